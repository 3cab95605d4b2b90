"""Uploading a saved part to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from xbt.hub.errors import SavedPartError
from xbt.hub.fetching import first_line, is_repository
from xbt.hub.files import PART_FILES

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
        raise SavedPartError(_reason(error, repo_id)) from error


def require_repository(repo_id: str) -> None:
    """Refuses what is not the name of a Hub repository.

    Raises:
        SavedPartError: If it has another form than ``org/name``.
    """
    if not is_repository(repo_id):
        raise SavedPartError(f"{repo_id!r} is not the name of a Hub repository; write 'org/name'")


def _reason(error: Exception, repo_id: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id} cannot be pushed to in offline mode; unset HF_HUB_OFFLINE"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403, 404):
        return (
            f"Hub repository {repo_id} cannot be written to ({status}); pass a token that may write there, "
            "or log in with 'hf auth login'"
        )
    return f"{repo_id} was not pushed: {first_line(error)}; nothing is lost, push again"
