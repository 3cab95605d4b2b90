"""Metadata of a store's rows: columns of the shards' parquet files."""

from __future__ import annotations

from collections.abc import Sequence
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
        """Columns of the rows ``start`` … ``stop − 1``; rows of files without a column have null there."""
        parts, number = [], int(np.searchsorted(self._starts, start, side="right")) - 1
        while number < len(self._paths) and self._starts[number] < stop:
            first, count = int(self._starts[number]), self._counts[number]
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                parts.append(self._table(self._paths[number], columns, count).slice(low, high - low))
            number += 1
        table = pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({})
        for name in columns or []:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows))
        return table

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


def _unreadable(path: Path, error: Exception) -> StoreError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return StoreError(f"{path} is not a readable parquet file ({reason}); copy it again or write it anew")
