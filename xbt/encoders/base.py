"""The interface of every CLIP: texts and images to vectors, and folding a matrix into its towers."""

from __future__ import annotations

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any, ClassVar, Literal, NoReturn, Self

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

from xbt.encoders.image_batching import (
    EncodedImages,
    HostCopy,
    NamedImage,
    Transform,
    as_images,
    decode_batches,
    not_finite,
    numbered,
    require_positive,
    wait_for_copies,
)
from xbt.encoders.text_batching import (
    PROBES,
    TENSOR_CORES,
    DistinctTexts,
    ShortContext,
    TextTransform,
    as_texts,
    batches_by_length,
    find_short_context,
    text_cleaning,
    tokenize_windows,
)
from xbt.encoders.towers import activation, fold_layers
from xbt.errors import ConfigError, DataError, EncoderError, ImageError, SpaceMismatchError, TruncationWarning
from xbt.images import ImageSource
from xbt.space import PROBE_TEXTS, EmbeddingSpace, draw_probe_images

Precision = Literal["fp32", "bf16"]

MAX_SIDE = 4096
"""Largest side in pixels of an image after a model's preprocessing."""
MAX_CONTEXT = 2**16
"""Largest number of tokens per text."""


class DualEncoder(ABC):
    """A CLIP of any library.

    Vectors always have unit length. ``embed_*`` are differentiable and stay on the encoder's device, for
    training. ``encode_*`` take raw texts and images and return float32 CPU tensors.

    Attributes:
        name: The specification that it was loaded from, such as ``"open_clip:ViT-B-32-quickgelu/openai"``.
        module: The CLIP itself. Loaded encoders are frozen (``requires_grad`` is off), fp32 and in eval mode.
            peft wraps it once LoRA is added.
        dim: Dimension of the vectors.
        context_length: Number of tokens that texts are padded or cut to.
        preprocessing: Settings that turn images into pixels, as JSON-able values; part of the space.
        image_transform: From an RGB image to (3, height, width) float32 pixels, always with PIL's
            resampling. Picklable and without weights, for worker processes.
        precision: Precision of ``encode_*``: ``"fp32"``, or ``"bf16"`` for autocast. The vectors are float32
            in both cases. ``embed_*`` leave precision to the training loop.
        lora_targets: Tower → regular expression for the modules that LoRA adapts by default.
        has_towers: False if the encoder gives vectors only, without access to tokens, pixels and weights.
        revision: The commit of the model's Hub repository, if known.
    """

    lora_targets: ClassVar[dict[str, str]]
    has_towers: ClassVar[bool] = True
    revision: str | None = None
    precision: Precision = "fp32"

    def __init__(
        self,
        name: str,
        module: nn.Module,
        dim: int,
        context_length: int,
        preprocessing: dict[str, Any],
        image_transform: Transform,
    ) -> None:
        require_side(*preprocessing.get("size", ()))
        if context_length > MAX_CONTEXT:
            raise EncoderError(
                f"'{name}' takes texts of {context_length} tokens, but at most {MAX_CONTEXT} are allowed; "
                "check its config"
            )
        self.name, self.module = name, module
        self.dim, self.context_length = dim, context_length
        self.preprocessing, self.image_transform = preprocessing, image_transform
        self._space: EmbeddingSpace | None = None
        self._short_context: tuple[ShortContext | None] | None = None

    @property
    @abstractmethod
    def text_transform(self) -> TextTransform:
        """Function from n texts to tokens, padded or cut to the context; picklable, without weights."""

    @abstractmethod
    def _text_features(self, tokens: Tensor) -> Tensor:
        """(n, dim) text vectors of any length, from (n, length) tokens.

        A tower may take fewer tokens than the context; :attr:`short_context` tests if that is exact.
        """

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """(n, dim) image vectors of any length."""

    @abstractmethod
    def _towers(self) -> list[nn.Module]:
        """The image and the text tower: the modules that take nearly all of the time."""

    def folded(self, weight: Tensor) -> DualEncoder:
        """Fold a matrix into the towers: vectors are mapped before they are normalised, at no cost.

        The last layer of each tower is replaced by its product with the matrix. All other weights are shared
        with this encoder, which does not change.

        Args:
            weight: (out_dim, dim) matrix W.

        Returns:
            An encoder of dimension ``out_dim`` with the vectors normalise(W z) for this one's vectors z.

        Raises:
            EncoderError: If a tower does not end in a matrix.
            SpaceMismatchError: If the matrix does not take vectors of this encoder's dimension.
        """
        if weight.ndim != 2 or weight.shape[1] != self.dim:
            raise SpaceMismatchError(
                f"a matrix of the shape {tuple(weight.shape)} cannot be folded into {self.name}, whose "
                f"vectors have dimension {self.dim}; give one made for this encoder"
            )
        twin = copy(self)
        twin.module = fold_layers(self._bare, self._last_layers(), weight, self.name)
        twin.dim = len(weight)
        twin._space = None
        return twin

    def _last_layers(self) -> dict[str, str]:
        """Tower → path of the layer that makes the vectors."""
        raise EncoderError(
            f"it is not known how {type(self).__name__} makes its vectors, so nothing can be folded into "
            f"{self.name}; use the projection unfolded"
        )

    @property
    def _bare(self) -> Any:
        # Without peft's wrapper, which only forwards calls: its layers are inside the model.
        return self._clip.get_base_model() if hasattr(self.module, "get_base_model") else self.module

    @property
    def _clip(self) -> Any:
        # The module typed as Any, for attributes that only the backend's classes have.
        return self.module

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.logit_scale.device

    @property
    def logit_scale(self) -> nn.Parameter:
        """Log of the factor on cosines in the contrastive loss, a scalar."""
        scale: nn.Parameter = self._clip.logit_scale
        return scale

    @property
    def space(self) -> EmbeddingSpace:
        """The space of this encoder's vectors; its probe is computed at first use and cached."""
        if self._space is None:
            # No warning about cut texts: cut probe texts identify a model as well as whole ones.
            texts, _ = self._encode_texts(list(PROBE_TEXTS), len(PROBE_TEXTS), precision="fp32")
            images = [(image, None) for image in draw_probe_images()]
            encoded = self._encode_batches([images], 0, "fp32")
            probe = torch.cat([texts, *(batch.vectors for batch in encoded)])
            self._space = EmbeddingSpace(
                self.name, self.dim, dict(self.preprocessing), probe, self.revision, settings=self.settings
            )
        return self._space

    def try_towers(self) -> None:
        """Embed one text and one image, so that errors of the model appear now."""
        with self._evaluating():
            self._text_features(self._moved(self.text_transform([PROBE_TEXTS[0]]).tokens))
            pixels = self.image_transform(draw_probe_images()[2])
            self._image_features(self._moved(pixels[None]))

    @property
    def settings(self) -> dict[str, Any]:
        """Activations, cleaning of texts and context length, as JSON-able values; part of the space.

        A probe shows most differences, but not all: GELU instead of QuickGELU can change a small model's
        vectors by less than rounding to half precision. So these settings are declared too. They are read
        from the running model, so that a model has the same ones in open_clip and in transformers.
        """
        image, text = self._towers()[:2]
        return {
            "text_activation": activation(text),
            "image_activation": activation(image),
            "text_cleaning": text_cleaning(self.text_transform),
            "context_length": self.context_length,
        }

    def invalidate_space(self) -> None:
        """Forget the probe and :attr:`short_context`; call this whenever the weights have changed."""
        self._space = None
        self._short_context = None

    @property
    def short_context(self) -> ShortContext | None:
        """Padding that can be skipped, or ``None`` if all of it counts.

        Tested at first use by encoding a few texts both ways, and cached.
        """
        if self._short_context is None:
            probes, _ = self.text_transform(list(PROBES))
            with self._evaluating():
                self._short_context = (find_short_context(self._text_features, probes.to(self.device)),)
        return self._short_context[0]

    def compile_towers(self) -> Self:
        """Compile both towers with ``torch.compile``, and return the encoder itself.

        The first batches of each shape then take minutes, and later ones less time. This pays off on a GPU
        for very large jobs. Vectors change by rounding.
        """
        _ = self.short_context  # before compiling, because the shapes of its probes never occur again
        for tower in self._towers():
            tower.compile()
        return self

    def to(self, device: str | torch.device) -> Self:
        """Move the weights, merged LoRA included, and return the encoder itself."""
        target = torch.device(device)
        if not hasattr(self.module, "peft_config"):
            self.module.to(target)
            return self
        from xbt.encoders.lora_attention import unmerged

        with unmerged(self.module):
            self.module.to(target)
        return self

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokenise texts, padded or cut to the context length.

        Args:
            texts: n texts.

        Returns:
            (n, context_length) int64 CPU tensor.

        Raises:
            DataError: If a single string is given instead of a list, or an item is not a string.
            EncoderError: If the tokenizer gives an id that the model does not know.

        Warns:
            TruncationWarning: With the number of texts that were cut, if any.
        """
        checked = as_texts(texts)
        tokens, cut = self.text_transform(checked)
        self._warn_cut(int(cut.sum()), len(checked))
        return tokens

    def preprocess(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into (3, height, width) float32 pixels with :attr:`image_transform`."""
        return self.image_transform(image)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embed tokens differentiably.

        Padding that changes nothing is cut off first. Vectors and gradients stay exact.

        Args:
            tokens: (n, length) int64 on any device; ``length`` is the context length, or less if the encoder
                has a :attr:`short_context`.

        Returns:
            (n, dim) unit rows on the encoder's device.
        """
        if self.short_context is not None:
            tokens = self.short_context.cut(tokens, self._multiple)
        return self._embed_whole(tokens)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embed (n, 3, H, W) pixels as (n, dim) unit rows on the encoder's device, differentiably."""
        return normalize(self._image_features(self._moved(pixels)).float(), dim=-1)

    def encode_texts(
        self, texts: Sequence[str], batch_size: int = 256, progress: bool = False, num_workers: int = 0
    ) -> Tensor:
        """Encode each distinct text once, without padding that changes nothing.

        Args:
            texts: n texts.
            batch_size: Maximum number of texts per forward pass. On CUDA this holds for texts of full
                context; batches of shorter texts are larger, up to the same number of tokens.
            progress: Whether to show a progress bar on stderr.
            num_workers: Processes that tokenise ahead; 0 tokenises in this process.

        Returns:
            (n, dim) float32 CPU tensor with unit rows and without a graph; n may be 0.

        Raises:
            DataError: If the texts are not a list of strings, or the model returns NaN.

        Warns:
            TruncationWarning: Once, with the number of texts that were cut, if any.
        """
        checked = as_texts(texts)
        vectors, cut = self._encode_texts(checked, batch_size, progress, num_workers, self.precision)
        self._warn_cut(cut, len(checked))
        return vectors

    def encode_images(
        self,
        images: Sequence[ImageSource],
        batch_size: int = 64,
        progress: bool = False,
        num_workers: int = 0,
    ) -> Tensor:
        """Encode images, decoding them batch by batch.

        Args:
            images: n PIL images, paths, or bytes of encoded images.
            batch_size: Images per forward pass.
            progress: Whether to show a progress bar on stderr.
            num_workers: Processes that read and preprocess images while the model computes, each at most two
                batches ahead; with 0 only one batch is in memory at a time.

        Returns:
            (n, dim) float32 CPU tensor with unit rows and without a graph; n may be 0.

        Raises:
            ImageError: If an image cannot be decoded; the message names it.
            DataError: If a single image is given instead of a list, or the model returns NaN.
        """
        items = as_images(images)
        require_positive(batch_size)
        parts = [torch.zeros(0, self.dim)]
        with tqdm(total=len(items), unit="image", disable=not progress, file=sys.stderr) as bar:
            batches = numbered(items, batch_size)
            num_workers = min(num_workers, -(-len(items) // batch_size))  # no idle workers
            for encoded in self._encode_batches(batches, num_workers, self.precision):
                if encoded.rejected:
                    raise ImageError(encoded.rejected[min(encoded.rejected)])
                parts.append(encoded.vectors)
                bar.update(len(encoded.vectors))
        return torch.cat(parts)

    def encode_image_batches(
        self, batches: Iterable[Sequence[ImageSource]], num_workers: int = 0
    ) -> Iterator[EncodedImages]:
        """Encode a stream of batches of images.

        Args:
            batches: PIL images, paths, or bytes of encoded images; one forward pass per batch. Consumed in
                the calling process, at most two batches per worker ahead.
            num_workers: Processes that read and preprocess images while the model computes; 0 does this in
                the calling process, with the same results.

        Yields:
            One result per batch, in order. It lists images that cannot be read; they raise no error.

        Raises:
            DataError: If the model returns NaN, the system rather than an image is at fault, or a worker
                dies. An exception of ``batches`` is raised after the results of the batches before it.
        """
        named = ([(source, None) for source in batch] for batch in batches)
        return self._encode_batches(named, num_workers, self.precision)

    def _encode_texts(
        self,
        texts: list[str],
        batch_size: int,
        progress: bool = False,
        num_workers: int = 0,
        precision: Precision = "fp32",
    ) -> tuple[Tensor, int]:
        """(n, dim) vectors, and the number of texts that were cut."""
        require_positive(batch_size)
        distinct = DistinctTexts.of(texts)
        times = distinct.where.bincount(minlength=len(distinct.texts))
        vectors = torch.zeros(len(distinct.texts), self.dim)
        n_cut = 0
        with tqdm(total=len(texts), unit="text", disable=not progress, file=sys.stderr) as bar:
            for start, (tokens, cut) in tokenize_windows(distinct.texts, self.text_transform, num_workers):
                batches = batches_by_length(
                    tokens, self.short_context, batch_size, self._multiple, fill=self._on_cuda
                )
                launched = ((b.rows, self._launch(self._embed_whole, b.tokens, precision)) for b in batches)
                for rows, part in wait_for_copies(launched):
                    vectors[start + rows] = part
                    bar.update(int(times[start + rows].sum()))
                window = slice(start, start + len(tokens))
                for broken in not_finite(vectors[window])[:1]:
                    self._raise_nan("text", distinct.first(start + broken))
                n_cut += int(times[window][cut].sum())
        # A copy is only needed if a text occurs twice.
        return vectors if len(vectors) == len(texts) else vectors[distinct.where], n_cut

    def _encode_batches(
        self, batches: Iterable[Sequence[NamedImage]], num_workers: int, precision: Precision
    ) -> Iterator[EncodedImages]:
        decoded = decode_batches(batches, self.image_transform, num_workers, pin_memory=self._on_cuda)
        nothing = HostCopy(torch.zeros(0, self.dim))
        launched = (
            (batch, self._launch(self.embed_pixels, batch.pixels, precision) if batch.kept else nothing)
            for batch in decoded
        )
        seen = 0
        for batch, vectors in wait_for_copies(launched):
            for broken in not_finite(vectors)[:1]:
                self._raise_nan("image", seen + batch.kept[broken])
            seen += len(batch.kept) + len(batch.rejected)
            yield EncodedImages(vectors, batch.kept, batch.rejected, batch.notes)

    def _launch(self, embed: Callable[[Tensor], Tensor], batch: Tensor, precision: Precision) -> HostCopy:
        # Entered per batch, so that eval mode and autocast don't leak while the generator is suspended.
        with self._evaluating(), self._autocast(precision):
            return HostCopy(embed(batch))

    def _embed_whole(self, tokens: Tensor) -> Tensor:
        return normalize(self._text_features(self._moved(tokens)).float(), dim=-1)

    def _moved(self, batch: Tensor) -> Tensor:
        # From page-locked memory this copies while the device computes.
        return batch.to(self.device, non_blocking=self._on_cuda)

    @property
    def _multiple(self) -> int:
        return TENSOR_CORES if self._on_cuda else 1

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _autocast(self, precision: Precision) -> AbstractContextManager[Any]:
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision is {precision!r}, but must be 'fp32' or 'bf16'")
        # Explicitly off for fp32, so that a training loop's autocast does not change the vectors.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")

    def _raise_nan(self, unit: str, number: int) -> NoReturn:
        raise DataError(
            f"{self.name} gives NaN for {unit} number {number}; its weights or adapter are broken"
        )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode without gradients; afterwards every module gets its former mode back."""
        training = [module for module in self.module.modules() if module.training]
        if training:
            self.module.eval()
        try:
            # Not inference_mode: autograd refuses its tensors, and users train on the vectors.
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

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


def require_side(*sides: int) -> None:
    """Refuse sides of more than :data:`MAX_SIDE` pixels with an EncoderError, before an image is made."""
    for side in sides:
        if side > MAX_SIDE:
            raise EncoderError(
                f"the preprocessing makes images of {side} pixels a side, but at most {MAX_SIDE} are "
                "allowed; check the model's config"
            )
