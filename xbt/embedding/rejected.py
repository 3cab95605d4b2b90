"""Rejected items of an embedding job: their records, retrying them, and a limit on their share.

``rejected.jsonl`` lists the items that could not be embedded, and ``notes.jsonl`` those that were converted.
Items can be tried again, because an image may be unreadable only for a while. The limit stops a job when the
source as a whole fails.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xbt.data.items import Entry, ItemSource, ListedImages, SourceShard
from xbt.errors import ConfigError, DataError
from xbt.files import write_lines
from xbt.store.layout import MANIFEST, ShardRecord, read_record
from xbt.store.store import EmbeddingStore

REJECTED, NOTES = "rejected.jsonl", "notes.jsonl"
_FIELDS = {REJECTED: ("rejected", "reason"), NOTES: ("notes", "note")}
RETRIED = "retried"
"""Folder within a job's directory in which a second job tries the rejected items again."""
_MIN_ENTRIES = 100  # a share of fewer items says little


def as_extra(rejected: Iterable[tuple[str, str]], notes: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Convert (id, reason) and (id, note) pairs to the form of a shard's record; omit empty lists."""
    extra = {"rejected": [list(pair) for pair in rejected], "notes": [list(pair) for pair in notes]}
    return {name: pairs for name, pairs in extra.items() if pairs}


def note_repeated(extra: Mapping[str, Any], repeated: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Add removed rows to a shard's record: pairs of an id and the earlier shard that has it."""
    rejected = [
        [name, f"the id {name!r} is already that of an item of shard {shard}"] for name, shard in repeated
    ]
    return {**extra, "rejected": [*extra.get("rejected", ()), *rejected]}


def write_records(path: Path, committed: Mapping[str, ShardRecord]) -> tuple[int, int]:
    """Write the two files from the records of all shards; return the numbers of rejected items and notes."""
    for name, (key, word) in _FIELDS.items():
        pairs = ((item, text) for record in committed.values() for item, text in record.extra.get(key, ()))
        lines = (json.dumps({"id": item, word: text}, ensure_ascii=False) + "\n" for item, text in pairs)
        write_lines(path / name, lines)
    return sum(1 for _ in _lines(path / REJECTED)), sum(1 for _ in _lines(path / NOTES))


class SelectedEntries(SourceShard):
    """The entries of a list at some ascending positions."""

    def __init__(self, part: SourceShard, positions: Sequence[int]) -> None:
        self.name, self.columns, self.length = part.name, part.columns, len(positions)
        self._part, self._positions = part, positions

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Read the selected entries ``start`` to ``stop`` without decoding them."""
        for position in self._positions[start:stop]:
            yield from self._part.read(position, position + 1)

    def digest(self) -> str:
        """SHA-256 of the list's digest and the positions."""
        return hashlib.sha256(json.dumps([self._part.digest(), list(self._positions)]).encode()).hexdigest()


def refuse_streams(source: ItemSource) -> None:
    """Refuse streams, because their items have no random access."""
    if source.length is None:
        raise ConfigError(
            f"--retry_rejected cannot be used with {source.name}: it is a stream, whose items cannot be "
            "found by their ids; embed it again with --overwrite true"
        )


def still_rejected(path: Path, source: ItemSource) -> list[int]:
    """Positions in the embedded list of all entries that were rejected and are not in the finished store.

    Only the main process calls this.
    """
    retried = path / RETRIED
    if (retried / MANIFEST).is_file():  # an earlier run was killed before it merged the results
        merge_retried(path)
    store, (part,) = EmbeddingStore.open(path), source.parts
    wanted = {name for _, note in store.extra() for name, _ in note.get("rejected", ())}
    for ids in _ids_by_shard(store):
        wanted.difference_update(ids)
    names = part.ids if isinstance(part, ListedImages) else (entry.id for entry in part.read())
    positions = [position for position, name in enumerate(names) if name in wanted] if wanted else []
    job = retried / "job.json"
    digest = select_entries(source, positions).digest()
    if retried.is_dir() and not (job.is_file() and read_record(job).get("digest") == digest):
        shutil.rmtree(retried)  # left from an earlier retry
    return positions


def select_entries(source: ItemSource, positions: Sequence[int]) -> ItemSource:
    """Reduce a source to the entries at these positions."""
    name = f"the rejected items of {source.name}"
    return ItemSource(name, source.modality, [SelectedEntries(source.parts[0], positions)])


def merge_retried(path: Path) -> int:
    """Append the items that were embedded on retry to the store, and update both files.

    Only the main process calls this. If it is killed at any point, it can be called again. The result is the
    number of items that were rejected again.
    """
    retried = path / RETRIED
    new, store = EmbeddingStore.open(retried), EmbeddingStore.open(path)
    appended = set(new.ids)
    appended.intersection_update(name for ids in _ids_by_shard(store) for name in ids)
    start = 0
    for shard, ids in zip(new.shards, _ids_by_shard(new), strict=True):
        stop = start + shard.count
        if ids and ids[0] not in appended:  # a shard is appended completely or not at all
            store.append(new.read(start, stop), ids, new.metadata(start=start, stop=stop), new.space)
        start = stop
    write_lines(path / REJECTED, _lines(retried / REJECTED))
    write_lines(path / NOTES, _with_new_notes(path / NOTES, retried / NOTES))
    shutil.rmtree(retried)
    return sum(1 for _ in _lines(path / REJECTED))


def _ids_by_shard(store: EmbeddingStore) -> Iterator[list[str]]:
    start = 0
    for shard in store.shards:
        yield store.read_ids(start, start + shard.count)
        start += shard.count


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", newline="\n") as file:
            yield from file


def _with_new_notes(old: Path, new: Path) -> Iterator[str]:
    added = dict.fromkeys(_lines(new))
    for line in _lines(old):
        added.pop(line, None)
        yield line
    yield from added


@dataclass
class RejectionLimit:
    """Counter of entries that stops the job when more than a share of them was rejected."""

    share: float | None
    """``None`` for no limit."""
    streams: bool
    """Whether the source consists of streams, whose items cannot be tried again."""
    entries: int = 0
    rejected: int = 0

    def add(self, entries: int, rejected: Sequence[tuple[str, str]]) -> None:
        """Count entries; ``rejected`` lists (id, reason) of the rejected ones."""
        self.entries += entries
        self.rejected += len(rejected)
        if rejected:
            self.require(f"the last is {rejected[-1][0]}: {rejected[-1][1]}")

    def require(self, why: str) -> None:
        """Compare the counts with the limit; ``why`` is a hint at the reasons, for the message."""
        if self.share is None or self.entries < _MIN_ENTRIES or self.rejected <= self.share * self.entries:
            return
        next_step = (
            "start again with --overwrite true" if self.streams else "continue with --retry_rejected true"
        )
        raise DataError(
            f"{self.rejected} of {self.entries} items were rejected ({why}), more than the share "
            f"{self.share:g} of --max_rejected; fix the source and {next_step}, or raise --max_rejected"
        )
