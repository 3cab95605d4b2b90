"""A part as it was at one moment, which any number of threads may search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xbt.gallery.approximate import ApproximateIndex
from xbt.gallery.exact import ExactRows
from xbt.gallery.segments import Segment
from xbt.gallery.settling import NOBODY, SPARE, settle
from xbt.space import EmbeddingSpace

ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class PartView:
    """Everything a search needs, and nothing that changes.

    Attributes:
        name: The part's name.
        space: The space of its vectors, if it is known.
        dim: Their dimension.
        ids: By row number; it may have got longer since.
        masked: (n,) bool: rows that are not to be found.
        count: Items that are searched.
        exact: The rows that are compared one by one: all, or those that the index does not have. ``None``
            if all are read where they stand, a block at a time, since an index is wanted and there is none.
        index: What proposes others, if there is one.
        segments: Where vectors stand.
        due: Whether an index is to be made.
        keep: Kept alive for as long as this is: the right to the files of a generation.
    """

    name: str
    space: EmbeddingSpace | None
    dim: int
    ids: list[str]
    masked: NDArray[np.bool_]
    count: int
    exact: ExactRows | None
    index: ApproximateIndex | None
    segments: tuple[Segment, ...]
    due: bool = False
    keep: Any = None

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], list[list[str]]]:
        """The k best items of every query.

        Without an index, scores and order are exact. An index proposes k and a few candidates, whose scores
        are then computed from the stored vectors, so that scores are always true inner products; a query for
        which it finds fewer than k is searched exactly.

        Args:
            queries: (n, dim), checked.
            k: From 0 to :attr:`count`.

        Returns:
            (n, k) scores, descending, and the items' ids.

        Raises:
            StoreError: If a segment that has to be read is damaged or gone.
        """
        if k == 0:
            return np.zeros((len(queries), 0), np.float32), [[] for _ in queries]
        if self.exact is None:
            scores, rows = self._scan(queries, k)
        elif self.index is None:
            scores, rows = self.exact.search(queries, k)
        else:
            scores, rows = self._search(self.exact, self.index, queries, k)
        names = self.ids
        return scores, [[names[row] for row in found] for found in rows.tolist()]

    def _search(
        self, exact: ExactRows, index: ApproximateIndex, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        wanted = index.proposals * k + SPARE
        proposed = index.propose(queries, wanted, self.masked)
        _, recent = exact.candidates(queries, min(k + SPARE, exact.count))
        candidates = np.concatenate([proposed, recent], axis=1)
        short = (candidates != NOBODY).sum(axis=1) < k
        missing = max(0, k - candidates.shape[1])
        candidates = np.pad(candidates, ((0, 0), (0, missing)), constant_values=NOBODY)
        scores, rows = settle(queries, candidates, k, self.gather)
        if short.any():
            scores[short], rows[short] = self._scan(queries[short], k)
        return scores, rows

    def _scan(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Exact search over the stored rows, part by part; it takes the memory of one of them."""
        best_scores, best = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        rows = np.flatnonzero(~self.masked)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            numbers = rows[start : start + ROWS_AT_ONCE]
            some = ExactRows(self.dim).grown(self.gather(numbers), numbers)
            found = some.search(queries, min(k, some.count))
            scores = np.concatenate([best_scores, found[0]], axis=1)
            both = np.concatenate([best, found[1]], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            best_scores, best = (np.take_along_axis(each, order, axis=1) for each in (scores, both))
        return best_scores, best

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors by row number."""
        return vectors_of(self.segments, self.dim, rows)


def vectors_of(segments: Sequence[Segment], dim: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Vectors of rows that are numbered over several segments.

    Args:
        segments: In order.
        dim: Dimension of the vectors.
        rows: (n,) row numbers.

    Returns:
        (n, dim) float32, in the order asked for; it must not be written to.
    """
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        parts, start = [], 0
        for segment in segments:
            stop = start + len(segment)
            low, high = max(int(rows[0]), start), min(int(rows[-1]) + 1, stop)
            parts += [segment.slice(low - start, high - start)] if low < high else []
            start = stop
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
    if len(segments) == 1:
        return segments[0].vectors(rows)
    vectors = np.empty((len(rows), dim), np.float32)
    start = 0
    for segment in segments:
        own = np.flatnonzero((rows >= start) & (rows < start + len(segment)))
        if len(own):
            vectors[own] = segment.vectors(rows[own] - start)
        start += len(segment)
    return vectors
