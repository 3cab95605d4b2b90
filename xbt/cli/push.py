"""The push job: find what a directory holds, load it to be sure of it, and share it on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xbt.backbones import CompatibleBackbone
from xbt.compatible import CompatibleEncoder
from xbt.heads import CompatibleHead
from xbt.hub import CARD_NAME, CONFIG_NAME, CardData, HubArtifact, SavedPartError, is_pickled, read_json
from xbt.projections import Projection, QueryEnsemble

RESULTS_NAME = "retrieval.json"
"""What the evaluation writes; taken from the run's directory where no results are named."""
_NOT_PARTS = ("checkpoints", "vectors", "images", "projection", "ensemble", "lora")
_DEPTH = 3


@dataclass
class PushConfig:
    """Share a projection, ensemble, compatible encoder or backbone on the Hugging Face Hub.

    The access token comes from ``hf auth login`` or the environment variable ``HF_TOKEN``, and from nowhere
    else: a config file is no place for it.
    """

    directory: str
    """What to share: where it was saved, or the output directory of the run that saved it."""
    repo: str
    """Hub repository, org/name; made if it does not exist."""
    private: bool | None = None
    """Whether a repository that is made is private, and one that is there must be; by default as the
    organisation has it."""
    revision: str | None = None
    """Branch to commit to, made if it does not exist; main by default."""
    message: str | None = None
    """The commit's summary."""
    create_pr: bool = False
    """Open a pull request instead of committing to main."""
    results: str | None = None
    """The retrieval.json whose cells the card shows; by default the one in the directory, if there is one."""
    evaluated_on: str | None = None
    """What the results were measured on, such as nlphuji/flickr30k."""
    license: str | None = None
    """Such as apache-2.0; nothing is claimed if left out."""
    datasets: list[str] = field(default_factory=list)
    """What it was fitted on, as the Hub names it."""
    base: str | None = None
    """Specification of the new model that holds everywhere, for one that was loaded from a directory here."""


@dataclass(frozen=True)
class PushResult:
    """What was pushed, and where.

    Attributes:
        url: Address of the commit, or of the pull request.
        commit: Its hash.
        kind: What was found, such as ``"CompatibleEncoder"``.
        path: Where it was found.
    """

    url: str
    commit: str
    kind: str
    path: str

    def to_dict(self) -> dict[str, str]:
        """A JSON-able form."""
        return asdict(self)

    def format(self) -> str:
        """The result in two lines, for a terminal."""
        return f"pushed the {self.kind} in {self.path}\n{self.url}"


def push(config: PushConfig) -> PushResult:
    """Finds, loads and pushes; of a run's directory only the saved part, never vectors or checkpoints.

    Args:
        config: What to share, and where.

    Raises:
        SavedPartError: If there is nothing to share or more than one thing, it is damaged, or the repository
            will not do.
        XbtError: If a compatible encoder's base model, or the results, cannot be read.

    Warns:
        UserWarning: If a model was loaded from a directory here, which others do not have.
    """
    directory = Path(config.directory).expanduser()
    path, kind = find_part(directory)
    results = config.results or _results_beside(directory, path)
    card = CardData(
        report=results,
        evaluated_on=config.evaluated_on,
        license=config.license,
        datasets=tuple(config.datasets),
        base=config.base,
    )
    options: dict[str, Any] = {"load_old": False} if kind is CompatibleEncoder else {}
    part = kind.from_pretrained(path, **options)
    commit = part.push_to_hub(
        config.repo,
        card=card,
        commit_message=config.message,
        private=config.private,
        revision=config.revision,
        create_pr=config.create_pr,
    )
    # What lies in the directory tells the same as what was pushed.
    if (path / CARD_NAME).is_file() and card != CardData():
        part.refresh_card(path, card)
    return PushResult(commit.pr_url or str(commit), commit.oid, type(part).__name__, str(path))


def find_part(directory: Path) -> tuple[Path, type[HubArtifact]]:
    """The saved part in a directory, or in a run's output directory.

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
    found = list(_parts_below(directory, _DEPTH))
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(path) for path, _ in found)
        raise SavedPartError(f"{directory} holds {len(found)} things to share: {listed}; name one of them")
    pickled = sorted(each.name for each in directory.iterdir() if is_pickled(each.name))
    raise SavedPartError(
        f"{directory} holds no projection, ensemble, compatible encoder or backbone that xbt saved"
        + (f"; {pickled[0]} would have to be unpickled and is not shared" if pickled else "")
    )


def _parts_below(directory: Path, depth: int) -> Iterator[tuple[Path, type[HubArtifact]]]:
    for child in sorted(each for each in directory.iterdir() if each.is_dir() and not each.is_symlink()):
        kind = _kind(child)
        if kind is not None:
            yield child, kind
        elif depth > 1 and child.name not in _NOT_PARTS and not child.name.startswith("."):
            yield from _parts_below(child, depth - 1)


def _kind(directory: Path) -> type[HubArtifact] | None:
    """The class of what was saved in a directory; ``None`` if nothing was, or a model of another library."""
    if not (directory / CONFIG_NAME).is_file():
        return None
    try:
        config = read_json(directory / CONFIG_NAME)
    except SavedPartError:
        return None
    form, kind = config.get("format"), config.get("kind")
    if form == "compatible_encoder":
        return CompatibleEncoder
    if form == "compatible_backbone":
        return CompatibleBackbone
    if kind == "query_ensemble":
        return QueryEnsemble
    if kind in Projection._kinds and "new_dim" in config:
        return Projection
    return CompatibleHead if kind in CompatibleHead._kinds else None


def _results_beside(directory: Path, part: Path) -> str | None:
    """The results that the run's directory holds, looked for from the part upwards."""
    for place in (part, *part.parents):
        if (place / RESULTS_NAME).is_file():
            return str(place / RESULTS_NAME)
        if place == directory:
            break
    return None
