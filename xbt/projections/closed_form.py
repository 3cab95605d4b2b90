"""Closed forms: what they have in common, the baselines, and the Procrustes rotation.

Every closed form takes vectors, or :class:`PairStatistics` that were gathered for several fits: those of the
texts in place of the new vectors, and of the images, or ``None``, in place of the old ones. ω is then 0
unless it is given.

Where pairs are given, their images take part: the objective is (1 − ω) times its mean over the texts plus ω
times its mean over the images, each photo under both models. ω = 0 leaves the images out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections.base import LinearProjection
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import PairedRows, PairStatistics, Source, Term

Centring = Literal["none", "joint", "modality"]
Data = Source | PairStatistics
"""Vectors of one model, or statistics; see the module."""

PAIRS_WEIGHT = 0.33
"""ω where pairs are given and no weight is."""

_GENERIC = 1e-4
_MAX_OFFSET, _MAX_WEIGHT = 2.0**40, 2.0**100
_ONE_DIRECTION = 10.0


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

    @property
    def cross_rounding(self) -> float:
        """Largest singular value of NᵀO that rounding alone can make; centring takes nothing off it."""
        return self.raw.rounding * float(torch.linalg.matrix_norm(self.raw.term("cross")))

    def square_rounding(self, gram: Literal["new_gram", "old_gram"]) -> float:
        """Largest sum of squares along one direction that rounding alone can make."""
        return _ONE_DIRECTION * self.raw.rounding * float(self.raw.term(gram).diagonal().mean())


def prepare(
    new: Data,
    old: Data | None,
    terms: Collection[Term],
    pairs: PairVectors | None,
    pairs_weight: float | None,
    centring: Centring,
) -> Problem:
    """Gather the statistics of a fit in one pass, mix texts and images, and centre them.

    Args:
        new: Vectors of the new model, or statistics of the texts.
        old: Vectors of the old model, row by row for the same items, or statistics of the images.
        terms: What to gather; the sums come by themselves where there is centring.
        pairs: Pairs whose images take part, if any.
        pairs_weight: ω in [0, 1); ``None`` is :data:`PAIRS_WEIGHT` with pairs and 0 without.
        centring: ``"none"`` leaves the vectors as they are. ``"joint"`` takes one mean off all of them, that
            of texts and images as they are mixed, which is the least-squares offset of a map with one offset.
            ``"modality"`` takes their own means off texts and off images, also where ω is 0, so that the gap
            between both does not take part; texts and images then have offsets of their own.

    Raises:
        ConfigError: If ω is out of range or asks for images that are not there, the centring is not known,
            or statistics lack a term.
        DataError: As :meth:`PairStatistics.of`; or if NᵀO is zero, so that the vectors say nothing of each
            other.
        SpaceMismatchError: If the pairs' vectors have other dimensions than the texts'.
    """
    if centring not in get_args(Centring):
        raise ConfigError(f"centring {centring!r} is not known; use 'none', 'joint' or 'modality'")
    weight = checked_share(pairs, pairs_weight)
    given = isinstance(new, PairStatistics)
    if given and (pairs is not None or not isinstance(old, PairStatistics | None)):
        raise ConfigError("beside statistics of texts give statistics of images, or None, and no pairs")
    if (weight > 0 or centring == "modality") and (old if given else pairs) is None:
        wanted = f"pairs_weight={weight}" if weight > 0 else "centring='modality'"
        also = "their statistics as well" if given else "pairs=PairVectors(...)"
        raise ConfigError(f"{wanted} needs images under both models; give {also}")
    if isinstance(new, PairStatistics):
        texts, images = new, old if isinstance(old, PairStatistics) else None
    else:
        if old is None or isinstance(old, PairStatistics):
            raise ConfigError("there are no old vectors to fit to; give those of the same items")
        terms = {*terms, "sums"} if centring != "none" else set(terms)
        with_images = pairs is not None and (weight > 0 or centring == "modality")
        images = PairStatistics.of_images(pairs, terms) if with_images and pairs is not None else None
        texts = PairStatistics.of(new, old, terms)
        require_same_models(pairs, texts.dims)
    return _centred(texts, images, weight, centring)


def checked_share(pairs: PairVectors | None, weight: float | None) -> float:
    """ω as given, or the default; a ConfigError if it is not in [0, 1)."""
    weight = (0.0 if pairs is None else PAIRS_WEIGHT) if weight is None else weight
    if not 0 <= weight < 1:
        raise ConfigError(f"pairs_weight must be at least 0 and below 1, got {weight}")
    return weight


def require_same_models(pairs: PairVectors | None, dims: tuple[int, int]) -> None:
    """Refuse pairs of other dimensions than the texts' with a SpaceMismatchError."""
    if pairs is not None and pairs.dims != dims:
        raise SpaceMismatchError(
            f"the pairs have vectors of {pairs.dims[0]} (new) and {pairs.dims[1]} (old) dimensions, but the "
            f"vectors to fit have {dims[0]} and {dims[1]}; embed both with the same two models"
        )


