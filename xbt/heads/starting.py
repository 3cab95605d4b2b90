"""Where a head begins when it is to start from a map that is already known, such as a Procrustes rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from xbt.errors import ConfigError
from xbt.heads.orthogonal import complement
from xbt.vectors import as_vectors


def checked_map(weight: Tensor, old_dim: int) -> Tensor:
    """The map to the old space as float64 on the CPU.

    Raises:
        ConfigError: If it does not lead to ``old_dim`` dimensions.
        DataError: If it is no matrix of finite numbers.
    """
    matrix = as_vectors(weight, "the map to start at").double()
    if len(matrix) != old_dim:
        raise ConfigError(
            f"the map to start at leads to {len(matrix)} dimensions, but the head's old model has {old_dim}"
        )
    return matrix


def stacked(weight: Tensor, in_dim: int) -> Tensor:
    """The map of leading compatible dimensions: E = [W; W⊥; 0], which keeps as much of x as fits.

    Args:
        weight: (old_dim, d) W.
        in_dim: Rows of E, at least old_dim.

    Returns:
        (in_dim, d) float32 E; W⊥ are orthonormal rows of what W does not see, as many as there is room for.
    """
    start = torch.zeros(in_dim, weight.shape[1], dtype=torch.float64)
    rest = complement(weight)[: in_dim - len(weight)]
    start[: len(weight)] = weight
    start[len(weight) : len(weight) + len(rest)] = rest
    return start.float()


def checked_order(order: Tensor | None, weight: Tensor) -> Tensor:
    """Directions of the old space, the least important first; (old_dim, old_dim) float64.

    By default the coordinates, the last one first; and where the map's image does not fill the old space,
    what lies outside it, and then that image.

    Raises:
        ConfigError: If an order is given that is not an orthogonal matrix.
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
