"""Image processors of transformers: what they do in words, and that it is what the model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from xbt.encoders.base import require_side
from xbt.encoders.loading import own_file
from xbt.encoders.quiet import brief
from xbt.errors import EncoderError, XbtError
from xbt.hub import read_json

CONFIG_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files that describe an image processor; the second one only where it has an ``image_processor``."""
_TRIED = ((48, 40), (40, 48))
"""Sizes of the images that are tried: no crop or no resizing shows in one of them."""


class Pixels:
    """An image processor as a function; picklable, holds no weights."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """From an RGB image to (3, height, width) float32 pixels."""
        pixels: Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.float()


def load_image_processor(folder: Path, name: str) -> Any:
    """Load the image processor in a directory, always the one that resizes with PIL.

    Raises:
        EncoderError: If there is none, or it needs code of its own, or cannot be used.
        SavedPartError: If its file is no JSON object.
    """
    found = [file for file in map(folder.joinpath, CONFIG_FILES) if file.is_file()]
    contents = {file.name: read_json(own_file(file)) for file in found}
    if not any(each == CONFIG_FILES[0] or "image_processor" in contents[each] for each in contents):
        raise EncoderError(
            f"'{name}' has no image processor: {folder / CONFIG_FILES[0]} is missing; save the one that the "
            "model was trained with there (AutoImageProcessor.from_pretrained(BASE).save_pretrained(FOLDER))"
        )
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
    except Exception as error:  # whatever odd values in its config lead to
        if any("auto_map" in each for each in contents.values()):
            raise EncoderError(
                f"the image processor of '{name}' needs code of its repository (auto_map), which is not run; "
                "save one of transformers' own image processors beside the model"
            ) from error
        raise EncoderError(
            f"the image processor of '{name}' cannot be loaded ({brief(error)}); check {CONFIG_FILES[0]}"
        ) from error


def describe(processor: Any, image_size: int, name: str) -> dict[str, Any]:
    """Describe what an image processor does to an image, once it is known that the model takes the result.

    Args:
        processor: The image processor.
        image_size: Pixels a side that the model takes.
        name: The encoder's specification, for errors.

    Returns:
        JSON-able settings, those that are applied: pixels are ``(x / 255 - mean) / std`` for values x.

    Raises:
        EncoderError: If it makes images of another size than the model takes, or of many sizes, or pixels
            that are not finite, or cannot be used.
    """
    try:
        settings = _settings(processor)
        _require_pixels(processor, image_size, name)
    except XbtError:
        raise
    except Exception as error:  # odd values in its config fail wherever they are first used
        raise EncoderError(
            f"the image processor of '{name}' cannot be used ({type(error).__name__}: {brief(error)}); check "
            f"{CONFIG_FILES[0]}"
        ) from error
    return settings


def _settings(processor: Any) -> dict[str, Any]:
    size = {key: value for key, value in dict(processor.size).items() if value is not None}
    resized, cropped = _does(processor, "resize"), _does(processor, "center_crop")
    final = dict(processor.crop_size) if cropped else size
    require_side(*size.values(), *filter(None, final.values()))  # what is only cropped later is made as well
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
    made = [size[key] for key in ("shortest_edge", "height", "width") if key in size]
    if resized and any(side not in sides for side in made):
        settings["resize_to"] = [made[0], made[-1]]
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
    """Mean and standard deviation of values between 0 and 1, whichever steps are left out."""
    scale = 255.0 * (float(processor.rescale_factor) if _does(processor, "rescale") else 1.0)
    mean, std = [0.0] * 3, [1.0] * 3
    if _does(processor, "normalize"):
        mean, std = list(processor.image_mean), list(processor.image_std)
    if abs(scale - 1.0) < 1e-9:  # 1/255, which is not exact
        return mean, std
    return [value / scale for value in mean], [value / scale for value in std]


def _require_pixels(processor: Any, image_size: int, name: str) -> None:
    transform = Pixels(processor)
    for width, height in _TRIED:
        pixels = transform(Image.new("RGB", (width, height), (200, 100, 50)))
        if tuple(pixels.shape) != (3, image_size, image_size):
            made = " x ".join(map(str, tuple(pixels.shape)[:0:-1]))
            raise EncoderError(
                f"the image processor of '{name}' makes {made} pixels of an image of {width} x {height}, but "
                f"the model takes {image_size} x {image_size} (vision_config.image_size); give it the "
                f"{CONFIG_FILES[0]} that it was trained with"
            )
        if not bool(torch.isfinite(pixels).all()):
            raise EncoderError(
                f"the image processor of '{name}' makes pixels that are not finite; check image_mean, "
                f"image_std and rescale_factor in {CONFIG_FILES[0]}"
            )
