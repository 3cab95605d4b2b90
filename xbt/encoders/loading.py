"""Encoders from a specification, or from any callable: an API, an ONNX session, another library's model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xbt.encoders.base import DualEncoder, Precision
from xbt.encoders.image_batching import EncodedImages, NamedImage, require_positive
from xbt.encoders.quiet import brief, quiet
from xbt.encoders.text_batching import DistinctTexts, ShortContext, TextTransform, refusing_panics
from xbt.errors import ConfigError, EncoderError, ImageError
from xbt.hub import HubAccess, SavedPartError
from xbt.images import read_image
from xbt.space import PROBE_TEXTS, EmbeddingSpace, draw_probe_images
from xbt.vectors import Vectors, as_vectors, unit_rows

FORMS = (
    "open_clip:ARCH/PRETRAINED (a tag or a weights file)",
    "open_clip:local-dir:PATH",
    "open_clip:hf-hub:org/repo (or org/repo@revision)",
    "transformers:REPO_OR_DIR (or org/repo@revision)",
)
"""Every form a specification can take."""
_BACKENDS = {"open_clip": "xbt.encoders.open_clip", "transformers": "xbt.encoders.hf_transformers"}


def load_encoder(
    spec: str,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> DualEncoder:
    """Load a CLIP as a frozen dual encoder.

    From the Hub only safetensors and JSON are loaded, and no code is run.

    Args:
        spec: One of ``"open_clip:ARCH/PRETRAINED"`` (a pretrained tag or a weights file),
            ``"open_clip:local-dir:PATH"``, ``"open_clip:hf-hub:org/repo"`` and
            ``"transformers:REPO_OR_DIR"``; a repository may be followed by ``@`` and a branch, tag or commit.
        device: Device of the weights.
        revision: Branch, tag or commit of the repository; overrides the one in ``spec``.
        cache_dir: The Hub cache to use instead of the default one.
        token: Hub access token, for private repositories.
        local_files_only: Use the cache alone.

    Returns:
        The encoder: fp32, eval mode, without gradients.

    Raises:
        EncoderError: If the specification is malformed, or the model cannot be loaded, or would be loaded
            wrongly: with random weights, another activation, or a tokenizer of another model.

    Example:
        >>> encoder = load_encoder("open_clip:ViT-B-32-quickgelu/openai")  # doctest: +SKIP
        >>> encoder.encode_texts(["a dog on a beach"]).shape  # doctest: +SKIP
        torch.Size([1, 512])
    """
    loader, rest = _parse(spec)
    try:
        with quiet(), refusing_panics(spec):
            encoder = loader(rest, spec, HubAccess(revision, cache_dir, token, local_files_only))
    except EncoderError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, SavedPartError) else brief(error)
        raise EncoderError(f"'{spec}' could not be loaded: {reason}") from error
    try:
        encoder.try_towers()
    except Exception as error:  # invalid config values fail where they are first used
        raise EncoderError(
            f"'{spec}' was loaded, but cannot encode ({type(error).__name__}: {brief(error)}); "
            "check its config"
        ) from error
    try:
        return encoder.to(device)
    except (RuntimeError, AssertionError) as error:
        raise EncoderError(f"'{spec}' could not be moved to device '{device}': {brief(error)}") from error


def _parse(spec: str) -> tuple[Callable[[str, str, HubAccess], DualEncoder], str]:
    backend, _, rest = str(spec).partition(":")
    if backend == "open_clip":
        prefixed = rest.startswith(("local-dir:", "hf-hub:"))
        head, _, tail = rest.partition(":" if prefixed else "/")
        complete = bool(head and tail)
    else:
        complete = backend == "transformers" and bool(rest)
    if not complete:
        raise EncoderError(f"'{spec}' is not an encoder specification; write one of: {'; '.join(FORMS)}")
    # Imported late, because open_clip and transformers take seconds.
    module = importlib.import_module(_BACKENDS[backend])
    loader: Callable[[str, str, HubAccess], DualEncoder] = getattr(module, f"load_{backend}")
    return loader, rest


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

    def _encode_texts(self, texts: list[str], batch_size: int, *_: Any, **__: Any) -> tuple[Tensor, int]:
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
