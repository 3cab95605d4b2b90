"""The export recipe's job: open a store or gallery and write it as others read it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from xbt.errors import ConfigError
from xbt.index import Gallery
from xbt.index.items import Source
from xbt.run_dir import RunDirectory
from xbt.serve.interchange import export_interchange
from xbt.serve.pgvector import PgvectorTable, export_pgvector
from xbt.store import EmbeddingStore

SQL = "gallery.sql"


@dataclass
class ExportConfig:
    """Write a store or gallery as .npy and Parquet, and as SQL for PostgreSQL with pgvector.

    Writes ``vectors.npy``, ``items.parquet``, ``about.json`` and ``gallery.sql`` to the output directory.
    """

    source: str
    """A store, a folder that clip-retrieval wrote, or a gallery."""
    output_dir: str
    """Where the files go."""
    part: str | None = None
    """The part of a gallery, needed while its items are in two: old or new."""
    modality: str | None = None
    """image or text; needed only for a clip-retrieval folder that holds both."""
    interchange: bool = True
    """Write .npy and Parquet."""
    pgvector: PgvectorTable | None = None
    """The table that the SQL makes; without it there is no SQL."""
    overwrite: bool = False
    """Replace another export in the output directory."""


def run_export(config: ExportConfig) -> str:
    """Exports what the config names.

    Args:
        config: What to export, and how.

    Returns:
        What was written, in a sentence.

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
