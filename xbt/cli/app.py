"""Entry point of ``xbt``: parse the command line, run the command, return an exit status."""

from __future__ import annotations

import os
import sys
import traceback
from argparse import SUPPRESS
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from textwrap import wrap
from typing import Any, get_args, get_type_hints

from xbt.cli.commands import Command, find_command, overview
from xbt.cli.output import as_json, escape_on_stdout, prints_on_stderr, show
from xbt.errors import ConfigError, XbtError
from xbt.version import __version__

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
    """Parse the flags of a command, run it and print its result.

    Returns:
        The exit status.
    """
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
    """Parse the flags of a command into its config.

    Raises:
        ConfigError: As :func:`~xbt.config.parse_config`.
    """
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
