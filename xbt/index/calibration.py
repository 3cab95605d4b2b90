"""Fitting a merge: both sides' scores on one scale, and the kind chosen on held-out queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError, DataError
from xbt.index.mixed import KINDS, AffineMerge, IsotonicMerge, Merge, RankMerge, RawMerge
from xbt.index.ranks import MixedScores
from xbt.vectors import Vectors

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NEWTON_STEPS = 50
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
        curves = [pool_adjacent_violators(side, relevant) for side in (scores.old, scores.new)]
        return IsotonicMerge(*(tuple(each.tolist()) for curve in curves for each in curve))
    (old_slope, old_offset), (new_slope, new_offset) = (
        logistic_fit(side, relevant) for side in (scores.old, scores.new)
    )
    # A slope of 0 means that the scores of a side are uninformative; its order is kept all the same.
    old_slope, new_slope = max(old_slope, _MIN_SPREAD), max(new_slope, _MIN_SPREAD)
    return AffineMerge(new_slope / old_slope, (new_offset - old_offset) / old_slope)


def logistic_fit(scores: NDArray[np.float32], relevant: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope a and offset b of P(relevant | s) = 1 / (1 + exp(−a s − b)), by maximum likelihood.

    Newton's method with halved steps, in float64, on standardised scores, with a penalty of 1e-6 on the slope
    that keeps it finite where the scores separate both classes. Both classes must be there.
    """
    values = scores.astype(np.float64).ravel()
    mean, spread = float(values.mean()), max(float(values.std()), _MIN_SPREAD)
    x, y = (values - mean) / spread, relevant.ravel().astype(np.float64)
    share = float(y.mean())
    theta = np.array([0.0, np.log(share / (1 - share))])
    penalty = 1e-6

    def loss(at: NDArray[np.float64]) -> float:
        logits = at[0] * x + at[1]
        return float((np.logaddexp(0, logits) - y * logits).mean() + penalty * at[0] ** 2 / 2)

    best = loss(theta)
    for _ in range(_NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-np.clip(theta[0] * x + theta[1], -500, 500)))
        error, weight = chance - y, chance * (1 - chance)
        gradient = np.array([(error * x).mean() + penalty * theta[0], error.mean()])
        curvature = np.array([[(weight * x * x).mean() + penalty, (weight * x).mean()], [0, weight.mean()]])
        curvature[1, 0] = curvature[0, 1]
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        while (there := loss(theta - step)) > best and float(np.abs(step).max()) > 1e-10:
            step = step / 2
        if not there < best - 1e-13:
            break
        theta, best = theta - step, there
    slope = float(theta[0]) / spread
    return slope, float(theta[1]) - slope * mean


def pool_adjacent_violators(
    scores: NDArray[np.float32], relevant: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The non-decreasing curve of least squares through 0/1 answers, by pooling adjacent violators.

    Ayer et al., "An empirical distribution function for sampling with incomplete information", 1955. Equal
    scores are one point. The curve is constant over each pool; its knots are the pools' first and last
    scores.

    Returns:
        Knots, ascending, and the curve's values there.
    """
    points, place = np.unique(scores.ravel(), return_inverse=True)
    sums = np.bincount(place.ravel(), weights=relevant.ravel().astype(np.float64))
    counts = np.bincount(place.ravel()).astype(np.float64)
    # A point lower than the one before it is pooled with it whatever follows: most are, before the loop.
    means = sums / counts
    opens = np.concatenate([[True], means[1:] > means[:-1]])
    firsts = np.flatnonzero(opens)
    stack: list[tuple[float, float, int]] = []
    for total, count, first in zip(
        np.add.reduceat(sums, firsts), np.add.reduceat(counts, firsts), firsts.tolist(), strict=True
    ):
        pool = (float(total), float(count), first)
        while stack and stack[-1][0] * pool[1] >= pool[0] * stack[-1][1]:
            before = stack.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2])
        stack.append(pool)
    starts = np.array([pool[2] for pool in stack])
    ends = np.concatenate([starts[1:], [len(points)]]) - 1
    values = np.array([pool[0] / pool[1] for pool in stack])
    both = np.stack([starts, ends], axis=1).ravel()
    keep = np.concatenate([[True], both[1:] != both[:-1]])
    return points[both[keep]].astype(np.float64), np.repeat(values, 2)[keep]


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
