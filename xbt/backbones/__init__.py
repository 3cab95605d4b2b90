"""Image backbones, and models made of a backbone and a compatible head."""

from __future__ import annotations

from xbt.backbones.compatible_backbone import CompatibleBackbone
from xbt.backbones.image_backbone import ImageBackbone
from xbt.backbones.loading import load_backbone, rebuild_backbone
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
