"""Query/gallery cells of an upgrade, the criterion of compatibility, and the recovered gain.

A cell ``new/old`` is named after the model of the queries, then the model of the gallery. The criterion of
backward compatibility (Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020; for
CLIPs per direction and per k, Jang & Lim, "Towards Cross-modal Backward-compatible Representation Learning
for Vision-Language Models", ICCV 2025) is that ``new/old`` is strictly better than ``old/old``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from PIL import Image
from torch import Tensor

from xbt.errors import DataError
from xbt.evaluation.bootstrap import Difference, compare_ranks
from xbt.evaluation.retrieval import best_positive_ranks, check_ks, check_positives
from xbt.vectors import Vectors

if TYPE_CHECKING:
    from xbt.data import ImageTextPairs
    from xbt.encoders import DualEncoder


DIRECTIONS = ("T2I", "I2T")
"""Text query against the image gallery, and image query against the text gallery."""

PerDirection = dict[str, dict[int, bool]]
Gains = dict[str, dict[int, float | None]]
Differences = dict[str, dict[int, Difference]]


@dataclass(frozen=True)
class Cell:
    """R@k of one pairing of query model and gallery model.

    Attributes:
        name: ``"old/old"``, ``"new/old"`` or ``"new/new"``, optionally with a label: ``"new/old (stage 1)"``.
        t2i: ``{k: fraction}`` for text queries against the image gallery.
        i2t: ``{k: fraction}`` for image queries against the text gallery.
        n_images: Images in the gallery.
        n_texts: Texts in the gallery.
        ranks: Rank of every query by direction, for intervals; empty if not known.
    """

    name: str
    t2i: dict[int, float]
    i2t: dict[int, float]
    n_images: int
    n_texts: int
    ranks: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, name: str, ranks: Mapping[str, Tensor], ks: Sequence[int], n_images: int, n_texts: int
    ) -> Self:
        """Count the hits of ranks by direction."""
        recall = {d: {k: int((rank < k).sum()) / len(rank) for k in ks} for d, rank in ranks.items()}
        return cls(name, recall["T2I"], recall.get("I2T", {}), n_images, n_texts, ranks)

    def recall(self, direction: str) -> dict[int, float]:
        """R@k of ``"T2I"`` or ``"I2T"``.

        Raises:
            DataError: For any other direction.
        """
        if direction not in DIRECTIONS:
            raise DataError(f"there is no direction {direction!r}; use 'T2I' or 'I2T'")
        return self.t2i if direction == "T2I" else self.i2t


def evaluate_cell(
    name: str,
    query_texts: Vectors,
    query_images: Vectors,
    gallery_texts: Vectors,
    gallery_images: Vectors,
    pairs_positives_t2i: Sequence[Sequence[int]],
    pairs_positives_i2t: Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 5, 10),
) -> Cell:
    """Measure one cell in both directions.

    Args:
        name: Name of the cell.
        query_texts: (n_texts, dim) vectors of the query model, searched in ``gallery_images``.
        query_images: (n_images, dim) vectors of the query model, searched in ``gallery_texts``.
        gallery_texts: (n_texts, dim) vectors of the gallery model.
        gallery_images: (n_images, dim) vectors of the gallery model.
        pairs_positives_t2i: The matching images of every text.
        pairs_positives_i2t: The matching texts of every image.
        ks: Cut-offs.

    Raises:
        DataError, SpaceMismatchError: See :func:`xbt.evaluation.recall_at_k`.
    """
    ks = check_ks(ks)
    t2i = best_positive_ranks(query_texts, gallery_images, pairs_positives_t2i)
    i2t = best_positive_ranks(query_images, gallery_texts, pairs_positives_i2t)
    return Cell.of(name, {"T2I": t2i, "I2T": i2t}, ks, len(gallery_images), len(gallery_texts))


def criterion(new_old: Cell, old_old: Cell) -> PerDirection:
    """True where new queries are strictly better than old ones on the old gallery, by direction and k."""
    return {
        direction: {k: value > old_old.recall(direction)[k] for k, value in new_old.recall(direction).items()}
        for direction in DIRECTIONS
    }


def recovered_gain(new_old: Cell, old_old: Cell, new_new: Cell) -> Gains:
    """Share of the gain of re-embedding that the upgrade achieves without it, by direction and k.

    It is (new/old - old/old) / (new/new - old/old): 0 is the old model, 1 is a re-embedded gallery, negative
    is worse than the old model, and ``None`` means that re-embedding gains nothing.
    """
    gains: Gains = {}
    for direction in DIRECTIONS:
        old, full = old_old.recall(direction), new_new.recall(direction)
        gains[direction] = {
            k: (value - old[k]) / (full[k] - old[k]) if full[k] > old[k] else None
            for k, value in new_old.recall(direction).items()
        }
    return gains


def differences(new_old: Cell, old_old: Cell, groups: Mapping[str, Tensor] | None = None) -> Differences:
    """Share of queries fixed and broken, by direction and k, with 95 % bootstrap intervals of the gain.

    Args:
        new_old: A cell with ranks.
        old_old: The baseline cell of the same queries, with ranks.
        groups: Group of every query by direction; queries of a group are not independent.

    Raises:
        DataError: If a cell has no ranks.
    """
    for cell in (new_old, old_old):
        if not cell.ranks:
            raise DataError(f"the cell {cell.name!r} has no ranks to compare; make it with evaluate_cell")
    return {
        direction: {
            k: compare_ranks(
                new_old.ranks[direction], old_old.ranks[direction], k, (groups or {}).get(direction)
            )
            for k in new_old.recall(direction)
        }
        for direction in DIRECTIONS
    }


@dataclass
class RetrievalReport:
    """Cells of one upgrade on one set of pairs, with criterion, gains and intervals.

    Attributes:
        cells: In display order; names are unique, and one is ``"old/old"``.
        groups: Group of every query by direction: texts of one image are not independent.

    Raises:
        DataError: If there is no ``"old/old"``, a name occurs twice, or the cells have different k.
    """

    cells: list[Cell]
    groups: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [cell.name for cell in self.cells]
        if "old/old" not in names:
            raise DataError(f"a report needs the cell 'old/old' to compare with; it has {names}")
        for cell in self.cells:
            if names.count(cell.name) > 1:
                raise DataError(f"the cell {cell.name!r} occurs twice; give each its own name")
            if tuple(cell.t2i) != self.ks or tuple(cell.i2t) != self.ks:
                raise DataError(
                    f"the cell {cell.name!r} has R@{list(cell.t2i)} (T2I) and R@{list(cell.i2t)} (I2T), but "
                    f"{self.cells[0].name!r} has R@{list(self.ks)}; evaluate all cells with the same ks"
                )

    @property
    def ks(self) -> tuple[int, ...]:
        """The cut-offs."""
        return tuple(self.cells[0].t2i)

    @property
    def upgrades(self) -> list[Cell]:
        """Cells whose name starts with ``new/old``."""
        return [cell for cell in self.cells if cell.name.startswith("new/old")]

    @property
    def verdicts(self) -> dict[str, PerDirection]:
        """:func:`criterion` of every upgrade, by the cell's name."""
        return {cell.name: criterion(cell, self.cell("old/old")) for cell in self.upgrades}

    @property
    def gains(self) -> dict[str, Gains]:
        """:func:`recovered_gain` of every upgrade, by the cell's name; empty without a ``new/new`` cell."""
        if all(cell.name != "new/new" for cell in self.cells):
            return {}
        old, new = self.cell("old/old"), self.cell("new/new")
        return {cell.name: recovered_gain(cell, old, new) for cell in self.upgrades}

    @property
    def differences(self) -> dict[str, Differences]:
        """:func:`differences` of every upgrade to old/old, by the cell's name; only for cells with ranks."""
        old = self.cell("old/old")
        ranked = [cell for cell in self.upgrades if cell.ranks and old.ranks]
        return {cell.name: differences(cell, old, self.groups) for cell in ranked}

    def cell(self, name: str) -> Cell:
        """Find a cell by name.

        Raises:
            DataError: If there is none; the message lists the existing names.
        """
        for cell in self.cells:
            if cell.name == name:
                return cell
        raise DataError(f"there is no cell {name!r}; there are {[cell.name for cell in self.cells]}")

    def meets_criterion(self, direction: str, name: str | None = None) -> bool:
        """True if the criterion holds at every k.

        Args:
            direction: ``"T2I"`` or ``"I2T"``.
            name: A ``new/old`` cell; by default all of them must meet the criterion.

        Raises:
            DataError: If the direction or the cell does not exist, or there is no ``new/old`` cell at all.
        """
        chosen = self.upgrades if name is None else [self.cell(name)]
        if not chosen:
            raise DataError("there is no cell 'new/old' to judge; evaluate at least one upgraded encoder")
        old = self.cell("old/old").recall(direction)
        return all(cell.recall(direction)[k] > old[k] for cell in chosen for k in self.ks)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form: counts, fractions, verdicts and recovered gains, with keys such as ``"R@1"``."""
        return {
            "cells": [
                {
                    "name": cell.name,
                    "n_images": cell.n_images,
                    "n_texts": cell.n_texts,
                    **keyed({direction: cell.recall(direction) for direction in DIRECTIONS}),
                }
                for cell in self.cells
            ],
            "criterion": {name: keyed(verdict) for name, verdict in self.verdicts.items()},
            "recovered_gain": {name: keyed(gain) for name, gain in self.gains.items()},
            "difference_to_old_old": {name: keyed(change) for name, change in self.differences.items()},
        }


def evaluate_retrieval(
    pairs: ImageTextPairs,
    old: DualEncoder,
    new: DualEncoder,
    upgraded: Mapping[str, DualEncoder],
    ks: Sequence[int] = (1, 5, 10),
    progress: bool = False,
    own: Mapping[str, DualEncoder] | None = None,
) -> RetrievalReport:
    """Measure old/old, new/old for every upgraded encoder, and new/new on the same pairs.

    Every encoder embeds every image and every text once.

    Args:
        pairs: Images, texts and their matches.
        old: The encoder of the gallery.
        new: The unchanged new encoder; on both sides it shows the result of re-embedding.
        upgraded: Encoders by label, built on the new one, that embed into the old space. A single one is
            named ``new/old``, several are named ``new/old (label)``.
        ks: Cut-offs.
        progress: Show progress bars of the encoders.
        own: Encoders by label to be measured on their own galleries, as ``new/new (label)``; the difference
            to ``new/new`` is the cost of compatibility.

    Raises:
        SpaceMismatchError: If an upgraded encoder does not embed into the old space.
        DataError: If ``ks`` or the pairs cannot be used; both are checked before the embedding.
    """
    ks = check_ks(ks)
    texts, images = list(pairs.texts), LazyImages(pairs)
    t2i, i2t = pairs.positives_t2i, pairs.positives_i2t
    check_positives(t2i, len(texts), len(images), "positives_t2i")
    check_positives(i2t, len(images), len(texts), "positives_i2t")
    for label, encoder in upgraded.items():
        old.space.require(encoder.space, f"the upgraded encoder {label!r}")

    def embed(encoder: DualEncoder) -> tuple[Tensor, Tensor]:
        text_vectors = encoder.encode_texts(texts, progress=progress)
        return text_vectors, encoder.encode_images(images, progress=progress)

    old_vectors = embed(old)
    cells = [evaluate_cell("old/old", *old_vectors, *old_vectors, t2i, i2t, ks)]
    for label, encoder in upgraded.items():
        name = "new/old" if len(upgraded) == 1 else f"new/old ({label})"
        cells.append(evaluate_cell(name, *embed(encoder), *old_vectors, t2i, i2t, ks))
    for label, encoder in (own or {}).items():
        vectors = embed(encoder)
        cells.append(evaluate_cell(f"new/new ({label})", *vectors, *vectors, t2i, i2t, ks))
    new_vectors = embed(new)
    cells.append(evaluate_cell("new/new", *new_vectors, *new_vectors, t2i, i2t, ks))
    first_image = torch.tensor([int(images[0]) for images in t2i])
    return RetrievalReport(cells, {"T2I": first_image, "I2T": torch.arange(len(i2t))})


class LazyImages(Sequence[Image.Image]):
    """Images of pairs, decoded one at a time on access."""

    def __init__(self, pairs: ImageTextPairs) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self._pairs.image(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self._pairs.image(index % len(self))


def keyed(by_direction: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[str, Any]]:
    """Give values by direction and k JSON-able keys such as ``"R@1"``."""
    return {
        direction: {f"R@{k}": v.to_dict() if isinstance(v, Difference) else v for k, v in values.items()}
        for direction, values in by_direction.items()
    }
