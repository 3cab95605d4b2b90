"""Immutable snapshots of gallery parts, searched by any number of threads."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from xbt.errors import SpaceMismatchError, StoreError
from xbt.index.exact_search import MISSING, OVERFETCH, ExactRows, Gather, rescore
from xbt.index.faiss_index import ApproximateIndex
from xbt.index.protocol import Hits
from xbt.space import EmbeddingSpace

ROWS_AT_ONCE = 65_536
"""Rows read at once when all rows are read from disk."""


@dataclass(frozen=True)
class PartView:
    """Snapshot of a part. It is immutable, so any number of threads may search it.

    ``ids`` may have grown since; ``masked`` (n,) rows are not to be found. ``exact`` rows are compared one by
    one: all, or those that ``index`` does not have. It is ``None`` if all are read from disk, a block at a
    time, since an index is ``due`` and there is none. ``trusted`` spaces are known to be the part's; the set
    grows.
    """

    name: str
    space: EmbeddingSpace | None
    dim: int
    ids: list[str]
    masked: NDArray[np.bool_]
    count: int
    exact: ExactRows | None
    index: ApproximateIndex | None
    gather: Gather
    segments: tuple[str, ...]
    trusted: WeakSet[EmbeddingSpace]
    due: bool = False

    def require_space(self, space: EmbeddingSpace | None, what: str) -> None:
        """Refuse queries of another space; see :func:`require_space`."""
        if space is not None and space not in self.trusted:
            require_space(space, self.space, self.dim, self.trusted, what)

    def hits(self, queries: NDArray[np.float32], k: int) -> Hits:
        """As :meth:`search`, with ids."""
        scores, rows = self.search(queries, k)
        if rows.size and rows.min() < 0:
            raise StoreError(
                f"the part {self.name!r} has rows that cannot be scored; see verify() for its faults"
            )
        return Hits([[self.ids[row] for row in line] for line in rows.tolist()], scores)

    def without(self, ids: Set[str]) -> PartView:
        """Exclude some items. The resulting view compares all rows, read from disk."""
        masked = self.masked | np.array([item in ids for item in self.ids[: len(self.masked)]], np.bool_)
        count = int(np.count_nonzero(~masked))
        return replace(self, masked=masked, count=count, exact=None, index=None, due=False)

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the k best rows of every query: (n, k) scores, descending, and row numbers.

        Without an index, scores and order are exact. An index proposes k and a few candidates, whose scores
        are then computed from the stored vectors, so that scores are always true inner products; a query for
        which it finds fewer than k is searched exactly.
        """
        if k == 0:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        if self.exact is None:
            return self.scan(queries, k)
        if self.index is None:
            return self.exact.search(queries, k)
        wanted = self.index.proposals * k + OVERFETCH
        proposed = self.index.propose(queries, wanted, self.masked)
        _, recent = self.exact.candidates(queries, min(k + OVERFETCH, self.exact.count))
        padding = np.full((len(queries), max(0, k - proposed.shape[1] - recent.shape[1])), MISSING)
        candidates = np.concatenate([proposed, recent, padding], axis=1)
        short = (candidates != MISSING).sum(axis=1) < k
        scores, rows = rescore(queries, candidates, k, self.gather)
        if short.any():
            scores[short], rows[short] = self.scan(queries[short], k)
        return scores, rows

    def scan(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Search the stored rows exactly, block by block, with the memory of one block."""
        best_scores, best = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        rows = np.flatnonzero(~self.masked)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            numbers = rows[start : start + ROWS_AT_ONCE]
            some = ExactRows(self.dim).grown(self.gather(numbers), numbers)
            hits = some.search(queries, min(k, some.count))
            scores = np.concatenate([best_scores, hits[0]], axis=1)
            numbers_of_both = np.concatenate([best, hits[1]], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            best_scores = np.take_along_axis(scores, order, axis=1)
            best = np.take_along_axis(numbers_of_both, order, axis=1)
        return best_scores, best


class MovedRows:
    """Search structures for the rows of a part that have moved to the next one, extended as rows move.

    Rows that have moved since the last call make a group. Small groups are joined, so that a row is read a
    logarithmic number of times.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[NDArray[np.int64], ExactRows]] = []

    def views(self, base: PartView, moved: NDArray[np.bool_]) -> list[PartView]:
        """Build views of all (n,) moved rows that are not removed; ``base`` is a view of the part."""
        fresh = moved.copy()
        for rows, _ in self._groups:
            fresh[rows] = False
        group = np.flatnonzero(fresh)
        while self._groups and len(group) and len(self._groups[-1][0]) <= 8 * len(group):
            both = np.sort(np.concatenate([self._groups.pop()[0], group]))
            group = both[moved[both]]
        if len(group):
            self._groups.append((group, ExactRows(base.dim).grown(base.gather(group), group)))
        kept = [exact.masked_by(~moved) for _, exact in self._groups]
        return [
            replace(base, masked=~moved, count=exact.count, exact=exact, index=None, due=False)
            for exact in kept
            if exact.count
        ]


def require_space(
    space: EmbeddingSpace, own: EmbeddingSpace | None, dim: int, trusted: WeakSet[EmbeddingSpace], what: str
) -> None:
    """Refuse vectors of another space than a part has, or of another dimension if it declares none.

    A space that is verified is added to ``trusted``, so that it need not be compared again.
    """
    if own is not None:
        own.require(space, what)
        if own.compare(space).verified:
            trusted.add(space)
    elif space.dim != dim:
        raise SpaceMismatchError(
            f"{what} belongs to the space of {space}, but the gallery has dimension {dim}; "
            "use the model that made the gallery or project into its space"
        )


def search_views(views: Sequence[PartView], queries: NDArray[np.float32], k: int) -> Hits:
    """Search disjoint sets of rows of one part together; equal scores are in the order of the part.

    Fewer than k rows a query are returned where there are fewer.
    """
    results = [view.search(queries, min(k, view.count)) for view in views]
    scores, rows = (np.concatenate(tables, axis=1) for tables in zip(*results, strict=True))
    order = np.lexsort((rows, -scores))[:, :k]
    names, rows = views[0].ids, np.take_along_axis(rows, order, axis=1)
    ids = [[names[row] for row in line] for line in rows.tolist()]
    return Hits(ids, np.take_along_axis(scores, order, axis=1))
