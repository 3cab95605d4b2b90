"""Entry point of ``xbt``: parse the command line, run the command, return an exit status.

The modules of a job are imported only when its command runs.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from textwrap import wrap
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from xbt.cli.output import CommandResult, as_json, escape_on_stdout, prints_on_stderr, show
from xbt.errors import ConfigError, XbtError
from xbt.version import __version__

if TYPE_CHECKING:
    from xbt.backfill import BackfillConfig, BackfillResult
    from xbt.embedding import EmbedConfig
    from xbt.evaluation.job import EvaluationConfig
    from xbt.report.config import UpgradeReportConfig


BUG = 70
"""Exit status of an unexpected error; 1 is taken by negative answers."""
JSON = "--json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after ``xbt``; by default those of the process.

    Returns:
        The exit status; see :mod:`xbt.cli`.
    """
    escape_on_stdout()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _overview_or_command(words)
    except XbtError as error:
        print(f"xbt: error: {error}", file=sys.stderr)
        if JSON in words:
            with suppress(XbtError):  # the first error matters more than a closed output
                show(_error("xbt", error, 2))
        return 2


def _overview_or_command(words: list[str]) -> int:
    if sorted(words) in (["--version"], [JSON, "--version"]):
        show(as_json({"version": __version__}) if JSON in words else f"xbt {__version__}")
        return 0
    if words[:1] in (["-h"], ["--help"]):
        show(overview())
        return 0
    if words == ["gallery"] or words[:2] in (["gallery", "-h"], ["gallery", "--help"]):
        show(overview("gallery "))
        return 0 if len(words) > 1 else 2
    if not words:
        print(overview(), file=sys.stderr)
        return 2
    return run_command(*find_command(words))


def run_command(command: Command, flags: list[str]) -> int:
    """Parse the flags of a command, run it, print its result, and return the exit status."""
    from xbt.config import run_guarded  # slow to import, and not needed by --help
    from xbt.processes import is_main_process

    as_document = JSON in flags

    def work() -> int:
        config = parse(command, flags)
        if not command.processes and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(f"{command.prog} runs in one process; launch it with --num_processes 1")
        with prints_on_stderr():
            result = command.run(config)
        if is_main_process() and not (result.error and as_document):  # the error document comes instead
            show(result.to_json() if as_document else result.text)
        if result.error is not None:
            raise result.error
        return result.status

    interrupted = "interrupted" + ("; the same command continues where it was" if command.resumable else "")

    def report(error: BaseException, status: int) -> None:
        message = interrupted if isinstance(error, KeyboardInterrupt) else None
        if as_document:
            with suppress(XbtError):  # the first error matters more than a closed output
                show(_error(command.prog, error, status, message))

    try:
        return run_guarded(work, command.prog, report, interrupted)
    except Exception as error:
        traceback.print_exc()
        if is_main_process():
            report(error, BUG)
        return BUG


def parse(command: Command, flags: Sequence[str]) -> Any:
    """Parse the flags of a command into its config, with the errors of :func:`~xbt.config.parse_config`."""
    from xbt.config import make_parser, parse_flags

    rest = list(flags)
    if command.first and rest and not rest[0].startswith("-"):
        rest = [f"--{command.first}={rest[0]}", *rest[1:]]
    config_class = command.config_class()
    words = [f"[{command.first.upper()}]"] if command.first else []
    words += [f"[{command.words.split('.')[-1].upper()} ...]"] if command.words else []
    usage = " ".join([command.prog, *words, "[--config FILE] [--key value ...] [--json]"])
    example = command.example.replace("\n", "\n  ")
    epilog = "\n".join([*_optional_groups(config_class), "example:", f"  {example}"])
    parser = make_parser(config_class, command.prog, usage, epilog)
    parser.add_argument(JSON, action="store_true", help="print one JSON document")
    if command.words:
        parser.add_argument("words", nargs="*", type=str, help=SUPPRESS)
    config, others = parse_flags(parser, config_class, rest)
    if others.get("words"):
        _add_words(config, str(command.words), others["words"])
    return config


def _optional_groups(config_class: type[Any]) -> list[str]:
    """Help lines for the keys of optional groups, which the list of flags does not show."""
    lines = []
    for name, hint in get_type_hints(config_class).items():
        group = next((option for option in get_args(hint) if is_dataclass(option)), None)
        if group is not None:
            listed = ", ".join(f".{key.name}" for key in fields(group))
            lines += [*wrap(f"--{name} has the keys {listed} (see --{name}.help)", 80), ""]
    return lines


def _add_words(config: Any, key: str, words: list[str]) -> None:
    *groups, name = key.split(".")
    for group in groups:
        config = getattr(config, group)
    present = getattr(config, name)
    setattr(config, name, [*([present] if isinstance(present, str) else present), *words])


