"""Orthogonal layers, and initialisation of heads from a known map such as a Procrustes rotation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from xbt.errors import ConfigError
from xbt.vectors import as_vectors

ORTHOGONAL_MAPS = ("matrix_exp", "cayley", "householder")
_TOLERANCE = 1e-4


def orthogonal_linear(dim: int, orthogonal_map: str = "matrix_exp") -> nn.Linear:
    """Create a layer x → R x with a (dim, dim) matrix R that stays orthogonal during training.

    R = B · map(X) with the fixed initial orthogonal matrix B and the parameter X (Lezcano-Casado,
    "Trivializations for gradient-based optimization on manifolds", NeurIPS 2019). The determinant of
    ``matrix_exp`` and ``cayley`` keeps its sign, as on any continuous path of orthogonal matrices.

    There is no bias, because it would preserve distances but not angles.

    Args:
        dim: Size of the matrix.
        orthogonal_map: ``"matrix_exp"``: exp(A) of a skew-symmetric A; ``"cayley"``: (I + A/2)(I − A/2)⁻¹,
            one linear solve, by far the fastest on a CPU; ``"householder"``: a product of reflections.
    """
    if orthogonal_map not in ORTHOGONAL_MAPS:
        raise ConfigError(
            f"orthogonal_map {orthogonal_map!r} is not known; there is {', '.join(ORTHOGONAL_MAPS)}"
        )
    layer = orthogonal(nn.Linear(dim, dim, bias=False), orthogonal_map=orthogonal_map)
    assert isinstance(layer, nn.Linear)
    return layer


def assign(layer: nn.Linear, matrix: Tensor) -> None:
    """Set the matrix of a layer of :func:`orthogonal_linear`."""
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
    """Nearest matrix with orthonormal rows to an (m, d) matrix, m ≤ d; float64."""
    left, _, right = torch.linalg.svd(rows.double(), full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def complement(rows: Tensor) -> Tensor:
    """Orthonormal rows (d − rank, d) that span the orthogonal complement of (m, d) rows; float64."""
    _, values, right = torch.linalg.svd(rows.double(), full_matrices=True)
    largest = float(values.max()) if len(values) else 0.0
    rank = int((values > 1e-6 * largest).sum()) if largest else 0
    basis: Tensor = right[rank:]
    return basis


def checked_map(weight: Tensor, old_dim: int) -> Tensor:
    """Check a map to the old space, and convert it to float64 on the CPU."""
    matrix = as_vectors(weight, "the initial map").double()
    if len(matrix) != old_dim:
        raise ConfigError(
            f"the initial map leads to {len(matrix)} dimensions, but the head's old model has {old_dim}"
        )
    return matrix


def stacked(weight: Tensor, in_dim: int) -> Tensor:
    """Extend a map of the compatible dimensions to E = [W; W⊥; 0], which keeps as much of x as possible.

    Args:
        weight: (old_dim, d) W.
        in_dim: Number of rows of E, at least old_dim.

    Returns:
        (in_dim, d) float32 E; W⊥ are as many orthonormal rows of the complement of W as fit.
    """
    start = torch.zeros(in_dim, weight.shape[1], dtype=torch.float64)
    rest = complement(weight)[: in_dim - len(weight)]
    start[: len(weight)] = weight
    start[len(weight) : len(weight) + len(rest)] = rest
    return start.float()


def checked_order(order: Tensor | None, weight: Tensor) -> Tensor:
    """Directions of the old space, the least important first; (old_dim, old_dim) float64.

    The default is the coordinates, the last one first. If the image of the map does not fill the old space,
    the directions outside the image come first, then the image.
    """
    old_dim, new_dim = weight.shape
    if order is None:
        if old_dim <= new_dim:
            return torch.eye(old_dim, dtype=torch.float64).flip(1)
        outside = complement(weight.T)
        return torch.cat([outside, complement(outside)]).T
    basis = as_vectors(order, "the order of the old space's directions").double()
    eye = torch.eye(old_dim, dtype=torch.float64)
    if basis.shape != eye.shape or float((basis.T @ basis - eye).abs().max()) > 1e-4:
        raise ConfigError(
            f"the order must be an orthogonal {old_dim} × {old_dim} matrix with one direction a column, "
            f"got shape {tuple(basis.shape)}"
        )
    return basis
