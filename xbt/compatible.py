"""What a user saves, loads, pushes and serves: the new CLIP, speaking the old one's space."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin
from torch import Tensor, nn

from xbt.encoders import DualEncoder, has_lora, load_encoder, load_lora, save_lora
from xbt.encoders.short_context import ShortContext
from xbt.encoders.text_batches import TextTransform
from xbt.errors import EncoderError, SpaceMismatchError
from xbt.hub import SavedPartError, fetch, read_json
from xbt.projections import Projection
from xbt.space import EmbeddingSpace
from xbt.version import __version__

CONFIG_NAME = "config.json"
PROJECTION_DIR = "projection"
LORA_DIR = "lora"
_FORMAT = "compatible_encoder"

_CARD = """# {new} speaks the space of {old}

A [CLIP](https://arxiv.org/abs/2103.00020) adapter made with xbt: the base model `{new}`{lora} and a
projection whose vectors can be searched in a gallery that `{old}` embedded. Nothing in that gallery needs
to be embedded again.

```python
import xbt

upgraded = xbt.CompatibleEncoder.from_pretrained("path/or/repo-of-this-adapter")
queries = upgraded.encode_texts(["a dog on a beach"])  # (1, {dim}) unit rows in the old space
```
"""


class CompatibleEncoder(DualEncoder, ModelHubMixin, library_name="xbt", license="apache-2.0"):
    """New encoder + LoRA (optional) + projection, behind the interface of an encoder; vectors are old-space.

    A drop-in for the old encoder: ``encode_texts`` and ``encode_images`` return (n, old_dim) float32 CPU unit
    rows that belong to ``space``, the old model's space.

    Args:
        new: The new encoder, with or without LoRA. Without LoRA it is checked against the space the
            projection was made for.
        projection: The map from its space to the old one; it must know its old space.

    Raises:
        SpaceMismatchError: If the encoder is not the one the projection was made for; the message names both.
    """

    lora_targets: ClassVar[dict[str, str]] = {}

    def __init__(self, new: DualEncoder, projection: Projection) -> None:
        if projection.old_space is None:
            raise SpaceMismatchError(
                "the projection does not know its old space; fit it with old_space= or call set_spaces"
            )
        if new.dim != projection.new_dim:
            raise SpaceMismatchError(
                f"the projection takes {projection.new_dim}-d vectors"
                + (f" of {projection.new_space}" if projection.new_space else "")
                + f", but the encoder is '{new.name}' ({new.dim}-d); load the encoder it was made for"
            )
        if projection.new_space is not None and not has_lora(new):
            projection.new_space.require(new.space, "the encoder given to the projection")
        self.new = new
        super().__init__(
            new.name,
            new.module,
            projection.old_dim,
            new.context_length,
            new.preprocessing,
            new.image_transform,
        )
        self.precision = new.precision
        self.projection = projection.to(new.device).eval()

    @property
    def module(self) -> nn.Module:
        """The new encoder's CLIP, which peft wraps once LoRA is added."""
        return self.new.module

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.new.module = module

    @property
    def space(self) -> EmbeddingSpace:
        """The old space: what this encoder's vectors may be compared with."""
        assert self.projection.old_space is not None
        return self.projection.old_space

    def to(self, device: str | torch.device) -> Self:
        """Moves encoder and projection, and returns the compatible encoder itself."""
        self.new.to(device)
        self.projection.to(device)
        return self

    @property
    def text_transform(self) -> TextTransform:
        """See :attr:`DualEncoder.text_transform`."""
        return self.new.text_transform

    @property
    def short_context(self) -> ShortContext | None:
        """See :attr:`DualEncoder.short_context`."""
        return self.new.short_context

    def invalidate_space(self) -> None:
        """See :meth:`DualEncoder.invalidate_space`; it is the new encoder whose weights change."""
        self.new.invalidate_space()

    def _text_features(self, tokens: Tensor) -> Tensor:
        return self._project(self.new._embed_whole(tokens))

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self._project(self.new.embed_pixels(pixels))

    def _project(self, vectors: Tensor) -> Tensor:
        # The projection is a thousandth of the work and stays in fp32 where the towers run in bf16.
        with torch.autocast(vectors.device.type, enabled=False):
            projected: Tensor = self.projection(vectors)
        return projected

    def _towers(self) -> list[nn.Module]:
        return self.new._towers()

    def _save_pretrained(self, save_directory: Path) -> None:
        shutil.rmtree(save_directory / LORA_DIR, ignore_errors=True)
        self.projection.save_pretrained(save_directory / PROJECTION_DIR)
        (save_directory / PROJECTION_DIR / "README.md").unlink(missing_ok=True)
        if has_lora(self.new):
            save_lora(self.new, save_directory / LORA_DIR)
        new_space = self.projection.new_space or self.new.space
        config = {
            "format": _FORMAT,
            "xbt_version": __version__,
            "base": self.new.name,
            "lora": has_lora(self.new),
            "new_space": new_space.to_dict(),
            "old_space": self.space.to_dict(),
        }
        (save_directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that is saved beside the weights: base model, use, and what it is compatible with."""
        repo = self.new.name.split(":", 1)[1].removeprefix("hf-hub:")
        data = ModelCardData(
            library_name="xbt",
            license="apache-2.0",
            base_model=repo if repo.count("/") == 1 and "local-dir" not in repo else None,
            tags=["backward-compatible", "clip", "image-text-retrieval"],
        )
        lora = " with a LoRA adapter" if has_lora(self.new) else ""
        body = _CARD.format(new=self.new.name, old=self.space.model, lora=lora, dim=self.dim)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        base: DualEncoder | str | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        **hub_options: Any,
    ) -> Self:
        """Loads a compatible encoder from a directory or a Hub repository, strictly.

        Args:
            pretrained_model_name_or_path: Directory, or Hub repository ``org/name``.
            base: The new encoder, or another specification for it, when the recorded one does not hold on
                this machine. It is changed in place when the saved part has LoRA.
            device: Where the encoder goes; a given encoder stays where it is.
            revision: Branch, tag or commit on the Hub.
            **hub_options: ``cache_dir``, ``token``, ``force_download``, ``local_files_only``.

        Returns:
            The encoder; LoRA is merged, so that it costs nothing at search time.

        Raises:
            SavedPartError: If a file is missing, damaged, or of another kind.
            EncoderError: If the base model cannot be loaded or the LoRA does not fit it.
            SpaceMismatchError: If the base is not the model this was made for; the message names both.
        """
        directory = fetch(pretrained_model_name_or_path, revision=revision, **hub_options)
        config = read_json(directory / CONFIG_NAME)
        if config.get("format") != _FORMAT:
            raise SavedPartError(f"{directory / CONFIG_NAME} does not describe a compatible encoder")
        projection = Projection.from_pretrained(directory / PROJECTION_DIR)
        try:
            recorded = EmbeddingSpace.from_dict(config["new_space"])
            base_spec, with_lora = str(config["base"]), bool(config["lora"])
        except (KeyError, TypeError, ValueError) as error:
            raise SavedPartError(f"{directory / CONFIG_NAME} lacks or misnames a key: {error}") from error
        new = base if isinstance(base, DualEncoder) else _load_base(base, base_spec, directory, device)
        if has_lora(new):
            raise EncoderError(f"'{new.name}' carries a LoRA already; give a freshly loaded base")
        recorded.require(new.space, f"the base model given to {directory}")
        if with_lora:
            load_lora(new, directory / LORA_DIR, merge=True)
        return cls(new, projection)


def _load_base(given: str | None, recorded: str, directory: Path, device: str | torch.device) -> DualEncoder:
    try:
        return load_encoder(given or recorded, device)
    except EncoderError as error:
        if given is not None:
            raise
        raise EncoderError(
            f"the base model recorded in {directory} cannot be loaded: {error}; pass base= to name it anew"
        ) from error
