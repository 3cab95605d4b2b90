"""The commands: a table of all, and the functions that run a job and describe its result.

The modules of a job are imported only when its command runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from xbt.cli.output import CommandResult
from xbt.errors import ConfigError


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: Name on the command line, one or two words.
        help: Description in one line.
        config: Location of the config dataclass, as ``"module:name"``.
        function: Location of the function that maps the config to a :class:`CommandResult`.
        example: A working command, with line breaks.
        first: Key of the first positional argument.
        words: Key of the list that takes further positional arguments.
        processes: Whether several processes may share the work.
        resumable: Whether the same command continues after a kill.
    """

    name: str
    help: str
    config: str
    function: str
    example: str
    first: str | None = None
    words: str | None = None
    processes: bool = False
    resumable: bool = False

    @property
    def prog(self) -> str:
        """Full name, with ``xbt`` before it."""
        return f"xbt {self.name}"

    def config_class(self) -> type[Any]:
        """Dataclass of the config."""
        config_class: type[Any] = resolve_name(self.config)
        return config_class

    def run(self, config: Any) -> CommandResult:
        """Run the command."""
        function: Callable[[Any], CommandResult] = resolve_name(self.function)
        return function(config)


_GALLERY = "xbt.cli.gallery"

COMMANDS = (
    Command(
        "embed",
        "embed images or captions into a store, in any number of processes",
        "xbt.embedding:EmbedConfig",
        "xbt.cli.commands:embed",
        "xbt embed --encoder open_clip:ViT-B-32-quickgelu/openai --images.source photos/ \\\n"
        "  --output_dir stores/photos_b32",
        processes=True,
        resumable=True,
    ),
    Command(
        "fit",
        "fit a projection, or choose one (if any helps) on held-out pairs",
        "xbt.cli.fit:FitConfig",
        "xbt.cli.commands:fit",
        "xbt fit --old_store stores/captions_b32 --new_store stores/captions_l14 --output_dir runs/fit\n"
        "xbt fit --old open_clip:ViT-B-32-quickgelu/openai \\\n"
        "  --new transformers:openai/clip-vit-large-patch14 --captions.source captions.txt \\\n"
        "  --pairs.source dataset_flickr8k.json --pairs.split val --output_dir runs/choice",
    ),
    Command(
        "evaluate",
        "measure old/old, new/old and new/new retrieval on image-text pairs",
        "xbt.evaluation.job:EvaluationConfig",
        "xbt.cli.commands:evaluate",
        "xbt evaluate --old open_clip:ViT-B-32-quickgelu/openai \\\n"
        "  --new transformers:openai/clip-vit-large-patch14 --upgraded.chosen runs/choice/compatible \\\n"
        "  --pairs.source dataset_flickr8k.json --pairs.split test --output_dir runs/evaluation",
    ),
    Command(
        "report",
        "say whether an upgrade is worth it, with numbers and pictures",
        "xbt.report:UpgradeReportConfig",
        "xbt.cli.commands:report",
        "xbt report --old open_clip:ViT-B-32-quickgelu/openai \\\n"
        "  --new transformers:openai/clip-vit-large-patch14 --captions.source captions.txt \\\n"
        "  --pairs.source dataset_flickr8k.json --pairs.split test --output_dir runs/report",
    ),
    Command(
        "search",
        "search a gallery with texts or pictures",
        "xbt.cli.search:SearchConfig",
        "xbt.cli.commands:search",
        'xbt search --gallery gallery --encoder runs/choice/compatible "a dog on a beach" "a red car"',
        words="queries.texts",
    ),
    Command(
        "backfill",
        "re-embed a gallery while it serves, the most urgent items first",
        "xbt.backfill:BackfillConfig",
        "xbt.cli.commands:backfill",
        "xbt backfill --gallery gallery --encoder transformers:openai/clip-vit-large-patch14 \\\n"
        "  --images.source photos/ --output_dir runs/backfill --max_hours 8",
        processes=True,
        resumable=True,
    ),
    Command(
        "push",
        "upload a compatible encoder or a projection to the Hugging Face Hub",
        "xbt.cli.push:PushConfig",
        "xbt.cli.commands:push",
        "xbt push runs/choice --repo me/l14-speaks-b32 --license apache-2.0",
        first="directory",
    ),
    Command(
        "gallery create",
        "create a gallery, from a store or empty",
        f"{_GALLERY}:CreateConfig",
        f"{_GALLERY}:create",
        "xbt gallery create gallery --store stores/photos_b32",
        first="gallery",
    ),
    Command(
        "gallery add",
        "add a store's items to a gallery",
        f"{_GALLERY}:AddConfig",
        f"{_GALLERY}:add",
        "xbt gallery add gallery --store stores/new_photos_b32",
        first="gallery",
    ),
    Command(
        "gallery remove",
        "remove items from a gallery",
        f"{_GALLERY}:RemoveConfig",
        f"{_GALLERY}:remove",
        "xbt gallery remove gallery 2019/beach.jpg 2019/forest.jpg",
        first="gallery",
        words="ids",
    ),
    Command(
        "gallery verify",
        "read every byte of a gallery or store and name what is damaged",
        f"{_GALLERY}:GalleryConfig",
        f"{_GALLERY}:verify",
        "xbt gallery verify gallery",
        first="gallery",
    ),
    Command(
        "gallery compact",
        "free the disk space of removed and superseded items",
        f"{_GALLERY}:GalleryConfig",
        f"{_GALLERY}:compact",
        "xbt gallery compact gallery",
        first="gallery",
    ),
    Command(
        "gallery info",
        "describe a gallery or store and the model that made it",
        f"{_GALLERY}:GalleryConfig",
        f"{_GALLERY}:info",
        "xbt gallery info gallery",
        first="gallery",
    ),
)
"""All commands, in the order of ``xbt --help``."""


