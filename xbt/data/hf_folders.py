"""Local directories in the formats of the Hub; files outside of the directory are never read.

A directory may come from an untrusted source. Its data set card (``README.md``) names data files, and so does
the ``state.json`` of ``Dataset.save_to_disk``. Both are checked before datasets uses them. Every file named
there is checked again before it is read.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from xbt.data.files import check_is_file, one_line, read_json
from xbt.errors import DataError, XbtError

HUB_PREFIX = "hf:"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_CARDS = ("README.md", ".huggingface.yaml")
_FORMATS = frozenset(["parquet", "json", "csv", "arrow", "text", "imagefolder", "webdataset"])
"""Supported formats; datasets reads others, such as HDF5, with libraries that follow links in the file."""
_MAX_CARD_BYTES = 1 << 20
_MAX_YAML_CHARS = 1 << 17
_MAX_NESTING = 100
"""Maximum nesting of brackets; PyYAML's time grows with its square."""
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_BLANK_LINES = 50
_MAX_PATTERN_LENGTH = 500
_MAX_WILDCARDS = 3


def directory_of(source: str) -> Path | None:
    """Return the local directory that a source names; ``None`` for a Hub data set."""
    name = source.removeprefix(HUB_PREFIX)
    directory = Path(name).expanduser()
    if directory.is_file():
        raise DataError(f"{source} is a file; leave out hf: to read it, or name its directory")
    if name.startswith(("/", ".", "~")) and not directory.exists():
        raise DataError(f"{source}: the directory {directory} does not exist; check the path")
    return directory if directory.is_dir() else None


def was_saved(directory: Path) -> bool:
    """Return True if ``save_to_disk`` wrote the directory; such a directory cannot be streamed."""
    return (directory / _STATE).exists() or (directory / _SPLITS).exists()


def open_folder(directory: Path, subset: str | None) -> Any:
    """Open a local directory as a ``datasets.Dataset`` or ``datasets.DatasetDict``."""
    if was_saved(directory):
        for folder in _saved_splits(directory):
            _check_saved(folder, directory)
        return datasets.load_from_disk(str(directory))
    builder = open_builder(directory, subset)
    builder.download_and_prepare()
    return builder.as_dataset()


def open_builder(directory: Path, subset: str | None) -> Any:
    """Open a directory of data files as a ``datasets.DatasetBuilder`` without reading them."""
    for name in _CARDS:
        _check_card(directory / name, directory)
    builder = datasets.load_dataset_builder(str(directory), subset, cache_dir=str(_cache_of(directory)))
    kind = type(builder).__module__.split(".")[-1]
    if not _FORMATS & {base.__module__.split(".")[-1] for base in type(builder).__mro__}:
        raise DataError(
            f"{directory} holds files of the format {kind}; give parquet, jsonl, csv or image files"
        )
    for files in (builder.config.data_files or {}).values():
        for file in map(Path, files):
            _check_inside(file, directory)
            if file.suffix.lower() == ".arrow":
                _check_arrow(file)
    return builder


@contextmanager
def translated(source: str, advice: str) -> Iterator[None]:
    """Translate any error of the datasets library into one DataError that ends with the advice."""
    try:
        yield
    except XbtError:
        raise
    except Exception as error:
        # huggingface_hub, fsspec, pyarrow and the builders have no common base error.
        raise DataError(
            f"{source} cannot be opened ({one_line(error.__cause__ or error)}); {advice}"
        ) from error


def _cache_of(directory: Path) -> Path:
    # datasets (5.2) keys its cache of a directory with a card by its name and card only, and would return
    # stale data for another directory of that name, or after the files have changed.
    resolved = directory.resolve()
    digest = hashlib.sha256(str(resolved).encode("utf-8", "surrogateescape"))
    for path in sorted(path for path in resolved.rglob("*") if path.is_file()):
        status = path.stat()
        name = path.relative_to(resolved).as_posix().encode("utf-8", "surrogateescape")
        digest.update(b"\0".join((name, str(status.st_size).encode(), str(status.st_mtime_ns).encode())))
    return Path(datasets.config.HF_DATASETS_CACHE) / "xbt-local" / digest.hexdigest()[:32]


def _check_card(card: Path, directory: Path) -> None:
    """Check the data files that a card names, and that the card can be parsed quickly."""
    if not os.path.lexists(card):
        return
    _check_inside(card, directory)
    text = _read_card(card)
    if re.search(rf"(?:\r?\n|\r){{{_MAX_BLANK_LINES}}}", text):
        raise DataError(f"{card} has more than {_MAX_BLANK_LINES} blank lines in a row; remove them")
    if card.name == _CARDS[0]:
        matter = REGEX_YAML_BLOCK.search(text)  # datasets uses the same expression
        text = matter[2] if matter is not None else ""
    try:
        _check_yaml(text, card)
        metadata = yaml.load(text, Loader=_LOADER)
    except XbtError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            f"{card}: its YAML cannot be read ({one_line(error)}); fix it, or remove the file"
        ) from error
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            for pattern in _patterns([config.get("data_files"), config.get("data_dir")]):
                _check_pattern(pattern, card)


