"""Metadata of a store's rows in parquet files: columns, unique ids, and column types over several shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xbt.errors import StoreError
from xbt.files import refuse_irregular
from xbt.store.layout import ID, ShardRecord, file_spans, metadata_file

_PANDAS_INDEX = "__index_level_"
_READ_ERRORS = (pa.ArrowException, ValueError, OverflowError, TypeError, KeyError, MemoryError)
"""Errors of damaged files and unusual values; broken UTF-8 raises a ValueError."""
_HASHES_PER_PASS = 2**27


def read_columns(path: Path, columns: Sequence[str] | None, rows: int | None = None) -> pa.Table:
    """Read columns of a parquet file, all by default; missing columns are left out.

    ``rows`` is the required number of rows, checked before the values are read.
    """
    with _opened(path) as (file, names):
        if rows is not None and file.metadata.num_rows != rows:
            raise StoreError(
                f"{path} has {file.metadata.num_rows} rows, but its shard has {rows} vectors; copy both again"
            )
        table = file.read(columns=names if columns is None else [name for name in columns if name in names])
        for name in table.column_names:
            _require_valid(table[name], name, path)
        return table


def inspect_parquet(path: Path) -> tuple[int, dict[str, pa.DataType]]:
    """Number of rows and types of the columns of a parquet file, from its footer."""
    with _opened(path) as (file, names):
        return int(file.metadata.num_rows), {name: file.schema_arrow.field(name).type for name in names}


def read_types(path: Path) -> dict[str, pa.DataType]:
    """Type of each column of a parquet file, from its footer; empty for a file without rows."""
    # Without values a type means nothing: pandas invents one for empty columns.
    count, types = inspect_parquet(path)
    return types if count else {}


def plain_values(values: Any, what: str) -> list[Any]:
    """Convert an Arrow column to Python values.

    Some have none, such as a date after the year 9999; the message names the row and ``what``.
    """
    try:
        plain: list[Any] = values.to_pylist()
    except _READ_ERRORS as error:
        row = _first_refused(values, lambda part: part.to_pylist())
        raise StoreError(
            f"{what}: the value of row {row} cannot be read ({_first_line(error)}); write it again, or leave "
            "that column out"
        ) from error
    return plain


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, list[str]]]:
    """A parquet file and its columns without pandas' index; the library's errors become StoreErrors."""
    try:
        refuse_irregular(path, path.parent.parent)
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            if len(set(names)) < len(names):
                repeated = next(name for name in names if names.count(name) > 1)
                raise StoreError(
                    f"{path} has two columns of the name {repeated!r}; write it again with one of them"
                )
            yield file, [name for name in names if not name.startswith(_PANDAS_INDEX)]
    except StoreError:
        raise
    except (*_READ_ERRORS, OSError) as error:
        raise StoreError(
            f"{path} is not a readable parquet file ({_first_line(error)}); copy it again or write it again"
        ) from error


def _require_valid(values: Any, name: str, path: Path) -> None:
    """Refuse a column with text that is not UTF-8, or with offsets out of range."""
    try:
        values.validate(full=True)
    except pa.ArrowException as error:
        row = _first_refused(values, lambda part: part.validate(full=True))
        raise StoreError(
            f"{path}: the value of row {row} in column {name!r} is damaged ({_first_line(error)}); copy the "
            "file again or write it again"
        ) from error


def _first_refused(values: Any, check: Callable[[Any], object]) -> int:
    """Position of the first value that a check refuses, by bisection."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            check(values.slice(low, middle - low))
        except _READ_ERRORS:
            high = middle
        else:
            low = middle
    return low


