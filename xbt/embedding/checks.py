"""Checks of an embedding job before it starts, so that errors appear early."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from xbt.data.items import ItemSource
from xbt.embedding.plan import even_shard_size
from xbt.embedding.rejected import NOTES, REJECTED, RETRIED
from xbt.errors import ConfigError, DataError
from xbt.files import remove_leftovers, write_record
from xbt.store.builder import StoreBuilder
from xbt.store.layout import EXTRA, FOLDERS, IN_PROGRESS, MANIFEST, METADATA, read_record
from xbt.store.shards import remove_strays

_JOB = "job.json"


def describe(source: ItemSource, shard_size: int, processes: int = 1) -> dict[str, Any]:
    """Describe a job by its source and shard sizes; the description is saved next to the store."""
    return {
        "source": source.name,
        "parts": len(source.parts),
        "items": source.length,
        "digest": source.digest(),
        "shard_size": shard_size,
        "items_per_shard": even_shard_size(shard_size, source.length, processes),
    }


def require_same_job(path: Path, job: dict[str, Any], builder: StoreBuilder) -> dict[str, Any]:
    """Record the job in a new directory, or compare it with the record in an existing one.

    Returns:
        The job as first started. A continued job keeps its shard size, whatever the number of processes.
    """
    recorded = path / _JOB
    if not recorded.is_file():
        if builder.committed():
            raise DataError(
                f"{path} holds vectors that were not written by an embedding job; choose another directory"
            )
        write_record(recorded, job)
        return job
    started = read_record(recorded)
    if started.get("shard_size") != job["shard_size"]:
        raise ConfigError(
            f"{path} was started with shard_size {started.get('shard_size')}, and now it is "
            f"{job['shard_size']}; use the first one, or choose another directory"
        )
    if started.get("digest") != job["digest"]:
        raise DataError(
            f"{job['source']} has changed since {path} was started ({_count(started)} then, {_count(job)} "
            "now, or others in their place); choose another directory, or start again with --overwrite true"
        )
    return {**job, "items_per_shard": started.get("items_per_shard", started["shard_size"])}


def _count(job: dict[str, Any]) -> str:
    return f"{job.get('items')} items" if job.get("items") is not None else f"{job.get('parts')} parts"


def require_same_source(rank: int, job: dict[str, Any], agreed: dict[str, Any]) -> None:
    """Refuse to share work between processes that find different items."""
    if job["digest"] != agreed["digest"]:
        raise DataError(
            f"process {rank} finds other items in {job['source']} ({_count(job)}) than the main process "
            f"({_count(agreed)}); give all processes the same files"
        )


def require_writable(path: Path) -> None:
    """Create the directory and check that it can be written to."""
    # This runs before a model is loaded and leaves no file behind, since the job may still turn out to be
    # wrong.
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"--output_dir {path} cannot be written: {error.strerror}") from error


def require_free_space(path: Path, entries: int | None, dim: int, dtype: str) -> None:
    """Compare the size of the vectors (at most ``entries``, if known) with the free disk space."""
    needed = (entries or 0) * dim * np.dtype(dtype).itemsize
    free = shutil.disk_usage(path).free
    if needed > free:
        raise ConfigError(
            f"{entries} vectors of {dim} {dtype} need {needed / 1e9:.3g} GB, but {path} has only "
            f"{free / 1e9:.3g} GB free; free some space, or choose another directory"
        )


def clear(path: Path) -> None:
    """Remove the files of an earlier job from its directory; vectors that no job has written stay."""
    unfinished = (path / IN_PROGRESS).is_dir() and not (path / MANIFEST).exists()
    if not unfinished and not (path / _JOB).is_file():
        return
    # The manifest goes first, since a store needs it. The record goes last, since it marks the files as ours.
    for name in (MANIFEST, EXTRA, IN_PROGRESS, RETRIED):
        _remove(path / name)
    for modality in FOLDERS:
        remove_strays(path, modality, ())
    for folder in (*FOLDERS.values(), METADATA):
        remove_leftovers(path / folder)
        with suppress(OSError):  # a folder with other files stays
            (path / folder).rmdir()
    for name in (REJECTED, NOTES, _JOB):
        _remove(path / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
