"""One shard: checked rows, their ids and metadata, written durably."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from xbt.errors import DataError, StoreError
from xbt.files import Sink, write_whole
from xbt.store import layout
from xbt.store.layout import Header, ShardRecord
from xbt.vectors import Vectors, as_vectors, lengths_of, not_unit

Metadata = Any
"""Metadata columns beside the ids, with one value per row."""

_ROWS_PER_WRITE = 65_536


def remove_strays(path: Path, modality: str, records: Iterable[ShardRecord]) -> None:
    """Remove files of shards without a record; files with other names stay.

    Other readers of this layout list the folders and ignore the manifest.
    """
    recorded = {path / name for record in records for name in record.files}
    for folder in (layout.FOLDERS[modality], layout.METADATA):
        for file in layout.shard_files(path, folder).values():
            if file not in recorded:
                file.unlink(missing_ok=True)


def write_shard(
    path: Path,
    header: Header,
    name: str,
    vectors: Vectors,
    ids: Sequence[str],
    metadata: Metadata | None = None,
    extra: Mapping[str, Any] | None = None,
) -> ShardRecord:
    """Check and write the files of a shard; the caller adds it to the store by writing its record.

    See :meth:`xbt.store.StoreBuilder.write`.
    """
    where = f"shard {name!r} of {path}"
    rows = as_rows(vectors, header, where)
    table = as_table(ids, metadata, len(rows), where)
    buffer = pa.BufferOutputStream()
    with _storing(f"{where}: the metadata"):
        pq.write_table(table, buffer)
    data = buffer.getvalue()
    vectors_path, metadata_path = layout.vectors_file(header.modality, name), layout.metadata_file(name)
    files = {
        vectors_path: write_whole(
            path / vectors_path, rows.nbytes + 128, lambda sink: _write_npy(sink, rows)
        ),
        metadata_path: write_whole(path / metadata_path, data.size, lambda sink: sink.write(data)),
    }
    return ShardRecord(name, len(rows), files, dict(extra or {}))


def as_rows(vectors: Vectors, header: Header, where: str) -> NDArray[np.floating]:
    """Check vectors and convert them to the dtype on disk."""
    if len(vectors) == 0:
        return np.zeros((0, header.dim), header.numpy_dtype)
    tensor = as_vectors(vectors, f"what is to be written to {where}", header.dim)
    checked = tensor.numpy()
    with np.errstate(over="ignore"):
        rows = checked.astype(header.numpy_dtype, copy=False)
    if not np.isfinite(rows).all():
        raise DataError(
            f"{where}: values up to {np.abs(checked).max():.3g} do not fit into {header.dtype}; make a store "
            "of dtype float32, or give unit vectors"
        )
    wrong_length = not_unit(lengths_of(tensor))
    if header.unit and bool(wrong_length.any()):
        row = int(torch.nonzero(wrong_length)[0])
        raise DataError(
            f"{where}: the rows of {header.space} have length 1, but row {row} has "
            f"{float(lengths_of(tensor[row])):.3g}; normalise the vectors, or give the store a space of "
            "normalisation 'none'"
        )
    return np.ascontiguousarray(rows)


def as_table(ids: Sequence[str], metadata: Metadata | None, count: int, where: str) -> pa.Table:
    """Build a shard's metadata table: the column id, then the others."""
    names = as_ids(ids, where)
    if len(names) != count:
        raise StoreError(f"{where}: there are {count} vectors but {len(names)} ids; give one id per vector")
    seen: set[str] = set()
    for row, name in enumerate(names):
        if not isinstance(name, str):
            raise StoreError(
                f"{where}: the id of row {row} is {name!r}, a {type(name).__name__}; ids are strings"
            )
        if name in seen:
            raise StoreError(f"{where}: the id {name!r} is there twice; ids must be unique")
        seen.add(name)
    columns = {layout.ID: _column(names, layout.ID, where, pa.string())}
    for column in _names(metadata, where):
        if column == layout.ID:
            raise StoreError(f"{where}: the metadata has a column 'id', which is reserved; rename it")
        assert metadata is not None
        values = _column(metadata[column], column, where)
        if len(values) != count:
            raise StoreError(f"{where}: column {column!r} has {len(values)} values for {count} rows")
        columns[column] = values
    return pa.table(columns)


def as_ids(ids: Iterable[str], where: str) -> list[str]:
    """Convert ids to a list; a generator is read once."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise StoreError(f"{where}: the ids are {ids!r:.40}; give a list of strings, one per vector")
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
    with _storing(f"{where}: column {name!r}"):
        return pa.array(values, type=kind)


@contextmanager
def _storing(what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeEncodeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise StoreError(f"{what} cannot be stored ({reason}); make it plain values") from error


def _write_npy(sink: Sink, rows: NDArray[np.floating]) -> None:
    header = np.lib.format.header_data_from_array_1_0(rows)
    np.lib.format.write_array_header_1_0(sink, header)
    for start in range(0, len(rows), _ROWS_PER_WRITE):
        sink.write(memoryview(rows[start : start + _ROWS_PER_WRITE].data).cast("B"))
