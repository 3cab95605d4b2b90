"""Typed configs: one dataclass is the command line, the YAML file and the record beside the output."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from xbt.config_files import plain_flags
from xbt.errors import ConfigError, XbtError
from xbt.processes import is_main_process, leave_processes, show_warning

ConfigT = TypeVar("ConfigT")

USER_ERRORS = (XbtError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors that a user can fix; they need no traceback."""
WRONG_INPUT, INTERRUPTED = 2, 130
"""Exit statuses."""
_URL = re.compile(r"[A-Za-z][\w+.-]+:/|[^/]*::")

set_parsing_settings(docstring_parse_attribute_docstrings=True, instantiate_subclass_spec_in_any=False)


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help formatter of jsonargparse that keeps the line breaks of the epilog."""


def make_parser(
    config_class: type[Any], prog: str | None = None, usage: str | None = None, epilog: str | None = None
) -> ArgumentParser:
    """Create a parser with the fields of a (possibly nested) dataclass as options, plus ``--config FILE``.

    Args:
        config_class: The dataclass.
        prog: Name shown in the help.
        usage: First line of the help, in place of all flags.
        epilog: Last lines of the help.
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
    """Build a config from command line flags and YAML files.

    Args:
        config_class: A dataclass; nested dataclasses become dotted flags.
        argv: The flags; ``None`` takes those of the process.
        prog: Name shown in the help.

    Returns:
        The config.

    Raises:
        ConfigError: If a key is unknown or missing, a value has the wrong type or fails a check of the
            dataclass, the YAML file is missing or malformed, a value names Python code, or the output
            directory is a URL.
    """
    flags = list(sys.argv[1:] if argv is None else argv)
    return parse_flags(make_parser(config_class, prog), config_class, flags)[0]


def parse_flags(
    parser: ArgumentParser, config_class: type[ConfigT], flags: Sequence[str]
) -> tuple[ConfigT, dict[str, Any]]:
    """Build a config with a parser that may have arguments besides the keys of the config.

    A plain string in place of a source (captions, images or pairs) becomes its ``source``. No module is
    imported: jsonargparse would read such a string, or a ``class_path``, as a class name and import it.

    Args:
        parser: A parser from :func:`make_parser`.
        config_class: The dataclass of the parser.
        flags: The command line.

    Returns:
        The config, and the values of the other arguments by name.

    Raises:
        ConfigError: See :func:`parse_config`.
    """
    try:
        parsed = parser.instantiate(parser.parse_args(plain_flags(flags, config_class)))
    except XbtError:
        raise
    except Exception as error:  # jsonargparse wraps the errors of a dataclass's checks
        raise ConfigError(_explain(error, flags)) from error
    values, keys = dict(vars(parsed)), {field.name for field in fields(config_class)}  # type: ignore[arg-type]
    config = config_class(**{key: values.pop(key) for key in list(values) if key in keys})
    for name in ("output_dir", "results"):
        require_local(getattr(config, name, None) or "", f"--{name}")
    return config, values


def require_local(path: str | Path, option: str) -> None:
    """Refuse a URL as an output path: it would become a local folder of that name.

    Args:
        path: The path.
        option: The option of the path, for the error message.

    Raises:
        ConfigError: If it is a URL (``s3://``, ``memory://``, ...).
    """
    if _URL.match(str(path)):
        raise ConfigError(
            f"{option} {path} is a URL, but xbt writes only to local folders; give a local path, and copy "
            "the result afterwards"
        )


def config_to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to plain dicts, lists and scalars."""
    if not is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"a config must be a dataclass instance, got {type(config).__name__}")
    return asdict(config)


def config_to_yaml(config: Any) -> str:
    """Convert a resolved config to YAML that ``--config`` can read."""
    text: str = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    return text


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested keys to dotted ones, as on the command line."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def run_recipe(main: Callable[[ConfigT], object], config_class: type[ConfigT]) -> None:
    """Run a recipe's main function with the config of the command line; see :func:`run_guarded`.

    Exits with status 2 after an error that the user can fix (an :class:`XbtError`, or a missing or unwritable
    file) and 130 after an interrupt. Any other error is a bug and keeps its traceback.
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
    on_error: Callable[[BaseException, int], None] | None = None,
    when_interrupted: str = "interrupted; the same command continues from its last checkpoint",
) -> int:
    """Run a command; an error of the user or an interrupt becomes one line on stderr and a status.

    Args:
        work: The command; returns the exit status.
        prog: Name of the command.
        on_error: Callback for the error and the status, in the main process.
        when_interrupted: Message after an interrupt.

    Returns:
        The status of ``work``; 2 after one of :data:`USER_ERRORS`, 130 after an interrupt. Any other error is
        a bug and is raised.
    """
    original_showwarning, warnings.showwarning = warnings.showwarning, show_warning
    try:
        status = work()
        leave_processes()
        return status
    except USER_ERRORS as error:
        status = _report(error, f"{prog}: error: {error}", WRONG_INPUT, on_error)
        leave_processes()
        return status
    except KeyboardInterrupt as error:
        return _report(error, f"{prog}: {when_interrupted}", INTERRUPTED, on_error)
    finally:
        warnings.showwarning = original_showwarning


def _report(
    error: BaseException, line: str, status: int, on_error: Callable[[BaseException, int], None] | None
) -> int:
    if is_main_process():
        print(line, file=sys.stderr)
        if on_error is not None:
            on_error(error, status)
    return status


def _first_paragraph(config_class: type[Any]) -> str:
    return inspect.cleandoc(config_class.__doc__ or "").split("\n\n")[0]


def _shorten_group_error(message: str) -> str:
    """Shorten an error in an optional group of keys; jsonargparse adds that the group is not None."""
    group, problem = r"^Parser key \"([^\"]+)\"", r"Problem with given class_path '[^']+': (.+)"
    match = re.search(rf"{group}: .*{problem} - Expected a <class 'NoneType'>", message)
    return f'Key "{match[1]}": {match[2]}' if match else message


def _explain(error: BaseException, flags: Sequence[str]) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, XbtError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    message = _shorten_group_error(" ".join(str(error).split()))
    files = [flags[i + 1] for i, flag in enumerate(flags[:-1]) if flag == "--config"]
    files += [flag.removeprefix("--config=") for flag in flags if flag.startswith("--config=")]
    where = f" (command line and {', '.join(files)})" if files else " (command line)"
    return f"{message}{where}; --help lists every key"
