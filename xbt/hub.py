"""Fetching saved parts from a directory or the Hugging Face Hub, and reading them without unpickling."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from xbt.errors import XbtError

SAFE_PATTERNS = ("*.json", "*.safetensors", "README.md")
"""What is fetched of a repository: nothing that would have to be unpickled."""
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


class SavedPartError(XbtError):
    """A saved projection, adapter or encoder that is missing, damaged or of another kind."""


def fetch(
    repo_or_dir: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    patterns: Sequence[str] = SAFE_PATTERNS,
) -> Path:
    """Returns a local directory that holds a saved part.

    Args:
        repo_or_dir: A directory, or a Hub repository ``org/name``.
        revision: Branch, tag or commit on the Hub.
        cache_dir: The Hub cache to use instead of the default one.
        token: Hub access token, for private repositories.
        force_download: Download again what the cache already holds.
        local_files_only: Use the cache alone.
        patterns: Which files are fetched.

    Returns:
        The directory itself, or the Hub cache's snapshot with the files that fit ``patterns``.

    Raises:
        SavedPartError: If there is no such directory, repository or revision, or the Hub cannot be reached.
    """
    path = Path(repo_or_dir).expanduser()
    if path.is_dir():
        return path
    name = str(repo_or_dir)
    if not _REPO_ID.fullmatch(name) or name.startswith("."):
        raise SavedPartError(
            f"directory {name} does not exist, and it is not a Hub repository 'org/name' either"
        )
    where = f"Hub repository {name}" + (f" at revision {revision}" if revision else "")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
            )
        )
    except RevisionNotFoundError as error:
        raise SavedPartError(f"{where} does not exist; look at the repository's branches and tags") from error
    except RepositoryNotFoundError as error:
        raise SavedPartError(f"{where} does not exist, or is private and needs a token") from error
    except LocalEntryNotFoundError as error:
        raise SavedPartError(
            f"there is no directory {name}, and the {where} is not in the cache and cannot be reached"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SavedPartError(f"{where} cannot be fetched: {str(error).splitlines()[0]}") from error


def split_revision(source: str) -> tuple[str, str | None]:
    """Splits ``org/name@revision``; a path of an existing directory is never split."""
    repo, at, revision = source.rpartition("@")
    if not at or not revision or Path(source).expanduser().exists() or not _REPO_ID.fullmatch(repo):
        return source, None
    return repo, revision


def cached_commit(repo: str, filename: str, revision: str | None = None) -> str | None:
    """The commit that a file of the Hub cache belongs to, or ``None`` if the file is not in the cache.

    Args:
        repo: Hub repository ``org/name``.
        filename: A file of it that was loaded.
        revision: Branch, tag or commit; the default branch if left out.
    """
    try:
        found = try_to_load_from_cache(repo, filename, revision=revision)
    except HFValidationError:
        return None
    # <cache>/models--org--name/snapshots/<commit>/<filename>
    parts = Path(found).parts if isinstance(found, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        SavedPartError: If the file is missing or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SavedPartError(
            f"{path} is missing: this directory was not saved by xbt, or only in part"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SavedPartError(f"{path} is not valid JSON ({error}); save or download it again") from error
    if not isinstance(data, dict):
        raise SavedPartError(f"{path} must hold a JSON object, got a {type(data).__name__}")
    return data


def load_weights(module: nn.Module, path: Path) -> None:
    """Loads safetensors into a module, strictly: every name and shape must agree.

    Raises:
        SavedPartError: If the file is missing, truncated, or does not fit the module.
    """
    module.load_state_dict(_read_fitting(path, module.state_dict()))


def _read_fitting(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise SavedPartError(
            f"{path} is missing: this directory was not saved by xbt, or only in part"
        ) from error
    except (SafetensorError, OSError) as error:
        raise SavedPartError(f"{path} is damaged ({error}); save or download it again") from error
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise SavedPartError(f"{path} does not fit its config: missing tensors {missing}, unexpected {extra}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise SavedPartError(
                f"{path} does not fit its config: tensor {key} has the shape {tuple(tensor.shape)}, "
                f"the config needs {tuple(expected[key].shape)}"
            )
    return tensors
