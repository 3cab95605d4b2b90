"""Whitened Procrustes: a rotation between whitened spaces, coloured again as the old one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xbt.errors import ConfigError, DataError
from xbt.projections.base import LinearProjection
from xbt.projections.closed_form import (
    Centring,
    cross_rounding,
    gather,
    linear_map,
    orthogonal_factor,
    prepare,
    square_rounding,
)
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import Source
from xbt.projections.statistics import PairStatistics, Term

_TERMS: tuple[Term, ...] = ("cross", "new_gram", "old_gram")
_SINGULAR = 1e-12


def fit_whitened_procrustes(
    new: Source,
    old: Source,
    *,
    pairs: PairVectors | None = None,
    pairs_weight: float | None = None,
    centring: Centring = "joint",
    shrinkage: float = 0.3,
) -> LinearProjection:
    """Whitens both sides, turns the new one onto the old one, and gives the result the old covariance.

    With Σ = (1 − γ) Σ̂ + γ (trace Σ̂ / dim) I the shrunk covariance of a side and C the one between both

        Σ_n^(−½) C Σ_o^(−½) = P Σ Qᵀ,      Wᵀ = Σ_n^(−½) P Qᵀ Σ_o^(½)

    (the whitening and de-whitening steps of Artetxe, Labaka & Agirre 2018, "Generalizing and Improving
    Bilingual Word Embedding Mappings with a Multi-Step Framework of Linear Transformations"). Any roots of
    both Σ give the same W (they differ by a rotation, which the solution takes along), so Cholesky factors
    serve. With ``shrinkage=1``, or covariances that are the identity already, it is the rotation of
    :func:`~xbt.projections.procrustes.fit_procrustes` times the ratio of both sides' root mean squares. Rows
    are used as they are given.

    Args:
        new: Vectors of the new model.
        old: Vectors of the old model, row by row for the same items.
        pairs: Image–text pairs whose images take part in the fit.
        pairs_weight: Their share ω in [0, 1); ``None`` is 0.33 with pairs.
        centring: As for :func:`~xbt.projections.procrustes.fit_procrustes`; with ``"none"`` second moments
            take the place of covariances.
        shrinkage: γ, above 0 up to 1.

    Returns:
        A projection, with offsets if it is centred.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If the vectors are empty, not paired, or hold NaN.
        SpaceMismatchError: If the pairs have other dimensions.
    """
    _check_shrinkage(shrinkage)
    texts, images, weight = gather(new, old, _TERMS, pairs, pairs_weight, centring)
    return whitened_procrustes_from(
        texts, images, pairs_weight=weight, centring=centring, shrinkage=shrinkage
    )


def whitened_procrustes_from(
    texts: PairStatistics,
    images: PairStatistics | None = None,
    *,
    pairs_weight: float = 0.0,
    centring: Centring = "joint",
    shrinkage: float = 0.3,
) -> LinearProjection:
    """Fit as :func:`fit_whitened_procrustes`, from all terms of statistics (``sums`` only with centring).

    Raises:
        ConfigError: If an option cannot be used, or the statistics lack what it needs.
        DataError: If the shrinkage is too small for the vectors.
    """
    _check_shrinkage(shrinkage)
    problem = prepare(texts, images, pairs_weight, centring)
    stats = problem.stats
    new_root, new_least = _root(stats.term("new_gram"), shrinkage, square_rounding(problem.raw, "new_gram"))
    old_root, old_least = _root(stats.term("old_gram"), shrinkage, square_rounding(problem.raw, "old_gram"))
    white = torch.linalg.solve_triangular(new_root, stats.term("cross"), upper=False)
    white = torch.linalg.solve_triangular(old_root.T, white, upper=True, left=False)
    # Whitening makes rounding as much larger as the vectors.
    weight, filled = orthogonal_factor(white, cross_rounding(problem) / math.sqrt(new_least * old_least))
    solution = torch.linalg.solve_triangular(new_root.T, weight.T @ old_root.T, upper=True)
    return linear_map(solution.T, problem, filled)


def _root(gram: Tensor, shrinkage: float, rounding: float) -> tuple[Tensor, float]:
    """L of Σ = L Lᵀ, lower triangular, and a lower bound of Σ's eigenvalues.

    Of a side without any spread beyond rounding both are those of the identity.

    Raises:
        DataError: If Σ is singular.
    """
    spread = float(gram.diagonal().mean())
    if spread <= rounding:
        return torch.eye(len(gram), dtype=torch.float64), 1.0
    shrunk = (1 - shrinkage) * gram
    shrunk.diagonal().add_(shrinkage * spread)
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    pivots = factor.diagonal().square()
    if int(failed) or float(pivots.min()) <= _SINGULAR * float(pivots.max()):
        raise DataError(
            f"with shrinkage={shrinkage:g} the covariance is singular: some directions are hardly there; "
            "give a greater shrinkage"
        )
    return factor, shrinkage * spread


def _check_shrinkage(shrinkage: float) -> None:
    if not 0 < shrinkage <= 1:
        raise ConfigError(f"shrinkage must be above 0 and at most 1, got {shrinkage}")
