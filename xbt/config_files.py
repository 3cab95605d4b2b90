"""Preparation of config files and flags for jsonargparse: plain strings become sources, code is refused.

jsonargparse reads a plain string in place of a dataclass, and the key ``class_path`` anywhere, as the name of
a class, and imports its module. Here such a string is a source, and the key is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import get_loader, set_parsing_settings

from xbt.errors import ConfigError, XbtError

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
