"""Looking for damage: every file of a store against the manifest that vouches for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from xbt.errors import StoreError
from xbt.store.clip_retrieval import scan_folder
from xbt.store.column_types import ColumnTypes
from xbt.store.files import checksum
from xbt.store.layout import (
    EXTRA,
    MANIFEST,
    METADATA,
    FileRecord,
    Manifest,
    ShardRecord,
    read_manifest,
    store_path,
)
from xbt.store.metadata import inspect_parquet
from xbt.store.npy import NpyRows, inspect_npy

_ROWS_AT_ONCE = 16_384
_MEND = "copy it again, or embed its rows anew"


def find_faults(path: str | Path, modality: str | None = None) -> list[str]:
    """Everything that is wrong with a store, even one too damaged to be opened.

    Args:
        path: The directory.
        modality: As in ``EmbeddingStore.open``.

    Returns:
        A sentence for each fault, which names the file and says what to do; empty if the store is sound.
    """
    directory = store_path(path)
    try:
        if (directory / MANIFEST).is_file():
            manifest = read_manifest(directory / MANIFEST)
        else:
            manifest = scan_folder(directory, modality, None)
    except StoreError as error:
        return [str(error)]
    faults = wrong_contents(directory, manifest.shards, manifest.header.dim)
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


def wrong_contents(path: Path, shards: Iterable[ShardRecord], dim: int) -> list[str]:
    """Everything that is wrong with the shards' files, a sentence each; every byte is read.

    Args:
        path: The store's directory.
        shards: What the files should be.
        dim: Dimension of the vectors.

    Returns:
        The faults; a flipped bit is found where checksums are known, NaN where they are not: what has a
        checksum was looked at before it was written.
    """
    faults: list[str] = []
    types = ColumnTypes()
    for shard in shards:
        for name, file in shard.files.items():
            fault = wrong_file(path / name, file, f"shard {shard.name!r}")
            fault = fault or _wrong_rows(path / name, name, shard, dim, checked=bool(file.sha256))
            faults.append(fault)
            if not fault and name.startswith(f"{METADATA}/"):
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
        return f"{path} of {of} cannot be read ({error.strerror}): {_MEND}"
    return "" if found == file.sha256 else f"{path} of {of} has other bytes than were written: {_MEND}"


def _wrong_size(path: Path, file: FileRecord, of: str) -> str:
    try:
        size = path.stat().st_size
    except OSError:
        return f"{path} of {of} is missing: {_MEND}"
    return "" if size == file.bytes else f"{path} of {of} has {size} bytes instead of {file.bytes}: {_MEND}"


def _wrong_rows(path: Path, name: str, shard: ShardRecord, dim: int, checked: bool) -> str:
    try:
        if name.startswith(f"{METADATA}/"):
            count, _ = inspect_parquet(path)
        else:
            npy = inspect_npy(path)
            count = npy.count
            if npy.dim != dim:
                return f"{path} of shard {shard.name!r} has dimension {npy.dim} instead of {dim}: {_MEND}"
    except StoreError as error:
        return str(error)
    if count != shard.count:
        return f"{path} of shard {shard.name!r} has {count} rows instead of {shard.count}: {_MEND}"
    if checked or name.startswith(f"{METADATA}/"):
        return ""
    broken = _first_not_finite(NpyRows([path], [count], dim))
    return (
        ""
        if broken is None
        else f"{path} of shard {shard.name!r} has NaN or infinity, first in its row {broken}: {_MEND}"
    )


def _first_not_finite(rows: NpyRows) -> int | None:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        sums = rows.slice(start, min(start + _ROWS_AT_ONCE, len(rows))).sum(axis=1, dtype=np.float64)
        broken = np.flatnonzero(~np.isfinite(sums))
        if len(broken):
            return start + int(broken[0])
    return None
