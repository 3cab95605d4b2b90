"""Metadata of a store's rows: columns of the shards' parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xbt.errors import StoreError

_INDEX = "__index_level_"  # what pandas adds to files it writes


def read_columns(path: Path, columns: Sequence[str] | None) -> pa.Table:
    """Reads some columns of a parquet file, or all; one that the file lacks is left out.

    Raises:
        StoreError: If the file cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            there = column_names(file)
            wanted = there if columns is None else [name for name in columns if name in there]
            return file.read(columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def inspect_parquet(path: Path) -> tuple[int, list[str]]:
    """Rows and columns of a parquet file, from its footer.

    Raises:
        StoreError: If the file cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            return int(file.metadata.num_rows), column_names(file)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def read_types(path: Path) -> dict[str, pa.DataType]:
    """The type of each column of a parquet file, from its footer; none of a file without rows.

    Raises:
        StoreError: If the file cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            # A type says nothing without a value: pandas makes up one for columns that are empty.
            names = column_names(file) if file.metadata.num_rows else []
            return {name: file.schema_arrow.field(name).type for name in names}
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def column_names(file: Any) -> list[str]:
    """The columns of an open parquet file, without those in which pandas keeps its index."""
    return [name for name in file.schema_arrow.names if not name.startswith(_INDEX)]


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
        for _, table in self._parts([column], start, stop):
            there = table[column].to_pylist() if column in table.column_names else [None] * table.num_rows
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
            table = read_columns(path, columns)
            if table.num_columns and table.num_rows != count:
                raise StoreError(
                    f"{path} has {table.num_rows} rows, but {count} vectors stand beside it; copy both again"
                )
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
                    f"shards before it ({_first_line(error)}); read other columns, or write it anew with one "
                    "type"
                )
            above = both
    raise AssertionError("every column can be joined alone, so all can")


def _unreadable(path: Path, error: Exception) -> StoreError:
    reason = _first_line(error)
    return StoreError(f"{path} is not a readable parquet file ({reason}); copy it again or write it anew")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
