"""Training of a small CLIP from scratch, for the demo and the tests."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xbt.encoders.open_clip import OpenClipEncoder
from xbt.errors import ConfigError
from xbt.losses import contrastive_loss
from xbt.training.args import TrainArgs
from xbt.training.batches import PairBatches
from xbt.training.cached_vectors import PairTraining, begin_on_pairs, cross_recall, embed_pairs
from xbt.training.loop import TrainingLoop


@dataclass(kw_only=True)
class ClipConfig(PairTraining):
    """Train a CLIP from scratch on image–text pairs, with open_clip's models.

    Writes the model to the output directory's ``model/``; ``open_clip:local-dir:OUTPUT_DIR/model`` loads it.
    """

    model: str
    """A built-in open_clip architecture, or a JSON file with an open_clip model config."""
    training: TrainArgs = field(default_factory=lambda: TrainArgs(weight_decay=0.1))
    """Settings of the training."""
    preprocess: dict[str, Any] = field(default_factory=dict)
    """Overrides of open_clip's image preprocessing: mean, std, interpolation, resize_mode."""
    held_out: float = 0.02
    """Fraction of the pairs held out to choose the best step."""


class ClipObjective(nn.Module):
    """CLIP's loss (Radford et al. 2021): symmetric InfoNCE with the model's own learnable logit scale."""

    def __init__(self, encoder: OpenClipEncoder) -> None:
        super().__init__()
        self._encoder = encoder
        self.towers = encoder.module

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss for ``{"pixels": (n, 3, H, W), "tokens": (n, context_length)}``."""
        images = self._encoder.embed_pixels(batch["pixels"])
        texts = self._encoder.embed_tokens(batch["tokens"])
        scale = self._encoder.logit_scale.exp()
        return contrastive_loss(images, texts, scale), {"logit_scale": scale.detach()}


def train_clip(config: ClipConfig) -> OpenClipEncoder:
    """Train a CLIP and save it in open_clip's own format.

    Args:
        config: What to do.

    Returns:
        The encoder of the best step on held-out pairs.

    Raises:
        XbtError: If the model config, the pairs or a setting cannot be used.
    """
    model = read_model_config(config.model)
    run, accelerator, train, held_out = begin_on_pairs(config, "train_clip")
    name = f"open_clip:local-dir:{run.path / 'model'}"
    encoder = OpenClipEncoder.create(model, config.preprocess or None, name).to(accelerator.device)

    def keep_scale() -> None:
        with torch.no_grad():  # CLIP keeps its temperature above 0.01
            encoder.logit_scale.clamp_(0.0, math.log(100.0))

    def evaluate() -> dict[str, float]:
        vectors = embed_pairs(accelerator, encoder, held_out)
        return cross_recall(vectors, vectors, held_out)

    TrainingLoop(
        accelerator,
        run,
        config.training,
        ClipObjective(encoder),
        PairBatches(train, encoder, config.training.seed),
        evaluate=evaluate,
        after_step=keep_scale,
        no_decay=("embedding", "logit_scale"),
    ).fit()
    encoder.module.eval().requires_grad_(False)
    encoder.invalidate_space()
    if accelerator.is_main_process:
        encoder.save_pretrained(run.path / "model")
    accelerator.wait_for_everyone()
    return encoder


def read_model_config(model: str) -> dict[str, Any] | str:
    """Read an open_clip model config from a JSON file; the name of a built-in architecture stays as it is."""
    if not model.endswith(".json"):
        return model
    try:
        config = json.loads(Path(model).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"--model {model} does not exist") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--model {model} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--model {model} must hold a JSON object, got a {type(config).__name__}")
    return config
