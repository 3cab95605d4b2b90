"""The sample that an upgrade is judged by: images and texts under both models, and how to show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from xbt.data.image_text_pairs import choose_subset
from xbt.encoders import DualEncoder
from xbt.errors import ImageError
from xbt.images import ImageSource, load_image
from xbt.projections import PairVectors
from xbt.projections.sources import Source
from xbt.space import EmbeddingSpace


@dataclass(frozen=True)
class Shown:
    """How images and texts are shown.

    Attributes:
        ids: A name per image.
        texts: The texts, or ``None`` where only their vectors are known.
        images: The images, or ``None``, likewise.
    """

    ids: list[str]
    texts: list[str] | None = None
    images: Sequence[ImageSource] | None = None

    def picture(self, row: int) -> Image.Image | None:
        """An image, or ``None`` where there is none or it cannot be decoded."""
        if self.images is None:
            return None
        try:
            return load_image(self.images[row], name=self.ids[row])
        except ImageError:
            return None

    def text(self, row: int, image: int) -> str:
        """A text, or where its wording is not known what it belongs to."""
        return f"text {row} (of {self.ids[image]})" if self.texts is None else self.texts[row]

    def subset(self, images: list[int], texts: list[int]) -> Self:
        """Some images and their texts."""
        chosen = self.images
        return replace(
            self,
            ids=[self.ids[row] for row in images],
            texts=None if self.texts is None else [self.texts[row] for row in texts],
            images=None if chosen is None else [chosen[row] for row in images],
        )


@dataclass(frozen=True)
class Side:
    """What is known of one model.

    Attributes:
        name: Its specification, or where its vectors came from.
        dim: Dimension of its vectors.
        space: Its space, where it is known.
        encoder: The model, where it is at hand.
        seconds_per_image: What an image of the sample took, decoding included.
    """

    name: str
    dim: int
    space: EmbeddingSpace | None = None
    encoder: DualEncoder | None = None
    seconds_per_image: float | None = None


@dataclass(frozen=True)
class Sample:
    """Images and texts of the user's own.

    Attributes:
        pairs: Their vectors.
        shown: How they are shown.
        old: The old model.
        new: The new model.
        corpus: New and old vectors of texts to fit maps to; ``None`` where the pairs' texts have to do.
        available: How many images there were to draw from.
        notes: What the user should know about where this comes from, a sentence each.
        skipped: Images that could not be read, with the reason.
    """

    pairs: PairVectors
    shown: Shown
    old: Side
    new: Side
    corpus: tuple[Source, Source] | None
    available: int
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = field(default=())

    def __len__(self) -> int:
        return len(self.pairs)

    def subset(self, images: list[int]) -> Self:
        """Some of the images with all of their texts; ``images`` ascending."""
        texts = texts_of(self.pairs.image_of_text, images)
        return replace(self, pairs=self.pairs.subset(images), shown=self.shown.subset(images, texts))

    def split(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """The part by which the method is chosen, and the part that measures it."""
        count = min(max(round(fraction * len(self)), 1), len(self) - 1)
        chosen = choose_subset(len(self), count, seed)
        taken = set(chosen)
        return self.subset(chosen), self.subset([row for row in range(len(self)) if row not in taken])


def texts_of(owner: Tensor, images: list[int]) -> list[int]:
    """The texts of some images, in their own order."""
    return [int(row) for row in torch.nonzero(torch.isin(owner, torch.tensor(images))).flatten()]
