"""A backbone with a compatible head: what is trained, saved, and served for image search."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from xbt.backbones.loading import ImageBackbone, rebuild_backbone
from xbt.backbones.preprocessing import ImagePreprocessing
from xbt.encoders.image_batching import as_images, decode_batches, not_finite, numbered, require_positive
from xbt.errors import ConfigError, DataError, ImageError, SpaceMismatchError
from xbt.heads import CompatibleHead, HeadOutput
from xbt.heads.base import build_head, described_head
from xbt.hub import (
    WEIGHTS_NAME,
    CardData,
    CardFacts,
    HubArtifact,
    Naming,
    SavedConfig,
    described_space,
    public_name,
    quoted,
    read_header,
)
from xbt.images import ImageSource
from xbt.space import PROBE_TEXTS, EmbeddingSpace, draw_probe_images

Side = Literal["new", "old"]
MAX_IMAGE_SIZE = 2048
"""Maximum side in pixels in a saved config; loading allocates a blank image of this size."""

_SNIPPET = """from xbt import CompatibleBackbone

model = CompatibleBackbone.from_pretrained({{source}})
vectors = model.encode_images(["photo.jpg"])  # (1, {dim}) unit rows, for a gallery of its own"""

_OLD_SNIPPET = """
queries = model.encode_images(["photo.jpg"], space="old")  # (1, {old_dim}) unit rows, for the old gallery"""

_LIMITS = (
    "It has no text tower: it searches images with images.",
    "It was trained on the classes that its config lists; how far it carries to other images was not "
    "measured unless Results says so.",
    "Compatible means that both models' vectors can be compared, not that the old gallery becomes better "
    "than its own vectors allow.",
)


