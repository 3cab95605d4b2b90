"""Orthogonal Procrustes: the closed-form rotation from the new space to the old one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from xbt.errors import DataError
from xbt.projections.base import LinearProjection
from xbt.vectors import Vectors, as_vectors

_CHUNK_ROWS = 65_536


def procrustes_rotation(new: Vectors, old: Vectors) -> Tensor:
    """Solves the orthogonal Procrustes problem for paired rows.

    With N the new vectors (n, new_dim) and O the old ones (n, old_dim), the map W of orthonormal columns (or
    rows, if old_dim > new_dim) that maximises the summed inner products is

        C = Nᵀ O = P Σ Qᵀ,      Wᵀ = P Qᵀ,      W maps z to W z

    (Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem"). Uncentred, rectangular
    and accumulated in fp64. This is the map that carries over best from text to images when only text is
    known, because it keeps every angle within the image of Wᵀ.

    Args:
        new: (n, new_dim) vectors of the new model.
        old: (n, old_dim) vectors of the old model for the same items.

    Returns:
        (old_dim, new_dim) float32 matrix W.

    Raises:
        DataError: If the row counts differ, or there are no rows, or NaN.
    """
    new_rows, old_rows = as_vectors(new, "new vectors"), as_vectors(old, "old vectors")
    if len(new_rows) != len(old_rows):
        raise DataError(
            f"new and old vectors must be of the same items: there are {len(new_rows)} new and "
            f"{len(old_rows)} old rows"
        )
    starts = range(0, len(new_rows), _CHUNK_ROWS)
    return procrustes_rotation_of_chunks(
        (new_rows[start : start + _CHUNK_ROWS], old_rows[start : start + _CHUNK_ROWS]) for start in starts
    )


def procrustes_rotation_of_chunks(chunks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """As :func:`procrustes_rotation`, for vectors that come piece by piece and need not fit into memory.

    Args:
        chunks: At least one pair of (k, new_dim) and (k, old_dim) vectors of the same items, without NaN; k
            may differ from piece to piece.

    Returns:
        (old_dim, new_dim) float32 matrix W.

    Raises:
        DataError: If there is no piece.
    """
    covariance: Tensor | None = None
    for new, old in chunks:
        product = new.double().T @ old.double()
        covariance = product if covariance is None else covariance.add_(product)
    if covariance is None:
        raise DataError("new and old vectors are empty: there are 0 rows; give at least one pair")
    left, _, right = torch.linalg.svd(covariance, full_matrices=False)
    rotation: Tensor = left @ right
    return rotation.T.float().contiguous()


def fit_procrustes(new: Vectors, old: Vectors) -> LinearProjection:
    """The Procrustes rotation as a projection; see :func:`procrustes_rotation`."""
    return LinearProjection.from_weight(procrustes_rotation(new, old))
