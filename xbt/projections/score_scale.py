"""Scores on the old scale: a threshold that was chosen for the old model keeps its meaning.

Applications cut results at a score ("show what is above 0.28"), and the scores of another query, of a mixture
or of a cascade lie elsewhere. A :class:`ScoreScale` is a strictly increasing map T of the new scores, so no
rank changes. It is fitted to keep *precision*: with P_old(t) the share of true matches among all results that
the old model scores at least t, and P_new the same for the new scores,

    T(s) = P_old⁻¹(P_new(s)).

Both precisions are made monotone by isotonic regression of the matches on the scores (Zadrozny & Elkan, KDD
2002). The change of precision that is left is measured on held-out queries, as :attr:`ScoreScale.checks`.

Without known matches, T keeps the number of results above every threshold instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from torch import Tensor

from xbt.errors import ConfigError, DataError

LEVELS = (0.5, 0.8, 0.95)
"""Precisions at whose old thresholds the error of a scale is measured."""

_KNOTS = 256
_DEPTH = 50
"""Scores per true match that are looked at, best first; below them precision is next to nothing."""
_TIE = 1e-7
"""Weight of the rank among scores of the same precision."""
_MIN_RESULTS = 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ThresholdCheck:
    """Precision at one old threshold, before and after, on queries that the scale was not fitted to.

    Attributes:
        level: Precision that the threshold was chosen for.
        threshold: Lowest old score at which old/old still has that precision.
        old_precision: Precision of old/old there.
        new_precision: Precision of the new scores on the old scale.
        unscaled_precision: Precision of the new scores as they are; NaN if none reaches the threshold.
        old_results: Results of old/old at or above the threshold, over all queries.
        new_results: Results of the new scores on the old scale.
    """

    level: float
    threshold: float
    old_precision: float
    new_precision: float
    unscaled_precision: float
    old_results: int
    new_results: int

    def __str__(self) -> str:
        return (
            f"at {self.threshold:.3f} ({100 * self.level:g} % precision): {100 * self.old_precision:.1f} → "
            f"{100 * self.new_precision:.1f} % of {self.new_results} results"
        )


@dataclass(frozen=True)
class ScoreScale:
    """Strictly increasing map of scores to the scale of old/old.

    Attributes:
        new_scores: Knots in the new scores, strictly increasing, at least two.
        old_scores: Values at the knots, strictly increasing.
        checks: Measured precision at old thresholds; empty without known matches.

    Raises:
        ConfigError: If the knots are not two strictly increasing finite sequences of one length.
    """

    new_scores: tuple[float, ...]
    old_scores: tuple[float, ...]
    checks: tuple[ThresholdCheck, ...] = ()

    def __post_init__(self) -> None:
        knots = np.array([self.new_scores, self.old_scores], dtype=np.float64, ndmin=2)
        increasing = knots.shape[1] >= 2 and np.isfinite(knots).all() and (np.diff(knots) > 0).all()
        if len(self.new_scores) != len(self.old_scores) or not increasing:
            raise ConfigError(
                "a score scale needs at least two knots with finite, strictly increasing scores on both sides"
            )

    def __call__(self, scores: NDArray[np.floating] | Tensor | float) -> Floats:
        """Map new scores to the old scale.

        Args:
            scores: Scores of any shape; ``-inf`` (no result) stays ``-inf``.

        Returns:
            float64 of the same shape. Beyond the knots the map goes on as a straight line.
        """
        return _line(_as_array(scores), np.array(self.new_scores), np.array(self.old_scores))

    def new_threshold(self, old_threshold: float) -> float:
        """Return the new score that corresponds to an old threshold: the inverse of the map."""
        return float(_line(np.array(old_threshold), np.array(self.old_scores), np.array(self.new_scores)))

    @property
    def error(self) -> float | None:
        """Largest change of precision over :attr:`checks`, from 0 to 1; ``None`` if nothing was measured."""
        changes = [abs(check.new_precision - check.old_precision) for check in self.checks]
        return max(changes, default=None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, from which :meth:`from_dict` makes an equal scale."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make a scale from the result of :meth:`to_dict`.

        Raises:
            ConfigError: If a key is missing or unknown, or its value cannot be used.
        """
        try:
            checks = tuple(ThresholdCheck(**check) for check in data["checks"])
            knots = [tuple(map(float, data[key])) for key in ("new_scores", "old_scores")]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"a score scale cannot be made from this: {error!r}") from error
        return cls(knots[0], knots[1], checks)


