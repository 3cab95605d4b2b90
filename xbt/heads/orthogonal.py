"""Orthogonal matrices: as layers that stay orthogonal while they are trained, and as bases for a start."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from xbt.errors import ConfigError

ORTHOGONAL_MAPS = ("matrix_exp", "cayley", "householder")
_TOLERANCE = 1e-4


def orthogonal_linear(dim: int, orthogonal_map: str = "matrix_exp") -> nn.Linear:
    """A layer x → R x whose (dim, dim) matrix R is orthogonal whatever an optimiser does to its parameters.

    R = B · map(X) with B a fixed orthogonal matrix, the one it began at, and X the parameter (Lezcano-Casado,
    "Trivializations for gradient-based optimization on manifolds", NeurIPS 2019). The determinant of
    ``matrix_exp`` and ``cayley`` keeps its sign, as that of any continuous path of such matrices.

    There is no bias: with one the layer would keep distances but not angles.

    Args:
        dim: Size of the matrix.
        orthogonal_map: ``"matrix_exp"``: exp(A) of a skew-symmetric A; ``"cayley"``: (I + A/2)(I − A/2)⁻¹,
            one linear solve, and on a CPU by far the quickest; ``"householder"``: a product of reflections.

    Raises:
        ConfigError: If the map is not known.
    """
    if orthogonal_map not in ORTHOGONAL_MAPS:
        raise ConfigError(
            f"orthogonal_map {orthogonal_map!r} is not known; there is {', '.join(ORTHOGONAL_MAPS)}"
        )
    layer = orthogonal(nn.Linear(dim, dim, bias=False), orthogonal_map=orthogonal_map)
    assert isinstance(layer, nn.Linear)
    return layer


def assign(layer: nn.Linear, matrix: Tensor) -> None:
    """Sets the matrix of a layer that :func:`orthogonal_linear` made.

    Raises:
        ConfigError: If the shape differs, or the matrix is not orthogonal; torch would make it so in silence.
    """
    weight = layer.weight
    if matrix.shape != weight.shape:
        raise ConfigError(
            f"the matrix has the shape {tuple(matrix.shape)}, but {tuple(weight.shape)} is needed"
        )
    matrix = matrix.detach()
    distance = float((matrix @ matrix.T - torch.eye(len(matrix)).to(matrix)).abs().max())
    if not distance <= _TOLERANCE:
        raise ConfigError(f"the matrix is not orthogonal: R Rᵀ differs from the identity by {distance:.2g}")
    with torch.no_grad():
        layer.weight = matrix.to(weight)


def nearest_orthonormal(rows: Tensor) -> Tensor:
    """The (m, d) matrix of orthonormal rows, m ≤ d, that is nearest to another; float64."""
    left, _, right = torch.linalg.svd(rows.double(), full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def complement(rows: Tensor) -> Tensor:
    """Orthonormal rows (d − rank, d) that span what the (m, d) rows do not; float64."""
    _, values, right = torch.linalg.svd(rows.double(), full_matrices=True)
    largest = float(values.max()) if len(values) else 0.0
    rank = int((values > 1e-6 * largest).sum()) if largest else 0
    rest: Tensor = right[rank:]
    return rest
