"""Closed forms that invert covariances: ridge regression, its low-rank form, and whitened Procrustes."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from xbt.errors import ConfigError, DataError
from xbt.projections.base import LinearProjection
from xbt.projections.closed_form import Centring, Data, Problem, linear_map, orthogonal_factor, prepare
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import Term

DEFAULT_REGULARISATION = 0.3
"""λ, where none is given, in units of the mean diagonal element of NᵀN (n / new_dim for unit rows)."""

_TERMS: tuple[Term, ...] = ("cross", "new_gram")


def fit_ridge(
    new: Data,
    old: Data | None = None,
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
    solution, problem = _ridge(new, old, pairs, pairs_weight, regularisation, intercept)
    return linear_map(solution.T, problem)


def _ridge(
    new: Data,
    old: Data | None,
    pairs: PairVectors | None,
    pairs_weight: float | None,
    regularisation: float | None,
    intercept: bool,
) -> tuple[Tensor, Problem]:
    """(new_dim, old_dim) float64 (NᵀN + λI)⁻¹ NᵀO, and what it solves."""
    if regularisation is not None and not (math.isfinite(regularisation) and regularisation >= 0):
        raise ConfigError(f"regularisation must be a number of at least 0, got {regularisation}")
    problem = prepare(new, old, _TERMS, pairs, pairs_weight, "joint" if intercept else "none")
    gram = problem.stats.term("new_gram").clone()
    amount = regularisation
    if amount is None:
        amount = DEFAULT_REGULARISATION * float(problem.raw.term("new_gram").diagonal().mean())
    gram.diagonal().add_(amount)
    factor = _cholesky(
        gram,
        1e-8,
        f"with regularisation={amount:g} the map is not determined by the {problem.stats.count} vectors "
        f"of dimension {len(gram)}: some directions are hardly there; give a greater regularisation",
    )
    return torch.cholesky_solve(problem.stats.term("cross"), factor), problem


def _cholesky(matrix: Tensor, singular: float, message: str) -> Tensor:
    """Lower triangular L of a matrix L Lᵀ; a DataError where the smallest pivot is next to nothing."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if int(failed) or float(pivots.min()) <= singular * float(pivots.max()):
        raise DataError(message)
    return factor


def fit_low_rank(
    new: Data,
    old: Data | None = None,
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
        regularisation: λ as for :func:`fit_ridge`.
        intercept: Whether there is an offset, which is not penalised.

    Returns:
        A projection, with an offset if there is an intercept.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If the vectors are empty, not paired, or hold NaN, or λ is too small for them.
        SpaceMismatchError: If the pairs have other dimensions.
    """
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    solution, problem = _ridge(new, old, pairs, pairs_weight, regularisation, intercept)
    if rank < min(solution.shape):
        # Bᵀ(NᵀN + λI)B, because (NᵀN + λI)B = NᵀO.
        fitted = solution.T @ problem.stats.term("cross")
        vectors = torch.linalg.eigh((fitted + fitted.T) / 2).eigenvectors[:, -rank:]
        solution = solution @ vectors @ vectors.T
    return linear_map(solution.T, problem)


def fit_whitened_procrustes(
    new: Data,
    old: Data | None = None,
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
    :func:`~xbt.projections.fit_procrustes` times the ratio of both sides' root mean squares. Rows
    are used as they are given.

    Args:
        new: Vectors of the new model.
        old: Vectors of the old model, row by row for the same items.
        pairs: Image–text pairs whose images take part in the fit.
        pairs_weight: Their share ω in [0, 1); ``None`` is 0.33 with pairs.
        centring: As for :func:`~xbt.projections.fit_procrustes`; with ``"none"`` second moments
            take the place of covariances.
        shrinkage: γ, above 0 up to 1.

    Returns:
        A projection, with offsets if it is centred.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If the vectors are empty, not paired, or hold NaN.
        SpaceMismatchError: If the pairs have other dimensions.
    """
    if not 0 < shrinkage <= 1:
        raise ConfigError(f"shrinkage must be above 0 and at most 1, got {shrinkage}")
    problem = prepare(new, old, (*_TERMS, "old_gram"), pairs, pairs_weight, centring)
    new_root, new_least = _root(problem, "new_gram", shrinkage)
    old_root, old_least = _root(problem, "old_gram", shrinkage)
    white = torch.linalg.solve_triangular(new_root, problem.stats.term("cross"), upper=False)
    white = torch.linalg.solve_triangular(old_root.T, white, upper=True, left=False)
    # Whitening makes rounding as much larger as the vectors.
    weight, filled = orthogonal_factor(white, problem.cross_rounding / math.sqrt(new_least * old_least))
    solution = torch.linalg.solve_triangular(new_root.T, weight.T @ old_root.T, upper=True)
    return linear_map(solution.T, problem, filled)


def _root(problem: Problem, term: Literal["new_gram", "old_gram"], shrinkage: float) -> tuple[Tensor, float]:
    """L of Σ = L Lᵀ, and a lower bound of Σ's eigenvalues; those of the identity where there is no spread."""
    gram = problem.stats.term(term)
    spread = float(gram.diagonal().mean())
    if spread <= problem.square_rounding(term):
        return torch.eye(len(gram), dtype=torch.float64), 1.0
    shrunk = (1 - shrinkage) * gram
    shrunk.diagonal().add_(shrinkage * spread)
    message = f"with shrinkage={shrinkage:g} the covariance is singular: some directions are hardly there; "
    return _cholesky(shrunk, 1e-12, message + "give a greater shrinkage"), shrinkage * spread
