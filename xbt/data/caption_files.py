"""Readers of caption files: one caption with its id at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xbt.data.files import check_is_file, kind_of, read_json, read_text
from xbt.data.hf_datasets import check_column
from xbt.data.karpathy import is_karpathy, parse_karpathy
from xbt.errors import ConfigError, DataError

Row = tuple[str, str | None]
"""An id, and the caption if there is one."""
_COLUMN = "name the column that holds text"


def read_rows(path: Path, column: str, split: str | None) -> Iterator[Row]:
    """Reads the captions of a file.

    Args:
        path: A .txt, .jsonl or .json file, each perhaps with .gz, or a .parquet file.
        column: Key or column of .jsonl and .parquet that holds a caption or a list of captions.
        split: Split of a Karpathy file.

    Returns:
        An id and a caption at a time, blank ones included; errors may come up on the way.

    Raises:
        ConfigError: If a split is given for a file that has none.
        DataError: If the file cannot be read; the message names the line where there is one.
    """
    check_is_file(path)
    kind = kind_of(path)
    if kind not in (".txt", ".jsonl", ".json", ".parquet") or path.name.lower().endswith(".parquet.gz"):
        raise DataError(
            f"captions cannot be read from {path}: its suffix must be .txt, .jsonl or .json (each may be "
            "followed by .gz) or .parquet; for a Hub data set, write hf: before its name"
        )
    if kind == ".json":
        return _read_json(path, split)
    if split is not None:
        raise ConfigError(f"split {split!r} was given, but {path} has no splits; leave it out")
    if kind == ".parquet":
        return _read_parquet(path, column)
    # Only line feeds end a line: a caption may contain other characters that str.splitlines splits at.
    lines = read_text(path).removesuffix("\n").split("\n")
    if kind == ".jsonl":
        return _parse_jsonl(lines, path, column)
    return ((f"row-{row}", line) for row, line in enumerate(lines))


def _parse_jsonl(lines: list[str], path: Path, column: str) -> Iterator[Row]:
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON; mend or remove the line") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object; write one object with the key {column!r} a line")
        check_column(column, list(row), where)
        yield from named_rows(row[column], f"row-{count}", f"{where}, column {column!r}")
        count += 1


def _read_json(path: Path, split: str | None) -> Iterator[Row]:
    content = read_json(path)
    if is_karpathy(content):
        for image in parse_karpathy(content, path, split):
            for position, told in enumerate(image.sentences):
                yield f"{image.name}#{position}", told
        return
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(
            f"{path} is neither a Karpathy split file (key 'images') nor official COCO captions (key "
            "'annotations'); convert it to .jsonl"
        )
    if split is not None:
        raise ConfigError(f"split {split!r} was given, but {path} has no splits; leave it out")
    for position, annotation in enumerate(annotations):
        where = f"{path}: record {position} of 'annotations'"
        if not isinstance(annotation, dict) or "caption" not in annotation:
            raise DataError(f"{where} lacks the key 'caption'; give the captions_*.json file")
        name = str(annotation.get("id", f"row-{position}"))
        yield from named_rows(annotation["caption"], name, where, "mend the record")


def _read_parquet(path: Path, column: str) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as table:
            check_column(column, table.schema_arrow.names, str(path))
            values = table.read(columns=[column])[column].to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable parquet file ({reason}); write it again") from error
    for row, value in enumerate(values):
        yield from named_rows(value, f"row-{row}", f"{path}, row {row}")


def named_rows(value: Any, name: str, where: str, mend: str = _COLUMN) -> Iterator[Row]:
    """The captions of one cell and their ids: the row's own, with ``#<position>`` if it holds a list."""
    told = as_captions(value, where, mend)
    if len(told) == 1 and not isinstance(value, list):
        yield name, told[0]
        return
    for position, caption in enumerate(told):
        yield f"{name}#{position}", caption


def as_captions(value: Any, where: str, mend: str = _COLUMN) -> list[str | None]:
    """Returns a cell as a list of captions.

    It may hold a string, a list of strings, or nothing; in place of a string or of the list, also Karpathy's
    structure with the string or strings under ``raw``.

    Args:
        value: The cell.
        where: Its place, for the error.
        mend: What to do about it, likewise.

    Returns:
        Its captions; None where the data has none.

    Raises:
        DataError: If it holds something else.
    """
    raw = _raw(value)
    told = [_raw(item) for item in raw] if isinstance(raw, list) else [raw]
    for item in told:
        if item is not None and not isinstance(item, str):
            raise DataError(
                f"{where}: a {type(item).__name__} ({str(item)[:40]!r}) where a caption should be; {mend}"
            )
    return told


def _raw(value: Any) -> Any:
    return value["raw"] if isinstance(value, dict) and "raw" in value else value
