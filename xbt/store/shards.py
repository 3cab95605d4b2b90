"""One shard: checked rows, their ids and metadata, written durably."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from xbt.errors import DataError, StoreError
from xbt.files import Sink, write_whole
from xbt.store.layout import (
    FOLDERS,
    ID,
    METADATA,
    Header,
    ShardRecord,
    metadata_file,
    shard_files,
    vectors_file,
)
from xbt.vectors import Vectors, as_vectors, lengths_of, not_unit


def remove_strays(path: Path, modality: str, records: Iterable[ShardRecord]) -> None:
    """Removes shards that no record vouches for, and nothing that is not named as a shard's file.

    Other readers of this layout go by what lies in the folders, not by the manifest.
    """
    ours = {path / name for record in records for name in record.files}
    for folder in (FOLDERS[modality], METADATA):
        for file in shard_files(path, folder).values():
            if file not in ours:
                file.unlink(missing_ok=True)


Metadata = Any
"""Columns beside the ids: one value a row each."""

_ROWS_AT_ONCE = 65_536


def write_shard(
    path: Path,
    header: Header,
    name: str,
    vectors: Vectors,
    ids: Sequence[str],
    metadata: Metadata | None = None,
    extra: Mapping[str, Any] | None = None,
) -> ShardRecord:
    """Checks and writes a shard's files; it belongs to the store once a record of it is written.

    Args:
        path: The store's directory.
        header: What the store is.
        name: The shard's name.
        vectors: (n, dim) float vectors; n may be 0.
        ids: n strings, without repetition.
        metadata: Columns of n values each, beside the ids.
        extra: JSON to keep beside the shard.

    Returns:
        The record.

    Raises:
        DataError: If a value is NaN or infinite.
        SpaceMismatchError: If the dimension is another.
        StoreError: If ids or metadata do not fit, or the disk is full.
    """
    where = f"shard {name!r} of {path}"
    rows = as_rows(vectors, header, where)
    table = as_table(ids, metadata, len(rows), where)
    data = _parquet(table, where)
    vectors_path, metadata_path = vectors_file(header.modality, name), metadata_file(name)
    files = {
        vectors_path: write_whole(
            path / vectors_path, rows.nbytes + 128, lambda sink: _write_npy(sink, rows)
        ),
        metadata_path: write_whole(path / metadata_path, data.size, lambda sink: sink.write(data)),
    }
    return ShardRecord(name, len(rows), files, dict(extra or {}))


def as_rows(vectors: Vectors, header: Header, where: str) -> NDArray[np.floating]:
    """The vectors as they are written to disk.

    Raises:
        DataError: If they hold NaN or infinity, values too large for float16, or rows that are not of length
            1 although the space says so.
        SpaceMismatchError: If the dimension is another.
    """
    dtype = np.dtype(header.dtype).newbyteorder("<")
    if len(vectors) == 0:
        return np.zeros((0, header.dim), dtype)
    tensor = as_vectors(vectors, f"what is to be written to {where}", header.dim)
    checked = tensor.numpy()
    with np.errstate(over="ignore"):
        rows = checked.astype(dtype, copy=False)
    if not np.isfinite(rows).all():
        raise DataError(
            f"{where}: values up to {np.abs(checked).max():.3g} do not fit into {header.dtype}; make a store "
            "of dtype float32, or give unit vectors"
        )
    off = not_unit(lengths_of(tensor))
    if header.unit and bool(off.any()):
        row = int(torch.nonzero(off)[0])
        raise DataError(
            f"{where}: the rows of {header.space} have length 1, but row {row} has "
            f"{float(lengths_of(tensor[row])):.3g}; normalise the vectors, or give the store a space of "
            "normalisation 'none'"
        )
    return np.ascontiguousarray(rows)


def as_table(ids: Sequence[str], metadata: Metadata | None, count: int, where: str) -> pa.Table:
    """The shard's metadata: the column id, then the others.

    Raises:
        StoreError: If an id is not a string or is repeated, or a column has another length or no Arrow type.
    """
    names = as_ids(ids, where)
    if len(names) != count:
        raise StoreError(f"{where}: there are {count} vectors but {len(names)} ids; give one id a vector")
    seen: set[str] = set()
    for row, name in enumerate(names):
        if not isinstance(name, str):
            raise StoreError(
                f"{where}: the id of row {row} is {name!r}, a {type(name).__name__}; ids are strings"
            )
        if name in seen:
            raise StoreError(f"{where}: the id {name!r} is there twice; ids must be unique")
        seen.add(name)
    columns = {ID: _column(names, ID, where, pa.string())}
    for column in _names(metadata, where):
        if column == ID:
            raise StoreError(f"{where}: the metadata has a column 'id', which is the ids' own; rename it")
        assert metadata is not None
        values = _column(metadata[column], column, where)
        if len(values) != count:
            raise StoreError(f"{where}: column {column!r} has {len(values)} values for {count} rows")
        columns[column] = values
    return pa.table(columns)


def as_ids(ids: Iterable[str], where: str) -> list[str]:
    """The ids as a list, whatever they come in; a generator is read once.

    Raises:
        StoreError: If they are no list of anything.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise StoreError(f"{where}: the ids are {ids!r:.40}; give a list of strings, one a vector")
    return list(ids)


def _names(metadata: Metadata | None, where: str) -> list[str]:
    if metadata is None:
        return []
    names = metadata.column_names if isinstance(metadata, pa.Table) else metadata
    if isinstance(names, str | bytes) or not (
        isinstance(names, Iterable) and hasattr(metadata, "__getitem__")
    ):
        raise StoreError(f"{where}: the metadata are a {type(metadata).__name__}; give columns by name")
    names = list(names)
    for name in names:
        if not isinstance(name, str) or names.count(name) > 1:
            raise StoreError(
                f"{where}: {name!r:.40} cannot name a column; give each column a string of its own"
            )
    return names


def _column(values: Any, name: str, where: str, kind: Any = None) -> Any:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    try:
        return pa.array(values, type=kind)
    except (pa.ArrowException, UnicodeEncodeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"{where}: column {name!r} cannot be stored ({reason}); make it plain values"
        ) from error


def _parquet(table: pa.Table, where: str) -> Any:
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(table, sink)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise StoreError(
            f"{where}: the metadata cannot be stored ({reason}); make it plain values"
        ) from error
    return sink.getvalue()


def _write_npy(sink: Sink, rows: NDArray[np.floating]) -> None:
    described = np.lib.format.header_data_from_array_1_0(rows)
    np.lib.format.write_array_header_1_0(sink, described)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        sink.write(memoryview(rows[start : start + _ROWS_AT_ONCE].data).cast("B"))
