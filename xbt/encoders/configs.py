"""Configs of open_clip and transformers: refused where they would run code or fetch more files.

Also the Hub repository that a specification names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xbt.errors import EncoderError
from xbt.hub.files import LOCAL, public_name, read_json

TOKENIZER_OPTIONS = ("additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token")
"""Tokenizer options that an open_clip config may set; open_clip would pass others to transformers."""

_ATTENTION = (None, "eager", "sdpa")
_FETCHING = (
    *("quantization_config", "transformers_weights", "kernel_config", "use_kernels"),
    *("experts_implementation", "_experts_implementation"),
)
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_TIMM_NAME = re.compile(r"[\w.-]+")


def require_plain_open_clip(config: Mapping[str, Any], what: str) -> None:
    """Refuse an open_clip model config that would run code or fetch a tower.

    The tokenizer gets only :data:`TOKENIZER_OPTIONS` (no ``trust_remote_code``), and the image tower is no
    repository and no directory.
    """
    text, vision = (_tower(config, name, what) for name in ("text_cfg", "vision_cfg"))
    options = text.get("tokenizer_kwargs") or {}
    unknown = (
        sorted(set(options) - set(TOKENIZER_OPTIONS)) if isinstance(options, dict) else [f"{options!r:.80}"]
    )
    if unknown:
        raise EncoderError(
            f"{what} gives its tokenizer the tokenizer_kwargs {', '.join(map(str, unknown))}, which could "
            f"run code or read other files; remove them: a config may only set {', '.join(TOKENIZER_OPTIONS)}"
        )
    timm = vision.get("timm_model_name")
    if timm is not None and not (isinstance(timm, str) and _TIMM_NAME.fullmatch(timm)):
        raise EncoderError(
            f"{what} has the timm_model_name {timm!r:.80}, but only built-in models of timm are supported; "
            "write a name of timm.list_models()"
        )


def require_plain_transformers(config: Mapping[str, Any], what: str) -> None:
    """Refuse a config that, itself or nested, would fetch kernels, quantised weights or other weights."""
    for key, value in config.items():
        fetches = key in _FETCHING and value is not None
        if fetches or (key in _ATTENTION_KEYS and value not in _ATTENTION):
            raise EncoderError(
                f"{what} sets {key} to {value!r:.80}, for which transformers could fetch code or other "
                "weights; remove it, or save the model in plain float32"
            )
        if isinstance(value, Mapping):
            require_plain_transformers(value, what)


def read_plain_transformers(folder: Path) -> dict[str, Any]:
    """Read and check the ``config.json`` of a transformers model; an adapter beside it is refused."""
    file = folder / "config.json"
    config = read_json(resolve_user_link(file))
    require_plain_transformers(config, str(file))
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise EncoderError(
            f"{adapter} would make transformers load an adapter too; merge it into the model, or remove it"
        )
    return config


def _tower(config: Mapping[str, Any], name: str, what: str) -> dict[str, Any]:
    tower = config.get(name)
    if not isinstance(tower, dict):
        raise EncoderError(f"{what} must describe the {name} by an object, got {tower!r:.80}")
    return tower


def resolve_user_link(file: Path) -> Path:
    """Resolve a link in a directory of the user; links in a Hub snapshot are returned as they are."""
    return file.resolve() if file.is_symlink() and file.parent.parent.name != "snapshots" else file


def hub_repository(spec: str) -> str | None:
    """The Hub repository ``org/name`` of an encoder's or space's weights, if they are there."""
    if public_name(spec) != spec or LOCAL in spec:
        return None
    backend, _, rest = spec.partition(":")
    if backend == "open_clip" and not rest.startswith("hf-hub:"):
        from open_clip.pretrained import get_pretrained_cfg  # takes seconds

        architecture, _, tag = rest.partition("/")
        rest = str(get_pretrained_cfg(architecture, tag).get("hf_hub", "")).rstrip("/")
    elif backend not in ("open_clip", "transformers"):
        return None
    repository = rest.removeprefix("hf-hub:").partition("@")[0]
    return repository if repository.count("/") == 1 else None
