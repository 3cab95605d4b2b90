"""Training: CLIPs from scratch, stages 1 and 2 of XBT, and backward-compatible training."""

from __future__ import annotations

from xbt.training.args import BackboneTraining, TrainArgs
from xbt.training.backbone import train_compatible_backbone
from xbt.training.clip import ClipConfig, train_clip
from xbt.training.compatible_clip import CompatibleClipConfig, train_compatible_clip
from xbt.training.lora_finetuning import LoraFinetuningConfig, finetune_lora
from xbt.training.methods import CompatibleBackboneConfig, LossWeights
from xbt.training.text_projection import TextProjectionConfig, pretrain_text_projection

__all__ = [
    "BackboneTraining",
    "ClipConfig",
    "CompatibleBackboneConfig",
    "CompatibleClipConfig",
    "LoraFinetuningConfig",
    "LossWeights",
    "TextProjectionConfig",
    "TrainArgs",
    "finetune_lora",
    "pretrain_text_projection",
    "train_clip",
    "train_compatible_backbone",
    "train_compatible_clip",
]
