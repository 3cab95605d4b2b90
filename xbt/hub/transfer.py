"""Downloading from, and uploading to, the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from huggingface_hub import CommitInfo, HfApi, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from xbt.errors import SavedPartError
from xbt.hub.files import CONFIG_NAME, PART_FILES, is_pickled, is_repository

SAFE_PATTERNS = ("*.json", "*.txt", "*.model")
"""Files that are downloaded from any model's repository besides its weights: configs and tokenizer files, no
code and no pickles."""
DEFAULT_BRANCH = "main"
_LEGACY_ID = re.compile(r"\w[\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubAccess:
    """Options of a download from the Hub.

    Attributes:
        revision: Branch, tag or commit; the default branch if left out.
        cache_dir: The Hub cache to use instead of the default one.
        token: Hub access token, for private repositories.
        local_files_only: Use the cache alone.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def at(self, revision: str | None) -> HubAccess:
        """The same options with another revision."""
        return replace(self, revision=revision)


class AccessOptions(TypedDict, total=False):
    """The options of a :class:`HubAccess`."""

    revision: str | None
    cache_dir: str | Path | None
    token: str | bool | None
    local_files_only: bool


class LoadOptions(AccessOptions, total=False):
    """Options of :meth:`~xbt.hub.HubArtifact.from_pretrained`, which describes them."""

    device: str | torch.device
    force_download: bool


def fetch(repo_or_dir: str | Path, *, force_download: bool = False, **access: Unpack[AccessOptions]) -> Path:
    """Return a local directory of a saved artifact, downloaded if need be.

    Args:
        repo_or_dir: A directory, or a Hub repository ``org/name``.
        force_download: Download again what the cache already holds.
        **access: See :class:`HubAccess`.

    Returns:
        The directory itself, or a snapshot in the Hub cache with the files that xbt saves.

    Raises:
        SavedPartError: If there is no such directory, repository or revision, the Hub cannot be reached, a
            download is cut short, or the repository holds only pickled files.
    """
    path = Path(repo_or_dir).expanduser()
    if path.is_dir():
        return path
    return fetch_repository(str(repo_or_dir), HubAccess(**access), force_download=force_download)


def fetch_repository(
    name: str,
    access: HubAccess,
    patterns: Sequence[str] = PART_FILES,
    needed: Sequence[str] = (CONFIG_NAME,),
    force_download: bool = False,
) -> Path:
    """Download a repository into the Hub cache and return its snapshot; local directories are ignored.

    Args:
        name: Hub repository: ``org/name``, or for models not saved by xbt a name without an organisation.
        access: Hub access.
        patterns: Files to download; by default those that xbt saves.
        needed: Files of which at least one must exist.
        force_download: Download again what the cache already holds.
    """
    if not is_repository(name) and (patterns is PART_FILES or not _LEGACY_ID.fullmatch(name)):
        raise SavedPartError(
            f"directory {name} does not exist, and it is not a Hub repository 'org/name' either"
        )
    where = f"Hub repository {name}" + (f" at revision {access.revision}" if access.revision else "")
    try:
        snapshot = Path(
            snapshot_download(
                name,
                revision=access.revision,
                cache_dir=access.cache_dir,
                token=access.token,
                force_download=force_download,
                # Some versions of huggingface_hub list a repository's files even in offline mode.
                local_files_only=access.local_files_only or is_offline_mode(),
                allow_patterns=list(patterns),
            )
        )
    except Exception as error:  # the HTTP library's errors have no common base class with the Hub's
        raise SavedPartError(_why_not_fetched(error, name, where)) from error
    if not any((snapshot / file).is_file() for file in needed):
        owner = " of xbt" if patterns is PART_FILES else ""
        raise SavedPartError(_why_incomplete(name, snapshot, where, needed[0], owner, access))
    return snapshot


