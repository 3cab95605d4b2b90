"""Checks of a model's config, which may say sizes and names, and nothing that runs code or fetches more."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xbt.errors import EncoderError
from xbt.hub import read_json

TOKENIZER_OPTIONS = ("additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token")
"""Options that a config may give open_clip's tokenizers, which hand anything else to transformers."""

_ATTENTION = (None, "eager", "sdpa")
_FETCHING = (
    "quantization_config",
    "transformers_weights",
    "kernel_config",
    "use_kernels",
    "experts_implementation",
    "_experts_implementation",
)
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_TIMM_NAME = re.compile(r"[\w.-]+")


def require_plain_open_clip(config: Mapping[str, Any], what: str) -> None:
    """Refuses an open_clip model config that would run code or fetch a tower from elsewhere.

    Args:
        config: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and more.
        what: What to call it in an error.

    Raises:
        EncoderError: If a tower is not described by an object, the tokenizer gets options that are not known
            to be harmless (``trust_remote_code`` is not), or the image tower is a repository or directory.
    """
    text, vision = (_tower(config, name, what) for name in ("text_cfg", "vision_cfg"))
    options = text.get("tokenizer_kwargs") or {}
    known = ", ".join(TOKENIZER_OPTIONS)
    unknown = (
        sorted(set(options) - set(TOKENIZER_OPTIONS)) if isinstance(options, dict) else [f"{options!r:.80}"]
    )
    if unknown:
        raise EncoderError(
            f"{what} gives its tokenizer the tokenizer_kwargs {', '.join(map(str, unknown))}, which could "
            f"run code or read other files; remove them: only {known} are taken from a config"
        )
    timm = vision.get("timm_model_name")
    if timm is not None and not (isinstance(timm, str) and _TIMM_NAME.fullmatch(timm)):
        raise EncoderError(
            f"{what} names {timm!r:.80} as timm_model_name, but only timm's own models are built, and "
            "nothing is fetched for them; write a name of timm.list_models()"
        )


def require_plain_transformers(config: Mapping[str, Any], what: str) -> None:
    """Refuses a transformers config that names kernels, quantised or other weights to be fetched.

    Args:
        config: What a config.json holds.
        what: What to call it in an error.

    Raises:
        EncoderError: If it, or a config inside it, has such a setting.
    """
    for key, value in config.items():
        named = key in _FETCHING and value is not None
        if named or (key in _ATTENTION_KEYS and value not in _ATTENTION):
            raise EncoderError(
                f"{what} sets {key} to {value!r:.80}, for which transformers could fetch code or other "
                "weights; remove it, or save the model in plain float32"
            )
        if isinstance(value, Mapping):
            require_plain_transformers(value, what)


def read_plain_transformers(folder: Path) -> dict[str, Any]:
    """Reads and checks the ``config.json`` of a model of transformers.

    Raises:
        SavedPartError: If it is missing or is no JSON object.
        EncoderError: As :func:`require_plain_transformers`, or if an adapter lies beside it.
    """
    file = folder / "config.json"
    config = read_json(own_file(file))
    require_plain_transformers(config, str(file))
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise EncoderError(
            f"{adapter} would have transformers load an adapter too; merge it into the model, or remove it"
        )
    return config


def _tower(config: Mapping[str, Any], name: str, what: str) -> dict[str, Any]:
    tower = config.get(name)
    if not isinstance(tower, dict):
        raise EncoderError(f"{what} must describe the {name} by an object, got {tower!r:.80}")
    return tower


def own_file(file: Path) -> Path:
    """The file that a link leads to, in a directory that the user names and whose links are his own."""
    return file.resolve() if file.is_symlink() and file.parent.parent.name != "snapshots" else file
