"""What a job makes sure of before it begins, so that nothing can go wrong late that could be known early."""

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
from xbt.store import StoreBuilder
from xbt.store.layout import EXTRA, FOLDERS, IN_PROGRESS, MANIFEST, METADATA, read_record
from xbt.store.shards import remove_strays

_JOB = "job.json"


def describe(source: ItemSource, shard_size: int, processes: int = 1) -> dict[str, Any]:
    """What makes a job this one and no other, and how it is cut; recorded beside its store."""
    return {
        "source": source.name,
        "parts": len(source.parts),
        "items": source.length,
        "digest": source.digest(),
        "shard_size": shard_size,
        "items_per_shard": even_shard_size(shard_size, source.length, processes),
    }


def require_same_job(path: Path, job: dict[str, Any], builder: StoreBuilder) -> dict[str, Any]:
    """Records the job in a new directory, and recognises it in an old one.

    Returns:
        The job as it was begun: its shards have the size they had then, by however many processes it is
        continued.

    Raises:
        ConfigError: If it was begun with another shard size.
        DataError: If its source has changed since, or no job has left what is there.
    """
    recorded = path / _JOB
    if not recorded.is_file():
        if builder.committed():
            raise DataError(
                f"{path} holds vectors that no embedding job has left there; choose another directory"
            )
        write_record(recorded, job)
        return job
    there = read_record(recorded)
    if there.get("shard_size") != job["shard_size"]:
        raise ConfigError(
            f"{path} was begun with shard_size {there.get('shard_size')}, and now it is {job['shard_size']}; "
            "go on as it was begun, or choose another directory"
        )
    if there.get("digest") != job["digest"]:
        raise DataError(
            f"{job['source']} has changed since {path} was begun ({_count(there)} then, {_count(job)} now, "
            "or others in their place); choose another directory, or pass --overwrite true to start afresh"
        )
    # Jobs of earlier versions were cut by their shard size.
    return {**job, "items_per_shard": there.get("items_per_shard", there["shard_size"])}


def _count(job: dict[str, Any]) -> str:
    return f"{job.get('items')} items" if job.get("items") is not None else f"{job.get('parts')} parts"


def require_same_source(rank: int, job: dict[str, Any], agreed: dict[str, Any]) -> None:
    """Refuses to share work between processes that find different items.

    Raises:
        DataError: If this process's job is not the main one's.
    """
    if job["digest"] != agreed["digest"]:
        raise DataError(
            f"process {rank} finds other items in {job['source']} ({_count(job)}) than the main process "
            f"({_count(agreed)}); give all processes the same files"
        )


def require_writable(path: Path) -> None:
    """Makes the directory and tries to write into it.

    Raises:
        ConfigError: If that fails.
    """
    # Asked before a model is loaded, and without leaving a trace of a job that may yet turn out wrong.
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"--output_dir {path} cannot be written: {error.strerror}") from error


def require_free_space(path: Path, entries: int | None, dim: int, dtype: str) -> None:
    """Compares what the vectors will take with the free space.

    Args:
        path: The job's directory.
        entries: How many vectors there will be at most; ``None`` if that cannot be known.
        dim: Their dimension.
        dtype: On disk.

    Raises:
        ConfigError: If they cannot fit.
    """
    needed = (entries or 0) * dim * np.dtype(dtype).itemsize
    free = shutil.disk_usage(path).free
    if needed > free:
        raise ConfigError(
            f"{entries} vectors of {dim} {dtype} need {needed / 1e9:.3g} GB, but {path} has only "
            f"{free / 1e9:.3g} GB free; make room, or choose another directory"
        )


def clear(path: Path) -> None:
    """Removes what an earlier job left in its directory; vectors that no job has left there stay."""
    begun = (path / IN_PROGRESS).is_dir() and not (path / MANIFEST).exists()
    if not begun and not (path / _JOB).is_file():
        return
    # The manifest first, since without it nothing passes for a store, and last what says that it is ours.
    for name in (MANIFEST, EXTRA, IN_PROGRESS, RETRIED):
        _remove(path / name)
    for modality in FOLDERS:
        remove_strays(path, modality, ())
    for folder in (*FOLDERS.values(), METADATA):
        remove_leftovers(path / folder)
        with suppress(OSError):  # the user's own files stay, and so does their folder
            (path / folder).rmdir()
    for name in (REJECTED, NOTES, _JOB):
        _remove(path / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
