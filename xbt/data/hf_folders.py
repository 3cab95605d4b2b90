"""Local directories in the formats of the Hub; no file in them decides that another place is read.

A directory may come from a stranger. Its data set card (``README.md``) names data files, and so does the
``state.json`` of ``Dataset.save_to_disk``: both are checked before datasets obeys them, and every file that
they lead to is checked again before it is read.
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

from xbt.data.files import check_is_file, read_json
from xbt.errors import DataError, XbtError

HUB_PREFIX = "hf:"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_CARDS = ("README.md", ".huggingface.yaml")
_FORMATS = frozenset(["parquet", "json", "csv", "arrow", "text", "imagefolder", "webdataset"])
"""Formats that are read: the others of datasets need libraries that follow links of their own (HDF5)."""
_LARGEST_CARD = 1 << 20
_MOST_BLANK_LINES = 50
_LONGEST_PATTERN = 500
_MOST_WILDCARDS = 3


def directory_of(source: str) -> Path | None:
    """The local directory that a source names, if it names one.

    Raises:
        DataError: If it is a file, or a path that does not exist.
    """
    name = source.removeprefix(HUB_PREFIX)
    directory = Path(name).expanduser()
    if directory.is_file():
        raise DataError(f"{source} is a file; leave out hf: to read it, or name its directory")
    if name.startswith(("/", ".", "~")) and not directory.exists():
        raise DataError(f"{source}: the directory {directory} does not exist; check the path")
    return directory if directory.is_dir() else None


def was_saved(directory: Path) -> bool:
    """True if ``save_to_disk`` made the directory, which then cannot be streamed."""
    return (directory / _STATE).exists() or (directory / _SPLITS).exists()


def open_folder(directory: Path, subset: str | None) -> Any:
    """Opens a local directory.

    Args:
        directory: The directory.
        subset: One of the configurations that its card names.

    Returns:
        A ``datasets.Dataset`` or ``datasets.DatasetDict``.

    Raises:
        DataError: If a file in it names one that lies elsewhere, or cannot be read.
    """
    if was_saved(directory):
        for folder in _saved_splits(directory):
            _check_saved(folder, directory)
        return datasets.load_from_disk(str(directory))
    builder = open_builder(directory, subset)
    builder.download_and_prepare()
    return builder.as_dataset()


def open_builder(directory: Path, subset: str | None) -> Any:
    """Opens a directory of data files without reading them.

    Returns:
        A ``datasets.DatasetBuilder``, whose data files are regular files of the directory.

    Raises:
        DataError: As :func:`open_folder`.
    """
    for name in _CARDS:
        _check_card(directory / name, directory)
    builder = datasets.load_dataset_builder(str(directory), subset, cache_dir=str(_cache_of(directory)))
    kind = type(builder).__module__.split(".")[-1]
    if not _FORMATS & {each.__module__.split(".")[-1] for each in type(builder).__mro__}:
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
    """Turns whatever datasets raises into one sentence.

    Args:
        source: What is being opened.
        advice: What to check.

    Raises:
        DataError: In place of any error that is not the project's own.
    """
    try:
        yield
    except XbtError:
        raise
    except Exception as error:
        # The hub client, fsspec, pyarrow and the builders share no kind of error.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise DataError(f"{source} cannot be opened ({type(error).__name__}: {reason}); {advice}") from error


def _cache_of(directory: Path) -> Path:
    """A cache for these very files.

    Where a directory has a data set card, datasets (5.2) caches its data by the directory's name and card
    alone: another directory of that name, or other files in this one, would be answered from the cache.
    """
    resolved = directory.resolve()
    digest = hashlib.sha256(str(resolved).encode("utf-8", "surrogateescape"))
    for path in sorted(path for path in resolved.rglob("*") if path.is_file()):
        status = path.stat()
        name = path.relative_to(resolved).as_posix().encode("utf-8", "surrogateescape")
        digest.update(b"\0".join((name, str(status.st_size).encode(), str(status.st_mtime_ns).encode())))
    return Path(datasets.config.HF_DATASETS_CACHE) / "xbt-local" / digest.hexdigest()[:32]


def _check_card(card: Path, directory: Path) -> None:
    """Checks the data files that a card names, and that parsing it ends soon."""
    if not os.path.lexists(card):
        return
    _check_inside(card, directory)
    if card.stat().st_size > _LARGEST_CARD:
        raise DataError(f"{card} has {card.stat().st_size:,} bytes, too many for a card; remove it")
    try:
        text = card.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{card} is not UTF-8; save it in UTF-8, or remove it") from error
    if re.search(rf"(?:\r?\n|\r){{{_MOST_BLANK_LINES}}}", text):
        raise DataError(f"{card} has more than {_MOST_BLANK_LINES} blank lines in a row; remove them")
    if card.name == _CARDS[0]:
        matter = REGEX_YAML_BLOCK.search(text)  # datasets finds it by the same expression
        text = matter[2] if matter is not None else ""
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise DataError(f"{card} has YAML aliases, which can unpack without end; write them out")
        said = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{card}: its YAML cannot be read ({reason}); fix it, or remove the file") from error
    configs = said.get("configs") if isinstance(said, dict) else None
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            for pattern in _patterns([config.get("data_files"), config.get("data_dir")]):
                _check_pattern(pattern, card)


def _patterns(value: Any) -> Iterator[str]:
    """Every string in a value of any structure; names of splits are among them, and are harmless."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _patterns(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _patterns(each)


