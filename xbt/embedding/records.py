"""``rejected.jsonl`` and ``notes.jsonl``: what became of every item that was not simply embedded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xbt.store import ShardRecord
from xbt.store.files import write_lines

REJECTED, NOTES = "rejected.jsonl", "notes.jsonl"
_FIELDS = {REJECTED: ("rejected", "reason"), NOTES: ("notes", "note")}


def as_extra(rejected: Iterable[tuple[str, str]], notes: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """What a shard's record keeps of these (id, reason) and (id, note) pairs."""
    kept = {"rejected": [list(pair) for pair in rejected], "notes": [list(pair) for pair in notes]}
    return {name: pairs for name, pairs in kept.items() if pairs}


def note_repeated(extra: Mapping[str, Any], repeated: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A shard's note once rows were taken out whose ids, as (id, shard), an earlier shard has."""
    rejected = [
        [name, f"the id {name!r} is already that of an item of shard {home}"] for name, home in repeated
    ]
    return {**extra, "rejected": [*extra.get("rejected", ()), *rejected]}


def write_records(path: Path, committed: Mapping[str, ShardRecord]) -> tuple[int, int]:
    """Gathers the two files from the records of all shards.

    Args:
        path: The job's directory.
        committed: The records in the order of the shards; each is looked at once for either file.

    Returns:
        How many items were rejected and how many have a note.

    Raises:
        StoreError: If there is no room for them.
    """
    counts = []
    for name, (key, word) in _FIELDS.items():
        count = 0

        def lines(key: str = key, word: str = word) -> Iterator[str]:
            nonlocal count
            for record in committed.values():
                for item, text in record.extra.get(key, ()):
                    count += 1
                    yield json.dumps({"id": item, word: text}, ensure_ascii=False) + "\n"

        write_lines(path / name, lines())
        counts.append(count)
    return counts[0], counts[1]
