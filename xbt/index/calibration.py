"""Exact ranks in an index under backfill, and the merge that ranks best on held-out queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit
from torch import Tensor

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation import best_positive_ranks
from xbt.evaluation.retrieval import (
    Positives,
    check_positives,
    count_before_best,
    distinct_rows,
    require_same_counts,
)
from xbt.index.mixed import (
    KINDS,
    AffineMerge,
    IsotonicMerge,
    Merge,
    RankMerge,
    RawMerge,
    Side,
    relative_places,
)
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
    require_same_counts(old_queries, new_queries, old_gallery, new_gallery)
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
        require_same_counts(old_queries, new_queries, old_gallery, new_gallery)
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


FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
_MIN_SPREAD = 1e-9


def fit_merge(
    old_queries: Vectors,
    new_queries: Vectors,
    old_gallery: Vectors,
    new_gallery: Vectors,
    positives: Sequence[Sequence[int]],
    *,
    kinds: Sequence[str] = ("affine", "isotonic", "rank", "raw"),
    groups: Tensor | None = None,
    fractions: Sequence[float] = FRACTIONS,
    ks: Sequence[int] = (1, 5, 10),
    folds: int = 4,
    seed: int = 0,
) -> Merge:
    """Fit every kind of merge to a sample of pairs and keep the one with the best recall.

    Each kind is fitted on all folds of the queries but one and measured on that one, at several fractions
    backfilled, each drawn at random. The kind with the best mean recall is fitted again to all.
    Ties go to the kind named first.

    Args:
        old_queries: (n, old_dim) queries of the sample in the old space.
        new_queries: (n, new_dim) the same in the new space.
        old_gallery: (m, old_dim) items of the sample under the old model.
        new_gallery: (m, new_dim) the same under the new model.
        positives: For every query the items that answer it.
        kinds: Which kinds to try; a single one is fitted without being compared.
        groups: (n,) integers; queries with the same one fall into one fold. ``None``: by first positive.
        fractions: Fractions backfilled at which recall is measured.
        ks: Cut-offs, over which it is averaged.
        folds: Number of folds, at least 2.
        seed: Fixes folds and what is backfilled.

    Returns:
        The merge.

    Raises:
        ConfigError: If a kind is not known, or there are none, or folds or fractions are out of range.
        DataError: If the sample cannot be used, or has fewer groups than folds.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ConfigError(f"kinds of merge are {', '.join(KINDS)}; got {list(kinds)}")
    scores = MixedScores(old_queries, new_queries, old_gallery, new_gallery, positives)
    if len(kinds) == 1:
        return fit_kind(kinds[0], scores)
    recall = compare_merges(scores, kinds, groups, fractions, ks, folds, seed)
    return fit_kind(max(kinds, key=lambda kind: recall[kind]), scores)


def compare_merges(
    scores: MixedScores,
    kinds: Sequence[str] = ("affine", "isotonic", "rank", "raw"),
    groups: Tensor | None = None,
    fractions: Sequence[float] = FRACTIONS,
    ks: Sequence[int] = (1, 5, 10),
    folds: int = 4,
    seed: int = 0,
) -> Mapping[str, float]:
    """Cross-fitted mean recall of every kind; see :func:`fit_merge`, whose errors these are."""
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise ConfigError(f"fractions are {list(fractions)}, but must lie between 0 and 1, such as 0.5")
    n_items = scores.old.shape[1]
    rng = np.random.default_rng(seed)
    masks = [np.less(rng.random(n_items), fraction) for fraction in fractions]
    recall = dict.fromkeys(kinds, 0.0)
    for fitted, held_out in _folds(scores, groups, folds, seed):
        train, test = scores.subset(fitted), scores.subset(held_out)
        for kind in kinds:
            merge = fit_kind(kind, train)
            hits = [float((test.ranks(mask, merge) < k).sum()) for mask in masks for k in ks]
            recall[kind] += sum(hits) / (len(hits) * len(scores))
    return recall


