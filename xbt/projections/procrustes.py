"""Orthogonal Procrustes: the closed-form rotation from the new space to the old one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError
from xbt.projections.base import LinearProjection
from xbt.projections.closed_form import (
    Centring,
    Problem,
    cross_rounding,
    gather,
    linear_map,
    orthogonal_factor,
    prepare,
    square_rounding,
)
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import BLOCK_ROWS, PairedVectors, Source
from xbt.projections.statistics import PairStatistics, Term


def fit_procrustes(
    new: Source,
    old: Source,
    *,
    pairs: PairVectors | None = None,
    pairs_weight: float | None = None,
    centring: Centring = "none",
    scale: bool = False,
) -> LinearProjection:
    """Fits the rotation that turns the new vectors onto the old ones.

    With N the new vectors (n, new_dim) and O the old ones (n, old_dim), the map W of orthonormal rows (or
    columns, if old_dim > new_dim) that maximises the summed inner products is

        C = Nᵀ O = P Σ Qᵀ,      Wᵀ = P Qᵀ,      W maps z to W z

    (Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem"). It is the map that
    carries over best from text to images when only text is known, because it keeps every angle within the
    image of Wᵀ. Rows are used as they are given: one of twice the length counts twice, a zero row not at all.

    The form that pads the old vectors with zeros to new_dim, solves a square problem and keeps the first
    old_dim rows (as the code released with SLERP does, Ricci et al. 2026, arXiv 2609.39836) has the same W.
    What differs there is that the visible part W z is not normalised, ‖W z‖ ≤ 1: that is ``project()``.

    Args:
        new: Vectors of the new model.
        old: Vectors of the old model, row by row for the same items.
        pairs: Image–text pairs whose images take part in the fit.
        pairs_weight: Their share ω in [0, 1); ``None`` is 0.33 with pairs.
        centring: ``"none"``; ``"joint"`` turns the vectors about their mean and puts the old mean back
            (Gupta et al. 2026, arXiv 2602.17584); ``"modality"`` does so for texts and for images, whose
            means come from ``pairs``.
        scale: Whether coordinate k of W z is multiplied by s_k = Σ (W z)_k o_k / Σ (W z)_k², the diagonal
            scaling of Drift-Adapter (Vejendla 2025, arXiv 2509.23471); W is then no longer orthonormal.

    Returns:
        A projection, with offsets if it is centred. Its ``filled`` tells how many directions the vectors do
        not determine, as where there are fewer rows than dimensions; they are cut or filled up as by
        :func:`~xbt.projections.baselines.fit_identity`, and carry next to nothing of the vectors.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If the vectors are empty, not paired, hold NaN, or are all zero on one side.
        SpaceMismatchError: If the pairs have other dimensions.
    """
    terms: tuple[Term, ...] = ("cross", "new_gram") if scale else ("cross",)
    texts, images, weight = gather(new, old, terms, pairs, pairs_weight, centring)
    return procrustes_from(texts, images, pairs_weight=weight, centring=centring, scale=scale)


def procrustes_from(
    texts: PairStatistics,
    images: PairStatistics | None = None,
    *,
    pairs_weight: float = 0.0,
    centring: Centring = "none",
    scale: bool = False,
) -> LinearProjection:
    """Fit as :func:`fit_procrustes`, from ``cross``, with centring also ``sums``, for scale ``new_gram``.

    Raises:
        ConfigError: If an option cannot be used, or the statistics lack what it needs.
    """
    problem = prepare(texts, images, pairs_weight, centring)
    weight, filled = orthogonal_factor(problem.stats.term("cross"), cross_rounding(problem))
    if scale:
        weight = _scales(weight, problem)[:, None] * weight
    return linear_map(weight, problem, filled)


def procrustes_rotation(new: Source, old: Source) -> Tensor:
    """The (old_dim, new_dim) float32 matrix W of :func:`fit_procrustes` without options.

    Raises:
        DataError: If the row counts differ, or there are no rows, or NaN.
    """
    return _rotation(PairStatistics.of(new, old))


def procrustes_rotation_of_chunks(chunks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Fit as :func:`procrustes_rotation`, for pairs of chunks.

    Args:
        chunks: At least one pair of (k, new_dim) and (k, old_dim) vectors of the same items, without NaN; k
            may differ from piece to piece.

    Returns:
        (old_dim, new_dim) float32 matrix W.

    Raises:
        DataError: If there is no piece, or a value is NaN or infinite.
    """
    return _rotation(PairStatistics.from_chunks(chunks))


def _rotation(stats: PairStatistics) -> Tensor:
    return orthogonal_factor(stats.term("cross"), cross_rounding(Problem(stats, stats))).weight.float()


def _scales(weight: Tensor, problem: Problem) -> Tensor:
    products = (weight * problem.stats.term("cross").T).sum(dim=1)
    squares = ((weight @ problem.stats.term("new_gram")) * weight).sum(dim=1)
    # Nothing is known of the length of a coordinate that is always 0.
    return torch.where(squares > square_rounding(problem.raw, "new_gram"), products / squares, 1.0)


@dataclass(frozen=True)
class ProcrustesStart:
    """The Procrustes rotation, and the means it was taken about.

    Attributes:
        rotation: (old_dim, new_dim) float32 matrix W.
        means: ``new_mean`` and ``old_mean``, and of images ``new_image_mean`` and ``old_image_mean``; empty
            if nothing was centred.
    """

    rotation: Tensor
    means: dict[str, Tensor] = field(default_factory=dict)


def procrustes_start(
    rows: PairedVectors,
    positions: NDArray[np.int64] | None = None,
    *,
    centred: bool = False,
    pairs: PairVectors | None = None,
    pairs_weight: float = 0.0,
) -> ProcrustesStart:
    """Solves the Procrustes problem over texts, and over pairs' images where they are given.

    With N, O the texts' vectors under both models and M, G those of the images, each row maybe less its mean,

        C = (1 − ω) Nᵀ O / n + ω Mᵀ G / m = P Σ Qᵀ,      Wᵀ = P Qᵀ

    See :func:`~xbt.projections.procrustes.fit_procrustes`; here rows may be taken in any order.

    Args:
        rows: The texts' vectors.
        positions: (n,) int64, which of them to use; ``None`` uses all.
        centred: Whether to take the means off; images have means of their own where ``pairs`` has them.
        pairs: Image–text pairs; their texts are not looked at.
        pairs_weight: ω in [0, 1).

    Returns:
        The rotation and the means.

    Raises:
        DataError: If there are no rows, or new and old vectors say nothing of each other.
    """
    positions = np.arange(len(rows)) if positions is None else positions
    if len(positions) == 0:
        raise DataError("new and old vectors are empty: there are 0 rows; give at least one pair")
    terms: tuple[Term, ...] = ("cross", "sums") if centred else ("cross",)
    texts = PairStatistics.from_chunks(_chunks(rows, positions), terms)
    images = None
    if pairs is not None and pairs.new_images is not None and (centred or pairs_weight > 0):
        images = PairStatistics.of_images(pairs, terms)
    centring: Centring = "none" if not centred else "joint" if images is None else "modality"
    weight = 0.0 if images is None else pairs_weight
    rotation = procrustes_from(texts, images, pairs_weight=weight, centring=centring).weight.detach()
    means: dict[str, Tensor] = {}
    if centred:
        means |= zip(("new_mean", "old_mean"), texts.means, strict=True)
        if images is not None:
            means |= zip(("new_image_mean", "old_image_mean"), images.means, strict=True)
    return ProcrustesStart(rotation, {name: mean.float() for name, mean in means.items()})


def _chunks(rows: PairedVectors, positions: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
    ordered = np.sort(positions)  # in row order: sequential reads of stores
    for start in range(0, len(ordered), BLOCK_ROWS):
        yield rows.take(ordered[start : start + BLOCK_ROWS])
