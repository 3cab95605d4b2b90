"""Files of a transformers model, checked before it is built; its tokenizer and its image processor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from xbt.encoders.base import require_side
from xbt.encoders.configs import read_plain_transformers, resolve_user_link
from xbt.encoders.quiet import brief
from xbt.errors import EncoderError, XbtError
from xbt.hub import SAFE_PATTERNS, HubAccess, fetch_repository, read_json, split_revision

SUPPORTED = ("clip", "siglip")
"""Values of ``model_type`` in a config.json that can be loaded."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Weights files, of which a repository must hold one."""
_CONFIG, _MODULES, _WRAPPED = "config.json", "modules.json", "0_CLIPModel"
_PACKAGES = {
    "sentencepiece": "sentencepiece",
    "protobuf": "protobuf",
    "tiktoken": "tiktoken",
    "blobfile": "tiktoken",
}
"""Name in an error of a tokenizer → package to install."""
_MAX_LIST = 2**20
_SUBFOLDER = re.compile(r"[\w-][\w.-]*")


def find_transformers(source: str, name: str, access: HubAccess) -> tuple[Path, str | None]:
    """Find, and download if need be, the files of a specification ``transformers:SOURCE``.

    The model may have been saved by sentence-transformers. The configs of a repository are fetched first, so
    that a model other than CLIP is refused before its weights are downloaded.

    Returns:
        The directory with the model's own ``config.json``, and the commit of the repository if it is one.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _require_clip(_model_folder(folder, name), name), None
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise EncoderError(f"the directory {folder} of '{name}' does not exist")
    repo, revision = split_revision(source)
    access = access.at(access.revision or revision)
    configs = fetch_repository(repo, access, ["*config.json", _MODULES], [_CONFIG, _MODULES])
    model = _require_clip(_model_folder(configs, name), name)
    inside = "" if model == configs else f"{model.name}/"
    patterns = (*SAFE_PATTERNS, f"{inside}model.safetensors", f"{inside}model-*-of-*.safetensors")
    whole = fetch_repository(repo, access, patterns, [f"{inside}{file}" for file in WEIGHTS])
    return whole / inside, whole.name


def _model_folder(folder: Path, name: str) -> Path:
    """The directory itself, or the subdirectory where sentence-transformers saved the CLIP."""
    listing = folder / _MODULES
    if not listing.is_file():
        return folder
    modules = _read_list(resolve_user_link(listing))
    kinds = [
        str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        for module in modules
    ]
    if not kinds or kinds[0] != "CLIPModel":
        if (folder / _CONFIG).is_file():
            return folder  # its model_type is checked later
        first = kinds[0] if kinds and kinds[0] else "none"
        raise EncoderError(
            f"'{name}' was saved by sentence-transformers, and its first module is {first:.80}, not "
            "CLIPModel; only CLIPs are loaded"
        )
    others = [kind for kind in kinds[1:] if kind != "Normalize"]
    if others:
        raise EncoderError(
            f"'{name}' was saved by sentence-transformers with {', '.join(others):.80} after the CLIP, which "
            "would change its vectors and cannot be loaded; load the CLIP alone: give its own directory"
        )
    inside = str(modules[0].get("path") or "")
    if not inside:
        return folder
    if not _SUBFOLDER.fullmatch(inside):
        raise EncoderError(f"{listing} names the directory {inside!r:.80}; it must be one inside {folder}")
    if not (folder / inside).is_dir():
        raise EncoderError(
            f"{listing} names the directory {inside}, which is missing; download the model again"
        )
    return folder / inside


def _read_list(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size < _MAX_LIST else None
    except (ValueError, RecursionError) as error:
        raise EncoderError(f"{file} is not valid JSON ({brief(error)}); download it again") from error
    if not isinstance(content, list):
        raise EncoderError(f"{file} must hold a list of modules, as sentence-transformers writes it")
    return content


def _require_clip(folder: Path, name: str) -> Path:
    """Return a directory if its config describes a CLIP or SigLIP of transformers."""
    if not (folder / _CONFIG).is_file():
        wrapped = f"; {_WRAPPED} in it looks like one: load that" if (folder / _WRAPPED).is_dir() else ""
        raise EncoderError(
            f"'{name}' could not be loaded: {folder} has no {_CONFIG}, so it is not a model of "
            f"transformers{wrapped or '; save the model with save_pretrained'}"
        )
    config = read_plain_transformers(folder)
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        code = "; code of a repository (auto_map) is not run" if "auto_map" in config else ""
        raise EncoderError(
            f"'{name}' is a {kind!r:.80} model, not a CLIP; xbt loads models of type "
            f"{' and '.join(SUPPORTED)} from transformers{code}"
        )
    if config.get("auto_map"):
        raise EncoderError(
            f"'{name}' refers to its own code (auto_map in {_CONFIG}), which is not run; remove auto_map if "
            f"it is a plain {kind} model, or wrap the model in a callable of yours"
        )
    return folder


def load_tokenizer(folder: Path, name: str) -> Any:
    """Load the tokenizer in a directory, without code of its repository."""
    file = folder / "tokenizer_config.json"
    config = read_json(resolve_user_link(file)) if file.is_file() else {}
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:  # of many types; panics of the Rust library are not Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise EncoderError(_no_tokenizer(folder, name, config, error)) from error


def _no_tokenizer(folder: Path, name: str, config: dict[str, Any], error: BaseException) -> str:
    if "auto_map" in config:
        return (
            f"the tokenizer of '{name}' needs code of its repository (auto_map), which is not run; save one "
            "of transformers' own tokenizers beside the model"
        )
    if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json", "spiece.model")):
        return (
            f"the tokenizer files of '{name}' are missing in {folder} (such as tokenizer.json, or vocab.json "
            "and merges.txt); save the tokenizer that the model was trained with there"
        )
    message = str(error).lower()
    package = next((name for name in _PACKAGES if name in message), None)
    if package is not None and (isinstance(error, ImportError) or "install" in message):
        return (
            f"the tokenizer of '{name}' needs the package {package}, which is not installed; install it: "
            f"pip install {package}"
        )
    return f"the tokenizer of '{name}' cannot be loaded ({brief(error)}); check its files in {folder}"


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
    """Load the image processor in a directory, always the variant that resizes with PIL."""
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
    """Describe an image processor's settings, after a check that its images have the model's input size.

    The result holds JSON-able settings of the steps that are applied. Pixels are ``(x / 255 - mean) / std``
    for values x, and must be finite.
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
    mode = "shortest" if set(size) == {"shortest_edge"} else "bounded"
    if {"height", "width"} <= set(size):
        mode = "squash"
    settings: dict[str, Any] = {
        "backend": "pil",
        "size": sides,
        "interpolation": Image.Resampling(processor.resample).name.lower() if resized else None,
        "resize_mode": mode if resized else "none",
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