def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """Find the command at the start of a command line.

    Returns:
        The command, and the rest of the line.

    Raises:
        ConfigError: If there is no such command; the message suggests the closest name.
    """
    for length in (2, 1):
        for command in COMMANDS:
            if command.name == " ".join(words[:length]):
                return command, list(words[length:])
    typed = " ".join(words[:2] if words[0] == "gallery" else words[:1])
    near = difflib.get_close_matches(typed, [command.name for command in COMMANDS], 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"there is no command {typed!r}; {hint}xbt --help lists them")


def overview(prefix: str = "") -> str:
    """Help text of ``xbt``, or of a group of commands such as ``"gallery "``."""
    chosen = [command for command in COMMANDS if command.name.startswith(prefix)]
    width = max(len(command.name) for command in chosen)
    lines = [
        f"usage: xbt {prefix}COMMAND [--config FILE] [--key value ...] [--json]",
        "",
        "Put a better CLIP in front of a gallery that an older one embedded."
        if not prefix
        else "Create, fill, check and describe galleries.",
        "",
        "commands:",
        *(f"  {command.name.ljust(width)}  {command.help}" for command in chosen),
        "",
        "Every key of a command's config is a flag, nested keys with dots (--images.source photos/), or a",
        "key of a YAML file (--config FILE). Results go to standard output, with --json as one JSON",
        "document. Progress, warnings and errors go to standard error.",
        "",
        "  xbt COMMAND --help  show the keys, with an example",
        "  xbt --version       show the version",
        "",
        "exit status: 0 for success; 1 if the answer is no (report, gallery verify); 2 for an error that",
        "you can fix; 70 for a bug; 130 after an interrupt",
    ]
    return "\n".join(lines)


if TYPE_CHECKING:
    from xbt.backfill import BackfillConfig, BackfillResult
    from xbt.cli.fit import FitConfig
    from xbt.cli.push import PushConfig
    from xbt.cli.search import SearchConfig
    from xbt.embedding import EmbedConfig
    from xbt.evaluation.job import EvaluationConfig
    from xbt.report.config import UpgradeReportConfig


def embed(config: EmbedConfig) -> CommandResult:
    """Embed, and describe the store."""
    from xbt.cli.gallery import describe_store
    from xbt.embedding import embed as run
    from xbt.embedding.rejected import NOTES, REJECTED

    store = run(config)
    document = describe_store(store)
    for name in (REJECTED, NOTES):
        document[Path(name).stem] = (store.path / name).read_bytes().count(b"\n")
    left_out = f"; {document['rejected']} rejected, see {REJECTED}" if document["rejected"] else ""
    text = f"{store.path}: {len(store)} {store.modality} vectors of {store.space}{left_out}"
    return CommandResult(document, text)


def fit(config: FitConfig) -> CommandResult:
    """Fit or choose a projection."""
    from xbt.cli.fit import run_fit

    result = run_fit(config)
    return CommandResult(result.to_dict(), str(result))


def evaluate(config: EvaluationConfig) -> CommandResult:
    """Evaluate; a published value that is not reproduced is an error after the table."""
    from xbt.errors import DataError
    from xbt.evaluation import CheckedReport, format_table
    from xbt.evaluation.job import run_evaluation

    measured: list[CheckedReport] = []
    mismatch = None
    try:
        run_evaluation(config, measured.append)
    except DataError as error:
        if not measured:
            raise
        mismatch = error
    return CommandResult(measured[0].to_dict(), format_table(measured[0]), error=mismatch)


def report(config: UpgradeReportConfig) -> CommandResult:
    """Write the upgrade report; the status is its verdict."""
    from xbt.report.job import write_upgrade_report

    result = write_upgrade_report(config)
    return CommandResult(result.to_dict(), result.format(), 0 if result.passed else 1)


def search(config: SearchConfig) -> CommandResult:
    """Search a gallery."""
    from xbt.cli.search import run_search

    answer = run_search(config)
    return CommandResult(answer.to_dict(), str(answer))


def backfill(config: BackfillConfig) -> CommandResult:
    """Backfill, and draw the measured curve."""
    result = backfill_and_draw(config)
    return CommandResult(result.to_dict(), str(result))


def backfill_and_draw(config: BackfillConfig) -> BackfillResult:
    """Backfill, and draw the measured recall over the fraction backfilled as ``curve.png``."""
    from xbt.backfill import run_backfill
    from xbt.processes import is_main_process
    from xbt.report.figures import draw_backfill_curve

    result = run_backfill(config)
    points = result.curve
    if points and is_main_process():
        stop = next((point.fraction for point in points if point.position == result.stopping_position), None)
        recall = {f"R@{k}": [point.recall[k] for point in points] for k in points[0].recall}
        path = Path(config.output_dir) / "curve.png"
        draw_backfill_curve([point.fraction for point in points], recall, path, stop)
    return result


def push(config: PushConfig) -> CommandResult:
    """Upload to the Hub."""
    from xbt.cli.push import push as run

    result = run(config)
    return CommandResult(result.to_dict(), result.format())
