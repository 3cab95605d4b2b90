"""Export of a store or gallery as common files: one .npy of vectors, and Parquet with the ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xbt.index.items import Items, Portion, Source, portion
from xbt.serve.files import whole_file
from xbt.store.files import write_record

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
        directory: Where to; files of these names are replaced.
        part: The part of a gallery, needed while its items are in two.

    Returns:
        How many items were written.

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
    return pa.schema(named + [pa.field(_renamed(each.name), each.type) for each in chosen.columns()])


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
