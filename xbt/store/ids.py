"""The ids of a store's rows: the user's own strings, each of them once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xbt.errors import StoreError
from xbt.store.layout import ShardRecord, metadata_file
from xbt.store.metadata import MetadataColumns, read_columns
from xbt.store.shards import ID

_HASHES_AT_ONCE = 2**27


def hashes_of(names: Iterable[str]) -> NDArray[np.int64]:
    """64-bit hashes of strings; they mean something within this process only."""
    return np.fromiter(map(hash, names), np.int64)


class Repetition(NamedTuple):
    """A string that has occurred before.

    Attributes:
        part: Which part it is in, and ...
        row: ... where in that part.
        name: The string.
        first: The part in which it occurred first.
    """

    part: int
    row: int
    name: str
    first: int


def repetitions(read: Callable[[], Iterable[Sequence[str]]], count: int) -> Iterator[Repetition]:
    """Finds strings that occur again, with 8 bytes a string (and at most 1 GiB) in memory.

    Args:
        read: Gives all strings, part by part; called once more for every 134 million of them, and once
            again when two hashes agree, to compare the strings themselves.
        count: How many strings there are.

    Yields:
        Every occurrence but the first, in order (within each 134 million).
    """
    passes = max(1, -(-count // _HASHES_AT_ONCE))
    for number in range(passes):
        parts = [np.zeros(0, np.int64)]
        for names in read():
            hashes = hashes_of(names)
            parts.append(hashes if passes == 1 else hashes[hashes % passes == number])
        hashes = np.concatenate(parts)
        del parts
        hashes.sort()
        repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        seen: dict[str, int] = {}
        for part, names in enumerate(read() if repeated else ()):
            for row, name in enumerate(names):
                if hash(name) not in repeated:
                    continue
                if name in seen:
                    yield Repetition(part, row, name, seen[name])
                else:
                    seen[name] = part


def first_repeated(read: Callable[[], Iterable[Sequence[str]]], count: int) -> str | None:
    """The first string that has occurred before, or ``None``; see :func:`repetitions`."""
    found = next(repetitions(read, count), None)
    return None if found is None else found.name


def repeated_ids(path: Path, records: Sequence[ShardRecord]) -> Iterator[Repetition]:
    """Ids that an earlier shard has; the parts are positions in ``records``."""
    return repetitions(lambda: shard_ids(path, records), sum(record.count for record in records))


def require_unique(path: Path, records: Sequence[ShardRecord]) -> None:
    """Refuses shards that share an id.

    Raises:
        StoreError: If an id occurs twice; the message names it and its shards.
    """
    found = next(repeated_ids(path, records), None)
    if found is not None:
        homes = f"{records[found.first].name} and {records[found.part].name}"
        raise StoreError(
            f"the id {found.name!r} is in the shards {homes} of {path}; ids must be unique over the store: "
            "give every row its own"
        )


def shard_ids(path: Path, records: Iterable[ShardRecord]) -> Iterator[list[str]]:
    """The ids of each shard."""
    for record in records:
        yield read_columns(path / metadata_file(record.name), [ID])[ID].to_pylist()


def choose_id_column(columns: MetadataColumns, counts: Sequence[int]) -> str | None:
    """The column of a clip-retrieval folder that can serve as ids: ``id``, else ``image_path``.

    Args:
        columns: The folder's metadata.
        counts: Rows of each shard.

    Returns:
        The column's name, or ``None`` if neither is there, without gaps and without repetition.
    """
    borders = list(pairwise(accumulate(counts, initial=0)))

    def read(name: str) -> Iterator[list[str | None]]:
        for start, stop in borders:
            yield columns.read_strings(name, start, stop)

    def is_usable(name: str) -> bool:
        if any(None in values for values in read(name)):
            return False
        return first_repeated(lambda: (list(map(str, values)) for values in read(name)), sum(counts)) is None

    there = columns.names()
    return next((name for name in (ID, "image_path") if name in there and is_usable(name)), None)


class KnownIds:
    """The ids a store has, as 8 bytes each, to refuse those that come again.

    Args:
        path: The store's directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sorted: dict[str, NDArray[np.int64]] = {}

    def refuse(self, ids: Sequence[str], shards: Sequence[ShardRecord]) -> None:
        """Refuses ids that one of the shards has.

        Raises:
            StoreError: If there is one; the message names the first.
        """
        new = hashes_of(ids)
        for shard in shards:
            known = self._sorted.get(shard.name)
            if known is None:
                known = np.sort(hashes_of(next(shard_ids(self._path, [shard]))))
                self._sorted[shard.name] = known
            if not len(known):
                continue
            places = np.searchsorted(known, new).clip(max=len(known) - 1)
            suspects = np.flatnonzero(known[places] == new)
            if len(suspects):
                there = set(next(shard_ids(self._path, [shard])))
                for row in suspects.tolist():
                    if ids[row] in there:
                        raise StoreError(
                            f"the id {ids[row]!r} is already in {self._path} (shard {shard.name!r}); ids "
                            "must be unique over the store: leave that row out or rename it"
                        )