class MetadataColumns:
    """Columns of several parquet files, read as one table.

    The last two tables are cached, so that ids and captions can be read in parallel.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        self._paths, self._counts = list(paths), list(counts)
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._names: list[str] | None = None
        self._cache: dict[Any, pa.Table] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": {}}

    def names(self) -> list[str]:
        """Columns that at least one file has, in order of appearance; the files are inspected once."""
        if self._names is None:
            names = (name for path in self._paths for name in inspect_parquet(path)[1])
            self._names = list(dict.fromkeys(names))
        return self._names

    def read(self, columns: Sequence[str] | None, start: int, stop: int) -> pa.Table:
        """Columns of the rows ``start`` … ``stop − 1``; null for rows of files without a column."""
        parts = list(self._parts(columns, start, stop))
        tables = [table for _, table in parts] or [pa.table({})]
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise StoreError(_describe_mismatch(parts)) from error
        for name in columns or []:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows))
        return table

    def read_strings(self, column: str, start: int, stop: int) -> list[str | None]:
        """Values of a column as strings, by each file's type: 7 is "7" even beside a file of floats."""
        strings: list[str | None] = []
        for path, table in self._parts([column], start, stop):
            if column in table.column_names:
                values = plain_values(table[column], f"column {column!r} of {path}")
            else:
                values = [None] * table.num_rows
            strings += [None if value is None else str(value) for value in values]
        return strings

    def _parts(self, columns: Sequence[str] | None, start: int, stop: int) -> Iterator[tuple[Path, pa.Table]]:
        for number, first, last in file_spans(self._starts, start, stop):
            table = self._table(self._paths[number], columns, self._counts[number])
            yield self._paths[number], table.slice(first, last - first)

    def _table(self, path: Path, columns: Sequence[str] | None, count: int) -> pa.Table:
        key = path, None if columns is None else tuple(columns)
        if key not in self._cache:
            table = read_columns(path, columns, count)
            if not table.num_columns:
                table = pa.table({name: pa.nulls(count) for name in columns or []})
            self._cache = {**dict(list(self._cache.items())[-1:]), key: table}
        return self._cache[key]


def _describe_mismatch(parts: Sequence[tuple[Path, pa.Table]]) -> str:
    """Describe the first column whose types cannot be combined, with the file where it differs."""
    for name in dict.fromkeys(name for _, table in parts for name in table.column_names):
        columns = [(path, table.select([name])) for path, table in parts if name in table.column_names]
        joined = columns[0][1]
        for path, column in columns[1:]:
            try:
                joined = pa.concat_tables([joined, column], promote_options="permissive")
            except pa.ArrowException as error:
                types = [part.schema.field(name).type for part in (column, joined)]
                return (
                    f"column {name!r} of {path} is {types[0]} and cannot be joined to the {types[1]} of the "
                    f"shards before it ({_first_line(error)}); read other columns, or write it again "
                    "with one type"
                )
    raise AssertionError("every column can be joined alone, so all can")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def hashes_of(names: Iterable[str]) -> NDArray[np.int64]:
    """64-bit hashes of strings, valid only in this process."""
    return np.fromiter(map(hash, names), np.int64)


class Repetition(NamedTuple):
    """A repeated string: part and row of this occurrence, the string, and the part of its first one."""

    part: int
    row: int
    name: str
    first: int


