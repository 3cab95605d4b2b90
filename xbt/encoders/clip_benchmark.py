"""Encoders in the form that CLIP_benchmark takes, so that an independent evaluation can check xbt's.

CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark) takes any object with ``encode_image`` and
``encode_text``. One run searches the images with the texts and the texts with the images. A cell ``new/old``
therefore needs two runs: one with the new model for the texts, and one with it for the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from xbt.encoders.base import DualEncoder
from xbt.encoders.image_batching import Transform
from xbt.errors import ConfigError
from xbt.images import read_image


class ClipBenchmarkModel(nn.Module):
    """Text tower of one encoder and image tower of another one, which share a space.

    Vectors are those of ``encode_texts`` and ``encode_images``: unit rows, in eval mode, without a graph, and
    in each encoder's own precision regardless of autocast. They stay on the encoder's device. The encoders
    are not submodules, so ``to`` and ``train`` do not change them.

    Args:
        text_encoder: Embeds the texts.
        image_encoder: Embeds the images; by default the text encoder does.

    Raises:
        SpaceMismatchError: If the two do not share a space; the message names both.
    """

    def __init__(self, text_encoder: DualEncoder, image_encoder: DualEncoder | None = None) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.image_encoder = text_encoder if image_encoder is None else image_encoder
        if self.image_encoder is not text_encoder:
            text_encoder.space.require(self.image_encoder.space, "the image encoder")

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(n, dim) float32 unit rows of (n, context_length) int64 tokens."""
        encoder = self.text_encoder
        with encoder._evaluating(), encoder._autocast(encoder.precision):
            return encoder.embed_tokens(tokens)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(n, dim) float32 unit rows of (n, 3, height, width) float32 pixels."""
        encoder = self.image_encoder
        with encoder._evaluating(), encoder._autocast(encoder.precision):
            return encoder.embed_pixels(pixels)

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Image vectors and text vectors."""
        return self.encode_image(pixels), self.encode_text(tokens)


class ClipBenchmarkParts(NamedTuple):
    """The values that CLIP_benchmark's ``load_clip`` returns, in its order."""

    model: ClipBenchmarkModel
    transform: Transform
    """From a PIL image to pixels, for the data set; picklable, without weights."""
    tokenizer: _Tokenizer
    """From n texts to (n, context_length) int64 tokens."""


def as_clip_benchmark(
    text_encoder: DualEncoder, image_encoder: DualEncoder | None = None
) -> ClipBenchmarkParts:
    """Make the arguments of ``clip_benchmark.metrics.zeroshot_retrieval.evaluate`` from one or two encoders.

    Args:
        text_encoder: Embeds the texts.
        image_encoder: Embeds the images; by default the text encoder does.

    Returns:
        Model, transform and tokenizer.

    Raises:
        SpaceMismatchError: If the two do not share a space; the message names both.

    Example:
        >>> model, transform, tokenizer = as_clip_benchmark(upgraded, old)  # T2I of the cell new/old
        >>> dataset = CocoCaptions(root, annotations, transform=transform)
        >>> loader = DataLoader(dataset, batch_size=64, collate_fn=stack_images)
        >>> zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu")["image_retrieval_recall@5"]
    """
    model = ClipBenchmarkModel(text_encoder, image_encoder)
    transform = _ReadAndTransform(model.image_encoder.image_transform)
    return ClipBenchmarkParts(model, transform, _Tokenizer(text_encoder))


def register_clip_benchmark(
    model_type: str, text_encoder: DualEncoder, image_encoder: DualEncoder | None = None
) -> None:
    """Register encoders as a model type of CLIP_benchmark, for this process.

    ``load_clip`` and the command line (``clip_benchmark.cli.main``, with ``--model_type``) can then use them.
    ``--model`` and ``--pretrained`` are only used in file names. The encoders are moved to the requested
    device.

    Args:
        model_type: The name; built-in model types of CLIP_benchmark are never replaced.
        text_encoder: Embeds the texts.
        image_encoder: Embeds the images; by default the text encoder does.

    Raises:
        ConfigError: If CLIP_benchmark is not installed, or the name is taken by another model type.
        SpaceMismatchError: If the two do not share a space.
    """
    try:
        from clip_benchmark.models import MODEL_TYPES, TYPE2FUNC
    except ModuleNotFoundError as error:
        raise ConfigError("CLIP_benchmark is not installed; run pip install clip-benchmark") from error
    taken = TYPE2FUNC.get(model_type)
    if taken is not None and not isinstance(taken, _Loader):
        raise ConfigError(
            f"model_type {model_type!r} is one of CLIP_benchmark's own; choose another name, such as 'xbt'"
        )
    TYPE2FUNC[model_type] = _Loader(as_clip_benchmark(text_encoder, image_encoder))
    if model_type not in MODEL_TYPES:
        MODEL_TYPES.append(model_type)


@dataclass(frozen=True)
class _ReadAndTransform:
    """Image transform that first converts any mode to RGB, as ``encode_images`` does."""

    transform: Transform

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(read_image(image).image)


@dataclass(frozen=True)
class _Tokenizer:
    encoder: DualEncoder

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.encoder.tokenize(texts)


@dataclass(frozen=True)
class _Loader:
    """Function that CLIP_benchmark calls to load a model."""

    parts: ClipBenchmarkParts

    def __call__(self, device: str | torch.device = "cpu", **_: Any) -> ClipBenchmarkParts:
        for encoder in (self.parts.model.text_encoder, self.parts.model.image_encoder):
            encoder.to(device)
        return self.parts
