"""Stage 2 of XBT: LoRA fine-tuning of the new model on image–text pairs, without the old model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from xbt.compatible.encoder import CompatibleEncoder
from xbt.encoders import DualEncoder, LoraSettings, add_lora, check_lora, load_encoder, set_lora_mode
from xbt.errors import ConfigError
from xbt.losses import Temperature, contrastive_loss, cosine_loss
from xbt.projections.base import Projection
from xbt.projections.trainer import NO_DECAY
from xbt.training.args import TrainArgs
from xbt.training.batches import PairBatches
from xbt.training.cached_vectors import (
    PairTraining,
    begin_on_pairs,
    cross_recall,
    embed_pairs,
    embed_texts_once,
)
from xbt.training.loop import TrainingLoop


@dataclass(kw_only=True)
class LoraTraining(PairTraining):
    """Settings of every training of a new encoder with LoRA on image–text pairs."""

    new: str
    """The new encoder."""
    training: TrainArgs = field(
        default_factory=lambda: TrainArgs(
            steps=200, batch_size=64, lr=5e-4, warmup_steps=20, eval_every=50, checkpoint_every=50
        )
    )
    """Settings of the training."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The LoRA of the new encoder."""
    temperature: float = 0.05
    """Temperature of the contrastive loss at the start; it is learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.01 <= self.temperature <= 1:
            raise ConfigError(f"--temperature must lie in [0.01, 1], got {self.temperature}")


@dataclass(kw_only=True)
class LoraFinetuningConfig(LoraTraining):
    """Stage 2: fine-tune the new model with LoRA on image–text pairs, behind stage 1's projection.

    Writes ``compatible/`` (load it with ``xbt.CompatibleEncoder.from_pretrained``), which holds the adapters
    and the projection but nothing of the base model, and ``result.json`` to the output directory.
    """

    projection: str
    """Stage 1's projection: its directory or Hub repository."""
    train_projection: bool = True
    """Also train the projection."""
    anchor_weight: float = 1.0
    """Weight of the anchor, which keeps projected texts near their vectors of stage 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor_weight < 0:
            raise ConfigError(f"--anchor_weight must not be negative, got {self.anchor_weight}")


class LoraObjective(nn.Module):
    """The parts of a loss on the towers of an encoder with LoRA, and on what lies behind them.

    Args:
        encoder: The new encoder, with LoRA.
        projection: What lies behind it.
        temperature: τ at the start, learned.
    """

    def __init__(self, encoder: DualEncoder, projection: Projection, temperature: float) -> None:
        super().__init__()
        self._encoder = encoder
        self.towers = encoder.module
        self.projection = projection
        self.temperature = Temperature(temperature)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for the frozen layers of the towers."""
        super().train(mode)
        set_lora_mode(self.towers, mode)
        return self


class CompatibleObjective(LoraObjective):
    """Loss of stage 2 over a batch of pairs.

        p = φ(f(x)),  q = φ(g(t))
        L = InfoNCE(p, q; τ) + β · mean(1 − cos(q, φ₀(g₀(t))))

    with f, g the new model's towers under LoRA, and φ₀, g₀ from stage 1. After stage 1, φ₀∘g₀ replaces
    the old text tower; the first term draws new images to it, and the second (the anchor) holds
    the texts in the old space, because nothing else in this stage knows where that is. XBT (arXiv 2405.14715)
    fine-tunes with LoRA on pairs and without the old model; the anchor is ours.
    """

    def __init__(self, encoder: DualEncoder, projection: Projection, config: LoraFinetuningConfig) -> None:
        super().__init__(encoder, projection, config.temperature)
        self.anchor_weight = config.anchor_weight

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts for ``{"pixels", "tokens", "anchor": (n, old_dim)}``."""
        images = self.projection(self._encoder.embed_pixels(batch["pixels"]), "image")
        texts = self.projection(self._encoder.embed_tokens(batch["tokens"]), "text")
        contrastive = contrastive_loss(images, texts, self.temperature())
        anchor = cosine_loss(texts, batch["anchor"])
        loss = contrastive + self.anchor_weight * anchor
        return loss, {"contrastive": contrastive.detach(), "anchor": anchor.detach()}


def finetune_lora(config: LoraFinetuningConfig) -> CompatibleEncoder:
    """Run stage 2 and save the compatible encoder.

    Args:
        config: What to do.

    Returns:
        The compatible encoder of the best step on held-out pairs; step 0 is stage 1's result.

    Raises:
        XbtError: If the encoder, the projection, the pairs or a setting cannot be used.
    """
    projection = Projection.from_pretrained(config.projection)
    run, accelerator, train, held_out = begin_on_pairs(config, "finetune_lora")
    # Its constructor refuses an encoder that is not the one the projection was made for.
    compatible = CompatibleEncoder(load_encoder(config.new, accelerator.device), projection)
    check_lora(compatible.new, config.lora)
    # Embed before LoRA is added: the vectors of stage 1 replace those of the old model.
    anchors = embed_texts_once(accelerator, compatible, train.texts, run.path / "anchors")
    stage1 = embed_pairs(accelerator, compatible, held_out)
    torch.manual_seed(config.training.seed)
    add_lora(compatible.new, config.lora)
    compatible.projection.requires_grad_(config.train_projection)

    def evaluate() -> dict[str, float]:
        return cross_recall(embed_pairs(accelerator, compatible, held_out), stage1, held_out)

    objective = CompatibleObjective(compatible.new, compatible.projection, config)
    dataset = PairBatches(train, compatible, config.training.seed, {"anchor": anchors})
    TrainingLoop(
        accelerator, run, config.training, objective, dataset, evaluate=evaluate, no_decay=NO_DECAY
    ).fit()
    if accelerator.is_main_process:
        compatible.save_pretrained(run.path / "compatible")
    accelerator.wait_for_everyone()
    return compatible