def fit_score_scale(
    old_scores: NDArray[np.floating] | Tensor,
    new_scores: NDArray[np.floating] | Tensor,
    matches: NDArray[np.bool_] | Tensor | None,
    *,
    groups: Sequence[int] | Tensor | None = None,
    folds: int = 5,
    seed: int = 0,
) -> ScoreScale:
    """Fit a scale and measure it by cross-validation.

    Args:
        old_scores: (n_queries, n_items) scores of old/old.
        new_scores: (n_queries, n_items) scores of what is deployed now, for the same queries and items.
        matches: (n_queries, n_items) booleans, true where an item is a right answer; ``None`` if unknown.
        groups: One number per query; queries with the same number stay in one fold.
        folds: Folds of the measurement.
        seed: Fixes the folds.

    Returns:
        The scale that is fitted to all queries; its checks come from fits to the other folds. A level that
        old/old does not reach with at least 20 results has no check.

    Raises:
        DataError: If shapes differ, a score is NaN or infinite, or nothing matches.
        ConfigError: If there are fewer groups than folds, or fewer than two folds.
    """
    old, new = _as_array(old_scores), _as_array(new_scores)
    known = None if matches is None else _as_array(matches).astype(bool)
    _require_alike(old, new, known)
    if known is None:
        return _fitted(old, new, None)
    owner = np.arange(len(old)) if groups is None else np.asarray(groups)
    if owner.shape != (len(old),):
        raise DataError(f"groups has the shape {owner.shape} for {len(old)} queries; give one per query")
    names = np.unique(owner)
    if not 2 <= folds <= len(names):
        raise ConfigError(f"folds is {folds}, but must lie between 2 and the {len(names)} groups of queries")
    fold_of = np.random.default_rng(seed).permutation(len(names))[np.searchsorted(names, owner)] % folds
    scaled = np.empty_like(new)
    for fold in range(folds):
        held_out = fold_of == fold
        if not known[~held_out].any():
            raise DataError("the queries outside of a fold have no match; bring more pairs")
        scaled[held_out] = _fitted(old[~held_out], new[~held_out], known[~held_out])(new[held_out])
    checks = _checks(old, new, scaled, known)
    scale = _fitted(old, new, known)
    return ScoreScale(scale.new_scores, scale.old_scores, checks)


def _as_array(values: Any) -> NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    return array if array.dtype == bool else array.astype(np.float64)


def _require_alike(old: Floats, new: Floats, matches: NDArray[np.bool_] | None) -> None:
    shapes = [old.shape, new.shape, *([] if matches is None else [matches.shape])]
    if old.ndim != 2 or len(set(shapes)) > 1:
        named = ", ".join(map(str, shapes))
        raise DataError(f"a scale needs scores and matches of one shape (n_queries, n_items), got {named}")
    for name, scores in (("old", old), ("new", new)):
        if not np.isfinite(scores).all():
            row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
            raise DataError(f"the {name} scores of query {row} are NaN or infinite; check its vectors")
        if scores.size < 2 or scores.min() == scores.max():
            raise DataError(f"all {scores.size} {name} scores are equal, so there is no scale to fit")
    if matches is not None and not matches.any():
        raise DataError("no item matches any query, so precision is 0 everywhere; give matches=None")


def _fitted(old: Floats, new: Floats, matches: NDArray[np.bool_] | None) -> ScoreScale:
    """A scale without checks: precision, or without matches the number of results, is kept."""
    if matches is None:
        ranks = np.unique(np.geomspace(1, old.size, _KNOTS).astype(np.int64)) - 1
        return _strict(_descending(new)[ranks], _descending(old)[ranks])
    old_scores, old_precision = _precision_curve(old, matches)
    new_scores, new_precision = _precision_curve(new, matches)
    ranks = np.unique(np.geomspace(1, len(new_scores), _KNOTS).astype(np.int64)) - 1
    values = np.interp(new_precision[ranks], old_precision[::-1], old_scores[::-1])
    return _strict(new_scores[ranks], values)


def _descending(scores: Floats) -> Floats:
    return np.sort(scores, axis=None)[::-1]


def _precision_curve(scores: Floats, matches: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Scores, best first, and the precision of all results down to each, strictly decreasing."""
    order = np.argsort(-scores, axis=None, kind="stable")
    order = order[: max(2, _DEPTH * int(matches.sum()))]
    rate = isotonic_regression(matches.ravel()[order].astype(np.float64), increasing=False).x
    places = np.arange(1, len(order) + 1)
    precision = np.cumsum(rate) / places - _TIE * places / scores.size
    return scores.ravel()[order], precision


def _strict(new_scores: Floats, old_scores: Floats) -> ScoreScale:
    """A scale through knots in descending order; steps that are flat get a slope of almost nothing."""
    knots, first = np.unique(new_scores, return_index=True)
    values = np.minimum.accumulate(old_scores)[first]
    if len(knots) < 2:
        knots = np.array([knots[0] - 1, knots[0]])
        values = np.array([values[0] - 1, values[0]])
    least = 1e-6 * (knots - knots[0])
    return ScoreScale(tuple((knots).tolist()), tuple((np.maximum.accumulate(values) + least).tolist()))


def _line(scores: NDArray[Any], knots: Floats, values: Floats) -> Floats:
    """Interpolate, and go on beyond the knots with the mean slope of all of them."""
    slope = (values[-1] - values[0]) / (knots[-1] - knots[0])
    inside = np.interp(scores, knots, values)
    beyond = scores - np.clip(scores, knots[0], knots[-1])
    return np.asarray(inside + slope * beyond, dtype=np.float64)


def _checks(
    old: Floats, new: Floats, scaled: Floats, matches: NDArray[np.bool_]
) -> tuple[ThresholdCheck, ...]:
    order = np.argsort(-old, axis=None, kind="stable")
    precision = np.cumsum(matches.ravel()[order]) / np.arange(1, old.size + 1)
    checks = []
    for level in LEVELS:
        reached = np.flatnonzero(precision >= level)
        if len(reached) == 0 or reached[-1] + 1 < _MIN_RESULTS:
            continue
        threshold = old.ravel()[order[reached[-1]]]
        kept = [scores >= threshold for scores in (old, scaled, new)]
        before, after, unscaled = (float(matches[each].mean()) if each.any() else math.nan for each in kept)
        counts = int(kept[0].sum()), int(kept[1].sum())
        checks.append(ThresholdCheck(level, float(threshold), before, after, unscaled, *counts))
    return tuple(checks)
