"""Keeping what a part is searched with up to date: the rows in memory, and an index."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xbt.errors import StoreError
from xbt.gallery.approximate import ApproximateIndex, train
from xbt.gallery.exact import BLOCK_NUMBERS, ExactRows
from xbt.gallery.index_cache import IndexCache
from xbt.gallery.index_plan import IndexPlan
from xbt.gallery.settling import Gather

LEAST_TAIL = 10_000
"""Rows that may have come since an approximate index was made, and are searched exactly beside it."""


@dataclass(frozen=True)
class Kept:
    """What rows are searched with.

    Attributes:
        exact: Those that are compared one by one; ``None`` if all are to be read where they stand, since
            there are rows enough for an index and none has been made yet.
        index: That of all others, if there is one.
        due: Whether an index is to be made.
    """

    exact: ExactRows | None
    index: ApproximateIndex | None
    due: bool


class Upkeep:
    """The rows that are compared one by one, and the index of all others, if there is one.

    Without an index all rows are compared. An index is made once there are rows enough to train it, and made
    anew when a quarter of its rows have come since, or half of them are masked. That takes long, so that it
    is apart: :meth:`made` may run while others search with what :meth:`refreshed` gives.

    Args:
        dim: Dimension of the vectors.
        plan: Which index.
        cache: Where it is kept, if it is.
    """

    def __init__(self, dim: int, plan: IndexPlan, cache: IndexCache | None) -> None:
        self._dim, self._plan, self._cache = dim, plan, cache
        self._exact, self._loaded = ExactRows(dim), 0
        self._index: ApproximateIndex | None = None

    def refreshed(self, gather: Gather, masked: NDArray[np.bool_], segments: list[str]) -> Kept:
        """What rows as they are now are searched with; an index is read from the cache, but never made.

        Args:
            gather: Gives rows' vectors.
            masked: (n,) bool, of all rows.
            segments: Names of the segments they are in.

        Raises:
            StoreError: If rows cannot be read.
        """
        outdated = not self._plan.exact and self._is_outdated(masked)
        if outdated and self._cache is not None:
            self.adopt(self._cache.load(segments, len(masked)))
            outdated = self._is_outdated(masked)
        if outdated and not self._is_worth_one(masked):
            self._index, self._exact, self._loaded, outdated = None, ExactRows(self._dim), 0, False
        due = outdated and not (self._cache is not None and self._cache.mmap and self._cache.read_only)
        if outdated and self._index is None:
            self._exact, self._loaded = ExactRows(self._dim), 0
            return Kept(None, None, due)
        # A block at a time, which then is not copied.
        step = max(1, BLOCK_NUMBERS // self._dim)
        rows = np.arange(self._loaded, len(masked))
        rows = rows[~masked[rows]]
        for start in range(0, len(rows), step):
            numbers = rows[start : start + step]
            self._exact = self._exact.grown(gather(numbers), numbers)
        self._exact, self._loaded = self._exact.masked_by(masked), len(masked)
        return Kept(self._exact, self._index, due)

    def made(self, gather: Gather, masked: NDArray[np.bool_], segments: list[str]) -> ApproximateIndex:
        """A new index of rows as they were at some moment, kept on disk if that is wanted.

        Nothing here is changed by it; :meth:`adopt` does that. The arguments are those of :meth:`refreshed`.

        Raises:
            StoreError: If rows cannot be read.
        """
        made = train(self._plan, self._dim, np.flatnonzero(~masked), len(masked), gather)
        return self._kept(made, segments, len(masked))

    def adopt(self, index: ApproximateIndex | None) -> None:
        """Searches with an index from now on; what has come since it was made is compared as well."""
        if index is not None:
            self._index = index
            self._exact, self._loaded = ExactRows(self._dim), index.upto

    def _is_worth_one(self, masked: NDArray[np.bool_]) -> bool:
        """Whether there are rows enough to train an index; a part that is backfilled has ever fewer."""
        return int((~masked).sum()) >= self._plan.fewest_rows(self._dim)

    def _is_outdated(self, masked: NDArray[np.bool_]) -> bool:
        if self._index is None:
            return self._is_worth_one(masked)
        tail, indexed = len(masked) - self._index.upto, len(self._index.rows)
        return tail > max(LEAST_TAIL, indexed // 4) or 2 * int(masked[self._index.rows].sum()) > indexed

    def _kept(self, made: ApproximateIndex, segments: list[str], count: int) -> ApproximateIndex:
        """Writes a new index down, and maps it if that is wanted."""
        if self._cache is None or self._cache.read_only:
            return made
        try:
            saved = self._cache.save(made, segments)
        except StoreError as error:
            warnings.warn(f"the index is not kept on disk: {error}", stacklevel=2)
            return made
        return (self._cache.load(segments, count) if saved and self._cache.mmap else None) or made
