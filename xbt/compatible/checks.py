"""Whether the parts of a compatible encoder belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from xbt.encoders import DualEncoder, has_lora
from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections import Projection
from xbt.projections.ensemble import QueryEnsemble
from xbt.vectors import Vectors, as_vectors


def check_new(new: DualEncoder, projection: Projection) -> None:
    """Refuses an encoder that the projection was not made for, as far as that can be told.

    Raises:
        SpaceMismatchError: If it is not, or the projection does not know its old space.
    """
    if projection.old_space is None:
        raise SpaceMismatchError(
            "the projection does not know its old space; fit it with old_space= or call set_spaces"
        )
    if new.dim != projection.new_dim:
        raise SpaceMismatchError(
            f"the projection takes {projection.new_dim}-d vectors"
            + (f" of {projection.new_space}" if projection.new_space else "")
            + f", but the encoder is '{new.name}' ({new.dim}-d); load the encoder it was made for"
        )
    if projection.new_space is not None and not has_lora(new):
        projection.new_space.require(new.space, "the encoder given to the projection")


def check_ensemble(projection: Projection, ensemble: QueryEnsemble | None, old: DualEncoder | None) -> None:
    """Refuses an ensemble of another space, an old encoder of another space, and one that nobody needs.

    Raises:
        SpaceMismatchError: If a space is not the projection's old one.
        ConfigError: If there is an old encoder and no ensemble.
    """
    space = projection.old_space
    assert space is not None
    if ensemble is None:
        if old is not None:
            raise ConfigError(
                f"the old encoder '{old.name}' is of use only with an ensemble; give ensemble= as well"
            )
        return
    if ensemble.old_dim != projection.old_dim:
        raise SpaceMismatchError(
            f"the ensemble combines {ensemble.old_dim}-d vectors, but the projection leads to {space}; fit "
            "it on pairs of that space"
        )
    if ensemble.old_space is not None and ensemble.old_space is not space:
        space.require(ensemble.old_space, "the ensemble")
    if old is not None:
        space.require(old.space, "the old encoder given to the ensemble")


def refuse(old_vectors: Vectors | None) -> None:
    """Refuses old vectors where there is no ensemble, with a ConfigError."""
    if old_vectors is not None:
        raise ConfigError(
            "old vectors are of use only with an ensemble; give the encoder one, or leave them out"
        )


def given(old_vectors: Vectors, count: int, dim: int) -> Tensor:
    """The caller's old vectors as a tensor.

    Raises:
        DataError: If they are not as many as the queries, or not finite.
        SpaceMismatchError: If they are not of the old dimension.
    """
    if len(old_vectors) != count:
        raise DataError(f"old_vectors has {len(old_vectors)} rows for {count} queries; give one for each")
    return torch.zeros(0, dim) if count == 0 else as_vectors(old_vectors, "old_vectors", dim)
