"""Typed configs: one dataclass is the command line, the YAML file and the record beside the output."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, get_loader, set_parsing_settings

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


_MAX_CONFIG_BYTES = 1 << 18
_MAX_ALIASES = 16
_MAX_DEPTH = 50
_CLASS_PATH = "class_path"


def plain_flags(flags: Sequence[str], config_class: type[Any]) -> list[str]:
    """Return a command line that is safe for jsonargparse, and keep jsonargparse from importing modules.

    ``--captions FILE`` becomes ``--captions.source FILE``, in YAML too. ``--config FILE`` moves before all
    other flags, with the file's content in place of its name: flags override files.

    Args:
        flags: The command line.
        config_class: The config's dataclass.

    Raises:
        ConfigError: If a file cannot be read or is no YAML mapping, or a key is ``class_path``.
    """
    groups = _groups(config_class)
    _allow_only({config_class, *groups.values()})
    end = flags.index("--") if "--" in flags else len(flags)
    files: list[str] = []
    others: list[str] = []
    for position, flag in enumerate(flags[:end]):
        if position > 0 and flags[position - 1] == "--config":
            files.append(f"--config={_read_yaml(flag, config_class)}")
        elif flag.startswith("--config="):
            files.append(f"--config={_read_yaml(flag.removeprefix('--config='), config_class)}")
        elif flag != "--config" or position == end - 1:
            others.append(_full_flag(flag, flags[position + 1] if position + 1 < end else "", groups))
    return [*files, *others, *flags[end:]]


def _groups(config_class: type[Any], prefix: str = "") -> dict[str, type[Any]]:
    """Nested dataclasses of a config by their dotted key."""
    groups = {}
    for name, hint in get_type_hints(config_class).items():
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, type) and is_dataclass(kind):
                groups[prefix + name] = kind
                groups.update(_groups(kind, f"{prefix}{name}."))
    return groups


def _allow_only(classes: set[type[Any]]) -> None:
    """Let jsonargparse import only the dataclasses of the config, under any of its names for them."""
    allowed: set[str] = set()
    for config_class in classes:
        module = config_class.__module__.split(".")
        names = [".".join([*module[:end], config_class.__qualname__]) for end in range(1, len(module) + 1)]
        allowed.update(name for name in names if all(part.isidentifier() for part in name.split(".")))
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(allowed))


def _full_flag(flag: str, value: str, groups: dict[str, type[Any]]) -> str:
    """Expand a flag to its full name: ``--captions`` becomes ``--captions.source``."""
    key, equals, joined = flag.removeprefix("--").partition("=")
    value = joined if equals else value
    if not flag.startswith("--"):
        return flag
    if key.endswith(f".{_CLASS_PATH}"):
        _refuse_code(key, "the command line")
    if value.lstrip().startswith("{"):  # a YAML mapping
        parsed = None
        with suppress(yaml.YAMLError, RecursionError, ValueError):  # jsonargparse reports these later
            parsed = get_loader("yaml")(value)
        _plain(parsed, None, key, "the command line")
    elif key in groups and value != "null" and _has_source(groups[key]):
        return f"--{key}.source{equals}{joined}"
    return flag


def _has_source(config_class: type[Any]) -> bool:
    """Check for a class of sources: ``source`` is its first field, and need not be named."""
    return fields(config_class)[0].name == "source"


def _refuse_code(key: str, where: str) -> None:
    raise ConfigError(f"{where}: {key} names Python code, which xbt never imports; give the settings instead")


def _plain(value: Any, config_class: type[Any] | None, key: str, where: str) -> Any:
    """Convert parsed YAML: a plain string for a source becomes a mapping, a class path is refused."""
    if isinstance(value, str) and config_class is not None and _has_source(config_class):
        return {"source": value}
    if isinstance(value, list):
        return [_plain(item, None, key, where) for item in value]
    if not isinstance(value, dict):
        return value
    groups = {} if config_class is None else _groups(config_class)
    plain = {}
    for name, item in value.items():
        inner_key = f"{key}.{name}" if key else str(name)
        if str(name).rpartition(".")[2] == _CLASS_PATH:
            _refuse_code(inner_key, where)
        plain[name] = _plain(item, groups.get(str(name)), inner_key, where)
    return plain


def _read_yaml(file: str, config_class: type[Any]) -> str:
    """Read a config file and return it as YAML for jsonargparse; see :func:`_plain`."""
    try:
        with Path(file).expanduser().open("rb") as opened:
            content = opened.read(_MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError | ValueError):
            raise ConfigError(f"--config {file} does not exist; check the path") from error
        raise ConfigError(f"--config {file} cannot be read ({error.strerror}); give a YAML file") from error
    if len(content) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"--config {file} is longer than {_MAX_CONFIG_BYTES:,} bytes; give a YAML file")
    try:
        text = content.decode("utf-8-sig")
        _refuse_bombs(text, file)
        parsed = get_loader("yaml")(text) if text.strip() else {}
        plain = _plain({} if parsed is None else parsed, config_class, "", file)
        if not isinstance(plain, dict):
            raise ConfigError(f"--config {file} holds no settings; write key: value on each line")
        return yaml.dump(plain, Dumper=_QuotingDumper, width=sys.maxsize, sort_keys=False)
    except XbtError:
        raise
    except RecursionError as error:
        raise ConfigError(f"--config {file} has a value that holds itself; write it out") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {file} is not valid YAML ({reason}); fix the file") from error


def _refuse_bombs(text: str, file: str) -> None:
    depth = aliases = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        if aliases > _MAX_ALIASES:  # aliases of aliases expand to billions of values
            raise ConfigError(
                f"--config {file} has more than {_MAX_ALIASES} aliases (*name); replace them by their values"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ConfigError(f"--config {file} has more than {_MAX_DEPTH} levels; write fewer levels")


class _QuotingDumper(yaml.SafeDumper):
    """YAML dumper that quotes every string, so that none is read as a number."""


_QuotingDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)
