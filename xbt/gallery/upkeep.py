"""Keeping what a part is searched with up to date: the rows in memory, and an index."""

from __future__ import annotations

import warnings

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


class Upkeep:
    """The rows that are compared one by one, and the index of all others, if there is one.

    Without an index all rows are compared. An index is made once there are rows enough to train it, and made
    anew when a quarter of its rows have come since, or half of them are masked.

    Args:
        dim: Dimension of the vectors.
        plan: Which index.
        cache: Where it is kept, if it is.
    """

    def __init__(self, dim: int, plan: IndexPlan, cache: IndexCache | None) -> None:
        self._dim, self._plan, self._cache = dim, plan, cache
        self._exact, self._loaded = ExactRows(dim), 0
        self._index: ApproximateIndex | None = None

    def refreshed(
        self, gather: Gather, masked: NDArray[np.bool_], segments: list[str]
    ) -> tuple[ExactRows, ApproximateIndex | None]:
        """What rows as they are now are searched with; both are immutable.

        Args:
            gather: Gives rows' vectors.
            masked: (n,) bool, of all rows.
            segments: Names of the segments they are in.

        Raises:
            StoreError: If rows cannot be read, or an index is to be mapped and there is none.
        """
        if not self._plan.exact:
            self._refresh_index(gather, masked, segments)
        # A block at a time, which then is not copied.
        step = max(1, BLOCK_NUMBERS // self._dim)
        rows = np.arange(self._loaded, len(masked))
        rows = rows[~masked[rows]]
        for start in range(0, len(rows), step):
            numbers = rows[start : start + step]
            self._exact = self._exact.grown(gather(numbers), numbers)
        self._exact, self._loaded = self._exact.masked_by(masked), len(masked)
        return self._exact, self._index

    def _refresh_index(self, gather: Gather, masked: NDArray[np.bool_], segments: list[str]) -> None:
        if not self._is_outdated(masked):
            return
        if self._cache is not None:
            self._adopt(self._cache.load(segments, len(masked)))
        if not self._is_outdated(masked):
            return
        if self._cache is not None and self._cache.mmap and self._cache.read_only:
            if self._index is None:
                raise StoreError(
                    f"the part {self._cache.part!r} has no index under {self._cache.folder} to be mapped; "
                    "open the gallery for writing and call prepare() once"
                )
            return
        made = train(self._plan, self._dim, np.flatnonzero(~masked), len(masked), gather)
        self._adopt(self._kept(made, segments, len(masked)))

    def _is_outdated(self, masked: NDArray[np.bool_]) -> bool:
        if self._index is None:
            return int((~masked).sum()) >= self._plan.fewest_rows(self._dim)
        tail, indexed = len(masked) - self._index.upto, len(self._index.rows)
        return tail > max(LEAST_TAIL, indexed // 4) or 2 * int(masked[self._index.rows].sum()) > indexed

    def _adopt(self, index: ApproximateIndex | None) -> None:
        if index is not None:
            self._index = index
            self._exact, self._loaded = ExactRows(self._dim), index.upto

    def _kept(self, made: ApproximateIndex, segments: list[str], count: int) -> ApproximateIndex:
        """Writes a new index down, and maps it if that is wanted."""
        if self._cache is None or self._cache.read_only:
            return made
        try:
            self._cache.save(made, segments)
        except StoreError as error:
            warnings.warn(f"the index is not kept on disk: {error}", stacklevel=2)
            return made
        return (self._cache.load(segments, count) if self._cache.mmap else None) or made
