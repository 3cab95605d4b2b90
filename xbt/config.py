"""Typed configs: one dataclass is the command line, the YAML file and the record beside the output."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from xbt.config_files import plain_flags
from xbt.errors import ConfigError, XbtError

ConfigT = TypeVar("ConfigT")

USER_ERRORS = (XbtError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors that a user can fix, which need no traceback."""
WRONG_INPUT, INTERRUPTED = 2, 130
"""Exit statuses."""
_URL = re.compile(r"[A-Za-z][\w+.-]+:/|[^/]*::")

set_parsing_settings(docstring_parse_attribute_docstrings=True, instantiate_subclass_spec_in_any=False)


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help, with the line breaks that an epilog has."""


def make_parser(
    config_class: type[Any], prog: str | None = None, usage: str | None = None, epilog: str | None = None
) -> ArgumentParser:
    """A parser whose options are the fields of a (possibly nested) dataclass, plus ``--config FILE``.

    Args:
        config_class: The dataclass.
        prog: Name shown in the help.
        usage: The help's first line, in place of all flags.
        epilog: The help's last lines.
    """
    parser = ArgumentParser(
        prog=prog,
        usage=usage,
        epilog=epilog,
        exit_on_error=False,
        allow_abbrev=False,  # half a key is an unknown key
        description=_first_paragraph(config_class),
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file; flags override its values, and so do files that come after it",
    )
    settings = parser.add_argument_group("settings")
    settings.add_class_arguments(config_class, nested_key=None, as_group=False, fail_untyped=True)
    return parser


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str] | None = None, prog: str | None = None
) -> ConfigT:
    """Builds a config from command line flags and YAML files.

    Args:
        config_class: A dataclass; nested dataclasses become dotted flags.
        argv: The flags; ``None`` reads the process's own.
        prog: Name shown in the help.

    Returns:
        The config.

    Raises:
        ConfigError: If a key is unknown, a value has the wrong type or fails the dataclass's own checks, a
            required key is missing, the YAML file is missing or malformed, a value names Python code, or the
            output directory is a URL.
    """
    flags = list(sys.argv[1:] if argv is None else argv)
    return parse_flags(make_parser(config_class, prog), config_class, flags)[0]


def parse_flags(
    parser: ArgumentParser, config_class: type[ConfigT], flags: Sequence[str]
) -> tuple[ConfigT, dict[str, Any]]:
    """Builds a config with a parser that may know other arguments beside the config's keys.

    A plain string in place of a source (captions, images or pairs) is its ``source``. Nothing is imported:
    jsonargparse would take such a string, and ``class_path``, for a class of any module.

    Args:
        parser: From :func:`make_parser`.
        config_class: The dataclass it was made of.
        flags: The command line.

    Returns:
        The config, and the values of the other arguments by name.

    Raises:
        ConfigError: As :func:`parse_config`.
    """
    try:
        parsed = parser.instantiate(parser.parse_args(plain_flags(flags, config_class)))
    except XbtError:
        raise
    except Exception as error:  # jsonargparse wraps what a dataclass's own check raised
        raise ConfigError(_explain(error, flags)) from error
    values, known = dict(vars(parsed)), {each.name for each in fields(config_class)}  # type: ignore[arg-type]
    config = config_class(**{key: values.pop(key) for key in list(values) if key in known})
    for name in ("output_dir", "results"):
        require_local(getattr(config, name, None) or "", f"--{name}")
    return config, values


def require_local(path: str | Path, option: str) -> None:
    """Checks that a path to write to is no URL.

    Args:
        path: The path.
        option: The option that gave it, for the error.

    Raises:
        ConfigError: If it is a URL (``s3://``, ``memory://``, ...), which would become a local folder of
            that name.
    """
    if _URL.match(str(path)):
        raise ConfigError(
            f"{option} {path} is a URL, but xbt writes to local folders only; give a local path, and copy "
            "the result when it is done"
        )


def config_to_dict(config: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    if not is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"a config must be a dataclass instance, got {type(config).__name__}")
    return asdict(config)


def config_to_yaml(config: Any) -> str:
    """The resolved config as YAML that ``--config`` reads back."""
    text: str = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    return text


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones, as they stand on the command line."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def run_recipe(main: Callable[[ConfigT], object], config_class: type[ConfigT]) -> None:
    """Runs a recipe's main function with the command line's config, and turns errors into one sentence.

    Exits with status 2 for what the user can fix (an :class:`XbtError` or a missing or unwritable file) and
    130 after an interrupt. Anything else is a bug and keeps its traceback.
    """
    prog = Path(sys.argv[0]).name

    def work() -> int:
        main(parse_config(config_class, prog=prog))
        return 0

    status = run_guarded(work, prog)
    if status:
        sys.exit(status)


def run_guarded(
    work: Callable[[], int],
    prog: str,
    tell: Callable[[BaseException, int], None] | None = None,
    when_interrupted: str = "interrupted; the same command continues from its last checkpoint",
) -> int:
    """Does a command's work, and turns errors and interrupts into one line on stderr and a status.

    Args:
        work: Returns the exit status.
        prog: What the command is called.
        tell: Is told of the error and the status as well, in the main process.
        when_interrupted: What to say after an interrupt.

    Returns:
        What ``work`` returns; 2 after one of :data:`USER_ERRORS`, 130 after an interrupt. Anything else is a
        bug and is raised.
    """
    shown_before, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        status = work()
        _leave_processes()
        return status
    except USER_ERRORS as error:
        status = _report(error, f"{prog}: error: {error}", WRONG_INPUT, tell)
        _leave_processes()
        return status
    except KeyboardInterrupt as error:
        return _report(error, f"{prog}: {when_interrupted}", INTERRUPTED, tell)
    finally:
        warnings.showwarning = shown_before


def is_main_process() -> bool:
    """Whether this is the only process of a run, or the one that speaks for all of them."""
    return os.environ.get("RANK", "0") == "0"


def _report(
    error: BaseException, line: str, status: int, tell: Callable[[BaseException, int], None] | None
) -> int:
    if is_main_process():
        print(line, file=sys.stderr)
        if tell is not None:
            tell(error, status)
    return status


_PATIENCE = 10.0
"""Seconds in which the other processes must have let go."""

_SETTLING = 0.3
"""Seconds in which gloo's threads have forgotten the last collective."""


def _leave_processes() -> None:
    """Ends the process group: gloo's threads, left running, abort every other process at its exit."""
    torch = sys.modules.get("torch")  # a command that never needed it, --help say, must not wait for it
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return

    def leave() -> None:
        # To forget a collective its thread needs the GIL, and older versions of torch join that thread
        # without letting go of it.
        time.sleep(_SETTLING)
        torch.distributed.destroy_process_group()

    # Where another process has gone already, older versions of torch wait for it for ever.
    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(_PATIENCE)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """One line per warning, from the main process alone: what a person at a terminal wants of them."""
    if is_main_process():
        print(f"warning: {message}", file=file or sys.stderr)


def _first_paragraph(config_class: type[Any]) -> str:
    return inspect.cleandoc(config_class.__doc__ or "").split("\n\n")[0]


def _of_optional_group(message: str) -> str:
    """What is wrong within a group of keys that may be left out; jsonargparse adds that it is not None."""
    group, problem = r"^Parser key \"([^\"]+)\"", r"Problem with given class_path '[^']+': (.+)"
    found = re.search(rf"{group}: .*{problem} - Expected a <class 'NoneType'>", message)
    return f'Key "{found[1]}": {found[2]}' if found else message


def _explain(error: BaseException, flags: Sequence[str]) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, XbtError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    message = _of_optional_group(" ".join(str(error).split()))
    files = [flags[i + 1] for i, flag in enumerate(flags[:-1]) if flag == "--config"]
    files += [flag.removeprefix("--config=") for flag in flags if flag.startswith("--config=")]
    where = f" (command line and {', '.join(files)})" if files else " (command line)"
    return f"{message}{where}; --help lists every key"
