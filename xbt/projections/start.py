"""Where trained maps begin: the Procrustes rotation, maybe about the means and maybe with pairs' images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError
from xbt.projections.closed_form import Centring
from xbt.projections.pairs import PairVectors
from xbt.projections.procrustes import procrustes_from
from xbt.projections.statistics import PairStatistics, Term

_ROWS_AT_ONCE = 8_192


class PairedVectors(Protocol):
    """Vectors of the same items under both models that can be read in any order."""

    def __len__(self) -> int: ...

    @property
    def dims(self) -> tuple[int, int]:
        """Dimension of the new and of the old vectors."""

    def take(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(k, new_dim) and (k, old_dim) vectors of some items, in the order asked for."""


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
    ordered = np.sort(positions)  # the order that disks like best
    for start in range(0, len(ordered), _ROWS_AT_ONCE):
        yield rows.take(ordered[start : start + _ROWS_AT_ONCE])
