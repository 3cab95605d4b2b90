"""Exact ranks in an index under backfill, by which its search is measured."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError, SpaceMismatchError
from xbt.evaluation import best_positive_ranks
from xbt.evaluation.retrieval import Positives, check_positives, count_before_best, distinct_rows
from xbt.index.mixed import Merge, Side, relative_places
from xbt.vectors import Vectors, as_vectors

QUERIES_AT_ONCE = 2**24
"""Scores of one side that :func:`mixed_ranks` holds at once."""


def mixed_ranks(
    old_queries: Vectors,
    new_queries: Vectors,
    old_gallery: Vectors,
    new_gallery: Vectors,
    positives: Sequence[Sequence[int]],
    backfilled: Tensor | NDArray[np.bool_],
    merge: Merge,
) -> Tensor:
    """Count, for every query, the wrong items that come at or before its best positive in a mixed index.

    The counterpart of :func:`xbt.evaluation.best_positive_ranks`, which it equals where nothing or everything
    is backfilled. A backfilled item is compared by its new vector with the new query, any other item by its
    old vector with the old query. Ties count against us.

    Args:
        old_queries: (n, old_dim) queries in the old space: of the old model, or projected new ones.
        new_queries: (n, new_dim) the same queries in the new space.
        old_gallery: (m, old_dim) old vectors of all items.
        new_gallery: (m, new_dim) new vectors of all items, ignored for those that are not backfilled.
        positives: For every query the items that answer it.
        backfilled: (m,) booleans.
        merge: How the scores of both sides are compared.

    Returns:
        (n,) int64 ranks from 0.

    Raises:
        DataError: If vectors or positives cannot be used, or the sides do not have the same queries or items.
        SpaceMismatchError: If queries and gallery of a side differ in dimension.
    """
    mask = _mask(backfilled, len(old_gallery))
    step = max(1, QUERIES_AT_ONCE // max(len(old_gallery), 1))
    _require_counts(old_queries, new_queries, old_gallery, new_gallery)
    if not mask.any():
        return best_positive_ranks(old_queries, old_gallery, positives)
    if mask.all():
        return best_positive_ranks(new_queries, new_gallery, positives)
    ranks = [
        MixedScores(
            old_queries[start : start + step],
            new_queries[start : start + step],
            old_gallery,
            new_gallery,
            positives[start : start + step],
        ).ranks(mask, merge)
        for start in range(0, max(len(old_queries), 1), step)
    ]
    return torch.cat(ranks)


class MixedScores:
    """The scores of some queries with all items under both models, for ranks at many states of backfilling.

    It holds 8 bytes per query and item, and 16 more for the scores of the last merge; :func:`mixed_ranks`
    takes the queries in pieces. Arguments and errors are those of :func:`mixed_ranks`.

    Attributes:
        old: (n, m) float32 scores under the old model.
        new: (n, m) under the new one.
        positives: The checked positives.
    """

    def __init__(
        self,
        old_queries: Vectors,
        new_queries: Vectors,
        old_gallery: Vectors,
        new_gallery: Vectors,
        positives: Sequence[Sequence[int]],
    ) -> None:
        _require_counts(old_queries, new_queries, old_gallery, new_gallery)
        self.old = _scores(old_queries, old_gallery, "old")
        self.new = _scores(new_queries, new_gallery, "new")
        self.positives: Positives = check_positives(positives, *self.old.shape)
        self._calibrated: tuple[Merge, NDArray[np.float64], NDArray[np.float64]] | None = None

    def __len__(self) -> int:
        return len(self.old)

    def subset(self, queries: NDArray[np.int64]) -> MixedScores:
        """The scores of some of the queries."""
        starts, rows = self.positives
        chosen = copy(self)
        chosen.old, chosen.new, chosen._calibrated = self.old[queries], self.new[queries], None
        lists = [rows[starts[query] : starts[query + 1]].tolist() for query in queries]
        chosen.positives = check_positives(lists, *chosen.old.shape)
        return chosen

    def relevant(self) -> NDArray[np.bool_]:
        """(n, m) booleans: whether the item answers the query."""
        starts, rows = self.positives
        answers = np.zeros(self.old.shape, dtype=bool)
        answers[np.repeat(np.arange(len(self)), np.diff(starts)), rows] = True
        return answers

    def calibrated(self, merge: Merge) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n, m) scores of both models on the merge's scale; those of the last merge are kept."""
        if self._calibrated is None or self._calibrated[0] != merge:
            self._calibrated = merge, merge.calibrate("old", self.old), merge.calibrate("new", self.new)
        return self._calibrated[1:]

    def ranks(self, backfilled: Tensor | NDArray[np.bool_], merge: Merge) -> Tensor:
        """(n,) int64 ranks; see :func:`mixed_ranks`."""
        mask = _mask(backfilled, self.old.shape[1])
        if merge.by_rank:
            return torch.from_numpy(count_before_best(*self._places(mask)))
        old, new = self.calibrated(merge)
        return torch.from_numpy(count_before_best(np.where(mask, new, old), self.positives))

    def _places(self, mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], Positives, NDArray[np.float64]]:
        """Negative places of all items with ties in their favour, the positives, and with ties against."""
        favoured, burdened = np.empty(self.old.shape), np.empty(self.old.shape)
        sides: tuple[tuple[Side, NDArray[np.float32], NDArray[np.bool_]], ...] = (
            ("old", self.old, ~mask),
            ("new", self.new, mask),
        )
        for side, scores, chosen in sides:
            columns = np.flatnonzero(chosen)
            for first, places in ((True, favoured), (False, burdened)):
                ranks = _ranks_within(scores[:, columns], first)
                places[:, columns] = -relative_places(side, ranks, len(columns))
        return favoured, self.positives, burdened


def _ranks_within(scores: NDArray[np.float32], first: bool) -> NDArray[np.int64]:
    """(n, m) rank of every item for its query, ties all at the first or all at the last of their places."""
    ranks = np.empty(scores.shape, dtype=np.int64)
    for line, place in zip(scores, ranks, strict=True):
        below = np.searchsorted(np.sort(line), line, "right" if first else "left")
        place[:] = len(line) - below - (0 if first else 1)
    return ranks


def _scores(queries: Vectors, gallery: Vectors, side: str) -> NDArray[np.float32]:
    left = as_vectors(queries, f"{side} queries").float().numpy()
    right = as_vectors(gallery, f"{side} gallery vectors").float().numpy()
    if left.shape[1] != right.shape[1]:
        raise SpaceMismatchError(
            f"the {side} queries have dimension {left.shape[1]} but the {side} gallery vectors have "
            f"{right.shape[1]}; project the queries into the space of that side"
        )
    # Equal items are scored once, so that they tie.
    distinct, column = distinct_rows(right)
    scores: NDArray[np.float32] = (left @ distinct.T)[:, column]
    return scores


def _mask(backfilled: Tensor | NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    mask = np.asarray(backfilled)
    if mask.dtype != np.bool_ or mask.shape != (count,):
        raise DataError(
            f"backfilled has the shape {mask.shape} and type {mask.dtype}; give one boolean per item, {count}"
        )
    return mask


def _require_counts(
    old_queries: Vectors, new_queries: Vectors, old_gallery: Vectors, new_gallery: Vectors
) -> None:
    for what, old, new in (("queries", old_queries, new_queries), ("items", old_gallery, new_gallery)):
        if len(old) != len(new):
            raise DataError(
                f"there are {len(old)} {what} in the old space and {len(new)} in the new one; "
                "give the same in both"
            )
