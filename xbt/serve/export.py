"""Exports of a store or gallery: .npy and Parquet files, and SQL for PostgreSQL with pgvector."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xbt.data.files import is_unicode
from xbt.errors import ConfigError, DataError
from xbt.files import whole_file, write_record
from xbt.index.gallery import Gallery
from xbt.index.items import Items, Portion, Source, portion
from xbt.run_dir import RunDirectory
from xbt.store.store import EmbeddingStore

VECTORS, ITEMS, ABOUT = "vectors.npy", "items.parquet", "about.json"
FORMAT = 1
ID, VECTOR = "id", "vector"


def export_interchange(source: Source, directory: str | Path, part: str | None = None) -> int:
    """Write ``vectors.npy``, ``items.parquet`` and ``about.json``.

    Row i of the array belongs to row i of the table, which has the columns ``id`` (string), ``vector``
    (fixed_size_list<float>[dim]) and those of the metadata; one of these that is called ``vector`` becomes
    ``metadata_vector``. The space is in ``about.json``, which is written last, and in the table's own
    metadata under ``xbt``.

    Args:
        source: An ``EmbeddingStore`` or a ``Gallery``, with its metadata.
        directory: Output directory; existing files of these names are replaced.
        part: Part of the gallery; needed while its items are in two parts.

    Returns:
        Number of items.

    Raises:
        ConfigError: If the source is something else.
        DataError: If there is no such part.
        StoreError: If the source is empty or damaged, or the files cannot be written.
    """
    chosen, target = portion(source, part), Path(directory).expanduser()
    space = None if chosen.space is None else chosen.space.to_dict()
    about = {"format": FORMAT, "count": chosen.count, "dim": chosen.dim, "dtype": "float32", "space": space}
    schema = _schema(chosen).with_metadata({"xbt": json.dumps(about)})
    with (
        whole_file(target / VECTORS) as array,
        whole_file(target / ITEMS) as table,
        array.open("wb") as out,
        pq.ParquetWriter(table, schema) as writer,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (chosen.count, chosen.dim)}
        np.lib.format.write_array_header_1_0(out, header)
        for items in chosen.batches():
            out.write(np.ascontiguousarray(items.vectors, dtype="<f4").data)
            writer.write_table(_table(items, schema))
    write_record(target / ABOUT, about)
    return chosen.count


def _schema(chosen: Portion) -> Any:
    vectors = pa.list_(pa.float32(), chosen.dim)
    named = [pa.field(ID, pa.string()), pa.field(VECTOR, vectors)]
    return pa.schema(named + [pa.field(_renamed(column.name), column.type) for column in chosen.columns()])


def _table(items: Items, schema: Any) -> Any:
    flat = pa.array(np.ascontiguousarray(items.vectors, dtype=np.float32).reshape(-1))
    columns: dict[str, Any] = {
        ID: pa.array(items.ids, pa.string()),
        VECTOR: pa.FixedSizeListArray.from_arrays(flat, items.vectors.shape[1]),
    }
    if items.metadata is not None:
        columns |= {_renamed(name): items.metadata[name] for name in items.metadata.column_names}
    arrays = [
        columns[field.name].cast(field.type)
        if field.name in columns
        else pa.nulls(len(items.ids), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _renamed(name: str) -> str:
    return f"metadata_{name}" if name == VECTOR else name


SQL = "gallery.sql"


@dataclass
class ExportConfig:
    """Write a store or gallery as .npy and Parquet, and as SQL for PostgreSQL with pgvector.

    Writes ``vectors.npy``, ``items.parquet``, ``about.json`` and ``gallery.sql`` to the output directory.
    """

    source: str
    """A store, a folder that clip-retrieval wrote, or a gallery."""
    output_dir: str
    """Output directory."""
    part: str | None = None
    """Part of the gallery, old or new; needed while its items are in two parts."""
    modality: str | None = None
    """image or text; needed only for a clip-retrieval folder that holds both."""
    interchange: bool = True
    """Write .npy and Parquet."""
    pgvector: PgvectorTable | None = None
    """Table for the SQL; without it no SQL is written."""
    overwrite: bool = False
    """Replace another export in the output directory."""


def run_export(config: ExportConfig) -> str:
    """Export a store or gallery, and return a sentence on the written files.

    Raises:
        XbtError: If the source or an option cannot be used, or the files cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("an export runs in one process; launch it with --num_processes 1")
    if not (config.interchange or config.pgvector):
        raise ConfigError("there is nothing to write; leave --interchange true, or give --pgvector.table")
    run = RunDirectory(config.output_dir, config, config.overwrite)
    source = open_source(config.source, config.modality)
    run.prepare()
    written, count = [], 0
    if config.interchange:
        count = export_interchange(source, run.path, config.part)
        written.append("vectors.npy and items.parquet")
    if config.pgvector:
        count = export_pgvector(source, run.path / SQL, config.pgvector, config.part)
        written.append(SQL)
    return f"exported {count} items to {run.path}: {', '.join(written)}"


