"""Ridge regression and its low-rank form: closed-form linear maps of least squared error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xbt.errors import ConfigError, DataError
from xbt.projections.base import LinearProjection
from xbt.projections.closed_form import Problem, gather, linear_map, prepare
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import Source
from xbt.projections.statistics import PairStatistics, Term

DEFAULT_REGULARISATION = 0.3
"""λ, where none is given, in units of the mean diagonal element of NᵀN (n / new_dim for unit rows)."""

TERMS: tuple[Term, ...] = ("cross", "new_gram")

_SINGULAR = 1e-8


def fit_ridge(
    new: Source,
    old: Source,
    *,
    pairs: PairVectors | None = None,
    pairs_weight: float | None = None,
    regularisation: float | None = None,
    intercept: bool = False,
) -> LinearProjection:
    """Fits W by least squares with a penalty on its size.

    With N the new vectors (n, new_dim) and O the old ones (n, old_dim)

        Wᵀ = (Nᵀ N + λ I)⁻¹ Nᵀ O,      W maps z to W z

    (Hoerl & Kennard 1970, "Ridge Regression: Biased Estimation for Nonorthogonal Problems"). It fits the
    vectors it was given better than a rotation does; fitted to texts alone it carries over to images less
    well. Rows are used as they are given, and a zero row changes nothing unless there is an intercept.

    Args:
        new: Vectors of the new model.
        old: Vectors of the old model, row by row for the same items.
        pairs: Image–text pairs whose images take part in the fit.
        pairs_weight: Their share ω in [0, 1); ``None`` is 0.33 with pairs.
        regularisation: λ ≥ 0, absolute as scikit-learn's alpha. ``None`` is 0.3 times the mean diagonal
            element of NᵀN, so 0.3 · n / new_dim for unit rows. 0 needs new_dim independent rows.
        intercept: Whether there is an offset, which is not penalised.

    Returns:
        A projection, with an offset if there is an intercept.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If the vectors are empty, not paired, hold NaN or are all zero, or λ is too small for them.
        SpaceMismatchError: If the pairs have other dimensions.
    """
    check_regularisation(regularisation)
    terms: tuple[Term, ...] = (*TERMS, "sums") if intercept else TERMS
    texts, images, weight = gather(new, old, terms, pairs, pairs_weight)
    return ridge_from(texts, images, pairs_weight=weight, regularisation=regularisation, intercept=intercept)


def ridge_from(
    texts: PairStatistics,
    images: PairStatistics | None = None,
    *,
    pairs_weight: float = 0.0,
    regularisation: float | None = None,
    intercept: bool = False,
) -> LinearProjection:
    """Fit as :func:`fit_ridge`, from statistics: ``cross`` and ``new_gram``, with an intercept ``sums``.

    With images, λ is beside the statistics scaled to the number of texts.

    Raises:
        ConfigError: If an option cannot be used, or the statistics lack what it needs.
        DataError: If λ is too small for the vectors.
    """
    problem = prepare(texts, images, pairs_weight, "joint" if intercept else "none")
    return linear_map(ridge_solution(problem, regularisation).T, problem)


def ridge_solution(problem: Problem, regularisation: float | None) -> Tensor:
    """(new_dim, old_dim) float64 (NᵀN + λI)⁻¹ NᵀO.

    Raises:
        ConfigError: If λ is negative or not a number.
        DataError: If the matrix is singular.
    """
    check_regularisation(regularisation)
    gram = problem.stats.term("new_gram").clone()
    amount = regularisation
    if amount is None:
        amount = DEFAULT_REGULARISATION * float(problem.raw.term("new_gram").diagonal().mean())
    gram.diagonal().add_(amount)
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    if int(failed) or float(pivots.min()) <= _SINGULAR * float(pivots.max()):
        raise DataError(
            f"with regularisation={amount:g} the map is not determined by the {problem.stats.count} vectors "
            f"of dimension {len(gram)}: some directions are hardly there; give a greater regularisation"
        )
    return torch.cholesky_solve(problem.stats.term("cross"), factor)


def check_regularisation(regularisation: float | None) -> None:
    """Refuses what cannot be a λ.

    Raises:
        ConfigError: If it is negative or not a finite number.
    """
    if regularisation is not None and not (math.isfinite(regularisation) and regularisation >= 0):
        raise ConfigError(f"regularisation must be a number of at least 0, got {regularisation}")


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
    """Fit as :func:`fit_low_rank`, from statistics: ``cross`` and ``new_gram``, with an intercept ``sums``.

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