class CompatibleBackbone(nn.Module, HubArtifact):
    """An image model whose vectors can be compared with an older model's, if its head says so.

    Its whole vectors (``space="new"``) go into the gallery; their leading ``old_dim`` coordinates, normalised
    (``space="old"``), are queries to a gallery of the old model.

    Attributes:
        backbone: From pixels to features.
        embedding: Linear layer from the features to what the head takes.
        head: What makes vectors and, in training, logits of them.
        preprocessing: From images to pixels.
        class_names: The classes it was trained on.
        old_space: The space that ``space="old"`` vectors belong to; ``None`` where nobody said, or where the
            head is independent.

    Example:
        >>> model = CompatibleBackbone.from_pretrained("runs/bt2/model")
        >>> gallery.search(model.encode_images(["query.jpg"], space="old"), k=5, space=model.old_space)
    """

    format_name = "compatible_backbone"
    config_keys = ("backbone", "head", "preprocessing", "class_names", "old_space")
    spare_bytes = 256 * 2**20  # a blank image, and the small text tower that open_clip builds besides

    def __init__(
        self,
        backbone: ImageBackbone,
        head: CompatibleHead,
        preprocessing: ImagePreprocessing,
        class_names: Sequence[str] = (),
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        """Join the parts; the linear layer between them is drawn from torch's global generator.

        Raises:
            SpaceMismatchError: If ``old_space`` does not have the dimension that the head is compatible with.
            ConfigError: If the head has a classifier for another number of classes than are named.
        """
        super().__init__()
        if old_space is not None and old_space.dim != head.old_dim:
            raise SpaceMismatchError(
                f"the old space is {old_space}, but the head is compatible with {head.old_dim} dimensions; "
                "make the head for that space"
            )
        if class_names and head.n_classes is not None and len(class_names) != head.n_classes:
            raise ConfigError(
                f"there are {len(class_names)} class names, but the head's classifier has {head.n_classes} "
                "classes; name each of them"
            )
        self.backbone = backbone
        self.embedding = nn.Linear(backbone.feature_dim, head.in_dim)
        self.head = head
        self.preprocessing = preprocessing
        self.class_names = list(class_names)
        self.old_space = old_space
        self._space: EmbeddingSpace | None = None

    @property
    def dim(self) -> int:
        """Dimension of the full vectors."""
        return self.head.out_dim

    @property
    def old_dim(self) -> int:
        """Dimension of the vectors that the head is compatible with; 0 for an independent head."""
        return self.head.old_dim

    @property
    def name(self) -> str:
        """Name of the space: the backbone's specification and the head's kind."""
        return f"{self.backbone.spec}+{self.head.kind}"

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding.weight.device

    def forward(self, pixels: Tensor) -> HeadOutput:
        """Map (n, 3, size, size) pixels on the model's device to the head's output."""
        output: HeadOutput = self.head(self.embedding(self.backbone(pixels)))
        return output

    def embed_pixels(self, pixels: Tensor, space: Side = "new") -> Tensor:
        """Map (n, 3, size, size) pixels to unit rows on the model's device, differentiably.

        Args:
            pixels: Preprocessed images, on any device.
            space: ``"new"`` for (n, dim) whole vectors, ``"old"`` for (n, old_dim) compatible ones.

        Raises:
            ConfigError: If the space is neither, or the head is independent.
        """
        self._dim_of(space)
        features = self.embedding(self.backbone(pixels.to(self.device)))
        return self.head.embed(features, space)

    def encode_images(
        self,
        images: Sequence[ImageSource],
        space: Side = "new",
        batch_size: int = 64,
        progress: bool = False,
        num_workers: int = 0,
    ) -> Tensor:
        """Decode and encode images batch by batch, always in float32 and in evaluation mode.

        Args:
            images: n PIL images, paths, or bytes of encoded images.
            space: ``"new"`` for whole vectors, ``"old"`` for vectors of the space of the old model.
            batch_size: Images per forward pass.
            progress: Show a progress bar on stderr.
            num_workers: Processes that read and preprocess images while the model computes.

        Returns:
            (n, dim) or (n, old_dim) float32 CPU tensor with unit rows and without a graph; n may be 0.

        Raises:
            ImageError: If an image cannot be decoded; the message names it.
            ConfigError: If the space is neither, or the head is independent.
            DataError: If a single image is given instead of a list, or the model returns NaN.
        """
        items = as_images(images)
        require_positive(batch_size)
        parts, done = [torch.zeros(0, self._dim_of(space))], 0
        batches = numbered(items, batch_size)
        num_workers = min(num_workers, -(-len(items) // batch_size))  # no more workers than batches
        pin = self.device.type == "cuda"
        decoded = decode_batches(batches, self.preprocessing.evaluation(), num_workers, pin_memory=pin)
        with tqdm(total=len(items), unit="image", disable=not progress, file=sys.stderr) as bar:
            for batch in decoded:
                if batch.rejected:
                    raise ImageError(batch.rejected[min(batch.rejected)])
                with self._evaluating():
                    vectors = self.embed_pixels(batch.pixels, space).float().cpu()
                for broken in not_finite(vectors)[:1]:
                    raise DataError(
                        f"{self.name} gives NaN for image number {done + broken}; its weights are damaged"
                    )
                parts.append(vectors)
                done += len(vectors)
                bar.update(len(vectors))
        return torch.cat(parts)

    @property
    def space(self) -> EmbeddingSpace:
        """Space of the full vectors; its probe is computed at first use and cached until the next training.

        The probe's rows for texts are zero, because there is no text tower.
        """
        if self._space is None or self.training:
            images = self.encode_images(draw_probe_images())
            probe = torch.cat([torch.zeros(len(PROBE_TEXTS), self.dim), images])
            self._space = EmbeddingSpace(self.name, self.dim, self.preprocessing.describe(), probe)
        return self._space

    def invalidate_space(self) -> None:
        """Drop the cached probe; call this after a change of weights in evaluation mode."""
        self._space = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training mode drops the cached probe."""
        if mode:
            self.invalidate_space()
        return super().train(mode)

    def _dim_of(self, space: str) -> int:
        if space not in ("new", "old"):
            raise ConfigError(f"space is {space!r}, but must be 'new' or 'old'")
        if space == "old" and not self.old_dim:
            raise ConfigError(
                f"{self.name} is compatible with no old model and has no vectors of an old space; use 'new'"
            )
        return self.dim if space == "new" else self.old_dim

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode in float32 without gradients; restores the mode of every module afterwards."""
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            # parametrize.cached computes each orthogonal matrix once, not at every access.
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False), parametrize.cached():
                yield
        finally:
            for module in training:
                module.training = True

    def _config(self, naming: Naming, card: CardData) -> dict[str, Any]:
        described = self.backbone.description()
        return {
            "backbone": described | {"spec": naming(described["spec"])},
            "head": described_head(self.head),
            "preprocessing": asdict(self.preprocessing),
            "class_names": self.class_names,
            "old_space": described_space(self.old_space, naming),
        }

    @classmethod
    def _build(cls, config: SavedConfig) -> CompatibleBackbone:
        values = config.values
        backbone = config.only(values["backbone"], ("spec", "image_size", "architecture"), "backbone")
        settings = [field.name for field in fields(ImagePreprocessing)]
        preprocessing = ImagePreprocessing(**config.only(values["preprocessing"], settings, "preprocessing"))
        for what, size in (
            ("backbone", backbone["image_size"]),
            ("preprocessing", preprocessing.image_size),
        ):
            if int(size) > MAX_IMAGE_SIZE:
                raise ConfigError(f"image_size of the {what} is {size}, but may be at most {MAX_IMAGE_SIZE}")
        _require_depth(backbone, len(read_header(config.file.parent / WEIGHTS_NAME)))
        head = build_head(config, config.only(values["head"], ("kind", "options"), "head"), "head.options")
        names = [str(name) for name in values["class_names"]]
        return cls(rebuild_backbone(backbone), head, preprocessing, names, config.space("old_space"))

    def _facts(self, card: CardData) -> CardFacts:
        space = self.old_space
        compatible = ""
        if self.old_dim:
            old = quoted(public_name(space.model)) if space is not None else "an older model"
            compatible = (
                f" Their first {self.old_dim} coordinates can be searched in a gallery that {old} embedded: "
                "nothing in that gallery needs to be embedded again."
            )
        spec = quoted(public_name(self.backbone.spec))
        snippet = _SNIPPET + (_OLD_SNIPPET if self.old_dim else "")
        return CardFacts(
            title=f"A {self.head.kind} image model on {spec}",
            summary=(
                f"An image model made with xbt: the backbone {spec} with the head {quoted(self.head.kind)}, "
                f"{self.dim}-d vectors.{compatible}"
            ),
            snippet=snippet.format(dim=self.dim, old_dim=self.old_dim),
            method=self.head.paper,
            limits=_LIMITS,
            spaces={"old": space},
            tags=("image-retrieval",),
            pipeline_tag="image-feature-extraction",
            packages=("timm", "torchvision"),
        )


def _require_depth(described: object, n_tensors: int, key: str = "backbone") -> None:
    """Refuse a network with more layers than saved tensors, before the layers are built."""
    if isinstance(described, Mapping):
        for name, value in described.items():
            _require_depth(value, n_tensors, str(name))
    elif isinstance(described, list):
        for value in described:
            _require_depth(value, n_tensors, key)
    elif ("layers" in key or "depth" in key) and isinstance(described, int) and described > n_tensors:
        raise ConfigError(
            f"{key} is {described}, but the weights have {n_tensors} tensors; save or download it again"
        )