def open_source(path: str, modality: str | None = None) -> Source:
    """Open a gallery for reading, or a store.

    Raises:
        DataError, StoreError: If there is neither, or it cannot be read.
    """
    if Gallery.exists(path):
        return Gallery.open(path, read_only=True)
    return EmbeddingStore.open(path, modality)


MAX_DIM, MAX_INDEXED_DIM = 16_000, 2_000
"""Maximum dimensions of pgvector's type ``vector``, and of its indexes."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"})
_NUL_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


@dataclass
class PgvectorTable:
    """Table of an export: ``id`` text, the vectors, and ``metadata`` as jsonb."""

    table: str = "items"
    """Name of the table, with or without a schema (public.items)."""
    column: str = "embedding"
    """Name of the column of vectors."""
    statement: Literal["copy", "insert"] = "copy"
    """Statement for the rows: COPY, fast in psql, or INSERT, which any client can run."""
    rows_at_once: int = 500
    """Rows in one INSERT."""
    index: bool = False
    """Add an HNSW index for the inner product at the end."""

    def __post_init__(self) -> None:
        """Refuse names that need escapes, and unknown values."""
        for name in (*self.table.split("."), self.column):
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"{name!r} is no plain SQL name; use letters, digits and underscores, at most 63"
                )
        if self.statement not in ("copy", "insert"):
            raise ConfigError(f"the statement is 'copy' or 'insert', got {self.statement!r}")
        if self.table.count(".") > 1 or self.column in ("id", "metadata"):
            raise ConfigError(f"{self.table}.{self.column} cannot be made; choose another table or column")
        if self.rows_at_once < 1:
            raise ConfigError(f"rows_at_once must be at least 1, got {self.rows_at_once}")

    @property
    def quoted(self) -> str:
        """Quoted name of the table in SQL."""
        return ".".join(f'"{part}"' for part in self.table.split("."))


def export_pgvector(
    source: Source, path: str | Path, options: PgvectorTable | None = None, part: str | None = None
) -> int:
    """Write SQL that creates a table with the items of a store or gallery, in one transaction.

    The space is written as JSON into the comment of the vector column. Numbers have enough digits to read
    the same float32 back.

    Args:
        source: An ``EmbeddingStore`` or a ``Gallery``, with its metadata.
        path: The file; an existing one is replaced.
        options: Names and statements.
        part: Part of the gallery; needed while its items are in two parts.

    Returns:
        Number of rows.

    Raises:
        ConfigError: If the source is something else, or its vectors have too many dimensions for pgvector.
        DataError: If an id or metadata cannot be stored in PostgreSQL (the character NUL, values without a
            JSON form), or there is no such part.
        StoreError: If the source is empty or damaged, or the file cannot be written.
    """
    table = options or PgvectorTable()
    chosen = portion(source, part)
    limit = MAX_INDEXED_DIM if table.index else MAX_DIM
    if chosen.dim > limit:
        does, fix = ("indexes", "leave out the index") if table.index else ("holds", "reduce them first")
        raise ConfigError(
            f"the vectors have {chosen.dim} dimensions, but pgvector {does} at most {limit}; {fix}"
        )
    file, count = Path(path).expanduser(), 0
    with whole_file(file) as partial, partial.open("w", encoding="utf-8", newline="\n") as out:
        _write_opening(out, table, chosen)
        for items in chosen.batches():
            rows = list(_rows(items))
            (_write_copy if table.statement == "copy" else _write_inserts)(out, table, rows)
            count += len(rows)
        if table.index:
            out.write(f'CREATE INDEX ON {table.quoted} USING hnsw ("{table.column}" vector_ip_ops);\n')
        out.write("COMMIT;\n")
    return count


def vector_text(row: NDArray[np.float32]) -> str:
    """Format a vector for pgvector, ``[0.1,0.2]``, without loss of float32 precision."""
    return f"[{','.join(row.astype(np.float32).astype(str))}]"


def _write_opening(out: TextIO, table: PgvectorTable, chosen: Portion) -> None:
    space = json.dumps({"space": None if chosen.space is None else chosen.space.to_dict()})
    out.write(
        "-- The vectors of a gallery; run with psql --set ON_ERROR_STOP=1 --file.\n"
        "SET client_encoding = 'UTF8';\n"
        "SET standard_conforming_strings = on;\n"
        "CREATE EXTENSION IF NOT EXISTS vector;\n"
        "BEGIN;\n"
        f'CREATE TABLE {table.quoted} (\n  "id" text PRIMARY KEY,\n'
        f'  "{table.column}" vector({chosen.dim}) NOT NULL,\n  "metadata" jsonb\n);\n'
        f'COMMENT ON COLUMN {table.quoted}."{table.column}" IS {_literal(space)};\n'
    )


def _write_copy(out: TextIO, table: PgvectorTable, rows: list[tuple[str, str, str | None]]) -> None:
    out.write(f'COPY {table.quoted} ("id", "{table.column}", "metadata") FROM stdin;\n')
    for row in rows:
        out.write("\t".join("\\N" if value is None else value.translate(_ESCAPES) for value in row) + "\n")
    out.write("\\.\n")


def _write_inserts(out: TextIO, table: PgvectorTable, rows: list[tuple[str, str, str | None]]) -> None:
    for start in range(0, len(rows), table.rows_at_once):
        out.write(f'INSERT INTO {table.quoted} ("id", "{table.column}", "metadata") VALUES\n')
        values = rows[start : start + table.rows_at_once]
        out.write(",\n".join(f"({', '.join(map(_literal, row))})" for row in values) + ";\n")


def _rows(items: Items) -> Iterator[tuple[str, str, str | None]]:
    try:
        metadata = [None] * len(items.ids) if items.metadata is None else items.metadata.to_pylist()
    except (ValueError, OverflowError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"the metadata of the items from {items.ids[0]!r} on have no JSON form ({error}); create a store "
            "with plain values"
        ) from error
    for item, vector, values in zip(items.ids, items.vectors, metadata, strict=True):
        if "\0" in item or not is_unicode(item):
            raise DataError(
                f"the id {item!r} holds the character NUL or a lone surrogate, which PostgreSQL cannot "
                "store; rename it"
            )
        yield item, vector_text(vector), None if values is None else _json(values, item)


def _json(values: dict[str, Any], item: str) -> str:
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")  # refuses lone surrogates
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the metadata of {item!r} have no JSON form ({error}); create a store with plain values"
        ) from error
    if _NUL_ESCAPE.search(text):
        raise DataError(
            f"the metadata of {item!r} hold the character NUL, which PostgreSQL cannot store; remove it"
        )
    return text


def _literal(value: str | None) -> str:
    if value is None:
        return "NULL"
    quoted = value.replace("'", "''")
    if any(character in value for character in "\n\r\t"):  # other tools may change line ends
        return f"E'{quoted.translate(_ESCAPES)}'"
    return f"'{quoted}'"
