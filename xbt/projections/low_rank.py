"""Low-rank affine map: reduced-rank ridge regression."""

from __future__ import annotations

import torch

from xbt.errors import ConfigError
from xbt.projections.base import LinearProjection
from xbt.projections.closed_form import gather, linear_map, prepare
from xbt.projections.pairs import PairVectors
from xbt.projections.ridge import TERMS, check_regularisation, ridge_solution
from xbt.projections.sources import Source
from xbt.projections.statistics import PairStatistics, Term


def fit_low_rank(
    new: Source,
    old: Source,
    *,
    rank: int = 64,
    pairs: PairVectors | None = None,
    pairs_weight: float | None = None,
    regularisation: float | None = None,
    intercept: bool = True,
) -> LinearProjection:
    """Fits W = U Vᵀ of a given rank, and an offset.

    The form of Drift-Adapter's low-rank map (Vejendla 2025, arXiv 2509.23471), which is trained there; here
    it is reduced-rank regression, in closed form (Izenman 1975, "Reduced-rank regression for the multivariate
    linear model"). With B = (NᵀN + λI)⁻¹ NᵀO the ridge solution, and V the first eigenvectors of the
    covariance of its fitted values, BᵀNᵀN B (with the penalty's share, Bᵀ(NᵀN + λI)B),

        Wᵀ = B V Vᵀ

    is the map of that rank of least penalised squared error. It is kept as one matrix: factored it would take
    rank · (new_dim + old_dim) products a query instead of new_dim · old_dim, half at rank 154 for 768 → 512.
    Rows are used as they are given.

    Args:
        new: Vectors of the new model.
        old: Vectors of the old model, row by row for the same items.
        rank: At least 1; what is above both dimensions is the full map.
        pairs: Image–text pairs whose images take part in the fit.
        pairs_weight: Their share ω in [0, 1); ``None`` is 0.33 with pairs.
        regularisation: λ as for :func:`~xbt.projections.ridge.fit_ridge`.
        intercept: Whether there is an offset, which is not penalised.

    Returns:
        A projection, with an offset if there is an intercept.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If the vectors are empty, not paired, or hold NaN, or λ is too small for them.
        SpaceMismatchError: If the pairs have other dimensions.
    """
    _check_rank(rank)
    check_regularisation(regularisation)
    terms: tuple[Term, ...] = (*TERMS, "sums") if intercept else TERMS
    texts, images, weight = gather(new, old, terms, pairs, pairs_weight)
    return low_rank_from(
        texts,
        images,
        rank=rank,
        pairs_weight=weight,
        regularisation=regularisation,
        intercept=intercept,
    )


def low_rank_from(
    texts: PairStatistics,
    images: PairStatistics | None = None,
    *,
    rank: int = 64,
    pairs_weight: float = 0.0,
    regularisation: float | None = None,
    intercept: bool = True,
) -> LinearProjection:
    """As :func:`fit_low_rank`, from statistics: ``cross`` and ``new_gram``, with an intercept ``sums``.

    Raises:
        ConfigError: If an option cannot be used, or the statistics lack what it needs.
        DataError: If λ is too small for the vectors.
    """
    _check_rank(rank)
    problem = prepare(texts, images, pairs_weight, "joint" if intercept else "none")
    solution = ridge_solution(problem, regularisation)
    if rank < min(solution.shape):
        # Bᵀ(NᵀN + λI)B, because (NᵀN + λI)B = NᵀO.
        fitted = solution.T @ problem.stats.term("cross")
        vectors = torch.linalg.eigh((fitted + fitted.T) / 2).eigenvectors[:, -rank:]
        solution = solution @ vectors @ vectors.T
    return linear_map(solution.T, problem)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
