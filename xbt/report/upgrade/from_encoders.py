"""A sample that is embedded with both models now."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xbt.data import CaptionSource, ImageTextPairs, PairSource, load_pairs, read_captions
from xbt.data.image_text_pairs import choose_subset
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError
from xbt.images import ImageSource
from xbt.projections import PairVectors
from xbt.report.upgrade.config import UpgradeReportConfig
from xbt.report.upgrade.sample import Sample, Shown, Side

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
