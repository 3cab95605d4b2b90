"""Image–text pairs as vectors under both models, to tune, select and judge maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xbt.errors import DataError
from xbt.evaluation.cells import DIRECTIONS
from xbt.store.store import EmbeddingStore
from xbt.vectors import Vectors, as_vectors, unit_rows

_ROUNDING = 1e-6


class Searched(NamedTuple):
    """Gallery rows and answers of one direction, prepared for ranking.

    Attributes:
        rows: (u, old_dim) the distinct rows of the gallery.
        row_of_item: (m,) int64, the row of every gallery item.
        copies: (u,) int64, number of items of each row.
        answers: (n_queries, most answers) int64 gallery items, filled up with -1.
    """

    rows: Tensor
    row_of_item: Tensor
    copies: Tensor
    answers: Tensor


@dataclass(frozen=True)
class PairVectors:
    """Images, texts, and which image each text describes, as unit vectors of the old and the new model.

    Vectors may be given as tensors, arrays or stores; stores are read whole. The old vectors of the images
    are rows of the gallery, so they exist already. Rows are normalised when the object is made.
    ``new_images`` may be missing where only text queries are of interest: then there is only the direction
    T2I.

    Attributes:
        new_texts: (n_texts, new_dim) float32.
        old_texts: (n_texts, old_dim) float32.
        old_images: (n_images, old_dim) float32.
        image_of_text: (n_texts,) int64, the image each text describes; every image has at least one text.
        new_images: (n_images, new_dim) float32, or ``None``.

    Raises:
        DataError: If vectors are empty, hold NaN or zero rows, are not of the same items, or an image has no
            text.
        SpaceMismatchError: If texts and images of a model differ in dimension, or are stores of other spaces.
    """

    new_texts: Tensor
    old_texts: Tensor
    old_images: Tensor
    image_of_text: Tensor
    new_images: Tensor | None = None

    def __post_init__(self) -> None:
        for texts, images, side in (
            (self.new_texts, self.new_images, "new"),
            (self.old_texts, self.old_images, "old"),
        ):
            if isinstance(texts, EmbeddingStore) and isinstance(images, EmbeddingStore):
                texts.space.require(images.space, f"the {side} image vectors of the pairs")
        old_texts = _unit_rows(self.old_texts, "old text vectors of the pairs")
        new_texts = _unit_rows(self.new_texts, "new text vectors of the pairs")
        old_images = _unit_rows(self.old_images, "old image vectors of the pairs", old_texts.shape[1])
        new_images = self.new_images
        if new_images is not None:
            new_images = _unit_rows(new_images, "new image vectors of the pairs", new_texts.shape[1])
        owner = torch.as_tensor(np.asarray(self.image_of_text), dtype=torch.int64)
        for name, rows, count in (
            ("new text", new_texts, len(owner)),
            ("old text", old_texts, len(owner)),
            ("new image", new_images, len(old_images)),
        ):
            if rows is not None and len(rows) != count:
                raise DataError(f"the pairs have {len(rows)} {name} vectors where {count} are needed")
        counts = torch.bincount(owner.clamp(0), minlength=len(old_images))
        if int(owner.min()) < 0 or len(counts) > len(old_images):
            raise DataError(
                f"image_of_text names an image outside 0 to {len(old_images) - 1}; use rows of old_images"
            )
        if int(counts.min()) == 0:
            raise DataError(f"image {int(counts.argmin())} of the pairs has no text; leave that image out")
        for name, value in (
            ("new_texts", new_texts),
            ("old_texts", old_texts),
            ("old_images", old_images),
            ("image_of_text", owner),
            ("new_images", new_images),
        ):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.old_images)

    @property
    def dims(self) -> tuple[int, int]:
        """Dimension of the new and of the old vectors."""
        return self.new_texts.shape[1], self.old_texts.shape[1]

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions in which there are new queries: T2I, and I2T if there are new image vectors."""
        return DIRECTIONS[:1] if self.new_images is None else DIRECTIONS

    def positives(self, direction: str) -> list[list[int]]:
        """For every query of a direction the gallery rows that answer it.

        Raises:
            DataError: If the direction is neither ``"T2I"`` nor ``"I2T"``.
        """
        _check_direction(direction)
        if direction == "T2I":
            return [[image] for image in self.image_of_text.tolist()]
        texts: list[list[int]] = [[] for _ in range(len(self))]
        for text, image in enumerate(self.image_of_text.tolist()):
            texts[image].append(text)
        return texts

    def queries(self, direction: str) -> tuple[Tensor, Tensor]:
        """The queries of a direction under the new and under the old model, row by row.

        Raises:
            DataError: If there is no such direction, or the pairs have no new image vectors for it.
        """
        _check_direction(direction)
        if direction == "T2I":
            return self.new_texts, self.old_texts
        if self.new_images is None:
            raise DataError(
                "the pairs have no new image vectors, so there are no I2T queries; give new_images"
            )
        return self.new_images, self.old_images

    def gallery(self, direction: str) -> Tensor:
        """The rows that the queries of a direction are searched in: the old images, or the old texts.

        Raises:
            DataError: If there is no such direction.
        """
        _check_direction(direction)
        return self.old_images if direction == "T2I" else self.old_texts

    def searched(self, direction: str) -> Searched:
        """The gallery of a direction and the answers in it, prepared once for any number of rankings.

        Raises:
            DataError: If there is no such direction.
        """
        _check_direction(direction)
        return self._searched[direction]

    @cached_property
    def _searched(self) -> dict[str, Searched]:
        prepared = {}
        for direction in DIRECTIONS:
            # BLAS may round one inner product differently in different columns; scored once, equal rows tie.
            rows, row_of_item = torch.unique(self.gallery(direction), dim=0, return_inverse=True)
            positives = [torch.tensor(items) for items in self.positives(direction)]
            answers = pad_sequence(positives, batch_first=True, padding_value=-1)
            prepared[direction] = Searched(rows, row_of_item, torch.bincount(row_of_item), answers)
        return prepared

    def groups(self, direction: str) -> Tensor:
        """(n_queries,) int64, the image of every query; queries of one image are not independent."""
        return self.image_of_text if direction == "T2I" else torch.arange(len(self))

    def subset(self, images: Sequence[int] | Tensor) -> Self:
        """Some of the images, in the order given, with all of their texts.

        Raises:
            DataError: If there are none.
        """
        chosen = torch.as_tensor(images, dtype=torch.int64)
        if len(chosen) == 0:
            raise DataError("a subset of the pairs needs at least one image")
        place = torch.full((len(self),), -1, dtype=torch.int64)
        place[chosen] = torch.arange(len(chosen))
        texts = torch.nonzero(place[self.image_of_text] >= 0).flatten()
        return replace(
            self,
            new_texts=self.new_texts[texts],
            old_texts=self.old_texts[texts],
            old_images=self.old_images[chosen],
            image_of_text=place[self.image_of_text[texts]],
            new_images=None if self.new_images is None else self.new_images[chosen],
        )

    def folds(self, count: int, seed: int = 0) -> list[tuple[Self, Self]]:
        """Splits the images into ``count`` parts and gives (all but one part, that part) for each of them.

        Raises:
            DataError: If there are fewer images than parts, or fewer than two parts.
        """
        if not 2 <= count <= len(self):
            raise DataError(f"{len(self)} images cannot be split into {count} folds; use 2 to {len(self)}")
        order = np.random.default_rng(seed).permutation(len(self))
        parts = np.array_split(order, count)
        return [
            (
                self.subset(torch.from_numpy(np.sort(np.concatenate(parts[:i] + parts[i + 1 :])))),
                self.subset(torch.from_numpy(np.sort(part))),
            )
            for i, part in enumerate(parts)
        ]


def _check_direction(direction: str) -> None:
    if direction not in DIRECTIONS:
        raise DataError(f"there is no direction {direction!r}; use 'T2I' or 'I2T'")


def _unit_rows(vectors: Vectors | EmbeddingStore, name: str, dim: int | None = None) -> Tensor:
    if isinstance(vectors, EmbeddingStore):
        vectors = vectors.rows(np.arange(len(vectors)))
    rows = as_vectors(vectors, name, dim)
    empty = ~rows.any(dim=1)
    if bool(empty.any()):
        raise DataError(f"{name} has zero rows, first row {int(torch.nonzero(empty)[0])}; leave them out")
    # Unit rows stay as they are, bit by bit: a part of the pairs has the same vectors as the whole.
    near = (rows.norm(dim=1, keepdim=True) - 1).abs() < _ROUNDING
    return torch.where(near, rows, unit_rows(rows)).float()
