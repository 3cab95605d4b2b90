"""Finding and checking the files of a transformers model before it is built, and loading its tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from xbt.encoders.loading import read_plain_transformers, resolve_user_link
from xbt.encoders.quiet import brief
from xbt.errors import EncoderError
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

    The configs of a repository are fetched first, so that a model other than CLIP is refused before its
    weights are downloaded.

    Args:
        source: A directory, or a Hub repository ``org/name`` or ``org/name@revision``. The model may have
            been saved by sentence-transformers.
        name: The whole specification.
        access: Hub access; its revision overrides the one in the specification.

    Returns:
        The directory with the model's own ``config.json``, and the commit of the repository if it is one.

    Raises:
        EncoderError: If the directory does not exist, or the model is not a CLIP, needs its own code, or is
            followed by other modules.
        SavedPartError: If a repository cannot be fetched or holds no safetensors, or a config is not JSON.
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
    """Load the tokenizer in a directory.

    Raises:
        EncoderError: If a package that it needs is not installed, it needs its own code, or its files are
            missing or damaged.
        SavedPartError: If ``tokenizer_config.json`` is not a JSON object.
    """
    file = folder / "tokenizer_config.json"
    config = read_json(resolve_user_link(file)) if file.is_file() else {}
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raise errors of many types
        raise EncoderError(_no_tokenizer(folder, name, config, error)) from error
    except BaseException as error:  # panics of the Rust library are not Exceptions
        if type(error).__name__ != "PanicException":
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
