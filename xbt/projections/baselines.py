"""Baselines: the new vectors as they are, and moved by the difference of the means."""

from __future__ import annotations

import torch

from xbt.projections.base import LinearProjection
from xbt.projections.closed_form import gather, linear_map, prepare
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import Source
from xbt.projections.statistics import PairStatistics, Term


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
    """Fit as :func:`fit_identity`, from statistics, of which it needs the dimensions alone."""
    new_dim, old_dim = texts.dims
    return LinearProjection.from_weight(torch.eye(old_dim, new_dim))


def fit_mean_shift(new: Source, old: Source, *, pairs: PairVectors | None = None) -> LinearProjection:
    """Moves z, cut or filled up with zeros, by (mean of the old vectors − mean of the new ones).

    Query drift compensation (Goswami et al. 2025, "Query Drift Compensation: Enabling Compatibility in
    Continual Learning of Retrieval Embedding Models", arXiv 2506.00037), made for a model that was trained on
    and has moved little; between models that were trained apart it does no better than
    :func:`~xbt.projections.baselines.fit_identity`. Rows are used as they are given.

    Args:
        new: Vectors of the new model.
        old: Vectors of the old model, row by row for the same items.
        pairs: Image–text pairs; their images are then moved by the difference of their own means.

    Returns:
        A projection with an offset, and one for images if there are pairs.

    Raises:
        ConfigError: If the pairs have no new image vectors.
        DataError: If the vectors are empty, not paired, or hold NaN.
        SpaceMismatchError: If the pairs have other dimensions.
    """
    terms: tuple[Term, ...] = ("sums",)
    texts, images, _ = gather(new, old, terms, pairs, 0.0, "joint" if pairs is None else "modality")
    return mean_shift_from(texts, images)


def mean_shift_from(texts: PairStatistics, images: PairStatistics | None = None) -> LinearProjection:
    """Fit as :func:`fit_mean_shift`, from the ``sums`` of texts and maybe images.

    Raises:
        ConfigError: If the statistics have no sums.
    """
    new_dim, old_dim = texts.dims
    problem = prepare(texts, images, 0.0, "joint" if images is None else "modality")
    return linear_map(torch.eye(old_dim, new_dim, dtype=torch.float64), problem)
