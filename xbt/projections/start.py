"""Where trained maps begin: the Procrustes rotation, maybe about the means and maybe with pairs' images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError
from xbt.projections.pairs import PairVectors
from xbt.projections.procrustes import procrustes_rotation_of_chunks

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
class ClosedForm:
    """The Procrustes rotation, and the means it was taken about.

    Attributes:
        rotation: (old_dim, new_dim) float32 matrix W.
        means: ``new_mean`` and ``old_mean``, and of images ``new_image_mean`` and ``old_image_mean``; empty
            if nothing was centred.
    """

    rotation: Tensor
    means: dict[str, Tensor] = field(default_factory=dict)


def closed_form(
    rows: PairedVectors,
    positions: NDArray[np.int64] | None = None,
    *,
    centred: bool = False,
    pairs: PairVectors | None = None,
    pairs_weight: float = 0.0,
) -> ClosedForm:
    """Solves the Procrustes problem over texts, and over pairs' images where they are given.

    With N, O the texts' vectors under both models and M, G those of the images, each row maybe less its mean,

        C = (1 − ω) Nᵀ O / n + ω Mᵀ G / m = P Σ Qᵀ,      Wᵀ = P Qᵀ

    See :func:`~xbt.projections.procrustes.procrustes_rotation`.

    Args:
        rows: The texts' vectors.
        positions: (n,) int64, which of them to use; ``None`` uses all.
        centred: Whether to take the means off; images have means of their own where ``pairs`` has them.
        pairs: Image–text pairs; their texts are not looked at.
        pairs_weight: ω in [0, 1).

    Returns:
        The rotation and the means.

    Raises:
        DataError: If there are no rows.
    """
    positions = np.arange(len(rows)) if positions is None else positions
    if len(positions) == 0:
        raise DataError("new and old vectors are empty: there are 0 rows; give at least one pair")
    images = None if pairs is None or pairs.new_images is None else (pairs.new_images, pairs.old_images)
    means: dict[str, Tensor] = {}
    if centred:
        means["new_mean"], means["old_mean"] = _means(_chunks(rows, positions))
        if images is not None:
            means["new_image_mean"], means["old_image_mean"] = _means([images])

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for new, old in _chunks(rows, positions):
            yield (new - means["new_mean"], old - means["old_mean"]) if centred else (new, old)
        if images is not None and pairs_weight > 0:
            new, old = images
            if centred:
                new, old = new - means["new_image_mean"], old - means["old_image_mean"]
            # The texts count 1 each, so that without pairs nothing is scaled and nothing rounded.
            yield new.double() * (pairs_weight / (1 - pairs_weight) * len(positions) / len(new)), old.double()

    rotation = procrustes_rotation_of_chunks(pieces())
    return ClosedForm(rotation, {name: mean.float() for name, mean in means.items()})


def _chunks(rows: PairedVectors, positions: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
    ordered = np.sort(positions)  # the order that disks like best
    for start in range(0, len(ordered), _ROWS_AT_ONCE):
        yield rows.take(ordered[start : start + _ROWS_AT_ONCE])


def _means(chunks: Iterator[tuple[Tensor, Tensor]] | list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    sums: tuple[Tensor, Tensor] | None = None
    count = 0
    for new, old in chunks:
        part = new.double().sum(dim=0), old.double().sum(dim=0)
        sums = part if sums is None else (sums[0] + part[0], sums[1] + part[1])
        count += len(new)
    assert sums is not None
    return sums[0] / count, sums[1] / count
