"""Immutable snapshots of gallery parts, searched by any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xbt.errors import DataError, StoreError
from xbt.index.exact_search import MISSING, OVERFETCH, ExactRows, Gather, rescore
from xbt.index.faiss_index import ApproximateIndex
from xbt.index.protocol import Hits
from xbt.space import EmbeddingSpace

if TYPE_CHECKING:
    from xbt.index.parts import Parts

ROWS_AT_ONCE = 65_536
"""Rows read at once when all rows are read from disk."""


@dataclass(frozen=True)
class PartView:
    """Snapshot of a part. It is immutable, so any number of threads may search it.

    Attributes:
        name: Name of the part.
        space: Space of its vectors, if it is known.
        dim: Their dimension.
        ids: By row number; the list may have grown since.
        masked: (n,) bool: rows that are not to be found.
        count: Items that are searched.
        exact: Rows that are compared one by one: all, or those that the index does not have. ``None`` if all
            are read from disk, a block at a time, since an index is wanted and there is none.
        index: Proposes others, if there is one.
        gather: Reads vectors by row number.
        segments: Names of the segments.
        trusted: Spaces that are known to be the part's.
        due: Whether an index is to be made.
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
    trusted: Collection[EmbeddingSpace]
    due: bool = False

    def hits(self, queries: NDArray[np.float32], k: int) -> Hits:
        """As :meth:`search`, with ids.

        Raises:
            StoreError: Also if fewer than k rows are found, as where a file was altered.
        """
        scores, rows = self.search(queries, k)
        if rows.size and rows.min() < 0:
            raise StoreError(
                f"the part {self.name!r} has rows that cannot be scored; see verify() for its faults"
            )
        names = self.ids
        return Hits([[names[row] for row in found] for found in rows.tolist()], scores)

    def without(self, ids: Set[str]) -> PartView:
        """Exclude some items. The resulting view compares all rows, read from disk."""
        hidden = np.array([item in ids for item in self.ids[: len(self.masked)]], np.bool_)
        masked = self.masked | hidden
        count = len(masked) - int(np.count_nonzero(masked))
        return replace(self, masked=masked, count=count, exact=None, index=None, due=False)

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the k best rows of every query.

        Without an index, scores and order are exact. An index proposes k and a few candidates, whose scores
        are then computed from the stored vectors, so that scores are always true inner products; a query for
        which it finds fewer than k is searched exactly.

        Args:
            queries: (n, dim), checked.
            k: From 0 to :attr:`count`.

        Returns:
            (n, k) scores, descending, and row numbers.

        Raises:
            StoreError: If a segment that has to be read is damaged or gone.
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
        candidates = np.concatenate([proposed, recent], axis=1)
        short = (candidates != MISSING).sum(axis=1) < k
        padding = max(0, k - candidates.shape[1])
        candidates = np.pad(candidates, ((0, 0), (0, padding)), constant_values=MISSING)
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
            found = some.search(queries, min(k, some.count))
            scores = np.concatenate([best_scores, found[0]], axis=1)
            both = np.concatenate([best, found[1]], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            best_scores, best = (np.take_along_axis(each, order, axis=1) for each in (scores, both))
        return best_scores, best


class MovedRows:
    """Search structures for the rows of a part that have moved to the next one, extended as rows move.

    Rows that have moved since the last call make a group. Small groups are joined, so that a row is read a
    logarithmic number of times.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[NDArray[np.int64], ExactRows]] = []

    def views(self, base: PartView, moved: NDArray[np.bool_]) -> list[PartView]:
        """Build views of all moved rows.

        Args:
            base: A view of the part.
            moved: (n,) bool: rows that have moved and are not removed.

        Raises:
            StoreError: If a segment cannot be read.
        """
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


class Views:
    """Views of all parts of a gallery, made on demand and cached until something changes.

    An index is made by the thread that finds that one is due; others search without it meanwhile.

    Args:
        state: Lock under which the parts change.
        parts: Gives the parts.

    Attributes:
        made: The views, or ``None`` if something has changed since.
        indexing: Held while an index is made.
    """

    def __init__(self, state: Any, parts: Callable[[], Parts]) -> None:
        self._state, self._parts = state, parts
        self.made: tuple[PartView, ...] | None = None
        self.indexing = threading.Lock()

    def all(self, wait: bool = False) -> tuple[PartView, ...]:
        """Build views of all parts, and any due index unless another thread is making it."""
        views = self._current()
        if any(view.due for view in views) and self.indexing.acquire(blocking=wait):
            try:
                self._make_indexes()
            finally:
                self.indexing.release()
            views = self._current()
        return views

    def alone(self, part: str | None) -> PartView:
        """Build a view of the named part, or of the only part with items.

        Raises:
            DataError: If there is no such part, or items are in two parts.
        """
        views = self.all()
        if part is not None:
            name = self._parts().part(part).name
            return next(view for view in views if view.name == name)
        there = [view for view in views if view.count] or [views[0]]
        if len(there) > 1:
            raise DataError(
                f"the gallery is being backfilled: {views[0].count} items are in the part {views[0].name!r} "
                f"and {views[1].count} in {views[1].name!r}; use search_mixed(), or name one with part="
            )
        return there[0]

    def of_vectors(self, using: str, without: str | None) -> list[PartView]:
        """Build views of all vectors of a part, except items with a vector in ``without``.

        Raises:
            DataError: If there is no such part.
        """
        self.all()
        with self._state:
            known, views = self._parts(), self._current()
            part, other = known.part(using), None if without is None else known.part(without)
            view = views[[each.name for each in views].index(part.name)]
            if other is None:
                return [view] if part is known.newest else [view, *part.moved_views()]
            return [view.without(set(other.with_vector())) if other is not known.newest else view]

    def _make_indexes(self) -> None:
        with self._state:
            known = self._parts()
            due = [(part, view) for part, view in zip(known, self._current(), strict=True) if view.due]
        for part, view in due:
            index = part.made_index(view)
            with self._state:
                if self._parts() is known:  # and was not compacted in between
                    part.adopt(index)
                    self.made = None

    def _current(self) -> tuple[PartView, ...]:
        views = self.made
        if views is None:
            with self._state:
                if self.made is None:
                    self.made = tuple(part.view() for part in self._parts())
                views = self.made
        return views


def search_views(views: Sequence[PartView], queries: NDArray[np.float32], k: int) -> Hits:
    """Search disjoint sets of rows of one part together.

    Args:
        views: Of one part.
        queries: (n, dim), checked.
        k: Rows a query; fewer are returned where there are fewer.

    Returns:
        The best rows, equal scores in the order of the part.
    """
    found = [view.search(queries, min(k, view.count)) for view in views]
    scores, rows = (np.concatenate(each, axis=1) for each in zip(*found, strict=True))
    order = np.lexsort((rows, -scores))[:, :k]
    names, rows = views[0].ids, np.take_along_axis(rows, order, axis=1)
    ids = [[names[row] for row in line] for line in rows.tolist()]
    return Hits(ids, np.take_along_axis(scores, order, axis=1))
