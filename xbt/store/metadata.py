"""Metadata of a store's rows: columns of the shards' parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xbt.errors import StoreError
from xbt.store.layout import refuse_irregular

_INDEX = "__index_level_"  # what pandas adds to files it writes
_BROKEN = (pa.ArrowException, ValueError, OverflowError, TypeError, KeyError, MemoryError)
"""Errors that damaged files and odd values raise; that of broken UTF-8 is a ValueError."""


def read_columns(path: Path, columns: Sequence[str] | None, rows: int | None = None) -> pa.Table:
    """Reads some columns of a parquet file, or all; one that the file lacks is left out.

    Args:
        path: The file.
        columns: Names; ``None`` takes all.
        rows: How many rows there must be, which is checked before anything is read.

    Raises:
        StoreError: If the file cannot be read, has other rows, or a value is damaged.
    """
    with _opened(path) as file:
        if rows is not None and file.metadata.num_rows != rows:
            raise StoreError(
                f"{path} has {file.metadata.num_rows} rows, but {rows} vectors are beside it; copy both again"
            )
        there = column_names(file, path)
        table = file.read(columns=there if columns is None else [name for name in columns if name in there])
        for name in table.column_names:
            _require_sound(table[name], name, path)
        return table


def inspect_parquet(path: Path) -> tuple[int, list[str]]:
    """Rows and columns of a parquet file, from its footer.

    Raises:
        StoreError: If the file cannot be read.
    """
    with _opened(path) as file:
        return int(file.metadata.num_rows), column_names(file, path)


def read_types(path: Path) -> dict[str, pa.DataType]:
    """The type of each column of a parquet file, from its footer; none of a file without rows.

    Raises:
        StoreError: If the file cannot be read.
    """
    with _opened(path) as file:
        # A type says nothing without a value: pandas makes up one for columns that are empty.
        names = column_names(file, path) if file.metadata.num_rows else []
        return {name: file.schema_arrow.field(name).type for name in names}


def column_names(file: Any, path: Path) -> list[str]:
    """The columns of an open parquet file, without those in which pandas keeps its index.

    Raises:
        StoreError: If two have one name.
    """
    names = list(file.schema_arrow.names)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise StoreError(f"{path} has two columns of the name {twice!r}; write it again with one of them")
    return [name for name in names if not name.startswith(_INDEX)]


def plain_values(values: Any, what: str) -> list[Any]:
    """The values of a column as Python's.

    Args:
        values: An Arrow column.
        what: What to call it in an error.

    Raises:
        StoreError: If a value has no such form, such as a date beyond the year 9999; the message names its
            row.
    """
    try:
        plain: list[Any] = values.to_pylist()
    except _BROKEN as error:
        row = _first(values, lambda part: part.to_pylist())
        raise StoreError(
            f"{what}: the value of row {row} cannot be read ({_first_line(error)}); write it again, or leave "
            "that column out"
        ) from error
    return plain


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open parquet file; what the library has against it or its content becomes one sentence."""
    try:
        refuse_irregular(path, path.parent.parent)
        with pq.ParquetFile(path) as file:
            yield file
    except StoreError:
        raise
    except (*_BROKEN, OSError) as error:
        raise StoreError(
            f"{path} is not a readable parquet file ({_first_line(error)}); copy it again or write it again"
        ) from error


def _require_sound(values: Any, name: str, path: Path) -> None:
    """Refuses a column with text that is not UTF-8, or offsets that lead nowhere."""
    try:
        values.validate(full=True)
    except pa.ArrowException as error:
        row = _first(values, lambda part: part.validate(full=True))
        raise StoreError(
            f"{path}: the value of row {row} in column {name!r} is damaged ({_first_line(error)}); copy the "
            "file again or write it again"
        ) from error


def _first(values: Any, check: Callable[[Any], object]) -> int:
    """The first value that a check refuses, by bisection: all before it are accepted together."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            check(values.slice(low, middle - low))
        except _BROKEN:
            high = middle
        else:
            low = middle
    return low


class MetadataColumns:
    """Columns over several parquet files as if they were one.

    The last two readings of a file are kept, so that ids and captions can be read on side by side.

    Args:
        paths: The files in order.
        counts: Their rows.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        self._paths, self._counts = list(paths), list(counts)
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._names: list[str] | None = None
        self._kept: dict[Any, pa.Table] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": {}}

    def names(self) -> list[str]:
        """Columns that at least one file has, in order of appearance; the files are looked at once."""
        if self._names is None:
            self._names = list(
                dict.fromkeys(name for path in self._paths for name in inspect_parquet(path)[1])
            )
        return self._names

    def read(self, columns: Sequence[str] | None, start: int, stop: int) -> pa.Table:
        """Columns of the rows ``start`` … ``stop − 1``; rows of files without a column have null there.

        Raises:
            StoreError: If a file cannot be read, or a column has types that do not go together.
        """
        parts = list(self._parts(columns, start, stop))
        table = _joined(parts) if parts else pa.table({})
        for name in columns or []:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows))
        return table

    def read_strings(self, column: str, start: int, stop: int) -> list[str | None]:
        """One column's values as strings, each file's by its own type: 7 is "7" whatever other files hold."""
        values: list[str | None] = []
        for path, table in self._parts([column], start, stop):
            if column in table.column_names:
                there = plain_values(table[column], f"column {column!r} of {path}")
            else:
                there = [None] * table.num_rows
            values += [None if value is None else str(value) for value in there]
        return values

    def _parts(self, columns: Sequence[str] | None, start: int, stop: int) -> Iterator[tuple[Path, pa.Table]]:
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while number < len(self._paths) and self._starts[number] < stop:
            first, count = int(self._starts[number]), self._counts[number]
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                path = self._paths[number]
                yield path, self._table(path, columns, count).slice(low, high - low)
            number += 1

    def _table(self, path: Path, columns: Sequence[str] | None, count: int) -> pa.Table:
        key = path, None if columns is None else tuple(columns)
        if key not in self._kept:
            table = read_columns(path, columns, count)
            if not table.num_columns:
                table = pa.table({name: pa.nulls(count) for name in columns or []})
            self._kept = {**dict(list(self._kept.items())[-1:]), key: table}
        return self._kept[key]


def _joined(parts: Sequence[tuple[Path, pa.Table]]) -> pa.Table:
    """Puts the tables of files below each other."""
    try:
        return pa.concat_tables([table for _, table in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise StoreError(_odd_column(parts)) from error


def _odd_column(parts: Sequence[tuple[Path, pa.Table]]) -> str:
    """Which column of which file cannot be put below those of the files before it."""
    for name in dict.fromkeys(name for _, table in parts for name in table.column_names):
        above: pa.Table | None = None
        for path, table in parts:
            if name not in table.column_names:
                continue
            own = table.select([name])
            try:
                both = own if above is None else pa.concat_tables([above, own], promote_options="permissive")
            except pa.ArrowException as error:
                assert above is not None
                kinds = [each.schema.field(name).type for each in (own, above)]
                return (
                    f"column {name!r} of {path} is {kinds[0]} and cannot be joined to the {kinds[1]} of the "
                    f"shards before it ({_first_line(error)}); read other columns, or write it again "
                    "with one type"
                )
            above = both
    raise AssertionError("every column can be joined alone, so all can")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
