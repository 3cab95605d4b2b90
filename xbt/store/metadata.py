"""Metadata of a store's rows: columns of the shards' parquet files.

The ids of a store's rows: the user's own strings, each of them once.

Types of metadata columns: what can be read over several shards as one column, and what cannot.
"""

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
from xbt.store.layout import ID, ShardRecord, metadata_file

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


_HASHES_AT_ONCE = 2**27


def hashes_of(names: Iterable[str]) -> NDArray[np.int64]:
    """64-bit hashes of strings; they mean something within this process only."""
    return np.fromiter(map(hash, names), np.int64)


class Repetition(NamedTuple):
    """A string that has occurred before.

    Attributes:
        part: Which part it is in, and ...
        row: ... where in that part.
        name: The string.
        first: The part in which it occurred first.
    """

    part: int
    row: int
    name: str
    first: int


def repetitions(read: Callable[[], Iterable[Sequence[str]]], count: int) -> Iterator[Repetition]:
    """Finds strings that occur again, with 8 bytes a string (and at most 1 GiB) in memory.

    Args:
        read: Gives all strings, part by part; called once more for every 134 million of them, and once
            again when two hashes agree, to compare the strings themselves.
        count: How many strings there are.

    Yields:
        Every occurrence but the first, in order (within each 134 million).
    """
    passes = max(1, -(-count // _HASHES_AT_ONCE))
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


def first_repeated(read: Callable[[], Iterable[Sequence[str]]], count: int) -> str | None:
    """The first string that has occurred before, or ``None``; see :func:`repetitions`."""
    found = next(repetitions(read, count), None)
    return None if found is None else found.name


def repeated_ids(path: Path, records: Sequence[ShardRecord]) -> Iterator[Repetition]:
    """Ids that an earlier shard has; the parts are positions in ``records``."""
    return repetitions(lambda: shard_ids(path, records), sum(record.count for record in records))


def require_unique(path: Path, records: Sequence[ShardRecord]) -> None:
    """Refuses shards that share an id.

    Raises:
        StoreError: If an id occurs twice; the message names it and its shards.
    """
    found = next(repeated_ids(path, records), None)
    if found is not None:
        homes = f"{records[found.first].name} and {records[found.part].name}"
        raise StoreError(
            f"the id {found.name!r} is in the shards {homes} of {path}; ids must be unique over the store: "
            "give every row its own"
        )


def shard_ids(path: Path, records: Iterable[ShardRecord]) -> Iterator[list[str]]:
    """The ids of each shard."""
    for record in records:
        yield read_columns(path / metadata_file(record.name), [ID])[ID].to_pylist()


def choose_id_column(columns: MetadataColumns, counts: Sequence[int]) -> str | None:
    """The column of a clip-retrieval folder that can serve as ids: ``id``, else ``image_path``.

    Args:
        columns: The folder's metadata.
        counts: Rows of each shard.

    Returns:
        The column's name, or ``None`` if neither is there, without gaps and without repetition.
    """
    borders = list(pairwise(accumulate(counts, initial=0)))

    def read(name: str) -> Iterator[list[str | None]]:
        for start, stop in borders:
            yield columns.read_strings(name, start, stop)

    def is_usable(name: str) -> bool:
        if any(None in values for values in read(name)):
            return False
        return first_repeated(lambda: (list(map(str, values)) for values in read(name)), sum(counts)) is None

    there = columns.names()
    return next((name for name in (ID, "image_path") if name in there and is_usable(name)), None)


class KnownIds:
    """The ids a store has, as 8 bytes each, to refuse those that come again.

    Args:
        path: The store's directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sorted: dict[str, NDArray[np.int64]] = {}

    def refuse(self, ids: Sequence[str], shards: Sequence[ShardRecord]) -> None:
        """Refuses ids that one of the shards has.

        Raises:
            StoreError: If there is one; the message names the first.
        """
        new = hashes_of(ids)
        for shard in shards:
            known = self._sorted.get(shard.name)
            if known is None:
                known = np.sort(hashes_of(next(shard_ids(self._path, [shard]))))
                self._sorted[shard.name] = known
            if not len(known):
                continue
            places = np.searchsorted(known, new).clip(max=len(known) - 1)
            suspects = np.flatnonzero(known[places] == new)
            if len(suspects):
                there = set(next(shard_ids(self._path, [shard])))
                for row in suspects.tolist():
                    if ids[row] in there:
                        raise StoreError(
                            f"the id {ids[row]!r} is already in {self._path} (shard {shard.name!r}); ids "
                            "must be unique over the store: leave that row out or rename it"
                        )


class ColumnTypes:
    """The type that each column beside the ids has over some shards, and what does not go together with it.

    Only footers are read, unless a type has to be widened: then the values are looked at as well, since an
    integer beyond 2⁵³, say, is no float.
    """

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}
        self._files: dict[Path, None] = {}

    def add(self, files: Iterable[Path]) -> list[str]:
        """Takes in those files that are new.

        Args:
            files: Parquet files in the order of the shards.

        Returns:
            A sentence for each column that cannot be read together with that of the files before.

        Raises:
            StoreError: If a file cannot be read.
        """
        faults = []
        for path in files:
            if path in self._files:
                continue
            for name, kind in read_types(path).items():
                try:
                    self._types[name] = self._wider(name, kind, path)
                except pa.ArrowException:
                    faults.append(f"{path}: {self._mismatch(name, kind)}; write it again with one type")
            self._files[path] = None
        return faults

    def require(self, table: pa.Table, where: str) -> None:
        """Refuses columns that could never be read together with those of the files taken in.

        Args:
            table: What is to be written next.
            where: What to call it.

        Raises:
            StoreError: If there is one; the message names it.
        """
        for name in table.column_names:
            kind = table.schema.field(name).type
            try:
                self._wider(name, kind, table)
            except pa.ArrowException as error:
                raise StoreError(
                    f"{where}: {self._mismatch(name, kind)}; give a column one type over the whole store, or "
                    "take another name"
                ) from error

    def _wider(self, name: str, kind: pa.DataType, source: Path | pa.Table) -> pa.DataType:
        """The type that holds what is there and what comes; an Arrow error if there is none."""
        there = self._types.get(name, kind)
        if name == ID or there.equals(kind):  # ids are read as strings, shard by shard
            return there
        wider = _common(there, kind)
        if not wider.equals(kind):
            _require_exact(source, name, wider)
        if not wider.equals(there):
            for path in self._files:
                _require_exact(path, name, wider)
        return wider

    def _mismatch(self, name: str, kind: pa.DataType) -> str:
        return f"column {name!r} is {kind}, which does not go together with {self._types[name]} before it"


def _common(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    schemas = [pa.schema([("column", kind)]) for kind in (first, second)]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _require_exact(source: Path | pa.Table, name: str, kind: pa.DataType) -> None:
    table = source if isinstance(source, pa.Table) else read_columns(source, [name])
    if name in table.column_names:
        table[name].cast(kind)
