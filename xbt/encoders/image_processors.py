"""Image processors of transformers: loading, description, and a check that they fit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from xbt.encoders.base import require_side
from xbt.encoders.loading import resolve_user_link
from xbt.encoders.quiet import brief
from xbt.errors import EncoderError, XbtError
from xbt.hub import read_json

CONFIG_FILES = ("preprocessor_config.json", "processor_config.json")
"""Config files of an image processor; the second counts only if it has the key ``image_processor``."""
_TRIED = ((48, 40), (40, 48))
"""Sizes of test images; at least one shows a missing crop or a missing resize."""


class Pixels:
    """An image processor as a function; picklable, without weights."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into (3, height, width) float32 pixels."""
        pixels: Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.float()


def load_image_processor(folder: Path, name: str) -> Any:
    """Load the image processor in a directory, always the variant that resizes with PIL.

    Raises:
        EncoderError: If there is none, or it needs its own code, or cannot be used.
        SavedPartError: If its file is not a JSON object.
    """
    files = [file for file in map(folder.joinpath, CONFIG_FILES) if file.is_file()]
    contents = {file.name: read_json(resolve_user_link(file)) for file in files}
    if not any(file == CONFIG_FILES[0] or "image_processor" in contents[file] for file in contents):
        raise EncoderError(
            f"'{name}' has no image processor: {folder / CONFIG_FILES[0]} is missing; save the one that the "
            "model was trained with there (AutoImageProcessor.from_pretrained(BASE).save_pretrained(FOLDER))"
        )
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
    except Exception as error:  # invalid values in its config raise errors of many types
        if any("auto_map" in content for content in contents.values()):
            raise EncoderError(
                f"the image processor of '{name}' needs code of its repository (auto_map), which is not run; "
                "save one of transformers' own image processors beside the model"
            ) from error
        raise EncoderError(
            f"the image processor of '{name}' cannot be loaded ({brief(error)}); check {CONFIG_FILES[0]}"
        ) from error


def describe(processor: Any, image_size: int, name: str) -> dict[str, Any]:
    """Describe an image processor's settings, after a check that its images fit the model.

    Args:
        processor: The image processor.
        image_size: Side in pixels of the model's input.
        name: The encoder's specification, for errors.

    Returns:
        JSON-able settings of the steps that are applied. Pixels are ``(x / 255 - mean) / std`` for values x.

    Raises:
        EncoderError: If its images have another size than the model's input, or different sizes, or pixels
            that are not finite, or it cannot be used.
    """
    try:
        settings = _settings(processor)
        _require_pixels(processor, image_size, name)
    except XbtError:
        raise
    except Exception as error:  # invalid config values fail where they are first used
        raise EncoderError(
            f"the image processor of '{name}' cannot be used ({type(error).__name__}: {brief(error)}); check "
            f"{CONFIG_FILES[0]}"
        ) from error
    return settings


def _settings(processor: Any) -> dict[str, Any]:
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    resized, cropped = _does(processor, "resize"), _does(processor, "center_crop")
    final = dict(processor.crop_size) if cropped else size
    require_side(*size.values(), *filter(None, final.values()))  # images are made at the size before the crop
    edge = final.get("shortest_edge")
    sides = [edge, edge] if edge else [final.get("height"), final.get("width")]
    mean, std = _normalisation(processor)
    settings: dict[str, Any] = {
        "backend": "pil",
        "size": sides,
        "interpolation": Image.Resampling(processor.resample).name.lower() if resized else None,
        "resize_mode": _resize_mode(size) if resized else "none",
        "mean": mean,
        "std": std,
    }
    resize_to = [size[key] for key in ("shortest_edge", "height", "width") if key in size]
    if resized and any(side not in sides for side in resize_to):
        settings["resize_to"] = [resize_to[0], resize_to[-1]]
    if _does(processor, "pad"):
        settings["padded"] = True
    return settings


def _does(processor: Any, step: str) -> bool:
    return bool(getattr(processor, f"do_{step}", False))


def _resize_mode(size: dict[str, Any]) -> str:
    if "height" in size and "width" in size:
        return "squash"
    return "shortest" if set(size) == {"shortest_edge"} else "bounded"


def _normalisation(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation for values between 0 and 1, also if a step is disabled."""
    scale = 255.0 * (float(processor.rescale_factor) if _does(processor, "rescale") else 1.0)
    mean, std = [0.0] * 3, [1.0] * 3
    if _does(processor, "normalize"):
        mean, std = list(processor.image_mean), list(processor.image_std)
    if abs(scale - 1.0) < 1e-9:  # the usual 1/255, up to rounding
        return mean, std
    return [value / scale for value in mean], [value / scale for value in std]


def _require_pixels(processor: Any, image_size: int, name: str) -> None:
    transform = Pixels(processor)
    for width, height in _TRIED:
        pixels = transform(Image.new("RGB", (width, height), (200, 100, 50)))
        if tuple(pixels.shape) != (3, image_size, image_size):
            size = " x ".join(map(str, tuple(pixels.shape)[:0:-1]))
            raise EncoderError(
                f"the image processor of '{name}' makes {size} pixels of an image of {width} x {height}, but "
                f"the model takes {image_size} x {image_size} (vision_config.image_size); give it the "
                f"{CONFIG_FILES[0]} that it was trained with"
            )
        if not bool(torch.isfinite(pixels).all()):
            raise EncoderError(
                f"the image processor of '{name}' makes pixels that are not finite; check image_mean, "
                f"image_std and rescale_factor in {CONFIG_FILES[0]}"
            )