def _check_pattern(pattern: str, card: Path) -> None:
    parts = pattern.replace("\\", "/").split("/")
    if (
        "::" in pattern
        or re.match(r"[\w.+-]+:/", pattern)
        or pattern.startswith(("/", "\\", "~"))
        or ".." in parts
    ):
        raise DataError(
            f"{card} names the data files {pattern[:100]!r}, which lie outside of {card.parent}; only files "
            "in the directory are read: correct the card, or remove it"
        )
    wildcards = max(len(re.findall(r"\*+|\?", part)) for part in parts)
    if len(pattern) > _LONGEST_PATTERN or wildcards > _MOST_WILDCARDS or parts.count("**") > 2:
        raise DataError(
            f"{card} names data files by the pattern {pattern[:100]!r}, which is too long or has too many "
            "wildcards; write a simpler one"
        )


def _check_inside(file: Path, directory: Path) -> None:
    """Checks that a path is a regular file and lies in the directory, also when links are followed."""
    try:
        resolved = file.resolve(strict=True)
        regular = stat.S_ISREG(resolved.stat().st_mode)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{file} cannot be found ({error}); copy or download {directory} again") from error
    root = directory.resolve()
    roots = [root]
    if root.parent.name == "snapshots":  # of the Hub's cache, whose files are links to its blobs
        roots.append(root.parent.parent / "blobs")
    if not any(resolved.is_relative_to(each) for each in roots):
        raise DataError(
            f"{file} leads to {resolved}, outside of {directory}; copy the file into the directory"
        )
    if not regular:
        raise DataError(f"{file} is a directory, pipe or device, not a file; remove it")


def _saved_splits(directory: Path) -> list[Path]:
    """The folders that hold a ``state.json``: the directory itself, and those of its splits."""
    folders = [directory] if (directory / _STATE).exists() else []
    if not (directory / _SPLITS).exists():
        return folders
    said = _read_record(directory / _SPLITS, directory)
    names = said.get("splits")
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
    """Checks the files that a ``state.json`` names."""
    state = _read_record(folder / _STATE, directory)
    _read_record(folder / "dataset_info.json", directory)
    files = [each for value in state.values() if isinstance(value, list) for each in value]
    for each in files:
        if not isinstance(each, dict):  # such as the columns of a format
            continue
        name = each.get("filename")
        if not isinstance(name, str) or not name or "://" in name:
            raise DataError(f"{folder / _STATE} lists a file without a name; save the data set again")
        _check_inside(folder / name, directory)
        _check_arrow(folder / name)


def _read_record(path: Path, directory: Path) -> dict[str, Any]:
    check_is_file(path)
    _check_inside(path, directory)
    said = read_json(path)
    if not isinstance(said, dict):
        raise DataError(f"{path} is not what save_to_disk writes; save the data set again")
    return said


def _check_arrow(path: Path) -> None:
    """Checks that nothing in an Arrow file points outside of it: it is read by its own offsets later."""
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
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is a damaged Arrow file ({reason}); copy or download it again") from error