def _centred(
    texts: PairStatistics, images: PairStatistics | None, weight: float, centring: Centring
) -> Problem:
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
    """The projection of an (old_dim, new_dim) matrix, with the offsets that take new means to old means."""

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


def orthogonal_factor(cross: Tensor, rounding: float) -> tuple[Tensor, int]:
    """The orthonormal factor of a matrix: from C = P Σ Qᵀ the map (P Qᵀ)ᵀ, the same on every call.

    Where the singular values are rounding, the data do not say where a direction belongs, and singular
    vectors depend on the solver. There the factor is completed by the rotation nearest to
    truncation or zero-padding between what is left of both sides (with a fixed, small generic part, where
    that is not unique): rows or columns are always orthonormal, and do not depend on the order of the
    vectors.

    Args:
        cross: (new_dim, old_dim) float64.
        rounding: Singular values up to here are rounding.

    Returns:
        (old_dim, new_dim) float64 with orthonormal rows (or columns, if old_dim > new_dim), and how many of
        its min(old_dim, new_dim) directions the matrix does not determine.
    """
    left, values, right = torch.linalg.svd(cross, full_matrices=False)
    known = int((values > rounding).sum())
    factor: Tensor = left[:, :known] @ right[:known]
    if known < len(values):
        # Orthonormal bases of what the known columns leave.
        new_rest, old_rest = (
            torch.linalg.qr(side, mode="complete").Q[:, known:] for side in (left[:, :known], right[:known].T)
        )
        generator = torch.Generator().manual_seed(0)
        generic = torch.randn(cross.shape, generator=generator, dtype=torch.float64)
        nearest = torch.eye(*cross.shape, dtype=torch.float64) + _GENERIC * generic
        left, _, right = torch.linalg.svd(new_rest.T @ nearest @ old_rest, full_matrices=False)
        factor = factor + new_rest @ left @ right @ old_rest.T
    return factor.T.contiguous(), len(values) - known


def fit_identity(new: Data, old: Data | None = None) -> LinearProjection:
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
    stats = new if isinstance(new, PairStatistics) else prepare(new, old, (), None, None, "none").raw
    new_dim, old_dim = stats.dims
    return LinearProjection.from_weight(torch.eye(old_dim, new_dim))


def fit_mean_shift(
    new: Data, old: Data | None = None, *, pairs: PairVectors | None = None
) -> LinearProjection:
    """Moves z, cut or filled up with zeros, by (mean of the old vectors − mean of the new ones).

    Query drift compensation (Goswami et al. 2025, "Query Drift Compensation: Enabling Compatibility in
    Continual Learning of Retrieval Embedding Models", arXiv 2506.00037), made for a model that was trained on
    and has moved little; between models that were trained apart it does no better than
    :func:`fit_identity`. Rows are used as they are given.

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
    images = old if isinstance(new, PairStatistics) else pairs
    terms: tuple[Term, ...] = ("sums",)
    problem = prepare(new, old, terms, pairs, 0.0, "joint" if images is None else "modality")
    new_dim, old_dim = problem.raw.dims
    return linear_map(torch.eye(old_dim, new_dim, dtype=torch.float64), problem)


def fit_procrustes(
    new: Data,
    old: Data | None = None,
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
        :func:`fit_identity`, and carry next to nothing of the vectors.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If the vectors are empty, not paired, hold NaN, or are all zero on one side.
        SpaceMismatchError: If the pairs have other dimensions.
    """
    terms: tuple[Term, ...] = ("cross", "new_gram") if scale else ("cross",)
    problem = prepare(new, old, terms, pairs, pairs_weight, centring)
    weight, filled = orthogonal_factor(problem.stats.term("cross"), problem.cross_rounding)
    if scale:
        products = (weight * problem.stats.term("cross").T).sum(dim=1)
        squares = ((weight @ problem.stats.term("new_gram")) * weight).sum(dim=1)
        # Nothing is known of the length of a coordinate that is always 0.
        scales = torch.where(squares > problem.square_rounding("new_gram"), products / squares, 1.0)
        weight = scales[:, None] * weight
    return linear_map(weight, problem, filled)


