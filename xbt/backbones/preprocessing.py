"""Preprocessing of images: a deterministic transform for vectors, and random augmentation for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from xbt.errors import ConfigError

Augmentation = Literal["none", "flip", "crop_flip", "resized_crop_flip"]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
ResizeMode = Literal["shortest", "squash"]
Seed = int | Sequence[int] | np.random.Generator
_CHOICES = {"interpolation": Interpolation, "resize_mode": ResizeMode, "augmentation": Augmentation}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PADDING = 8
"""Padding of ``crop_flip`` as a fraction of the image size: 4 pixels of 32, as is usual for CIFAR."""
AREA = (0.08, 1.0)
"""Range of the area that ``resized_crop_flip`` crops, as is usual for ImageNet."""
RATIO = (3 / 4, 4 / 3)
"""Range of the ratio of width to height that ``resized_crop_flip`` crops."""


@dataclass(frozen=True)
class ImagePreprocessing:
    """Settings of the preprocessing of images.

    Raises:
        ConfigError: If a value cannot be used.
    """

    image_size: int = 224
    """Side of the backbone's input in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each colour, of values between 0 and 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each colour."""
    interpolation: Interpolation = "bilinear"
    """Interpolation of the resizing, always by Pillow."""
    resize_mode: ResizeMode = "shortest"
    """For vectors: shortest keeps the sides' ratio and cuts out the middle, squash makes images square."""
    crop_fraction: float = 1.0
    """For vectors: images are resized to image_size / crop_fraction, then the middle is cut out; 0.875 is
    usual for ImageNet, 1 for images that are square already."""
    augmentation: Augmentation = "none"
    """In training: none; flip; crop_flip (padded, cropped at random and flipped, as is usual for CIFAR);
    resized_crop_flip (a random part, resized and flipped, as is usual for ImageNet)."""

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.image_size < 1:
            raise ConfigError(f"image_size is {self.image_size}, but must be at least 1 pixel")
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(
                f"crop_fraction is {self.crop_fraction}, but must lie above 0 and be at most 1, such as 0.875"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(
                f"mean {self.mean} and std {self.std} must be three numbers each, those of std above 0"
            )
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                names = ", ".join(get_args(kind))
                raise ConfigError(f"{name} {getattr(self, name)!r} is not known; choose one of {names}")

    def evaluation(self) -> EvaluationTransform:
        """The deterministic transform, for vectors."""
        return EvaluationTransform(self)

    def training(self) -> TrainingTransform:
        """The transform with random crops and flips, for training."""
        return TrainingTransform(self)

    def describe(self) -> dict[str, Any]:
        """Settings that belong to the identity of a space: all but the augmentation."""
        return {
            "backend": "pil",
            "size": [self.image_size, self.image_size],
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
            "crop_fraction": self.crop_fraction,
            "mean": list(self.mean),
            "std": list(self.std),
        }


@dataclass(frozen=True)
class EvaluationTransform:
    """Deterministic transform of an RGB image to (3, size, size) float32 pixels; picklable.

    Attributes:
        preprocessing: How.
    """

    preprocessing: ImagePreprocessing

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize the shorter side, cut out the middle, and normalise."""
        return _normalised(_middle(image, self.preprocessing), self.preprocessing)


@dataclass(frozen=True)
class TrainingTransform:
    """Random transform of an RGB image and a seed to (3, size, size) float32 pixels; picklable.

    Attributes:
        preprocessing: How.

    Example:
        >>> ImagePreprocessing(32, augmentation="crop_flip").training()(image, (seed, step, position))
    """

    preprocessing: ImagePreprocessing

    def __call__(self, image: Image.Image, seed: Seed) -> Tensor:
        """Augment and normalise.

        Args:
            image: An RGB image.
            seed: Whatever ``numpy.random.default_rng`` takes; nothing else decides what is drawn.
        """
        how, random = self.preprocessing, np.random.default_rng(seed)
        if how.augmentation == "resized_crop_flip":
            image = _random_part(image, how, random)
        else:
            image = _middle(image, how)
        if how.augmentation == "crop_flip":
            image = _shifted(image, how.image_size, random)
        if how.augmentation != "none" and random.random() < 0.5:
            image = F.horizontal_flip(image)
        return _normalised(image, how)


def _middle(image: Image.Image, how: ImagePreprocessing) -> Image.Image:
    side = max(how.image_size, round(how.image_size / how.crop_fraction))
    target = [side] if how.resize_mode == "shortest" else [side, side]
    if min(image.size) != side or (len(target) == 2 and image.size != (side, side)):
        image = F.resize(image, target, interpolation=InterpolationMode(how.interpolation))
    if image.size != (how.image_size, how.image_size):
        image = F.center_crop(image, [how.image_size, how.image_size])
    return image


def _shifted(image: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    padding = max(1, size // PADDING)
    top, left = (int(offset) for offset in random.integers(0, 2 * padding + 1, size=2))
    shifted: Image.Image = F.crop(F.pad(image, [padding]), top, left, size, size)
    return shifted


def _random_part(image: Image.Image, how: ImagePreprocessing, random: np.random.Generator) -> Image.Image:
    """Inception's crop of random area and ratio; a centre crop if ten draws do not fit the image."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
            size, mode = [how.image_size, how.image_size], InterpolationMode(how.interpolation)
            part: Image.Image = F.resized_crop(image, top, left, h, w, size, interpolation=mode)
            return part
    return _middle(image, how)


def _normalised(image: Image.Image, how: ImagePreprocessing) -> Tensor:
    pixels = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)
    normalised: Tensor = F.normalize(pixels, list(how.mean), list(how.std), inplace=True)
    return normalised
