"""The new vector of an index: declared, filled in beside other writers, and complete.

Everything here works on any :class:`~xbt.index.VectorIndex`. A gallery on disk also has a lock, which its
writers share.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from numpy.typing import NDArray

from xbt.errors import BusyError, DataError
from xbt.index.gallery import Gallery
from xbt.index.mixed import next_vector_name
from xbt.index.protocol import VectorIndex
from xbt.space import EmbeddingSpace

LOCK_TIMEOUT = 60.0
"""Seconds to wait for another writer of a gallery."""
ROWS_AT_ONCE = 65_536
"""Rows that are read at once."""


def vector_names(index: VectorIndex) -> tuple[str, str]:
    """Names of the old vector and of the new one, which need not be there yet."""
    old, *rest = index.info().vectors
    return old, rest[0] if rest else next_vector_name(old)


def is_complete(index: VectorIndex, space: EmbeddingSpace) -> bool:
    """Check if an index has vectors of the new space alone: it was backfilled and compacted."""
    (_, old), *rest = index.info().vectors.items()
    if rest:
        name, new = rest[0]
        if new.space is not None:
            new.space.require(space, f"the encoder that the part {name!r} is to be filled with")
        return False
    return old.space is not None and old.dim == space.dim and old.space.same_as(space)


def begin(index: VectorIndex, name: str, space: EmbeddingSpace) -> None:
    """Declare the new vector, unless it is there."""
    with _exclusive(index):
        index.add_vector(name, space)


def read_vectors(index: VectorIndex, ids: Sequence[str], name: str) -> NDArray[np.float32]:
    """Read the vectors of many rows, some at a time: (n, dim) float32."""
    starts = range(0, max(len(ids), 1), ROWS_AT_ONCE)
    return np.concatenate([index.fetch(ids[start : start + ROWS_AT_ONCE], name) for start in starts])


def pending(index: VectorIndex, new: str) -> list[str]:
    """Ids of the rows without the new vector, in the order of the index."""
    missing = new if new in index.info().vectors else None
    return [name for batch in index.scan(missing=missing) for name in batch.ids]


def fingerprints_of(index: VectorIndex, ids: Sequence[str], old: str) -> dict[str, int]:
    """Compute a number for each row, which changes when its old vector does; refuses unknown rows."""
    return dict(zip(ids, (hash(row.tobytes()) for row in index.fetch(ids, old)), strict=True))


def fingerprints(index: VectorIndex, old: str, new: str) -> dict[str, int]:
    """Compute the fingerprint of each row without the new vector, in the order of the index."""
    return {
        name: hash(row.tobytes())
        for batch in index.scan(missing=new, vectors=old)
        for name, row in zip(batch.ids, batch.vectors if batch.vectors is not None else (), strict=True)
    }


def backfill_present(
    index: VectorIndex,
    vectors: NDArray[np.float32],
    ids: Sequence[str],
    names: tuple[str, str],
    before: Mapping[str, int],
) -> int:
    """Backfill rows with (n, new_dim) vectors, without those that somebody has removed or replaced meanwhile.

    ``before`` holds the :func:`fingerprints` before the first image was read. A row with another fingerprint
    by now was replaced: its new vector may be of an image that it no longer has.

    Returns:
        Number of rows that were backfilled.
    """
    if not len(ids):
        return 0
    old, new = names
    with _exclusive(index):
        try:
            now = fingerprints_of(index, ids, old)
        except DataError:  # some are gone, or were added with a new vector alone
            now = fingerprints(index, old, new)
        rows = [row for row, name in enumerate(ids) if name in now and now[name] == before.get(name)]
        if rows:
            index.upsert([ids[row] for row in rows], vectors[rows], new)
        return len(rows)


@contextmanager
def _exclusive(index: VectorIndex) -> Iterator[None]:
    """Hold the writer lock of a gallery, waiting for other writers: they hold it for moments only.

    A database orders its own writes.
    """
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
