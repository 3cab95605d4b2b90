"""Fetching saved parts from a directory or the Hugging Face Hub.

Uploading a saved part to the Hugging Face Hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from xbt.hub.files import CONFIG_NAME, PART_FILES, is_pickled

SAFE_PATTERNS = ("*.json", "*.txt", "*.model")
"""What is fetched of a foreign model's repository besides its weights: configs and the tokenizer's files, no
code and nothing that would have to be unpickled."""
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OLD_ID = re.compile(r"\w[\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubAccess:
    """How the Hub is asked for a model.

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
        """The same at another revision."""
        return replace(self, revision=revision)


def is_repository(name: str) -> bool:
    """Whether a name has the form of a Hub repository, ``org/name``."""
    return bool(_REPO_ID.fullmatch(name)) and not name.startswith(".") and ".." not in name


def fetch(
    repo_or_dir: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """Returns a local directory that holds a saved part.

    Args:
        repo_or_dir: A directory, or a Hub repository ``org/name``.
        revision: Branch, tag or commit on the Hub.
        cache_dir: The Hub cache to use instead of the default one.
        token: Hub access token, for private repositories.
        force_download: Download again what the cache already holds.
        local_files_only: Use the cache alone.

    Returns:
        The directory itself, or the Hub cache's snapshot with the files that a saved part can have.

    Raises:
        SavedPartError: If there is no such directory, repository or revision, the Hub cannot be reached, a
            download is cut short, or the repository holds pickled files and none of xbt's.
    """
    path = Path(repo_or_dir).expanduser()
    if path.is_dir():
        return path
    access = HubAccess(revision, cache_dir, token, local_files_only)
    return fetch_repository(str(repo_or_dir), access, force_download=force_download)


def fetch_repository(
    name: str,
    access: HubAccess,
    patterns: Sequence[str] = PART_FILES,
    needed: Sequence[str] = (CONFIG_NAME,),
    force_download: bool = False,
) -> Path:
    """Returns the Hub cache's snapshot of a repository; a directory of that name is not looked at.

    Args:
        name: Hub repository: ``org/name``, or for foreign models a name without an organisation.
        access: How the Hub is asked.
        patterns: Which files are fetched; by default those that a saved part can have.
        needed: Files of which one must be there.
        force_download: Download again what the cache already holds.

    Raises:
        SavedPartError: If there is no such repository or revision, the Hub cannot be reached, a download is
            cut short, or the repository lacks what is needed.
    """
    if not is_repository(name) and (patterns is PART_FILES or not _OLD_ID.fullmatch(name)):
        raise SavedPartError(
            f"directory {name} does not exist, and it is not a Hub repository 'org/name' either"
        )
    where = f"Hub repository {name}" + (f" at revision {access.revision}" if access.revision else "")
    try:
        found = Path(
            snapshot_download(
                name,
                revision=access.revision,
                cache_dir=access.cache_dir,
                token=access.token,
                force_download=force_download,
                # Some versions list a repository's files even where they must stay offline.
                local_files_only=access.local_files_only or is_offline_mode(),
                allow_patterns=list(patterns),
            )
        )
    except Exception as error:  # the HTTP library's own errors share no kind with the Hub's
        raise SavedPartError(_reason(error, name, where)) from error
    if not any((found / each).is_file() for each in needed):
        own = " of xbt" if patterns is PART_FILES else ""
        raise SavedPartError(_lacks(name, found, where, needed[0], own, access))
    return found


def _reason(error: Exception, name: str, where: str) -> str:
    if isinstance(error, RevisionNotFoundError):
        return f"{where} does not exist; look at the repository's branches and tags"
    if isinstance(error, GatedRepoError):
        return f"{where} is gated; ask its owner for access and pass a token that has it"
    if isinstance(error, RepositoryNotFoundError) or _status(error) in (401, 403):
        return f"{where} does not exist, or is private and needs a token that may read it"
    if isinstance(error, LocalEntryNotFoundError):
        return f"there is no directory {name}, and the {where} is not in the cache and cannot be reached"
    return f"{where} cannot be fetched: {first_line(error)}; try again"


def _lacks(name: str, snapshot: Path, where: str, needed: str, own: str, access: HubAccess) -> str:
    """Why a repository lacks a file: it may hold another format, or nothing."""
    files: list[str] = []
    if not access.local_files_only:
        try:
            files = HfApi(token=access.token).list_repo_files(name, revision=snapshot.name)
        except Exception:  # only to say more: offline there is no list
            files = []
    pickled = sorted(filter(is_pickled, files))
    if pickled:
        return (
            f"{where} holds {pickled[0]} and no {needed}{own}; what would have to be unpickled could run any "
            "code and is not even fetched: ask for safetensors and JSON"
        )
    holds = "so it holds nothing that xbt saved" if own else "which the model needs; name another repository"
    return f"{where} has no {needed}, {holds}"


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def split_revision(source: str) -> tuple[str, str | None]:
    """Splits ``org/name@revision``; a path of an existing directory is never split."""
    repo, at, revision = source.rpartition("@")
    if not at or not revision or Path(source).expanduser().exists() or not _REPO_ID.fullmatch(repo):
        return source, None
    return repo, revision


def is_commit(revision: object) -> bool:
    """Whether a revision is the full hash of a commit, which a branch or tag that moves is not."""
    return isinstance(revision, str) and bool(_COMMIT.fullmatch(revision))


def cached_commit(
    repo: str, filename: str, revision: str | None = None, cache_dir: str | Path | None = None
) -> str | None:
    """The commit that a file of the Hub cache belongs to, or ``None`` if the file is not in the cache.

    Args:
        repo: Hub repository ``org/name``.
        filename: A file of it that was loaded.
        revision: Branch, tag or commit; the default branch if left out.
        cache_dir: The Hub cache to look in instead of the default one.
    """
    try:
        found = try_to_load_from_cache(repo, filename, cache_dir=cache_dir, revision=revision)
    except HFValidationError:
        return None
    # <cache>/models--org--name/snapshots/<commit>/<filename>
    parts = Path(found).parts if isinstance(found, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


DEFAULT_BRANCH = "main"


def upload(
    directory: Path,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Uploads the files of a saved part in one commit; what an earlier part had and this one has not goes.

    Args:
        directory: Where it was saved; of it only :data:`~xbt.hub.PART_FILES` are uploaded.
        repo_id: Hub repository ``org/name``, made if it does not exist.
        commit_message: The commit's summary.
        private: Whether a repository that is made is private, and one that is there must be.
        token: Hub access token that may write; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        revision: Branch to commit to, made if it does not exist.
        create_pr: Open a pull request instead of committing to the branch.

    Returns:
        The commit, whose string is its URL.

    Raises:
        SavedPartError: If the name, the token or the repository will not do, or the Hub cannot be reached.
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
                f"Hub repository {repo_id} is there already and is public; make it private in its settings, "
                "or push to another"
            )
        if revision not in (None, DEFAULT_BRANCH):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            allow_patterns=list(PART_FILES),
            delete_patterns=list(PART_FILES),
        )
    except SavedPartError:
        raise
    except Exception as error:  # the HTTP library's own errors share no kind with the Hub's
        raise SavedPartError(_reason_pushing(error, repo_id)) from error


def require_repository(repo_id: str) -> None:
    """Refuses what is not the name of a Hub repository.

    Raises:
        SavedPartError: If it has another form than ``org/name``.
    """
    if not is_repository(repo_id):
        raise SavedPartError(f"{repo_id!r} is not the name of a Hub repository; write 'org/name'")


def _reason_pushing(error: Exception, repo_id: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id} cannot be pushed to in offline mode; unset HF_HUB_OFFLINE"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403, 404):
        return (
            f"Hub repository {repo_id} cannot be written to ({status}); pass a token that may write there, "
            "or log in with 'hf auth login'"
        )
    return f"{repo_id} was not pushed: {first_line(error)}; nothing is lost, push again"