def _why_not_fetched(error: Exception, name: str, where: str) -> str:
    if isinstance(error, RevisionNotFoundError):
        return f"{where} does not exist; look at the repository's branches and tags"
    if isinstance(error, GatedRepoError):
        return f"{where} is gated; ask its owner for access and pass a token that has it"
    if isinstance(error, RepositoryNotFoundError) or _status(error) in (401, 403):
        return f"{where} does not exist, or is private and needs a token that may read it"
    if isinstance(error, LocalEntryNotFoundError):
        return f"there is no directory {name}, and the {where} is not in the cache and cannot be reached"
    return f"{where} cannot be fetched: {first_line(error)}; try again"


def _why_incomplete(name: str, snapshot: Path, where: str, needed: str, owner: str, access: HubAccess) -> str:
    """Explain a missing file: the repository may hold pickles, or nothing of xbt."""
    files: list[str] = []
    if not access.local_files_only:
        try:
            files = HfApi(token=access.token).list_repo_files(name, revision=snapshot.name)
        except Exception:  # the list only improves the message, and offline there is none
            files = []
    pickled = sorted(filter(is_pickled, files))
    if pickled:
        return (
            f"{where} holds {pickled[0]} and no {needed}{owner}; unpickling could run any code, so such "
            "files are not even fetched: ask for safetensors and JSON"
        )
    holds = "so it holds nothing that xbt saved" if owner else "which the model needs; use another one"
    return f"{where} has no {needed}, {holds}"


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def split_revision(source: str) -> tuple[str, str | None]:
    """Split ``org/name@revision``; a path of an existing directory is never split."""
    repo, at, revision = source.rpartition("@")
    if not at or not revision or Path(source).expanduser().exists() or not is_repository(repo):
        return source, None
    return repo, revision


def is_commit(revision: object) -> bool:
    """True if a revision is the full hash of a commit, not a branch or tag, which can move."""
    return isinstance(revision, str) and bool(_COMMIT.fullmatch(revision))


def cached_commit(
    repo: str, filename: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> str | None:
    """The commit that a file of the Hub cache belongs to, or ``None`` if the file is not in the cache."""
    try:
        path = try_to_load_from_cache(repo, filename, cache_dir=cache_dir, revision=revision)
    except HFValidationError:
        return None
    # <cache>/models--org--name/snapshots/<commit>/<filename>
    parts = Path(path).parts if isinstance(path, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def upload(
    directory: Path,
    repo_id: str,
    message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """Upload the files of an artifact in one commit, and delete those of an earlier one.

    The files are those of :data:`~xbt.hub.files.PART_FILES` in the directory.

    See :meth:`~xbt.hub.HubArtifact.push_to_hub`.
    """
    require_repository(repo_id)
    if create_pr and revision not in (None, DEFAULT_BRANCH):
        raise SavedPartError(
            f"a pull request is opened against {DEFAULT_BRANCH}, not {revision}; leave out revision or "
            "create_pr"
        )
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise SavedPartError(
                f"Hub repository {repo_id} already exists and is public; make it private in its settings, or "
                "push to another"
            )
        if revision not in (None, DEFAULT_BRANCH):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            allow_patterns=list(PART_FILES),
            delete_patterns=list(PART_FILES),
        )
    except SavedPartError:
        raise
    except Exception as error:  # see fetch_repository
        raise SavedPartError(_why_not_pushed(error, repo_id)) from error


def require_repository(repo_id: str) -> None:
    """Refuse a name that does not have the form ``org/name``, with a SavedPartError."""
    if not is_repository(repo_id):
        raise SavedPartError(f"{repo_id!r} is not the name of a Hub repository; write 'org/name'")


def _why_not_pushed(error: Exception, repo_id: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id} cannot be pushed to in offline mode; unset HF_HUB_OFFLINE"
    status = _status(error)
    if status in (401, 403, 404):
        return (
            f"Hub repository {repo_id} cannot be written to ({status}); pass a token with write access, "
            "or log in with 'hf auth login'"
        )
    return f"{repo_id} was not pushed: {first_line(error)}; nothing is lost, push again"
