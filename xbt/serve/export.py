"""The export job: write a store or gallery as .npy and Parquet files, and as SQL for pgvector."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xbt.errors import ConfigError
from xbt.files import whole_file, write_record
from xbt.index import Gallery
from xbt.index.items import Items, Portion, Source, portion
from xbt.run_dir import RunDirectory
from xbt.serve.pgvector import PgvectorTable, export_pgvector
from xbt.store import EmbeddingStore

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
    """Export a store or gallery.

    Returns:
        A sentence on the written files.

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
