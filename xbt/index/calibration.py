"""Fitting a merge: both sides' scores on one scale, and the kind chosen on held-out queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit
from torch import Tensor

from xbt.errors import ConfigError, DataError
from xbt.index.mixed import KINDS, AffineMerge, IsotonicMerge, Merge, RankMerge, RawMerge
from xbt.index.ranks import MixedScores
from xbt.vectors import Vectors

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
