"""The job of ``xbt push``: find a saved artifact, check that it loads, and upload it to the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xbt.backbones import CompatibleBackbone
from xbt.compatible.encoder import CompatibleEncoder
from xbt.heads import CompatibleHead
from xbt.hub import CARD_NAME, CONFIG_NAME, CardData, HubArtifact, SavedPartError, is_pickled, read_json
from xbt.projections.base import Projection
from xbt.projections.ensemble import QueryEnsemble

RESULTS_NAME = "retrieval.json"
"""Results of an evaluation; found in the run's directory unless given."""
_SKIPPED_FOLDERS = ("checkpoints", "vectors", "images", "projection", "ensemble", "lora")
_MAX_DEPTH = 3
_ARTIFACTS: dict[str, type[HubArtifact]] = {
    artifact.format_name: artifact
    for artifact in (Projection, QueryEnsemble, CompatibleEncoder, CompatibleBackbone, CompatibleHead)
}


@dataclass
class PushConfig:
    """Share a projection, ensemble, compatible encoder or backbone on the Hugging Face Hub.

    The access token comes only from ``hf auth login`` or the environment variable ``HF_TOKEN``, never from a
    config file.
    """

    directory: str
    """Directory of the saved artifact, or the output directory of the run that saved it."""
    repo: str
    """Hub repository, org/name; created if it does not exist."""
    private: bool | None = None
    """Whether a new repository is private, and an existing one must be; by default the organisation's
    setting."""
    revision: str | None = None
    """Branch to commit to, created if it does not exist; main by default."""
    message: str | None = None
    """Summary of the commit."""
    create_pr: bool = False
    """Open a pull request instead of committing to main."""
    results: str | None = None
    """The retrieval.json whose cells the card shows; by default the one in the directory, if any."""
    evaluated_on: str | None = None
    """Data set of the results, such as nlphuji/flickr30k."""
    license: str | None = None
    """Licence, such as apache-2.0; none is claimed by default."""
    datasets: list[str] = field(default_factory=list)
    """Data sets that it was fitted on, by their Hub names."""
    base: str | None = None
    """Public specification of the new model, if it was loaded from a local directory."""


@dataclass(frozen=True)
class PushResult:
    """Result of a push: address and hash of the commit or pull request, and the pushed artifact."""

    url: str
    commit: str
    kind: str
    path: str

    def to_dict(self) -> dict[str, str]:
        """A JSON-able form."""
        return asdict(self)

    def __str__(self) -> str:
        return f"pushed the {self.kind} in {self.path}\n{self.url}"


def push(config: PushConfig) -> PushResult:
    """Find, load and push an artifact; vectors and checkpoints of a run are never uploaded.

    Raises:
        XbtError: If there is no artifact or more than one, it is damaged, the repository cannot be used, or a
            compatible encoder's base model, or the results, cannot be read.

    Warns:
        UserWarning: If a model was loaded from a local directory, which others do not have.
    """
    directory = Path(config.directory).expanduser()
    path, kind = find_artifact(directory)
    results = config.results or _results_beside(directory, path)
    about = {name: getattr(config, name) for name in ("evaluated_on", "license", "base")}
    card = CardData(report=results, datasets=tuple(config.datasets), **about)
    options: dict[str, Any] = {"load_old": False} if kind is CompatibleEncoder else {}
    artifact = kind.from_pretrained(path, **options)
    access: dict[str, Any] = {"private": config.private, "revision": config.revision}
    commit = artifact.push_to_hub(
        config.repo, card=card, commit_message=config.message, create_pr=config.create_pr, **access
    )
    # Keep the local card equal to the pushed one.
    if (path / CARD_NAME).is_file() and card != CardData():
        artifact.refresh_card(path, card)
    return PushResult(commit.pr_url or str(commit), commit.oid, type(artifact).__name__, str(path))


def find_artifact(directory: Path) -> tuple[Path, type[HubArtifact]]:
    """Find the saved artifact in a directory, or in a run's output directory.

    Raises:
        SavedPartError: If there is none, or more than one; the message lists them.
    """
    if not directory.is_dir():
        raise SavedPartError(
            f"directory {directory} does not exist; name what a run or save_pretrained wrote"
        )
    kind = _kind(directory)
    if kind is not None:
        return directory, kind
    artifacts = list(_artifacts_below(directory, _MAX_DEPTH))
    if len(artifacts) == 1:
        return artifacts[0]
    if artifacts:
        listed = ", ".join(str(path) for path, _ in artifacts)
        raise SavedPartError(
            f"{directory} holds {len(artifacts)} things to share: {listed}; name one of them"
        )
    pickled = sorted(file.name for file in directory.iterdir() if is_pickled(file.name))
    raise SavedPartError(
        f"{directory} holds no projection, ensemble, compatible encoder or backbone that xbt saved"
        + (f"; {pickled[0]} would have to be unpickled and is not shared" if pickled else "")
    )


def _artifacts_below(directory: Path, depth: int) -> Iterator[tuple[Path, type[HubArtifact]]]:
    for child in sorted(path for path in directory.iterdir() if path.is_dir() and not path.is_symlink()):
        kind = _kind(child)
        if kind is not None:
            yield child, kind
        elif depth > 1 and child.name not in _SKIPPED_FOLDERS and not child.name.startswith("."):
            yield from _artifacts_below(child, depth - 1)


def _kind(directory: Path) -> type[HubArtifact] | None:
    """Class of the artifact in a directory; ``None`` if there is none, or a model of another library."""
    if not (directory / CONFIG_NAME).is_file():
        return None
    try:
        config = read_json(directory / CONFIG_NAME)
    except SavedPartError:
        return None
    form = config.get("format")
    return _ARTIFACTS.get(form) if isinstance(form, str) else None


def _results_beside(directory: Path, artifact: Path) -> str | None:
    """Results in the run's directory, searched from the artifact upwards."""
    for folder in (artifact, *artifact.parents):
        if (folder / RESULTS_NAME).is_file():
            return str(folder / RESULTS_NAME)
        if folder == directory:
            break
    return None