def procrustes_rotation(new: Source, old: Source) -> Tensor:
    """The (old_dim, new_dim) float32 matrix W of :func:`fit_procrustes` without options.

    Raises:
        DataError: If the row counts differ, there are no rows, a value is NaN, or one side is all zero.
    """
    return fit_procrustes(new, old).weight.detach()


def procrustes_rotation_of_chunks(chunks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Fit as :func:`procrustes_rotation`, for pairs of chunks.

    Args:
        chunks: At least one pair of (k, new_dim) and (k, old_dim) vectors of the same items, without NaN; k
            may differ from piece to piece.

    Returns:
        (old_dim, new_dim) float32 matrix W.

    Raises:
        DataError: If there is no piece, a value is NaN or infinite, or one side is all zero.
    """
    return fit_procrustes(PairStatistics.from_chunks(chunks)).weight.detach()


class ProcrustesStart(NamedTuple):
    """The Procrustes rotation, and the means it was taken about.

    Attributes:
        rotation: (old_dim, new_dim) float32 matrix W.
        means: ``new_mean`` and ``old_mean``, and of images ``new_image_mean`` and ``old_image_mean``; empty
            if nothing was centred.
    """

    rotation: Tensor
    means: dict[str, Tensor]


def procrustes_start(
    rows: PairedRows,
    positions: NDArray[np.int64] | None = None,
    *,
    centred: bool = False,
    pairs: PairVectors | None = None,
    pairs_weight: float = 0.0,
) -> ProcrustesStart:
    """Solves the Procrustes problem over texts, and over pairs' images where they are given.

    With N, O the texts' vectors under both models and M, G those of the images, each row maybe less its mean,

        C = (1 − ω) Nᵀ O / n + ω Mᵀ G / m = P Σ Qᵀ,      Wᵀ = P Qᵀ

    See :func:`fit_procrustes`; here rows may be taken in any order.

    Args:
        rows: The texts' vectors.
        positions: (n,) int64, which of them to use; ``None`` uses all.
        centred: Whether to take the means off; images have means of their own where ``pairs`` has them.
        pairs: Image–text pairs; their texts are not looked at.
        pairs_weight: ω in [0, 1).

    Returns:
        The rotation and the means.
    """
    positions = np.arange(len(rows)) if positions is None else positions
    if len(positions) == 0:
        raise DataError("new and old vectors are empty: there are 0 rows; give at least one pair")
    terms: tuple[Term, ...] = ("cross", "sums") if centred else ("cross",)
    texts = PairStatistics.from_chunks(rows.chunks(positions), terms)
    images = None
    if pairs is not None and pairs.new_images is not None and (centred or pairs_weight > 0):
        images = PairStatistics.of_images(pairs, terms)
    centring: Centring = "none" if not centred else "joint" if images is None else "modality"
    weight = 0.0 if images is None else pairs_weight
    rotation = fit_procrustes(texts, images, pairs_weight=weight, centring=centring).weight.detach()
    means: dict[str, Tensor] = {}
    if centred:
        means |= zip(("new_mean", "old_mean"), texts.means, strict=True)
        if images is not None:
            means |= zip(("new_image_mean", "old_image_mean"), images.means, strict=True)
    return ProcrustesStart(rotation, {name: mean.float() for name, mean in means.items()})
