"""Any callable as an encoder: an embedding API, an ONNX session, a model of another library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xbt.encoders.base import DualEncoder, Precision
from xbt.encoders.checks import require_positive
from xbt.encoders.image_batching import EncodedImages, NamedImage
from xbt.encoders.text_batching import DistinctTexts, ShortContext, TextTransform
from xbt.errors import ConfigError, EncoderError, ImageError
from xbt.images import read_image
from xbt.space import PROBE_TEXTS, EmbeddingSpace, draw_probe_images
from xbt.vectors import Vectors, as_vectors, unit_rows

EmbedTexts = Callable[[list[str]], Vectors | list[list[float]]]
"""From n texts to (n, dim) vectors."""
EmbedImages = Callable[[list[Image.Image]], Vectors | list[list[float]]]
"""From n RGB images of any size to (n, dim) vectors."""


def wrap_encoder(
    *,
    texts: EmbedTexts | None = None,
    images: EmbedImages | None = None,
    name: str,
    preprocessing: Mapping[str, Any] | None = None,
) -> WrappedEncoder:
    """Make an encoder of functions that embed texts and images.

    The result embeds, searches, evaluates and is compared like any other encoder. What needs weights, such as
    LoRA, folding and ``embed_tokens``, raises an EncoderError.

    Args:
        texts: Function from a list of n texts to (n, dim) vectors of any length, as array, tensor or
            list; called with one batch at a time. Without it the encoder embeds images only.
        images: Function from a list of n RGB images to (n, dim) vectors. Without it the encoder embeds texts
            only.
        name: Name of the model and its version, such as ``"my-api-v2"``; part of the space.
        preprocessing: Settings that change the vectors, as JSON-able values; part of the space.

    Raises:
        ConfigError: If there is neither function, or the name is empty.
        EncoderError: If a function fails on xbt's probe, or its result is no (n, dim) array of finite,
            non-zero rows, or both functions give different dimensions.

    Example:
        >>> import numpy as np
        >>> encoder = wrap_encoder(texts=lambda texts: np.ones((len(texts), 4)), name="my-api-v2")
        >>> encoder.encode_texts(["a dog on a beach"]).tolist()
        [[0.5, 0.5, 0.5, 0.5]]
    """
    if texts is None and images is None:
        raise ConfigError("an encoder needs a function for texts or for images; give at least one")
    if not name:
        raise ConfigError("an encoder needs a name, which identifies its space, such as 'my-api-v2'")
    return WrappedEncoder(name, texts, images, dict(preprocessing or {}))


class WrappedEncoder(DualEncoder):
    """Encoder around two functions; see :func:`wrap_encoder`, which makes it."""

    lora_targets: ClassVar[dict[str, str]] = {}
    has_towers = False

    def __init__(
        self, name: str, texts: EmbedTexts | None, images: EmbedImages | None, preprocessing: dict[str, Any]
    ) -> None:
        self._functions: dict[str, Any] = {"texts": texts, "images": images}
        self.name = name
        probes = []
        if texts is not None:
            probes.append(self._call("texts", list(PROBE_TEXTS)))
        if images is not None:
            probes.append(self._call("images", draw_probe_images()))
        if len({probe.shape[1] for probe in probes}) > 1:
            raise EncoderError(
                f"{name} gives texts of {probes[0].shape[1]} and images of {probes[1].shape[1]} dimensions; "
                "both functions must use one model"
            )
        super().__init__(name, nn.Module(), probes[0].shape[1], 0, preprocessing, _no_pixels)
        # A probe of one modality cannot be compared with a probe of both, so the space has none.
        probe = torch.cat(probes) if len(probes) == 2 else None
        self._space = EmbeddingSpace(name, self.dim, dict(preprocessing), probe)

    @property
    def device(self) -> torch.device:
        """The CPU, where all vectors arrive."""
        return torch.device("cpu")

    @property
    def space(self) -> EmbeddingSpace:
        """The space of the vectors; with a probe if there are functions for texts and for images."""
        assert self._space is not None
        return self._space

    def invalidate_space(self) -> None:
        """Do nothing: a function's weights cannot be changed from here."""

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing is known about a function's settings."""
        return {}

    @property
    def text_transform(self) -> TextTransform:
        """Unavailable."""
        self._refuse("tokens")

    @property
    def logit_scale(self) -> nn.Parameter:
        """Unavailable."""
        self._refuse("logit scale")

    @property
    def short_context(self) -> ShortContext | None:
        """``None``: a function sees whole texts."""
        return None

    def _text_features(self, tokens: Tensor) -> Tensor:
        self._refuse("tokens")

    def _image_features(self, pixels: Tensor) -> Tensor:
        self._refuse("pixels")

    def _towers(self) -> list[nn.Module]:
        return []

    def _encode_texts(
        self,
        texts: list[str],
        batch_size: int,
        progress: bool = False,
        num_workers: int = 0,
        precision: Precision = "fp32",
    ) -> tuple[Tensor, int]:
        require_positive(batch_size)
        distinct = DistinctTexts.of(texts)
        starts = range(0, len(distinct.texts), batch_size)
        parts = [self._call("texts", distinct.texts[start : start + batch_size]) for start in starts]
        vectors = torch.cat([torch.zeros(0, self.dim), *parts])
        return vectors[distinct.where], 0

    def _encode_batches(
        self, batches: Iterable[Sequence[NamedImage]], num_workers: int, precision: Precision
    ) -> Iterator[EncodedImages]:
        for batch in batches:
            encoded = EncodedImages(torch.zeros(0, self.dim), [], {}, {})
            images = []
            for position, (source, label) in enumerate(batch):
                try:
                    read = read_image(source, label)
                except ImageError as error:
                    encoded.rejected[position] = str(error)
                    continue
                images.append(read.image)
                encoded.kept.append(position)
                if read.note is not None:
                    encoded.notes[position] = read.note
            yield encoded._replace(vectors=self._call("images", images)) if images else encoded

    def _call(self, kind: str, items: list[Any]) -> Tensor:
        """(n, dim) float32 unit rows of one batch, checked."""
        function = self._functions[kind]
        if function is None:
            raise EncoderError(f"{self.name} has no function for {kind}; give wrap_encoder {kind}=")
        try:
            result = function(list(items))
            if isinstance(result, list):
                result = np.asarray(result, dtype=np.float32)  # what JSON of an API gives
            vectors = as_vectors(result, f"the {kind} vectors", vars(self).get("dim"))
        except Exception as error:
            raise EncoderError(
                f"the function for {kind} of {self.name} failed on {len(items)} {kind}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if len(vectors) != len(items):
            raise EncoderError(
                f"the function for {kind} of {self.name} gave {len(vectors)} vectors for {len(items)} {kind}"
            )
        rows = unit_rows(vectors.float())
        if not bool(rows.any(dim=1).all()):
            raise EncoderError(f"the function for {kind} of {self.name} gave a row of zeros; check its input")
        return rows

    def _refuse(self, what: str) -> NoReturn:
        raise EncoderError(
            f"{self.name} wraps functions, so xbt cannot reach its {what}; load the model itself with "
            "load_encoder to train or fold it"
        )


def _no_pixels(image: Image.Image) -> Tensor:
    raise EncoderError("an encoder that wraps functions has no preprocessing of its own; use encode_images")
