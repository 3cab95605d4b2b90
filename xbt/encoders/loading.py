"""Loading an encoder from its specification, and checks that a config cannot run code or fetch more files."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from xbt.encoders.base import DualEncoder
from xbt.encoders.quiet import brief, quiet
from xbt.errors import EncoderError
from xbt.hub import LOCAL, HubAccess, SavedPartError, public_name, read_json

FORMS = (
    "open_clip:ARCH/PRETRAINED (a tag or a weights file)",
    "open_clip:local-dir:PATH",
    "open_clip:hf-hub:org/repo (or org/repo@revision)",
    "transformers:REPO_OR_DIR (or org/repo@revision)",
)
"""Every form a specification can take."""
_BACKENDS = {"open_clip": "xbt.encoders.open_clip", "transformers": "xbt.encoders.hf_transformers"}
TOKENIZER_OPTIONS = ("additional_special_tokens", "clean", "language", "reduction_mask", "strip_sep_token")
"""Tokenizer options that an open_clip config may set; open_clip would pass others to transformers."""

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


def load_encoder(
    spec: str,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> DualEncoder:
    """Load a CLIP as a frozen dual encoder.

    From the Hub only safetensors and JSON are loaded, and no code is run.

    Args:
        spec: One of ``"open_clip:ARCH/PRETRAINED"`` (a pretrained tag or a weights file),
            ``"open_clip:local-dir:PATH"``, ``"open_clip:hf-hub:org/repo"`` and
            ``"transformers:REPO_OR_DIR"``; a repository may be followed by ``@`` and a branch, tag or commit.
        device: Device of the weights.
        revision: Branch, tag or commit of the repository; overrides the one in ``spec``.
        cache_dir: The Hub cache to use instead of the default one.
        token: Hub access token, for private repositories.
        local_files_only: Use the cache alone.

    Returns:
        The encoder: fp32, eval mode, without gradients.

    Raises:
        EncoderError: If the specification is malformed, or the model cannot be loaded, or would be loaded
            wrongly: with random weights, another activation, or a tokenizer of another model.

    Example:
        >>> encoder = load_encoder("open_clip:ViT-B-32-quickgelu/openai")  # doctest: +SKIP
        >>> encoder.encode_texts(["a dog on a beach"]).shape  # doctest: +SKIP
        torch.Size([1, 512])
    """
    loader, rest = _parse(spec)
    try:
        with quiet():
            encoder = loader(rest, spec, HubAccess(revision, cache_dir, token, local_files_only))
    except EncoderError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, SavedPartError) else brief(error)
        raise EncoderError(f"'{spec}' could not be loaded: {reason}") from error
    try:
        encoder.try_towers()
    except Exception as error:  # invalid config values fail where they are first used
        raise EncoderError(
            f"'{spec}' was loaded, but cannot encode ({type(error).__name__}: {brief(error)}); "
            "check its config"
        ) from error
    try:
        return encoder.to(device)
    except (RuntimeError, AssertionError) as error:
        raise EncoderError(f"'{spec}' could not be moved to device '{device}': {brief(error)}") from error


def _parse(spec: str) -> tuple[Callable[[str, str, HubAccess], DualEncoder], str]:
    backend, _, rest = str(spec).partition(":")
    if backend == "open_clip":
        prefixed = rest.startswith(("local-dir:", "hf-hub:"))
        head, _, tail = rest.partition(":" if prefixed else "/")
        complete = bool(head and tail)
    else:
        complete = backend == "transformers" and bool(rest)
    if not complete:
        raise EncoderError(f"'{spec}' is not an encoder specification; write one of: {'; '.join(FORMS)}")
    # Imported late, because open_clip and transformers take seconds.
    module = importlib.import_module(_BACKENDS[backend])
    loader: Callable[[str, str, HubAccess], DualEncoder] = getattr(module, f"load_{backend}")
    return loader, rest


def require_plain_open_clip(config: Mapping[str, Any], what: str) -> None:
    """Refuse an open_clip model config that would run code or fetch a tower.

    Args:
        config: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and more.
        what: Name of the config in errors.

    Raises:
        EncoderError: If a tower's description is not an object, the tokenizer gets options other than
            :data:`TOKENIZER_OPTIONS` (such as ``trust_remote_code``), or the image tower is a repository or
            directory.
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
    """Refuse a transformers config that would fetch kernels, quantised weights or other weights.

    Args:
        config: Content of a config.json.
        what: Name of the config in errors.

    Raises:
        EncoderError: If the config, or a config inside it, has such a setting.
    """
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
    """Read and check the ``config.json`` of a transformers model.

    Raises:
        SavedPartError: If it is missing or not a JSON object.
        EncoderError: As :func:`require_plain_transformers`, or if an adapter is in the same directory.
    """
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
    """The Hub repository ``org/name`` that an encoder's weights come from.

    Args:
        spec: A specification for :func:`load_encoder`, or the name of a space.

    Returns:
        The repository, or ``None`` for a directory, a file, or weights that are not on the Hub.
    """
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
