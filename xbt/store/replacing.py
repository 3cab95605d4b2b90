"""Taking rows out of a shard of a store that is being built: a kill at any moment loses none of the others.

The new files are written whole beside the old ones, then the record is replaced, which decides, and then the
files are moved to their places. Whoever finds new files that the record vouches for goes on with the moving.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from xbt.store.files import checksum, sync_directory, write_record, writing_to
from xbt.store.layout import (
    FOLDERS,
    IN_PROGRESS,
    METADATA,
    FileRecord,
    Header,
    ShardRecord,
    metadata_file,
    read_shard_record,
    shard_files,
    vectors_file,
)
from xbt.store.metadata import read_columns
from xbt.store.npy import NpyRows
from xbt.store.shards import ID, write_shard

_NEW = "new"


def drop_rows(
    path: Path, header: Header, shard: ShardRecord, rows: Sequence[int], extra: Mapping[str, Any]
) -> None:
    """Writes a committed shard again without some of its rows; the main process alone does this.

    Args:
        path: The store's directory.
        header: What the store is.
        shard: The shard.
        rows: Which of its rows to leave out.
        extra: The shard's new note.

    Raises:
        StoreError: If the shard cannot be read, or there is no room for it to stand there twice.
    """
    keep = np.ones(shard.count, bool)
    keep[rows] = False
    table = read_columns(path / metadata_file(shard.name), None).filter(pa.array(keep))
    vectors = NpyRows([path / vectors_file(header.modality, shard.name)], [shard.count], header.dim)
    kept = vectors.slice(0, shard.count)[keep]
    ids = table[ID].to_pylist()
    new = path / IN_PROGRESS / _NEW
    record = write_shard(new, header, shard.name, kept, ids, table.drop([ID]), extra)
    write_record(path / IN_PROGRESS / f"{shard.name}.json", record.to_dict())
    complete_replacements(path, header.modality)


def complete_replacements(path: Path, modality: str) -> None:
    """Moves new files that their shard's record vouches for, and removes others that a killed writer left.

    Raises:
        StoreError: If a record is damaged, or the directory cannot be written.
    """
    new = path / IN_PROGRESS / _NEW
    if not new.is_dir():
        return
    for folder in (FOLDERS[modality], METADATA):
        for name, file in shard_files(new, folder).items():
            record, place = path / IN_PROGRESS / f"{name}.json", f"{folder}/{file.name}"
            found = FileRecord(file.stat().st_size, checksum(file))
            if record.is_file() and read_shard_record(record).files.get(place) == found:
                with writing_to(path / place, 0):
                    file.replace(path / place)
        sync_directory(path / folder)
    shutil.rmtree(new)