def _error(prog: str, error: BaseException, status: int, message: str | None = None) -> str:
    kind = type(error).__name__
    document = {"command": prog, "kind": kind, "message": message or str(error) or kind, "status": status}
    return as_json({"error": document})


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: Name on the command line, one or two words.
        help: Description in one line.
        config: Location of the config dataclass, as ``"module:name"``.
        function: Location of the function of the config. Its result is a :class:`CommandResult`, or has
            ``to_dict()`` and a text.
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
        result = resolve_name(self.function)(config)
        if isinstance(result, CommandResult):
            return result
        return CommandResult(result.to_dict(), str(result))


def _of_gallery(word: str, help: str, config: str, rest: str = "", words: str | None = None) -> Command:
    config, example = f"xbt.cli.gallery:{config}", f"xbt gallery {word} gallery{rest}"
    return Command(f"gallery {word}", help, config, f"xbt.cli.gallery:{word}", example, "gallery", words)


COMMANDS = (
    Command(
        "embed",
        "embed images or captions into a store, in any number of processes",
        "xbt.embedding:EmbedConfig",
        "xbt.cli.app:embed",
        "xbt embed --encoder open_clip:ViT-B-32-quickgelu/openai --images.source photos/ \\\n"
        "  --output_dir stores/photos_b32",
        processes=True,
        resumable=True,
    ),
    Command(
        "fit",
        "fit a projection, or choose one (if any helps) on held-out pairs",
        "xbt.cli.fit:FitConfig",
        "xbt.cli.fit:run_fit",
        "xbt fit --old_store stores/captions_b32 --new_store stores/captions_l14 --output_dir runs/fit\n"
        "xbt fit --old open_clip:ViT-B-32-quickgelu/openai \\\n"
        "  --new transformers:openai/clip-vit-large-patch14 --captions.source captions.txt \\\n"
        "  --pairs.source dataset_flickr8k.json --pairs.split val --output_dir runs/choice",
    ),
    Command(
        "evaluate",
        "measure old/old, new/old and new/new retrieval on image-text pairs",
        "xbt.evaluation.job:EvaluationConfig",
        "xbt.cli.app:evaluate",
        "xbt evaluate --old open_clip:ViT-B-32-quickgelu/openai \\\n"
        "  --new transformers:openai/clip-vit-large-patch14 --upgraded.chosen runs/choice/compatible \\\n"
        "  --pairs.source dataset_flickr8k.json --pairs.split test --output_dir runs/evaluation",
    ),
    Command(
        "report",
        "say whether an upgrade is worth it, with numbers and pictures",
        "xbt.report:UpgradeReportConfig",
        "xbt.cli.app:report",
        "xbt report --old open_clip:ViT-B-32-quickgelu/openai \\\n"
        "  --new transformers:openai/clip-vit-large-patch14 --captions.source captions.txt \\\n"
        "  --pairs.source dataset_flickr8k.json --pairs.split test --output_dir runs/report",
    ),
    Command(
        "search",
        "search a gallery with texts or pictures",
        "xbt.cli.search:SearchConfig",
        "xbt.cli.search:run_search",
        'xbt search --gallery gallery --encoder runs/choice/compatible "a dog on a beach" "a red car"',
        words="queries.texts",
    ),
    Command(
        "backfill",
        "re-embed a gallery while it serves, the most urgent items first",
        "xbt.backfill:BackfillConfig",
        "xbt.cli.app:backfill_and_draw",
        "xbt backfill --gallery gallery --encoder transformers:openai/clip-vit-large-patch14 \\\n"
        "  --images.source photos/ --output_dir runs/backfill --max_hours 8",
        processes=True,
        resumable=True,
    ),
    Command(
        "push",
        "upload a compatible encoder or a projection to the Hugging Face Hub",
        "xbt.cli.push:PushConfig",
        "xbt.cli.push:push",
        "xbt push runs/choice --repo me/l14-speaks-b32 --license apache-2.0",
        first="directory",
    ),
    _of_gallery(
        "create", "create a gallery, from a store or empty", "CreateConfig", " --store stores/photos_b32"
    ),
    _of_gallery("add", "add a store's items to a gallery", "AddConfig", " --store stores/new_photos_b32"),
    _of_gallery(
        "remove", "remove items from a gallery", "RemoveConfig", " 2019/beach.jpg 2019/forest.jpg", "ids"
    ),
    _of_gallery("verify", "read every byte of a gallery or store and name what is damaged", "GalleryConfig"),
    _of_gallery("compact", "free the disk space of removed and superseded items", "GalleryConfig"),
    _of_gallery("info", "describe a gallery or store and the model that made it", "GalleryConfig"),
)
"""All commands, in the order of ``xbt --help``."""


def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """Find the command at the start of a command line; return it, and the rest of the line.

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