def _read_card(card: Path) -> str:
    if card.stat().st_size > _MAX_CARD_BYTES:
        raise DataError(f"{card} has {card.stat().st_size:,} bytes, too many for a card; remove it")
    try:
        return card.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{card} is not UTF-8; save it in UTF-8, or remove it") from error


def _check_yaml(text: str, card: Path) -> None:
    """Check that YAML can be parsed in little time and memory."""
    depth = 0
    for token in yaml.scan(text[: _MAX_YAML_CHARS + 1], Loader=_LOADER):
        if isinstance(token, yaml.AliasToken):
            raise DataError(f"{card} has YAML aliases, which can expand without limit; write the values out")
        depth += isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken)
        depth -= isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken)
        if depth > _MAX_NESTING:
            raise DataError(f"{card} has more than {_MAX_NESTING} levels of nested brackets; remove the file")
    if len(text) > _MAX_YAML_CHARS:
        raise DataError(f"{card} has {len(text):,} characters of YAML, too many for a card; remove the file")


def _patterns(value: Any) -> Iterator[str]:
    """Yield every string in a nested value; this includes names of splits, which do no harm."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _patterns(item)


def _check_pattern(pattern: str, card: Path) -> None:
    parts = pattern.replace("\\", "/").split("/")
    if (
        "::" in pattern
        or re.match(r"[\w.+-]+:/", pattern)
        or pattern.startswith(("/", "\\", "~"))
        or ".." in parts
    ):
        raise DataError(
            f"{card} names the data files {pattern[:100]!r}, which lie outside of {card.parent}; fix the "
            "card to name only files in the directory, or remove it"
        )
    wildcards = max(len(re.findall(r"\*+|\?", part)) for part in parts)
    if len(pattern) > _MAX_PATTERN_LENGTH or wildcards > _MAX_WILDCARDS or parts.count("**") > 2:
        raise DataError(
            f"{card} names data files by the pattern {pattern[:100]!r}, which is too long or has too many "
            "wildcards; write a simpler one"
        )


def _check_inside(file: Path, directory: Path) -> None:
    """Check that a path is a regular file in the directory after links are resolved."""
    try:
        resolved = file.resolve(strict=True)
        regular = stat.S_ISREG(resolved.stat().st_mode)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{file} cannot be found ({error}); copy or download {directory} again") from error
    folder = directory.resolve()
    roots = [folder]
    if folder.parent.name == "snapshots":  # the Hub's cache links its files to blobs
        roots.append(folder.parent.parent / "blobs")
    if not any(resolved.is_relative_to(root) for root in roots):
        raise DataError(
            f"{file} leads to {resolved}, outside of {directory}; copy the file into the directory"
        )
    if not regular:
        raise DataError(f"{file} is a directory, pipe or device, not a file; remove it")


def _saved_splits(directory: Path) -> list[Path]:
    """Folders that hold a ``state.json``: the directory itself and the folders of its splits."""
    folders = [directory] if (directory / _STATE).exists() else []
    if not (directory / _SPLITS).exists():
        return folders
    names = _read_record(directory / _SPLITS, directory).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{directory / _SPLITS} does not list the splits; save the data set again")
    for name in names:
        if not name or "/" in name or "\\" in name or name == "..":
            raise DataError(
                f"{directory / _SPLITS} names the split {name[:100]!r}, which is no folder in the directory; "
                "save the data set again"
            )
    return folders + [directory / name for name in names]


def _check_saved(folder: Path, directory: Path) -> None:
    """Check the files that a ``state.json`` names."""
    state = _read_record(folder / _STATE, directory)
    _read_record(folder / "dataset_info.json", directory)
    items = [item for value in state.values() if isinstance(value, list) for item in value]
    for item in [item for item in items if isinstance(item, dict)]:  # others are columns of a format
        name = item.get("filename")
        if not isinstance(name, str) or not name or "://" in name:
            raise DataError(f"{folder / _STATE} lists a file without a name; save the data set again")
        _check_inside(folder / name, directory)
        _check_arrow(folder / name)


def _read_record(path: Path, directory: Path) -> dict[str, Any]:
    check_is_file(path)
    _check_inside(path, directory)
    record = read_json(path)
    if not isinstance(record, dict):
        raise DataError(f"{path} was not written by save_to_disk; save the data set again")
    return record


def _check_arrow(path: Path) -> None:
    """Check that no offset in an Arrow file points outside of it, because later reads trust the offsets."""
    try:
        with pa.memory_map(str(path)) as file:
            try:
                batches = pa.ipc.open_stream(file)
            except pa.ArrowInvalid:
                file.seek(0)
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            for batch in batches:
                batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(
            f"{path} is a damaged Arrow file ({one_line(error)}); copy or download it again"
        ) from error
