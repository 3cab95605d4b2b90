"""Image backbones, and models made of a backbone and a compatible head."""

from __future__ import annotations

from xbt.backbones.loading import ImageBackbone, load_backbone, rebuild_backbone
from xbt.backbones.model import CompatibleBackbone
from xbt.backbones.preprocessing import EvaluationTransform, ImagePreprocessing, TrainingTransform

__all__ = [
    "CompatibleBackbone",
    "EvaluationTransform",
    "ImageBackbone",
    "ImagePreprocessing",
    "TrainingTransform",
    "load_backbone",
    "rebuild_backbone",
]
