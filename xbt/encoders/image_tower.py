"""The image tower of a CLIP alone: taken from an encoder, or built from its description."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from xbt.encoders.base import DualEncoder
from xbt.encoders.configs import require_plain_transformers
from xbt.encoders.quiet import brief, quiet
from xbt.errors import EncoderError

# The text tower of a rebuilt CLIP is discarded, so it is as small as the libraries allow.
_OPEN_CLIP_TEXT = {"context_length": 32, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
_TRANSFORMERS_TEXT = {
    **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    **{"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
}


class ImageTower(nn.Module):
    """The image part of a CLIP: (n, 3, height, width) → (n, dim) vectors of any length.

    Attributes:
        architecture: JSON-able description; :func:`build_image_tower` builds the same tower from it, with
            random weights.
        image_size: Side in pixels of its input.
        parts: The modules of the CLIP, shared with it.
    """

    def __init__(self, parts: dict[str, nn.Module], architecture: dict[str, Any], image_size: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.architecture = architecture
        self.image_size = image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed (n, 3, height, width) pixels as (n, dim) vectors of any length."""
        output = self.parts["tower"](pixels)
        # open_clip returns vectors, CoCa a tuple of vectors and patches, transformers an output object.
        first = output[0] if isinstance(output, tuple) else output
        vectors: Any = getattr(output, "pooler_output", first)
        embedded: Tensor = self.parts["projection"](vectors) if "projection" in self.parts else vectors
        return embedded


def take_image_tower(encoder: DualEncoder) -> ImageTower:
    """Take the image tower from an encoder without LoRA; it shares the encoder's weights."""
    clip: Any = encoder.module
    if hasattr(clip, "peft_config"):
        raise EncoderError(f"{encoder.name} has LoRA attached; give an encoder as it was loaded")
    if hasattr(clip, "visual"):
        return _open_clip_tower(clip, deepcopy(vars(encoder)["model_config"]))
    if hasattr(clip, "vision_model"):
        config = json.loads(clip.config.to_json_string(use_diff=False))
        kept = ("model_type", "vision_config", "projection_dim")
        return _transformers_tower(clip, {key: config[key] for key in kept if key in config})
    raise EncoderError(
        f"{type(encoder).__name__} is not an encoder of open_clip or transformers; load one of these"
    )


def build_image_tower(architecture: dict[str, Any]) -> ImageTower:
    """Build a tower from an :attr:`ImageTower.architecture`, without files and with random weights."""
    try:
        builders = {"open_clip": _build_open_clip, "transformers": _build_transformers}
        with quiet():
            return builders[architecture["library"]](architecture["config"])
    except Exception as error:  # the libraries raise errors of many types
        raise EncoderError(
            f"cannot build an image tower from {architecture!r}: {type(error).__name__}: {brief(error)}"
        ) from error


def _open_clip_tower(clip: Any, config: dict[str, Any]) -> ImageTower:
    size = clip.visual.image_size
    side = int(size[0] if isinstance(size, list | tuple) else size)
    return ImageTower({"tower": clip.visual}, {"library": "open_clip", "config": config}, side)


def _transformers_tower(clip: Any, config: dict[str, Any]) -> ImageTower:
    parts = {"tower": clip.vision_model}
    if hasattr(clip, "visual_projection"):
        parts["projection"] = clip.visual_projection
    side = int(clip.config.vision_config.image_size)
    return ImageTower(parts, {"library": "transformers", "config": config}, side)


def _build_open_clip(config: dict[str, Any]) -> ImageTower:
    from xbt.encoders.open_clip import OpenClipEncoder

    # These settings wrap the same image tower, and need their own kind of text tower.
    small = {key: value for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    small["text_cfg"] = dict(_OPEN_CLIP_TEXT)
    return _open_clip_tower(OpenClipEncoder.create(small).module, config)


def _build_transformers(config: dict[str, Any]) -> ImageTower:
    from transformers import AutoConfig, AutoModel

    require_plain_transformers(config, "the image tower's config")
    vision = {key: value for key, value in config.items() if key != "model_type"}
    whole = AutoConfig.for_model(config["model_type"], text_config=dict(_TRANSFORMERS_TEXT), **vision)
    return _transformers_tower(AutoModel.from_config(whole, trust_remote_code=False), config)
