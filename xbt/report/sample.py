"""The sample of a report: vectors of images and texts under both models, and their display."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from xbt.data import CaptionSource, ImageTextPairs, PairSource, load_pairs, read_captions
from xbt.data.items import choose_subset
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError, ImageError
from xbt.images import ImageSource, load_image
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import Source
from xbt.report.config import UpgradeReportConfig
from xbt.space import EmbeddingSpace


@dataclass(frozen=True)
class Shown:
    """Images and texts of a sample for display.

    Attributes:
        ids: A name per image.
        texts: The texts, or ``None`` if only their vectors are known.
        images: The images, or ``None`` if only their vectors are known.
    """

    ids: list[str]
    texts: list[str] | None = None
    images: Sequence[ImageSource] | None = None

    def picture(self, row: int) -> Image.Image | None:
        """Load an image; ``None`` if there is none or it cannot be decoded."""
        if self.images is None:
            return None
        try:
            return load_image(self.images[row], name=self.ids[row])
        except ImageError:
            return None

    def text(self, row: int, image: int) -> str:
        """A text; if it is unknown, its row and the id of its image."""
        return f"text {row} (of {self.ids[image]})" if self.texts is None else self.texts[row]

    def subset(self, images: list[int], texts: list[int]) -> Self:
        """Select images and their texts."""
        chosen = self.images
        return replace(
            self,
            ids=[self.ids[row] for row in images],
            texts=None if self.texts is None else [self.texts[row] for row in texts],
            images=None if chosen is None else [chosen[row] for row in images],
        )


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        name: Its specification, or the source of its vectors.
        dim: Dimension of its vectors.
        space: Its space, if known.
        encoder: The model, if it was loaded.
        seconds_per_image: Mean time to embed an image of the sample, including decoding.
    """

    name: str
    dim: int
    space: EmbeddingSpace | None = None
    encoder: DualEncoder | None = None
    seconds_per_image: float | None = None


@dataclass(frozen=True)
class Sample:
    """A sample of the user's images and texts.

    Attributes:
        pairs: Vectors of images and texts.
        shown: Images and texts for display.
        old: The old model.
        new: The new model.
        corpus: New and old vectors of texts to fit maps to; ``None`` if only the pairs' texts can be used.
        available: Number of images the sample was drawn from.
        notes: Notes for the user on the source of the data, a sentence each.
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
        """Select images (rows ascending) with all of their texts."""
        texts = texts_of(self.pairs.image_of_text, images)
        return replace(self, pairs=self.pairs.subset(images), shown=self.shown.subset(images, texts))

    def split(self, fraction: float, seed: int) -> tuple[Self, Self]:
        """Split into the part that chooses the method and the part that measures it."""
        count = min(max(round(fraction * len(self)), 1), len(self) - 1)
        chosen = choose_subset(len(self), count, seed)
        taken = set(chosen)
        return self.subset(chosen), self.subset([row for row in range(len(self)) if row not in taken])


def texts_of(owner: Tensor, images: list[int]) -> list[int]:
    """Rows of the texts of some images, ascending."""
    return [int(row) for row in torch.nonzero(torch.isin(owner, torch.tensor(images))).flatten()]


_WARM_UP = 4


def embed_sample(config: UpgradeReportConfig, ready: Callable[[], None]) -> Sample:
    """Draw a sample of the pairs, and embed it and the corpus with both models.

    ``ready`` is called after everything was loaded and before anything is embedded.

    Warns:
        UserWarning: If images were left out because they cannot be decoded.
    """
    assert config.pairs is not None
    assert config.old is not None
    assert config.new is not None
    pairs, available, skipped = _draw(config.pairs, config.sample, config.seed)
    corpus = None if config.captions is None else _corpus(config.captions, pairs)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoders = [load_encoder(spec, device) for spec in (config.old, config.new)]
    ready()
    texts, images, fitted, sides = [], [], [], []
    for encoder in encoders:
        texts.append(encoder.encode_texts(list(pairs.texts), progress=True))
        vectors, seconds = _timed_images(encoder, pairs.images)
        images.append(vectors)
        fitted.append(None if corpus is None else encoder.encode_texts(corpus, progress=True))
        sides.append(Side(encoder.name, encoder.dim, encoder.space, encoder, seconds / len(pairs)))
    owner = torch.tensor(pairs.text_image)
    vectors_of_pairs = PairVectors(texts[1], texts[0], images[0], owner, images[1])
    fits = None if fitted[0] is None or fitted[1] is None else (fitted[1], fitted[0])
    shown = Shown(pairs.ids, pairs.texts, pairs.images)
    return Sample(vectors_of_pairs, shown, sides[0], sides[1], fits, available, (), skipped)


def _draw(
    source: PairSource, count: int, seed: int
) -> tuple[ImageTextPairs, int, tuple[tuple[str, str], ...]]:
    """A sample of readable pairs, the number of available pairs, and the unreadable images."""
    pairs = load_pairs(source)
    drawn, rejected = pairs.select(choose_subset(len(pairs), count, seed)).drop_unreadable(progress=True)
    if rejected:
        listed = "; ".join(image.reason for image in rejected[:5])
        warnings.warn(f"skipped {len(rejected)} of the sample's images: {listed}", stacklevel=4)
    return drawn, len(pairs), tuple((image.id, image.reason) for image in rejected)


def _corpus(source: CaptionSource, pairs: ImageTextPairs) -> list[str]:
    """Captions without those of the pairs, so that a map is not tested on its training data."""
    held_out = set(pairs.texts)
    corpus = [text for text in dict.fromkeys(read_captions(source)) if text not in held_out]
    if not corpus:
        raise ConfigError("every caption is one of the pairs' own; give --captions of other images")
    return corpus


def _timed_images(encoder: DualEncoder, images: Sequence[ImageSource]) -> tuple[Tensor, float]:
    """Vectors, and the seconds to compute them, including decoding but not the warm-up."""
    listed = [images[row] for row in range(len(images))]
    encoder.encode_images(listed[:_WARM_UP])
    start = time.perf_counter()
    vectors = encoder.encode_images(listed, progress=True)
    return vectors, time.perf_counter() - start
