"""Building models and tokenizers of open_clip from a config, of which only sizes and options count."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
from open_clip.hf_configs import arch_dict
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import nn

from xbt.encoders.loading_checks import read_plain_transformers, require_plain_open_clip
from xbt.errors import EncoderError
from xbt.hub import HubAccess, fetch_repository

CONFIG_FILE = "open_clip_config.json"
_HERE = HubAccess()


def build(config: dict[str, Any], preprocess: dict[str, Any]) -> nn.Module:
    """Builds a model with random weights.

    Raises:
        EncoderError: If the config would run code or fetch an image tower.
    """
    require_plain_open_clip(config, "the open_clip model config")
    with TemporaryDirectory() as directory:
        write_config(Path(directory), config, preprocess)
        module: nn.Module = open_clip.create_model(
            f"local-dir:{directory}", precision="fp32", load_weights=False, pretrained_text=False
        )
    return module


def with_text_model(
    config: dict[str, Any], access: HubAccess = _HERE, foreign: bool = False
) -> dict[str, Any]:
    """A config whose text tower, if transformers builds it, is described by a checked file of this machine.

    Args:
        config: An open_clip model config.
        access: How the Hub is asked for the text model's config; nothing else of it is fetched.
        foreign: Whether the config came from the Hub: then a path in it is not followed.

    Raises:
        EncoderError: If open_clip knows no such text model, or its config says what it must not.
        SavedPartError: If it cannot be fetched.
    """
    text = config.get("text_cfg")
    name = text.get("hf_model_name") if isinstance(text, dict) else None
    if not name:
        return config
    folder = Path(str(name)).expanduser()
    if foreign or not folder.is_dir():
        folder = fetch_repository(str(name), access, ["config.json"])
    kind = read_plain_transformers(folder).get("model_type")
    if kind not in arch_dict:
        raise EncoderError(
            f"the text model '{name}' is of type {kind!r:.80}, and code of a repository is not run; "
            f"open_clip builds {', '.join(arch_dict)}"
        )
    return config | {"text_cfg": {**config["text_cfg"], "hf_model_name": str(folder)}}


def make_tokenizer(text: dict[str, Any]) -> Any:
    """open_clip's tokenizer for a ``text_cfg``; code of a repository is never run."""
    length, options = text.get("context_length", 77), text.get("tokenizer_kwargs") or {}
    source = text.get("hf_tokenizer_name")
    if not source:
        return SimpleTokenizer(context_length=length, **options)
    mode = text.get("tokenizer_mode")
    return HFTokenizer(source, context_length=length, tokenizer_mode=mode, trust_remote_code=False, **options)


def write_config(folder: Path, model_config: dict[str, Any], preprocess: dict[str, Any]) -> None:
    """Writes ``open_clip_config.json``."""
    # The size is left out: open_clip takes it from the image tower.
    kept = {key: preprocess[key] for key in preprocess if key not in ("size", "mode")}
    config = {"model_cfg": model_config, "preprocess_cfg": kept}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
