"""Projections: maps from the new model's space into the old model's space."""

from __future__ import annotations

from collections.abc import Callable

from xbt.errors import ConfigError
from xbt.projections.base import LinearProjection, Projection
from xbt.projections.procrustes import fit_procrustes, procrustes_rotation, procrustes_rotation_of_chunks
from xbt.projections.residual import ResidualProjection
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors

_METHODS: dict[str, Callable[[Vectors, Vectors], Projection]] = {"procrustes": fit_procrustes}


def fit_projection(
    new: Vectors,
    old: Vectors,
    method: str = "procrustes",
    *,
    new_space: EmbeddingSpace | None = None,
    old_space: EmbeddingSpace | None = None,
) -> Projection:
    """Fits a closed-form projection to vectors of the same items under both models.

    Args:
        new: (n, new_dim) float vectors of the new model.
        old: (n, old_dim) float vectors of the old model, row by row for the same items.
        method: ``"procrustes"``; see :func:`procrustes_rotation`.
        new_space: The space ``new`` lives in, attached to the result.
        old_space: The space ``old`` lives in, attached to the result.

    Returns:
        A projection whose forward takes (n, new_dim) vectors and returns (n, old_dim) unit rows.

    Raises:
        ConfigError: If the method is not known.
        DataError: If the vectors are empty, not paired, or hold NaN.
        SpaceMismatchError: If a space's dimension is not that of its vectors.
    """
    if method not in _METHODS:
        raise ConfigError(
            f"projection method {method!r} is not known; there is {', '.join(sorted(_METHODS))}"
        )
    projection = _METHODS[method](new, old)
    projection.set_spaces(new_space, old_space)
    return projection


__all__ = [
    "LinearProjection",
    "Projection",
    "ResidualProjection",
    "fit_procrustes",
    "fit_projection",
    "procrustes_rotation",
    "procrustes_rotation_of_chunks",
]
