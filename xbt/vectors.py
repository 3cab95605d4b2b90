"""Checks on vectors that every floor of the house shares."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError, SpaceMismatchError

Vectors = Tensor | NDArray[np.floating]


def as_vectors(vectors: Vectors, name: str, dim: int | None = None) -> Tensor:
    """Returns vectors as a float CPU tensor after checking that they can be used.

    Args:
        vectors: (n, dim) torch tensor or numpy array of any float dtype; half precision becomes float32.
        name: What these vectors are, for the error message ("gallery", "new text vectors").
        dim: The dimension they must have, if there is one.

    Returns:
        (n, dim) float32 tensor (float64 stays float64) on the CPU, detached.

    Raises:
        DataError: If there are no rows, the shape is not (n, dim), or a value is NaN or infinite; the
            message names the first such row.
        SpaceMismatchError: If the dimension is not ``dim``.
    """
    if isinstance(vectors, np.ndarray):
        # torch refuses foreign byte order and negative strides, and warns of read-only memory maps.
        vectors = np.require(vectors, vectors.dtype.newbyteorder("="), ["C", "W"])
    tensor = torch.as_tensor(vectors).detach().cpu()
    if not tensor.is_floating_point():
        raise DataError(f"{name} must be floating point, got {tensor.dtype}; embed the data first")
    if tensor.dtype != torch.float64:
        tensor = tensor.float()
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise DataError(f"{name} must have the shape (n, dim), got {tuple(tensor.shape)}")
    if tensor.shape[0] == 0:
        raise DataError(f"{name} is empty: it has 0 rows; give at least one vector")
    if dim is not None and tensor.shape[1] != dim:
        raise SpaceMismatchError(
            f"{name} has dimension {tensor.shape[1]}, but {dim} is needed; was it made by another model?"
        )
    finite = torch.isfinite(tensor).all(dim=1)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten()
        raise DataError(
            f"{name} has NaN or infinite values in {len(bad)} of {len(tensor)} rows, first in row "
            f"{int(bad[0])}; find out which input made it and leave that out"
        )
    return tensor
