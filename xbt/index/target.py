"""The index that is backfilled: opened, given its new vector, and written to beside other writers."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xbt.errors import BusyError, DataError
from xbt.index.gallery import Gallery
from xbt.index.mixed import next_vector_name
from xbt.index.protocol import VectorIndex
from xbt.space import EmbeddingSpace

LOCK_TIMEOUT = 60.0
"""Seconds to wait for another writer."""
ROWS_AT_ONCE = 65_536
"""Rows that are read at once."""


def open_gallery(path: str | Path, store: str | None) -> Gallery:
    """Open a gallery for writing; if there is none, make one from a store, which is not changed.

    Raises:
        StoreError: If there is no gallery and no store is given, or either is damaged.
    """
    if store is not None and not Gallery.exists(path):
        return Gallery.create(path, store=store)
    return Gallery.open(path)


def vector_names(index: VectorIndex) -> tuple[str, str]:
    """Names of the old vector and of the new one, which need not be there yet."""
    old, *rest = index.info().vectors
    return old, rest[0] if rest else next_vector_name(old)


def is_complete(index: VectorIndex, space: EmbeddingSpace) -> bool:
    """Check if an index has vectors of the new space alone: it was backfilled and compacted.

    Raises:
        SpaceMismatchError: If it has a second vector, of another space.
    """
    (_, old), *rest = index.info().vectors.items()
    if rest:
        name, new = rest[0]
        if new.space is not None:
            new.space.require(space, f"the encoder that the part {name!r} is to be filled with")
        return False
    return old.space is not None and old.dim == space.dim and old.space.same_as(space)


def begin(index: VectorIndex, name: str, space: EmbeddingSpace) -> None:
    """Declare the new vector, unless it is there.

    Raises:
        StoreError: If another process has been writing for long, or the disk is full.
    """
    with _exclusive(index):
        index.add_vector(name, space)


def fraction_backfilled(index: VectorIndex) -> float:
    """Share of the rows that have the second vector; 1 where the first one was dropped already."""
    info = index.info()
    names = list(info.vectors)
    return 1.0 if len(names) == 1 else info.vectors[names[1]].count / max(info.count, 1)


def read_vectors(index: VectorIndex, ids: Sequence[str], name: str) -> NDArray[np.float32]:
    """Read the vectors of many rows, some at a time: (n, dim) float32.

    Raises:
        DataError: If a row is not there or has no such vector.
    """
    starts = range(0, max(len(ids), 1), ROWS_AT_ONCE)
    return np.concatenate([index.fetch(ids[start : start + ROWS_AT_ONCE], name) for start in starts])


def pending(index: VectorIndex, new: str) -> list[str]:
    """Ids of the rows without the new vector, in the order of the index."""
    missing = new if new in index.info().vectors else None
    return [name for batch in index.scan(missing=missing, batch_size=ROWS_AT_ONCE) for name in batch.ids]


def fingerprints(index: VectorIndex, ids: Sequence[str], old: str) -> dict[str, int]:
    """Compute a number for each row that changes when its old vector does, as when the row is replaced.

    Args:
        index: The index.
        ids: Rows of the index.
        old: Name of the old vector.

    Raises:
        DataError: If a row is not there.
        StoreError: If vectors cannot be read.
    """
    hashes: dict[str, int] = {}
    for start in range(0, len(ids), ROWS_AT_ONCE):
        some = ids[start : start + ROWS_AT_ONCE]
        hashes.update(zip(some, (hash(row.tobytes()) for row in index.fetch(some, old)), strict=True))
    return hashes


def backfill_present(
    index: VectorIndex,
    vectors: NDArray[np.float32],
    ids: Sequence[str],
    names: tuple[str, str],
    before: Mapping[str, int],
) -> int:
    """Backfill rows, without those that somebody has removed or replaced in the meantime.

    Args:
        index: The index.
        vectors: (n, new_dim) new vectors of the rows.
        ids: The rows.
        names: Names of the old vector and of the new one.
        before: Result of :func:`fingerprints` before the first image was read. A row with another fingerprint
            by now was replaced: its new vector may be of an image that it no longer has.

    Returns:
        Number of rows that were backfilled.

    Raises:
        StoreError: If another process has been writing for long, or the disk is full.
    """
    if not len(ids):
        return 0
    old, new = names
    with _exclusive(index):
        now = _fingerprints_of_pending(index, ids, old, new)
        rows = [row for row, name in enumerate(ids) if name in now and now[name] == before.get(name)]
        if rows:
            index.upsert([ids[row] for row in rows], vectors[rows], new)
        return len(rows)


def _fingerprints_of_pending(index: VectorIndex, ids: Sequence[str], old: str, new: str) -> Mapping[str, int]:
    try:
        return fingerprints(index, ids, old)
    except DataError:  # some are gone, or were added with a new vector alone
        there: Collection[str] = set(pending(index, new))
        return fingerprints(index, [name for name in ids if name in there], old)


@contextmanager
def _exclusive(index: VectorIndex) -> Iterator[None]:
    """Hold the writer lock of a gallery, waiting for other writers: they hold it for moments only."""
    deadline, pause = time.monotonic() + LOCK_TIMEOUT, 0.05
    with ExitStack() as stack:
        while isinstance(index, Gallery):
            try:
                stack.enter_context(index.writing())
                break
            except BusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
        yield
