"""Common parts of the closed forms: texts and images in one objective, centring, offsets, null directions.

Where pairs are given, their images take part: the objective is (1 − ω) times its mean over the texts plus ω
times its mean over the images, each photo under both models. ω = 0 leaves the images out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections.base import LinearProjection
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import Source
from xbt.projections.statistics import PairStatistics, Term

Centring = Literal["none", "joint", "modality"]

PAIRS_WEIGHT = 0.33
"""ω where pairs are given and no weight is."""

_GENERIC = 1e-4
_MAX_OFFSET, _MAX_WEIGHT = 2.0**40, 2.0**100
_ONE_DIRECTION = 10.0


class Gathered(NamedTuple):
    """Statistics of a fit.

    Attributes:
        texts: Those of the texts.
        images: Those of the pairs' images, or ``None`` where they take no part.
        weight: ω, the images' share.
    """

    texts: PairStatistics
    images: PairStatistics | None
    weight: float


class Problem(NamedTuple):
    """Statistics that a linear map is to be fitted to, and the means to which its offsets belong.

    Attributes:
        stats: Of texts and images together, less their means if they are centred.
        raw: The same before centring, beside which rounding is judged (:attr:`PairStatistics.rounding`).
        text_means: New and old mean, or ``None`` for a map without offset.
        image_means: Those of images where they have an offset of their own.
    """

    stats: PairStatistics
    raw: PairStatistics
    text_means: tuple[Tensor, Tensor] | None = None
    image_means: tuple[Tensor, Tensor] | None = None


def gather(
    new: Source,
    old: Source,
    terms: Collection[Term],
    pairs: PairVectors | None = None,
    pairs_weight: float | None = None,
    centring: Centring = "none",
) -> Gathered:
    """Gathers the statistics of a fit in one pass.

    Args:
        new: Vectors of the new model.
        old: Vectors of the old model, row by row for the same items.
        terms: What to gather; the sums come by themselves where there is centring.
        pairs: Pairs whose images take part, if any.
        pairs_weight: ω in [0, 1); ``None`` is :data:`PAIRS_WEIGHT` with pairs and 0 without.
        centring: See :func:`prepare`; ``"modality"`` needs the images even if ω is 0.

    Raises:
        ConfigError: If ω is out of range or asks for images that are not there, or the centring is not known.
        DataError: As :meth:`PairStatistics.of`.
        SpaceMismatchError: If the pairs' vectors have other dimensions than the texts'.
    """
    check_centring(centring)
    weight = (0.0 if pairs is None else PAIRS_WEIGHT) if pairs_weight is None else pairs_weight
    _check_weight(weight)
    terms = {*terms, "sums"} if centring != "none" else set(terms)
    images = None
    if weight > 0 or centring == "modality":
        if pairs is None:
            wanted = f"pairs_weight={weight}" if weight > 0 else "centring='modality'"
            raise ConfigError(f"{wanted} needs images under both models; give pairs=PairVectors(...)")
        images = PairStatistics.of_images(pairs, terms)
    texts = PairStatistics.of(new, old, terms)
    if pairs is not None and pairs.dims != texts.dims:
        raise SpaceMismatchError(
            f"the pairs have vectors of {pairs.dims[0]} (new) and {pairs.dims[1]} (old) dimensions, but the "
            f"vectors to fit have {texts.dims[0]} and {texts.dims[1]}; embed both with the same two models"
        )
    return Gathered(texts, images, weight)


def prepare(
    texts: PairStatistics, images: PairStatistics | None, weight: float, centring: Centring
) -> Problem:
    """Mixes texts and images and centres them.

    ``"none"`` leaves the vectors as they are. ``"joint"`` takes one mean off all of them, that of texts and
    images as they are mixed, which is the least-squares offset of a map with one offset. ``"modality"`` takes
    their own means off texts and off images, so that the gap between both does not take part; texts and
    images then have offsets of their own.

    Raises:
        ConfigError: If the images are needed and not there, a term is missing, or a value is not known.
        DataError: If NᵀO is zero, so that the vectors say nothing of each other.
    """
    check_centring(centring)
    _check_weight(weight)
    if images is None and (weight > 0 or centring == "modality"):
        wanted = f"pairs_weight={weight}" if weight > 0 else "centring='modality'"
        raise ConfigError(f"{wanted} needs images under both models; give their statistics as well")
    mixed = texts if images is None or weight == 0 else texts.mixed(images, weight)
    if mixed.cross is not None and not bool(mixed.cross.any()):
        raise DataError(
            "the products of new and old vectors are all zero, so there is nothing to fit; look whether the "
            "vectors of one side are all zero"
        )
    if centring == "none":
        return Problem(mixed, mixed)
    if centring == "joint" or images is None:
        return Problem(mixed.centred(), mixed, mixed.means)
    centred = texts.centred()
    if weight > 0:
        centred = centred.mixed(images.centred(), weight)
    return Problem(centred, mixed, texts.means, images.means)


def linear_map(weight: Tensor, problem: Problem, filled: int = 0) -> LinearProjection:
    """The projection of an (old_dim, new_dim) matrix, with the offsets that take new means to old means.

    Raises:
        DataError: If the map is too large: beside such an offset, vectors of usual lengths are nothing.
    """

    def offset(means: tuple[Tensor, Tensor] | None) -> Tensor | None:
        return None if means is None else means[1] - weight @ means[0]

    offsets = offset(problem.text_means), offset(problem.image_means)
    limits = [(weight, _MAX_WEIGHT), *((each, _MAX_OFFSET) for each in offsets if each is not None)]
    for tensor, limit in limits:
        largest = float(tensor.abs().max())
        if not largest <= limit:
            raise DataError(
                f"the fitted map has values up to {largest:.3g}, too large to be of use; give vectors "
                "of about unit length"
            )
    projection = LinearProjection.from_weight(weight, *offsets)
    projection.filled = filled
    return projection


def cross_rounding(problem: Problem) -> float:
    """Largest singular value of NᵀO that rounding alone can make; centring takes nothing off it."""
    return problem.raw.rounding * float(torch.linalg.matrix_norm(problem.raw.term("cross")))


def square_rounding(raw: PairStatistics, gram: Literal["new_gram", "old_gram"]) -> float:
    """Largest sum of squares along one direction that rounding alone can make."""
    return _ONE_DIRECTION * raw.rounding * float(raw.term(gram).diagonal().mean())


class Factor(NamedTuple):
    """The orthonormal factor of a matrix.

    Attributes:
        weight: (old_dim, new_dim) float64 with orthonormal rows (or columns, if old_dim > new_dim).
        filled: How many of its min(old_dim, new_dim) directions the matrix does not determine.
    """

    weight: Tensor
    filled: int


def orthogonal_factor(cross: Tensor, rounding: float) -> Factor:
    """The orthonormal factor of a matrix: from C = P Σ Qᵀ the map (P Qᵀ)ᵀ, the same on every call.

    Where the singular values are rounding, the data do not say where a direction belongs, and singular
    vectors depend on the solver. There the factor is completed by the rotation nearest to
    truncation or zero-padding between what is left of both sides (with a fixed, small generic part, where
    that is not unique): rows or columns are always orthonormal, and do not depend on the order of the
    vectors.

    Args:
        cross: (new_dim, old_dim) float64.
        rounding: Singular values up to here are rounding.
    """
    left, values, right = torch.linalg.svd(cross, full_matrices=False)
    known = int((values > rounding).sum())
    factor: Tensor = left[:, :known] @ right[:known]
    if known < len(values):
        new_rest, old_rest = (_complement(side) for side in (left[:, :known], right[:known].T))
        generator = torch.Generator().manual_seed(0)
        generic = torch.randn(cross.shape, generator=generator, dtype=torch.float64)
        nearest = torch.eye(*cross.shape, dtype=torch.float64) + _GENERIC * generic
        left, _, right = torch.linalg.svd(new_rest.T @ nearest @ old_rest, full_matrices=False)
        factor = factor + new_rest @ left @ right @ old_rest.T
    return Factor(factor.T.contiguous(), len(values) - known)


def _complement(basis: Tensor) -> Tensor:
    """An orthonormal basis of what (dim, k) orthonormal columns leave."""
    complete: Tensor = torch.linalg.qr(basis, mode="complete").Q
    return complete[:, basis.shape[1] :]


def check_centring(centring: str) -> None:
    """Refuses what is not a :data:`Centring`.

    Raises:
        ConfigError: If it is not known.
    """
    if centring not in get_args(Centring):
        raise ConfigError(f"centring {centring!r} is not known; use 'none', 'joint' or 'modality'")


def _check_weight(weight: float) -> None:
    if not 0 <= weight < 1:
        raise ConfigError(f"pairs_weight must be at least 0 and below 1, got {weight}")
