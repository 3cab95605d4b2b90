"""Finding config, weights and tokenizer of an open_clip model, and building model and tokenizer from them."""

from __future__ import annotations

import difflib
import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
from huggingface_hub import try_to_load_from_cache
from open_clip.hf_configs import arch_dict
from open_clip.pretrained import (
    download_pretrained_from_hf,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import nn

from xbt.encoders.configs import read_plain_transformers, require_plain_open_clip, resolve_user_link
from xbt.encoders.weights_files import load_weights_file
from xbt.errors import EncoderError
from xbt.hub import (
    SAFE_PATTERNS,
    HubAccess,
    cached_commit,
    fetch_repository,
    is_snapshot,
    limit_allocations,
    read_json,
    split_revision,
)

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
_OLD_WEIGHTS_FILE = "open_clip_pytorch_model.bin"
_WEIGHTS_PATTERNS = (WEIGHTS_FILE, "*.safetensors", _OLD_WEIGHTS_FILE, "*.bin", "*.pth", "*.pt")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_DEFAULT_ACCESS = HubAccess()


@dataclass(frozen=True)
class OpenClipSource:
    """Everything that a model is built from."""

    config: dict[str, Any]
    """open_clip's description of the architecture."""
    preprocess: dict[str, Any]
    """Image preprocessing that differs from open_clip's default."""
    weights: Path
    folder: Path | None
    """The directory of the config; ``None`` for a built-in config of open_clip."""
    access: HubAccess
    """Hub access for text models and tokenizers that a config names."""
    revision: str | None
    """The commit of the Hub repository, if it came from one."""

    def module(self) -> nn.Module:
        """Build the model, which must not be far larger than the weights, and load them strictly."""
        if self.folder is None:
            module = build(with_text_model(self.config, self.access), self.preprocess)
        else:
            config = with_text_model(self.config, self.access, is_snapshot(self.folder))
            with limit_allocations([resolve_user_link(self.weights)], self.folder / CONFIG_FILE):
                module = build(config, self.preprocess)
        load_weights_file(module, self.weights)
        return module

    def tokenizer(self) -> Any:
        """Make the tokenizer: from the directory's own files if there are any, else from the config."""
        text, folder = dict(self.config["text_cfg"]), self.folder
        name = text.get("hf_tokenizer_name")
        if not name:
            return make_tokenizer(text)
        has_files = folder is not None and any((folder / file).exists() for file in _TOKENIZER_FILES)
        if folder is None or (is_snapshot(folder) and not has_files):
            needed = (*_TOKENIZER_FILES, "config.json")
            folder = fetch_repository(str(name), self.access, SAFE_PATTERNS, needed)
        return make_tokenizer({**text, "hf_tokenizer_name": str(folder)})


def find_open_clip(rest: str, name: str, access: HubAccess) -> OpenClipSource:
    """Find, and download if need be, the files of a specification.

    See :func:`~xbt.encoders.open_clip.load_open_clip`.
    """
    if rest.startswith("local-dir:"):
        folder = Path(rest.removeprefix("local-dir:")).expanduser()
        if not folder.is_dir():
            raise EncoderError(f"the directory {folder} of '{name}' does not exist")
        if not (folder / CONFIG_FILE).is_file():
            raise EncoderError(f"{folder} has no {CONFIG_FILE}, so '{name}' is not an open_clip directory")
        return _in_folder(folder, _weights_in(folder), access.at(None), None)
    if rest.startswith("hf-hub:"):
        repo, revision = split_revision(rest.removeprefix("hf-hub:"))
        patterns = (*SAFE_PATTERNS, WEIGHTS_FILE)
        folder = fetch_repository(repo, access.at(access.revision or revision), patterns, [WEIGHTS_FILE])
        if not (folder / CONFIG_FILE).is_file():
            raise EncoderError(
                f"the Hub repository {repo} has no {CONFIG_FILE}, so it is not an open_clip model"
            )
        return _in_folder(folder, folder / WEIGHTS_FILE, access.at(None), folder.name)
    arch, _, tag = rest.partition("/")
    config, trained = check_tag(arch, tag), dict(get_pretrained_cfg(arch, tag))
    weights = _tag_weights(trained, name, access) if trained else Path(tag).expanduser()
    repo = str(trained.get("hf_hub", "")).rstrip("/")
    commits = (
        cached_commit(repo, file, access.revision, access.cache_dir) for file in (WEIGHTS_FILE, CONFIG_FILE)
    )
    revision = next(filter(None, commits), None) if repo else None
    return OpenClipSource(config, trained, weights, None, access.at(None), revision)


def check_tag(arch: str, tag: str) -> dict[str, Any]:
    """The config of an architecture, after a check, before any download, that the tag fits it."""
    config = builtin_config(arch)
    quick = bool(config.get("quick_gelu", False))
    trained = get_pretrained_cfg(arch, tag)
    if not trained:
        if Path(tag).expanduser().is_file():
            return config
        known = ", ".join(list_pretrained_tags_by_model(arch)) or "none"
        raise EncoderError(f"'{tag}' is neither a file nor a pretrained tag of {arch}; its tags are: {known}")
    if bool(trained.get("quick_gelu", False)) == quick:
        return config
    twin = arch.removesuffix("-quickgelu") if quick else f"{arch}-quickgelu"
    fix = f"use 'open_clip:{twin}/{tag}'" if twin in open_clip.list_models() else "no architecture fits it"
    raise EncoderError(
        f"the weights '{tag}' were trained {'without' if quick else 'with'} QuickGELU, but the architecture "
        f"{arch} {'has' if quick else 'lacks'} it and would give wrong vectors; {fix}"
    )


def builtin_config(arch: str) -> dict[str, Any]:
    """open_clip's built-in config of an architecture."""
    # Checked here, because open_clip would also accept "hf-hub:...".
    if arch not in open_clip.list_models():
        close = difflib.get_close_matches(arch, open_clip.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise EncoderError(f"open_clip has no architecture '{arch}'{hint}")
    config: dict[str, Any] = open_clip.get_model_config(arch)
    return config


def build(config: dict[str, Any], preprocess: dict[str, Any]) -> nn.Module:
    """Build a model with random weights, from a config that runs no code and fetches no tower."""
    require_plain_open_clip(config, "the open_clip model config")
    with TemporaryDirectory() as directory:
        write_config(Path(directory), config, preprocess)
        module: nn.Module = open_clip.create_model(
            f"local-dir:{directory}", precision="fp32", load_weights=False, pretrained_text=False
        )
    return module


def with_text_model(
    config: dict[str, Any], access: HubAccess = _DEFAULT_ACCESS, foreign: bool = False
) -> dict[str, Any]:
    """Replace the name of a transformers text model in a config by a local directory with its checked config.

    No other file of the text model is fetched. A path in a ``foreign`` config, from the Hub, is not followed.
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
            f"open_clip supports {', '.join(arch_dict)}"
        )
    return config | {"text_cfg": {**config["text_cfg"], "hf_model_name": str(folder)}}


def make_tokenizer(text: dict[str, Any]) -> Any:
    """Make open_clip's tokenizer for a ``text_cfg``, without code of a repository."""
    length, options = text.get("context_length", 77), text.get("tokenizer_kwargs") or {}
    source = text.get("hf_tokenizer_name")
    if not source:
        return SimpleTokenizer(context_length=length, **options)
    mode = text.get("tokenizer_mode")
    return HFTokenizer(source, context_length=length, tokenizer_mode=mode, trust_remote_code=False, **options)


def write_config(folder: Path, model_config: dict[str, Any], preprocess: dict[str, Any]) -> None:
    """Write ``open_clip_config.json``."""
    # The size is left out: open_clip takes it from the image tower.
    kept = {key: preprocess[key] for key in preprocess if key not in ("size", "mode")}
    config = {"model_cfg": model_config, "preprocess_cfg": kept}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _in_folder(folder: Path, weights: Path, access: HubAccess, revision: str | None) -> OpenClipSource:
    file = folder / CONFIG_FILE
    content = read_json(resolve_user_link(file))
    config, preprocess = content.get("model_cfg"), content.get("preprocess_cfg") or {}
    if not isinstance(config, dict) or not isinstance(preprocess, dict):
        raise EncoderError(
            f"{file} must have a model_cfg, and its preprocess_cfg must be an object; save it again"
        )
    require_plain_open_clip(config, str(file))
    return OpenClipSource(deepcopy(config), preprocess, weights, folder, access, revision)


def _weights_in(folder: Path) -> Path:
    """The weights in a local directory; safetensors are preferred."""
    for pattern in _WEIGHTS_PATTERNS:
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            listed = ", ".join(file.name for file in files[:5])
            raise EncoderError(
                f"{folder} has {len(files)} weights files, {listed}{', …' * (len(files) > 5)}, but only one "
                f"can be loaded; keep one of them there, or rename it to {WEIGHTS_FILE} if it is safetensors"
            )
        if files:
            return files[0]
    raise EncoderError(f"{folder} has no weights; put {WEIGHTS_FILE} there")


def _tag_weights(trained: dict[str, Any], name: str, access: HubAccess) -> Path:
    """The weights of a pretrained tag of open_clip, from its cache or downloaded."""
    hub = str(trained.get("hf_hub", ""))
    repo, _, file = hub.rpartition("/")
    if access.local_files_only:
        cached = _cached(repo, file, str(trained.get("url", "")), access)
        if cached is None:
            raise EncoderError(f"the weights of '{name}' are not in the cache, and local_files_only is set")
        return cached
    if repo and access.revision:
        options = {"filename": file or None, "revision": access.revision, "cache_dir": access.cache_dir}
        return Path(download_pretrained_from_hf(repo, **options))
    return Path(open_clip.factory.download_pretrained(trained, cache_dir=access.cache_dir))


def _cached(repo: str, file: str, url: str, access: HubAccess) -> Path | None:
    if not repo:
        path = Path(access.cache_dir or "~/.cache/clip").expanduser() / url.rpartition("/")[2]
        return path if path.is_file() else None
    names = (f"{file.rpartition('.')[0]}.safetensors", file) if file else (WEIGHTS_FILE, _OLD_WEIGHTS_FILE)
    for name in names:
        cached = try_to_load_from_cache(repo, name, cache_dir=access.cache_dir, revision=access.revision)
        if isinstance(cached, str):
            return Path(cached)
    return None
