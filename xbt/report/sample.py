"""The sample that an upgrade is judged by: images and texts under both models, and how to show them.

A sample that is embedded with both models now.
"""

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
from xbt.projections import PairVectors
from xbt.projections.sources import Source
from xbt.report.config import UpgradeReportConfig
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


_WARM_UP = 4


def embed_sample(config: UpgradeReportConfig, ready: Callable[[], None]) -> Sample:
    """Draws a sample of the pairs and embeds it, and the corpus, with both models.

    Args:
        config: With encoders and pairs.
        ready: Called once everything has been loaded and before anything is embedded.

    Raises:
        XbtError: If an encoder, the pairs or the captions cannot be used.

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
    """A sample of readable pairs, how many there were, and what could not be read."""
    pairs = load_pairs(source)
    drawn, rejected = pairs.select(choose_subset(len(pairs), count, seed)).drop_unreadable(progress=True)
    if rejected:
        listed = "; ".join(each.reason for each in rejected[:5])
        warnings.warn(f"skipped {len(rejected)} of the sample's images: {listed}", stacklevel=4)
    return drawn, len(pairs), tuple((each.id, each.reason) for each in rejected)


def _corpus(source: CaptionSource, pairs: ImageTextPairs) -> list[str]:
    """Captions that are none of the pairs' own: a map must not be judged on what it was fitted to."""
    own = set(pairs.texts)
    corpus = [text for text in dict.fromkeys(read_captions(source)) if text not in own]
    if not corpus:
        raise ConfigError("every caption is one of the pairs' own; give --captions of other images")
    return corpus


def _timed_images(encoder: DualEncoder, images: Sequence[ImageSource]) -> tuple[Tensor, float]:
    """Vectors, and the seconds they took, decoding included and the first start not."""
    listed = [images[row] for row in range(len(images))]
    encoder.encode_images(listed[:_WARM_UP])
    start = time.perf_counter()
    vectors = encoder.encode_images(listed, progress=True)
    return vectors, time.perf_counter() - start
