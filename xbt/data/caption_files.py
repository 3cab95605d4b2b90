"""Readers of caption files: one caption with its id at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xbt.data.caption_tables import TABLE_KINDS, read_table
from xbt.data.files import check_is_file, check_unpacked, kind_of, parse_json, read_json, read_text
from xbt.data.hf_datasets import check_column
from xbt.data.karpathy import is_karpathy, parse_karpathy
from xbt.errors import ConfigError, DataError

Row = tuple[str, str | None]
"""An id, and the caption if there is one."""
_USUAL_COLUMN = "caption"
_COLUMN = "name the column that holds text"


def read_rows(path: Path, column: str, split: str | None) -> Iterator[Row]:
    """Reads the captions of a file.

    Args:
        path: A .txt, .token, .csv, .tsv, .jsonl or .json file, each perhaps with .gz, or a .parquet file.
        column: Key or column of .jsonl, .parquet, .csv and .tsv that holds a caption or a list of captions.
        split: Split of a Karpathy file.

    Returns:
        An id and a caption at a time, blank ones included; errors may come up on the way.

    Raises:
        ConfigError: If a split is given for a file that has none.
        DataError: If the file cannot be read; the message names the line where there is one.
    """
    check_is_file(path)
    kind = kind_of(path)
    kinds = (".txt", *TABLE_KINDS, ".jsonl", ".json", ".parquet")
    if kind not in kinds or path.name.lower().endswith(".parquet.gz"):
        raise DataError(
            f"captions cannot be read from {path}: its suffix must be .txt, .token, .csv, .tsv, .jsonl or "
            ".json (each may be followed by .gz) or .parquet; for a Hub data set, write hf: before its name"
        )
    if kind == ".json":
        return _read_json(path, split)
    if split is not None:
        raise ConfigError(f"split {split!r} was given, but {path} has no splits; leave it out")
    if kind == ".parquet":
        return _read_parquet(path, column)
    return _read_jsonl(path, column) if kind == ".jsonl" else _read_lines(path, column)


def _read_lines(path: Path, column: str) -> Iterator[Row]:
    wanted = None if column == _USUAL_COLUMN else column
    text = read_text(path)
    table = read_table(text, path, caption_column=wanted)
    if table is None:
        for row, line in enumerate(_split_lines(text)):
            yield f"row-{row}", line
        return
    seen: Counter[str] = Counter()
    for row, each in enumerate(table):
        where = f"{path}, line {each.number}"
        value = unpacked(each.caption, where)
        if each.image is None:
            yield from named_rows(value, f"row-{row}", where)
            continue
        for caption in as_captions(value, where):
            yield f"{each.image}#{seen[each.image]}", caption
            seen[each.image] += 1


def _split_lines(text: str) -> list[str]:
    # Only line feeds end a line: a caption may contain other characters that str.splitlines splits at.
    return text.removesuffix("\n").split("\n")


def _read_jsonl(path: Path, column: str) -> Iterator[Row]:
    lines = _split_lines(read_text(path))
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, where, first_line=None)
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
        yield from named_rows(annotation["caption"], name, where, "fix the record")


def _read_parquet(path: Path, column: str) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            check_column(column, names, str(path))
            if names.count(column) > 1:
                raise DataError(f"{path} has two columns {column!r}; rename one and write it again")
            check_unpacked(path, _column_size(table.metadata, column))
            cells = table.read(columns=[column])[column]
            values = _values(cells, path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable parquet file ({reason}); write it again") from error
    for row, value in enumerate(values):
        yield from named_rows(value, f"row-{row}", f"{path}, row {row}")


def _column_size(metadata: Any, column: str) -> int:
    """Bytes of a column once it is unpacked, by the file's own account."""
    groups = (metadata.row_group(row) for row in range(metadata.num_row_groups))
    chunks = (group.column(place) for group in groups for place in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column
    )


def _values(cells: Any, path: Path) -> list[Any]:
    try:
        return cells.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        for row, cell in enumerate(cells):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {row}: not UTF-8; write the file again") from error
        raise


def unpacked(value: Any, where: str = "") -> Any:
    """Captions that a table without lists holds as JSON in a string, as a list; anything else as it is."""
    if isinstance(value, str) and value.startswith('["') and value.endswith('"]'):
        try:
            return parse_json(value, where)
        except DataError:
            return value
    return value


def named_rows(value: Any, name: str, where: str, fix: str = _COLUMN) -> Iterator[Row]:
    """The captions of one cell and their ids: the row's own, with ``#<position>`` if it holds a list."""
    told = as_captions(value, where, fix)
    if len(told) == 1 and not isinstance(value, list):
        yield name, told[0]
        return
    for position, caption in enumerate(told):
        yield f"{name}#{position}", caption


def as_captions(value: Any, where: str, fix: str = _COLUMN) -> list[str | None]:
    """Returns a cell as a list of captions.

    It may hold a string, a list of strings, or nothing; in place of a string or of the list, also Karpathy's
    structure with the string or strings under ``raw``.

    Args:
        value: The cell.
        where: Its place, for the error.
        fix: What to do about it, likewise.

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
                f"{where}: a {type(item).__name__} ({str(item)[:40]!r}) where a caption should be; {fix}"
            )
    return told


def _raw(value: Any) -> Any:
    return value["raw"] if isinstance(value, dict) and "raw" in value else value
