"""``rejected.jsonl`` and ``notes.jsonl``: what became of every item that was not simply embedded.

Trying again what a job rejected: images may have been unreadable for a while.

How much a job may reject before it stops: a source that fails as a whole is not an image that fails.
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
from xbt.store import EmbeddingStore, ShardRecord
from xbt.store.layout import MANIFEST, read_record

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


RETRIED = "retried"
"""Folder within a job's directory in which the items are tried again, by a job like any other."""


class ChosenEntries(SourceShard):
    """Some entries of a list."""

    def __init__(self, part: SourceShard, places: Sequence[int]) -> None:
        """Keeps the list and the places of the chosen entries, which ascend."""
        self.name, self.columns, self.length = part.name, part.columns, len(places)
        self._part, self._places = part, places

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Reads the chosen entries ``start`` to ``stop`` undecoded."""
        for place in self._places[start:stop]:
            yield from self._part.read(place, place + 1)

    def digest(self) -> str:
        """SHA-256 of the list's digest and the places."""
        return hashlib.sha256(json.dumps([self._part.digest(), list(self._places)]).encode()).hexdigest()


def refuse_streams(source: ItemSource) -> None:
    """Refuses sources whose items can only be reached by reading all that comes before them.

    Raises:
        ConfigError: If this is one.
    """
    if source.length is None:
        raise ConfigError(
            f"--retry_rejected cannot be used with {source.name}: it is a stream, whose items are not found "
            "again by their ids; embed it again with --overwrite true"
        )


def still_rejected(path: Path, source: ItemSource) -> list[int]:
    """Finds out what of a finished store is to be tried again; the main process alone calls this.

    Args:
        path: The job's directory.
        source: What it embedded, a list.

    Returns:
        The places, in the list, of all entries that were rejected and are not in the store.
    """
    retried = path / RETRIED
    if (retried / MANIFEST).is_file():  # an earlier run was killed before it could take them over
        take_over(path)
    store, (part,) = EmbeddingStore.open(path), source.parts
    wanted = {name for _, note in store.extra() for name, _ in note.get("rejected", ())}
    for ids in _ids_by_shard(store):
        wanted.difference_update(ids)
    names = part.ids if isinstance(part, ListedImages) else (entry.id for entry in part.read())
    places = [place for place, name in enumerate(names) if name in wanted] if wanted else []
    job = retried / "job.json"
    digest = chosen(source, places).digest()
    if retried.is_dir() and not (job.is_file() and read_record(job).get("digest") == digest):
        shutil.rmtree(retried)  # the remains of one that was taken over
    return places


def chosen(source: ItemSource, places: Sequence[int]) -> ItemSource:
    """The source with some of its entries only."""
    name = f"what was rejected of {source.name}"
    return ItemSource(name, source.modality, [ChosenEntries(source.parts[0], places)])


def take_over(path: Path) -> int:
    """Appends what could be embedded at the second try, and brings the lists up to date.

    The main process alone calls this. Killed at any moment, it may be called again.

    Args:
        path: The job's directory.

    Returns:
        How many items could not be embedded this time either.

    Raises:
        StoreError: If there is no room.
    """
    retried = path / RETRIED
    found, store = EmbeddingStore.open(retried), EmbeddingStore.open(path)
    there = set(found.ids)
    there.intersection_update(name for ids in _ids_by_shard(store) for name in ids)
    start = 0
    for shard, ids in zip(found.shards, _ids_by_shard(found), strict=True):
        stop = start + shard.count
        if ids and ids[0] not in there:  # a shard is appended whole or not at all
            store.append(found.read(start, stop), ids, found.metadata(start=start, stop=stop), found.space)
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
    unknown = dict.fromkeys(_lines(new))
    for line in _lines(old):
        unknown.pop(line, None)
        yield line
    yield from unknown


_LEAST = 100  # items from which on a share means something


@dataclass
class RejectionLimit:
    """Counts entries, and stops the job when too large a share of them was rejected.

    Attributes:
        share: The share that may be rejected; ``None`` is no limit.
        streams: Whether the source is made of streams, whose items cannot be tried again.
        entries: Entries so far.
        rejected: Those that were rejected.
    """

    share: float | None
    streams: bool
    entries: int = 0
    rejected: int = 0

    def add(self, entries: int, rejected: Sequence[tuple[str, str]]) -> None:
        """Counts some entries, of which these (id, reason) were rejected.

        Raises:
            DataError: If that is too much.
        """
        self.entries += entries
        self.rejected += len(rejected)
        if rejected:
            self.require(f"the last is {rejected[-1][0]}: {rejected[-1][1]}")

    def require(self, why: str) -> None:
        """Compares what was counted with the limit.

        Args:
            why: What is known of the reasons.

        Raises:
            DataError: If too large a share of at least 100 entries was rejected.
        """
        if self.share is None or self.entries < _LEAST or self.rejected <= self.share * self.entries:
            return
        again = (
            "start afresh with --overwrite true" if self.streams else "continue with --retry_rejected true"
        )
        raise DataError(
            f"{self.rejected} of {self.entries} items were rejected ({why}), more than the share "
            f"{self.share:g} of --max_rejected; fix the source and {again}, or raise --max_rejected"
        )
