"""The vectors as they are, cut or filled up with zeros: what an upgrade without a projection gives."""

from __future__ import annotations

import torch

from xbt.projections.base import LinearProjection
from xbt.projections.sources import Source
from xbt.projections.statistics import PairStatistics


def fit_identity(new: Source, old: Source) -> LinearProjection:
    """W z = the first old_dim coordinates of z, or z followed by zeros.

    The lower end of every comparison; it is right where the new model was made to answer in the old space.
    The vectors are read once and checked as for every other method, but only their dimensions matter.

    Args:
        new: Vectors of the new model.
        old: Vectors of the old model, row by row for the same items.

    Returns:
        A projection without offset.

    Raises:
        DataError: If the vectors are empty, not paired, or hold NaN.
    """
    return identity_from(PairStatistics.of(new, old, terms=()))


def identity_from(texts: PairStatistics) -> LinearProjection:
    """As :func:`fit_identity`, from statistics, of which it needs the dimensions alone."""
    new_dim, old_dim = texts.dims
    return LinearProjection.from_weight(torch.eye(old_dim, new_dim))
