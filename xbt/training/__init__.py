"""Training: CLIPs from scratch, stage 1 (text-only projection) and stage 2 (LoRA) of XBT."""

from __future__ import annotations

from xbt.training.args import TrainArgs
from xbt.training.clip import ClipConfig, train_clip
from xbt.training.lora_finetuning import LoraFinetuningConfig, finetune_lora
from xbt.training.text_projection import TextProjectionConfig, pretrain_text_projection

__all__ = [
    "ClipConfig",
    "LoraFinetuningConfig",
    "TextProjectionConfig",
    "TrainArgs",
    "finetune_lora",
    "pretrain_text_projection",
    "train_clip",
]