def fit_kind(kind: str, scores: MixedScores) -> Merge:
    """Fit one kind of merge to all pairs of a sample's queries and items.

    ``"affine"`` compares the log-odds of relevance a s + b that a logistic regression gives each side
    (Platt, "Probabilistic outputs for support vector machines", 1999); ``"isotonic"`` the probabilities of a
    monotone one (Zadrozny & Elkan, "Transforming classifier scores into accurate multiclass probability
    estimates", KDD 2002).
    """
    if kind not in KINDS:
        raise ConfigError(f"a merge of kind {kind!r} is not known; there is {', '.join(KINDS)}")
    if kind in ("raw", "rank"):
        return RawMerge() if kind == "raw" else RankMerge()
    relevant = scores.relevant()
    if relevant.all():
        raise DataError("every item answers every query, so there is nothing to distinguish; give a sample "
                        "with wrong answers")  # fmt: skip
    if kind == "isotonic":
        curves = [isotonic_curve(side, relevant) for side in (scores.old, scores.new)]
        return IsotonicMerge(*(tuple(each.tolist()) for curve in curves for each in curve))
    (old_slope, old_offset), (new_slope, new_offset) = (
        logistic_fit(side, relevant) for side in (scores.old, scores.new)
    )
    # A slope of 0 means that the scores of a side are uninformative; its order is kept all the same.
    old_slope, new_slope = max(old_slope, _MIN_SPREAD), max(new_slope, _MIN_SPREAD)
    return AffineMerge(new_slope / old_slope, (new_offset - old_offset) / old_slope)


def logistic_fit(scores: NDArray[np.float32], relevant: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope a and offset b of P(relevant | s) = 1 / (1 + exp(−a s − b)), by maximum likelihood.

    Fitted in float64 on standardised scores, with a penalty of 1e-6 on the slope that keeps it finite where
    the scores separate both classes. Both classes must be there.
    """
    values = scores.astype(np.float64).ravel()
    mean, spread = float(values.mean()), max(float(values.std()), _MIN_SPREAD)
    x, y, penalty = (values - mean) / spread, relevant.ravel().astype(np.float64), 1e-6

    def loss(theta: NDArray[np.float64]) -> tuple[float, list[float]]:
        logits = theta[0] * x + theta[1]
        error = expit(logits) - y
        value = (np.logaddexp(0, logits) - y * logits).mean() + penalty * theta[0] ** 2 / 2
        return value, [(error * x).mean() + penalty * theta[0], error.mean()]

    start = [0.0, logit(y.mean())]
    theta = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-10}).x
    slope = float(theta[0]) / spread
    return slope, float(theta[1]) - slope * mean


def isotonic_curve(
    scores: NDArray[np.float32], relevant: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The non-decreasing curve of least squares through 0/1 answers; equal scores are one point.

    Returns:
        Knots, ascending: the first and last scores of each constant stretch. And the curve's values there.
    """
    points, place = np.unique(scores.ravel(), return_inverse=True)
    counts = np.bincount(place.ravel()).astype(np.float64)
    means = np.bincount(place.ravel(), weights=relevant.ravel().astype(np.float64)) / counts
    fit = isotonic_regression(means, weights=counts)
    ends = np.unique([fit.blocks[:-1], fit.blocks[1:] - 1])
    return points[ends].astype(np.float64), fit.x[ends]


def _folds(
    scores: MixedScores, groups: Tensor | None, folds: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Queries to fit on and queries to measure on; those of a group stay together."""
    owner = scores.positives.rows[scores.positives.starts[:-1]] if groups is None else groups.numpy()
    if len(owner) != len(scores):
        raise DataError(f"there are {len(owner)} groups for {len(scores)} queries; give one per query")
    names, place = np.unique(owner, return_inverse=True)
    if folds < 2:
        raise ConfigError(f"folds is {folds}, but must be at least 2")
    if folds > len(names):
        raise DataError(
            f"the queries are about {len(names)} items, but comparing merges takes at least {folds}; "
            "give more pairs"
        )
    fold_of = np.random.default_rng(seed).permutation(len(names)) % folds
    for fold in range(folds):
        held = fold_of[place] == fold
        yield np.flatnonzero(~held), np.flatnonzero(held)
