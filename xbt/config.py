"""Typed configs: one dataclass is the command line, the YAML file and the record beside the output."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from xbt.errors import ConfigError, XbtError

ConfigT = TypeVar("ConfigT")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def make_parser(config_class: type[Any], prog: str | None = None) -> ArgumentParser:
    """A parser whose options are the fields of a (possibly nested) dataclass, plus ``--config FILE``."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=_first_paragraph(config_class))
    parser.add_argument("--config", action="config", help="YAML file; flags after it override its values")
    parser.add_class_arguments(config_class, nested_key=None, fail_untyped=True)
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
            required key is missing, or the YAML file is missing or malformed.
    """
    parser = make_parser(config_class, prog)
    flags = list(sys.argv[1:] if argv is None else argv)
    try:
        parsed = parser.instantiate(parser.parse_args(flags))
    except XbtError:
        raise
    except Exception as error:  # jsonargparse wraps what a dataclass's own check raised
        raise ConfigError(_explain(error, flags)) from error
    values = {key: value for key, value in vars(parsed).items() if key != "config"}
    return config_class(**values)


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

    Exits with status 2 for what the user can mend (an :class:`XbtError` or a missing or unwritable file) and
    130 after an interrupt. Anything else is a bug and keeps its traceback.
    """
    prog = Path(sys.argv[0]).name
    warnings.showwarning = _show_warning
    try:
        main(parse_config(config_class, prog=prog))
        _leave_processes()
    except (XbtError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{prog}: error: {error}", file=sys.stderr)
        _leave_processes()
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command continues from its last checkpoint", file=sys.stderr)
        sys.exit(130)


def _leave_processes() -> None:
    """Ends the process group: gloo's threads, left running, abort every other process at its exit."""
    torch = sys.modules.get("torch")  # a command that never needed it, --help say, must not wait for it
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """One line per warning, from the main process alone: what a person at a terminal wants of them."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=file or sys.stderr)


def _first_paragraph(config_class: type[Any]) -> str:
    return (config_class.__doc__ or "").strip().split("\n\n")[0]


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
