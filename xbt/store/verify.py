"""Looking for damage: every file of a store against the manifest that vouches for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from xbt.errors import SpaceMismatchError, StoreError
from xbt.space import EmbeddingSpace
from xbt.store.clip_retrieval import scan_folder
from xbt.store.column_types import ColumnTypes
from xbt.store.files import checksum
from xbt.store.layout import (
    EXTRA,
    MANIFEST,
    METADATA,
    FileRecord,
    Header,
    Manifest,
    ShardRecord,
    has_manifest,
    read_manifest,
    refuse_irregular,
    store_path,
)
from xbt.store.metadata import read_columns
from xbt.store.npy import AGAIN, NpyRows, inspect_npy

_ROWS_AT_ONCE = 16_384


def find_faults(
    path: str | Path, modality: str | None = None, space: EmbeddingSpace | None = None
) -> list[str]:
    """Everything that is wrong with a store, even one too damaged to be opened.

    Args:
        path: The directory.
        modality: As in ``EmbeddingStore.open``.
        space: Likewise; the space of a clip-retrieval folder.

    Returns:
        A sentence for each fault, which names the file and says what to do; empty if the store is sound.
    """
    directory = store_path(path)
    try:
        if has_manifest(directory):
            manifest = read_manifest(directory / MANIFEST)
        else:
            manifest = scan_folder(directory, modality, space)
    except (StoreError, SpaceMismatchError) as error:
        return [str(error)]
    faults = wrong_contents(directory, manifest)
    if manifest.extra is not None:
        faults.append(wrong_file(directory / EXTRA, manifest.extra, "the writers' notes"))
    return [fault for fault in faults if fault]


def refuse_wrong_sizes(path: Path, manifest: Manifest) -> None:
    """Refuses a store with files that are missing, cut or too long.

    Raises:
        StoreError: If there is one; the message names the first.
    """
    faults = wrong_sizes(path, manifest.shards)
    if faults:
        more = f" ({len(faults)} files are wrong: see xbt.store.find_faults)" if len(faults) > 1 else ""
        raise StoreError(f"{faults[0]}{more}")


def wrong_sizes(path: Path, shards: Iterable[ShardRecord]) -> list[str]:
    """Files that are missing, cut or too long, a sentence each; only sizes are looked at."""
    files = ((shard, name, file) for shard in shards for name, file in shard.files.items())
    faults = (_wrong_size(path / name, file, f"shard {shard.name!r}") for shard, name, file in files)
    return [fault for fault in faults if fault]


def wrong_contents(path: Path, manifest: Manifest) -> list[str]:
    """Everything that is wrong with the shards' files, a sentence each; every byte is read.

    Args:
        path: The store's directory.
        manifest: What the files should be.

    Returns:
        The faults; a flipped bit is found where checksums are known.
    """
    faults: list[str] = []
    types = ColumnTypes()
    for shard in manifest.shards:
        for name, file in shard.files.items():
            fault = wrong_file(path / name, file, f"shard {shard.name!r}")
            dtype = manifest.header.numpy_dtype if file.sha256 else None
            faults.append(fault or _wrong_rows(path / name, shard, manifest.header, dtype))
            if not faults[-1] and name.startswith(f"{METADATA}/"):
                faults += types.add([path / name])
    return [fault for fault in faults if fault]


def wrong_file(path: Path, file: FileRecord, of: str) -> str:
    """What is wrong with a file's size or bytes, or an empty string."""
    fault = _wrong_size(path, file, of)
    if fault or not file.sha256:
        return fault
    try:
        found = checksum(path)
    except OSError as error:
        return f"{path} of {of} cannot be read ({error.strerror}): {AGAIN}"
    return "" if found == file.sha256 else f"{path} of {of} has other bytes than were written: {AGAIN}"


def _wrong_size(path: Path, file: FileRecord, of: str) -> str:
    try:
        size = path.stat().st_size
        refuse_irregular(path, path.parent if path.name == EXTRA else path.parent.parent)
    except OSError:
        return f"{path} of {of} is missing: {AGAIN}"
    except StoreError as error:
        return str(error)
    return "" if size == file.bytes else f"{path} of {of} has {size} bytes instead of {file.bytes}: {AGAIN}"


def _wrong_rows(path: Path, shard: ShardRecord, header: Header, dtype: np.dtype[Any] | None) -> str:
    """Finds what is wrong with a file's content; NaN too, which a checksum knows nothing of."""
    where = f"{path} of shard {shard.name!r}"
    try:
        if path.parent.name == METADATA:
            count = read_columns(path, None, rows=shard.count).num_rows
        else:
            npy = inspect_npy(path)
            count = npy.count
            if npy.dim != header.dim:
                return (
                    f"{path} of shard {shard.name!r} has dimension {npy.dim} instead of {header.dim}: {AGAIN}"
                )
        if count != shard.count:
            return f"{where} has {count} rows instead of {shard.count}: {AGAIN}"
        if path.parent.name != METADATA:
            rows = NpyRows([path], [count], header.dim, dtype, header.unit)
            for start in range(0, count, _ROWS_AT_ONCE):
                rows.slice(start, min(start + _ROWS_AT_ONCE, count))
    except StoreError as error:
        return str(error)
    return ""
