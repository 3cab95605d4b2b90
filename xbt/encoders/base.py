"""A CLIP seen as two functions: texts to vectors and images to vectors."""

from __future__ import annotations

import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from xbt.errors import ConfigError, DataError, EncoderError, TruncationWarning
from xbt.images import ImageSource, draw_probe_images, load_image
from xbt.space import PROBE_TEXTS, EmbeddingSpace


class DualEncoder(ABC):
    """One CLIP, whichever library it comes from.

    Vectors have unit length everywhere. ``embed_*`` are differentiable and stay on the encoder's device, for
    training; ``encode_*`` take raw texts and images and return float32 CPU tensors, for everything else.

    Attributes:
        name: The specification it was loaded from, such as ``"open_clip:ViT-B-32-quickgelu/openai"``.
        module: The CLIP itself. Loaded encoders are frozen (``requires_grad`` is off), fp32 and in eval mode.
            peft wraps it once LoRA is added.
        dim: Dimension of the vectors.
        context_length: Number of tokens every text is padded or cut to.
        preprocessing: How images become pixels, as JSON-able values; part of the space.
        lora_targets: Per tower, a regular expression for the modules that LoRA adapts by default.
    """

    lora_targets: ClassVar[dict[str, str]]

    def __init__(
        self, name: str, module: nn.Module, dim: int, context_length: int, preprocessing: dict[str, Any]
    ) -> None:
        self.name = name
        self.module = module
        self.dim = dim
        self.context_length = context_length
        self.preprocessing = preprocessing
        self._space: EmbeddingSpace | None = None

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Tensor:
        """Turns a PIL image into (3, height, width) float32 pixels, always with PIL's own resampling."""

    @abstractmethod
    def _tokenize(self, texts: list[str]) -> tuple[Tensor, int]:
        """(n, context_length) int64 tokens on the CPU, and how many of the texts were cut."""

    @abstractmethod
    def _text_features(self, tokens: Tensor) -> Tensor:
        """(n, dim) text vectors of any length."""

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """(n, dim) image vectors of any length."""

    @property
    def _clip(self) -> Any:
        # The module again, for attributes that only the backend's classes have.
        return self.module

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    @property
    def logit_scale(self) -> nn.Parameter:
        """Log of the factor on cosines in the contrastive loss, a scalar."""
        scale: nn.Parameter = self._clip.logit_scale
        return scale

    @property
    def space(self) -> EmbeddingSpace:
        """The space of this encoder's vectors; its probe is computed at first use and kept."""
        if self._space is None:
            # Probe texts that a short context cuts identify the model as well as whole ones: no warning.
            texts, _ = self._encode_texts(list(PROBE_TEXTS), len(PROBE_TEXTS), progress=False)
            probe = torch.cat([texts, self.encode_images(draw_probe_images())])
            self._space = EmbeddingSpace(self.name, self.dim, dict(self.preprocessing), probe)
        return self._space

    def invalidate_space(self) -> None:
        """Forgets the probe; call it whenever the weights have changed."""
        self._space = None

    def to(self, device: str | torch.device) -> Self:
        """Moves the weights, merged LoRA included, and returns the encoder itself."""
        target = torch.device(device)
        if not hasattr(self.module, "peft_config"):
            self.module.to(target)
            return self
        from xbt.encoders.exact_attention import unmerged

        with unmerged(self.module):
            self.module.to(target)
        return self

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokenises texts, padded or cut to the context length.

        Args:
            texts: n texts.

        Returns:
            (n, context_length) int64 CPU tensor.

        Raises:
            DataError: If a single string is given instead of a list, or an item is not a string.
            EncoderError: If the tokenizer gives an id the model does not know.

        Warns:
            TruncationWarning: If texts were cut; it says how many.
        """
        checked = _as_texts(texts)
        tokens, cut = self._tokenize(checked)
        self._warn_cut(cut, len(checked))
        return tokens

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embeds (n, context_length) tokens as (n, dim) unit rows on the encoder's device, differentiably."""
        return normalize(self._text_features(tokens.to(self.device)), dim=-1)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embeds (n, 3, H, W) pixels as (n, dim) unit rows on the encoder's device, differentiably."""
        return normalize(self._image_features(pixels.to(self.device)), dim=-1)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256, progress: bool = False) -> Tensor:
        """Encodes texts.

        Args:
            texts: n texts.
            batch_size: Texts per forward pass.
            progress: Whether to show a progress bar on stderr.

        Returns:
            (n, dim) float32 CPU tensor with unit rows and without a graph; n may be 0.

        Raises:
            DataError: If the texts are not a list of strings, or the model returns NaN.

        Warns:
            TruncationWarning: Once, with the number of texts that were cut.
        """
        checked = _as_texts(texts)
        vectors, cut = self._encode_texts(checked, batch_size, progress)
        self._warn_cut(cut, len(checked))
        return vectors

    def encode_images(
        self, images: Sequence[ImageSource], batch_size: int = 64, progress: bool = False
    ) -> Tensor:
        """Encodes images, decoding them batch by batch.

        Args:
            images: n PIL images, paths, or bytes of encoded images.
            batch_size: Images per forward pass; only this many are held decoded at a time.
            progress: Whether to show a progress bar on stderr.

        Returns:
            (n, dim) float32 CPU tensor with unit rows and without a graph; n may be 0.

        Raises:
            ImageError: If an image cannot be decoded; the message names it.
            DataError: If a single image is given instead of a list, or the model returns NaN.
        """
        if isinstance(images, str | bytes | os.PathLike | Image.Image):
            raise DataError(f"images must be a list, got a single {type(images).__name__}; write [image]")
        # A sequence is left as it is: it may read its images only when they are asked for.
        items = images if isinstance(images, Sequence) else list(images)

        def embed(start: int, stop: int) -> Tensor:
            decoded = (_open(items[number], number) for number in range(start, stop))
            return self.embed_pixels(torch.stack([self.preprocess(image) for image in decoded]))

        return self._encode(len(items), batch_size, progress, "image", embed)

    def _known(self, tokens: Tensor, vocab_size: int) -> Tensor:
        """The tokens, once it is sure that the model has an embedding for each of them."""
        highest = int(tokens.max())
        # Checked on the tokens that occur: vocabularies with spare ids at the end are common and harmless.
        if highest >= vocab_size:
            raise EncoderError(
                f"the tokenizer of {self.name} gives token id {highest}, but the model only embeds "
                f"{vocab_size} (its vocab_size); they do not belong together"
            )
        return tokens

    def _encode_texts(self, texts: list[str], batch_size: int, progress: bool) -> tuple[Tensor, int]:
        cut = 0

        def embed(start: int, stop: int) -> Tensor:
            nonlocal cut
            tokens, more = self._tokenize(texts[start:stop])
            cut += more
            return self.embed_tokens(tokens)

        return self._encode(len(texts), batch_size, progress, "text", embed), cut

    def _encode(
        self, count: int, batch_size: int, progress: bool, unit: str, embed: Callable[[int, int], Tensor]
    ) -> Tensor:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, but it must be at least 1")
        parts = [torch.zeros(0, self.dim)]
        bar = tqdm(total=count, unit=unit, disable=not progress, file=sys.stderr)
        with bar, self._evaluating():
            for start in range(0, count, batch_size):
                stop = min(start + batch_size, count)
                part = embed(start, stop).float().cpu()
                finite = torch.isfinite(part).all(dim=1)
                if not bool(finite.all()):
                    first = start + int(torch.nonzero(~finite)[0])
                    raise DataError(
                        f"{self.name} gives NaN for {unit} number {first}; its weights or adapter are broken"
                    )
                parts.append(part)
                bar.update(stop - start)
        return torch.cat(parts)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode without gradients; afterwards every module is back in the mode it was in."""
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            # Not inference_mode: its tensors cannot take part in autograd, and users train on the vectors.
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training

    def _warn_cut(self, cut: int, count: int) -> None:
        if cut:
            warnings.warn(
                f"{cut} of {count} texts are longer than the {self.context_length} tokens of {self.name} "
                "and were cut",
                TruncationWarning,
                stacklevel=3,
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self.name}', dim={self.dim})"


def _as_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str | bytes):
        raise DataError(f"texts must be a list of strings, got the single text {texts!r}; write [text]")
    items = list(texts)
    for number, text in enumerate(items):
        if not isinstance(text, str):
            raise DataError(f"texts[{number}] is {text!r}, a {type(text).__name__}, but must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"texts[{number}] is not valid Unicode: {text!r} has half a surrogate") from error
    return items


def _open(source: ImageSource, number: int) -> Image.Image:
    named = isinstance(source, str | os.PathLike)
    return load_image(source, None if named else f"number {number}")