def repetitions(read: Callable[[], Iterable[Sequence[str]]], count: int) -> Iterator[Repetition]:
    """Find every occurrence but the first of ``count`` strings, in order within each 134 million of them.

    This takes 8 bytes of memory per string, and at most 1 GiB. ``read`` yields all strings, part by part. It
    is called once per 134 million strings, and once more if two hashes are equal, to compare the strings.
    """
    passes = max(1, -(-count // _HASHES_PER_PASS))
    for number in range(passes):
        parts = [np.zeros(0, np.int64)]
        for names in read():
            hashes = hashes_of(names)
            parts.append(hashes if passes == 1 else hashes[hashes % passes == number])
        hashes = np.concatenate(parts)
        del parts
        hashes.sort()
        repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        seen: dict[str, int] = {}
        for part, names in enumerate(read() if repeated else ()):
            for row, name in enumerate(names):
                if hash(name) not in repeated:
                    continue
                if name in seen:
                    yield Repetition(part, row, name, seen[name])
                else:
                    seen[name] = part


def repeated_ids(path: Path, records: Sequence[ShardRecord]) -> Iterator[Repetition]:
    """Ids that occur in an earlier shard or row; the parts are positions in ``records``."""
    count = sum(record.count for record in records)
    return repetitions(lambda: (read_ids(path, record) for record in records), count)


def require_unique(path: Path, records: Sequence[ShardRecord]) -> None:
    """Refuse shards that share an id."""
    repetition = next(repeated_ids(path, records), None)
    if repetition is not None:
        shards = f"{records[repetition.first].name} and {records[repetition.part].name}"
        raise StoreError(
            f"the id {repetition.name!r} is in the shards {shards} of {path}; ids must be unique over the "
            "store: give every row its own"
        )


def read_ids(path: Path, record: ShardRecord) -> list[str]:
    """Read the ids of a shard."""
    ids: list[str] = read_columns(path / metadata_file(record.name), [ID])[ID].to_pylist()
    return ids


def choose_id_column(columns: MetadataColumns, counts: Sequence[int]) -> str | None:
    """Choose the ids of a clip-retrieval folder: ``id``, else ``image_path``.

    ``None`` if both have gaps or repetitions.
    """
    ranges = list(pairwise(accumulate(counts, initial=0)))

    def read(name: str) -> Iterator[list[str | None]]:
        for start, stop in ranges:
            yield columns.read_strings(name, start, stop)

    def is_usable(name: str) -> bool:
        if any(None in values for values in read(name)):
            return False
        repeated = repetitions(lambda: (list(map(str, values)) for values in read(name)), sum(counts))
        return next(repeated, None) is None

    names = columns.names()
    return next((name for name in (ID, "image_path") if name in names and is_usable(name)), None)


class KnownIds:
    """Hashes of the ids of a store, 8 bytes each, to refuse ids that exist already."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sorted_hashes: dict[str, NDArray[np.int64]] = {}

    def refuse(self, ids: Sequence[str], shards: Sequence[ShardRecord]) -> None:
        """Refuse ids that one of the shards contains."""
        new = hashes_of(ids)
        for shard in shards:
            old = self._sorted_hashes.get(shard.name)
            if old is None:
                old = np.sort(hashes_of(read_ids(self._path, shard)))
                self._sorted_hashes[shard.name] = old
            if not len(old):
                continue
            positions = np.searchsorted(old, new).clip(max=len(old) - 1)
            suspects = np.flatnonzero(old[positions] == new)
            if len(suspects):
                old_ids = set(read_ids(self._path, shard))
                for row in suspects.tolist():
                    if ids[row] in old_ids:
                        raise StoreError(
                            f"the id {ids[row]!r} is already in {self._path} (shard {shard.name!r}); ids "
                            "must be unique over the store: leave that row out or rename it"
                        )


class ColumnTypes:
    """Common type of each metadata column over the shards.

    Only footers are read, unless a type has to be widened. Then the values are read too: for example, an
    integer beyond 2⁵³ is not exact as a float.
    """

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}
        self._files: dict[Path, None] = {}

    def add(self, files: Iterable[Path]) -> list[str]:
        """Add new parquet files in the order of the shards; each incompatible column gives a sentence."""
        faults = []
        for path in files:
            if path in self._files:
                continue
            for name, dtype in read_types(path).items():
                try:
                    self._types[name] = self._widened(name, dtype, path)
                except pa.ArrowException:
                    faults.append(f"{path}: {self._mismatch(name, dtype)}; write it again with one type")
            self._files[path] = None
        return faults

    def require(self, table: pa.Table, where: str) -> None:
        """Refuse columns of the table ``where`` with types incompatible with the files added so far."""
        for name in table.column_names:
            dtype = table.schema.field(name).type
            try:
                self._widened(name, dtype, table)
            except pa.ArrowException as error:
                raise StoreError(
                    f"{where}: {self._mismatch(name, dtype)}; give a column one type over the store, or use "
                    "another name"
                ) from error

    def _widened(self, name: str, dtype: pa.DataType, source: Path | pa.Table) -> pa.DataType:
        """Type that holds the old and the new values of a column; an Arrow error if there is none."""
        old = self._types.get(name, dtype)
        if name == ID or old.equals(dtype):  # ids are read as strings, shard by shard
            return old
        schemas = [pa.schema([("column", kind)]) for kind in (old, dtype)]
        wider = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        if not wider.equals(dtype):
            _require_exact(source, name, wider)
        if not wider.equals(old):
            for path in self._files:
                _require_exact(path, name, wider)
        return wider

    def _mismatch(self, name: str, dtype: pa.DataType) -> str:
        return f"column {name!r} is {dtype}, which does not go together with {self._types[name]} before it"


def _require_exact(source: Path | pa.Table, name: str, dtype: pa.DataType) -> None:
    table = source if isinstance(source, pa.Table) else read_columns(source, [name])
    if name in table.column_names:
        table[name].cast(dtype)
