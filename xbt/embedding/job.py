"""The embedding job and its settings: turns images or captions into a store, resumable, in many processes."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np

from xbt.data.captions import CaptionSource
from xbt.data.image_collection import ImageCollection, open_captions, open_images
from xbt.data.items import ItemSource, ListedTexts, require_unique
from xbt.embedding.rejected import (
    NOTES,
    REJECTED,
    RETRIED,
    RejectionLimit,
    merge_retried,
    note_repeated,
    refuse_streams,
    select_entries,
    still_rejected,
    write_records,
)
from xbt.embedding.work import ShardPlan, Task, embed_tasks, even_shard_size
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError, DataError
from xbt.files import remove_leftovers, write_record
from xbt.processes import Team, cores_per_process, start_processes
from xbt.run_dir import RunDirectory
from xbt.store.builder import StoreBuilder
from xbt.store.layout import EXTRA, FOLDERS, IN_PROGRESS, MANIFEST, METADATA, read_record
from xbt.store.shards import remove_strays
from xbt.store.store import EmbeddingStore

_JOB = "job.json"
MAY_CHANGE = ("batch_size", "num_workers", "compile", "retry_rejected", "max_rejected")
"""Settings that may change when a job is continued. They affect at most the last digits of a vector, or the
handling of rejected items."""


@dataclass
class EmbedConfig:
    """Embed images or captions into a store, with any number of processes; a killed job continues.

    The output directory is the store (open it with ``xbt.EmbeddingStore.open``). It also contains
    ``rejected.jsonl`` (items that could not be embedded, with the reason) and ``notes.jsonl`` (items that
    were converted or lost something).
    """

    encoder: str
    """The encoder, such as open_clip:ViT-B-32-quickgelu/openai."""
    output_dir: str
    """Directory of the store; with several machines, on a shared file system."""
    images: ImageCollection | None = None
    """The images to embed, or ..."""
    captions: CaptionSource | None = None
    """... the captions, also from WebDataset tars."""
    shard_size: int = 10_000
    """Maximum number of items per shard, and so the work that a killed process loses. If several processes
    share a list, shards are smaller, down to 256, so that all get equal shares."""
    batch_size: int = 256
    """Items per forward pass. It may change when a job is continued."""
    num_workers: int | None = None
    """Processes that decode images or tokenise texts, per embedding process; by default chosen from the
    number of cores."""
    dtype: Literal["float16", "float32"] = "float16"
    """Dtype of the vectors on disk."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass."""
    compile: bool = False
    """Compile the towers with torch.compile: slower to start, faster for millions of items on a GPU."""
    retry_rejected: bool = False
    """Try rejected items again, also after the job has finished, because images may be unreadable only for a
    while. Items that can be embedded now are appended to the store. Not for streams."""
    max_rejected: float | None = None
    """Stop when more than this share of at least 100 items was rejected; finished work is kept."""
    overwrite: bool = False
    """Start again in an output directory that holds another job."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If both or neither of ``images`` and ``captions`` are given, or a number is too
                small.
        """
        if (self.images is None) == (self.captions is None):
            given = "both were" if self.images is not None else "neither was"
            raise ConfigError(
                f"give either --images.source or --captions.source: {given} given, and a store holds one of "
                "them"
            )
        for name, minimum in (("shard_size", 1), ("batch_size", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"--{name} must be at least {minimum}, got {value}")
        if self.max_rejected is not None and not 0 <= self.max_rejected < 1:
            raise ConfigError(f"--max_rejected is a share from 0 to below 1, got {self.max_rejected}")

    def open_source(self) -> ItemSource:
        """Open the images or captions; nothing is decoded yet.

        Raises:
            DataError: If they cannot be read.
            ConfigError: If ``retry_rejected`` is set for streams.
        """
        if self.images is not None:
            source = open_images(self.images)
        else:
            assert self.captions is not None
            source = open_captions(self.captions)
        if self.retry_rejected:
            refuse_streams(source)
        return source


@dataclass(frozen=True)
class JobSettings:
    """Settings of :func:`embed_source`; see :class:`EmbedConfig`."""

    shard_size: int = 10_000
    batch_size: int = 256
    dtype: str = "float16"
    num_workers: int | None = None
    retry_rejected: bool = False
    max_rejected: float | None = None


def embed(config: EmbedConfig) -> EmbeddingStore:
    """Embed images or captions into a store.

    Every process that ``accelerate launch`` or ``torchrun`` started calls this. Shards are written one by
    one. A job that was killed or ran out of disk space continues when the same command is run again, with any
    number of processes, and produces the same store as an uninterrupted job.

    Args:
        config: The settings.

    Returns:
        The finished store, open in every process.

    Raises:
        XbtError: If a setting, the source, the encoder or the directory cannot be used, or the encoder
            returns NaN. Images that cannot be decoded raise no error; they are listed in ``rejected.jsonl``.
    """
    path = Path(config.output_dir)
    team = Team(start_processes(), path)
    run = team.together(lambda: RunDirectory(path, config, config.overwrite, MAY_CHANGE))
    source = team.together(config.open_source)
    team.main_alone(lambda: require_writable(path))

    def load() -> DualEncoder:
        encoder = load_encoder(config.encoder, team.state.device)
        encoder.precision = config.precision
        return encoder.compile_towers() if config.compile else encoder

    def prepare() -> None:
        if config.overwrite:
            _clear(path)
        run.prepare()

    encoder = team.together(load)
    team.main_alone(prepare)
    settings = {option.name: getattr(config, option.name) for option in fields(JobSettings)}
    return embed_source(team, source, encoder, path, JobSettings(**settings))


def embed_texts_into_store(
    encoder: DualEncoder,
    texts: Sequence[str],
    ids: Sequence[str],
    path: str | Path,
    *,
    shard_size: int = 10_000,
    batch_size: int = 256,
    dtype: str = "float16",
    overwrite: bool = False,
) -> EmbeddingStore:
    """Embed texts into a store; every process of the run calls this. See :func:`embed`.

    Args:
        encoder: The encoder, in every process.
        texts: n texts, the same in every process.
        ids: n unique ids.
        path: The store's directory. A finished store of the same texts is returned unchanged.
        shard_size: Texts per shard.
        batch_size: Texts per forward pass.
        dtype: ``"float16"`` or ``"float32"``, on disk.
        overwrite: Whether to replace an existing store of other texts.

    Returns:
        The store, with the texts as column ``caption``.

    Raises:
        DataError: If ids and texts do not match, a text is blank, or the store holds other texts.
        SpaceMismatchError: If it holds another encoder's vectors.
    """
    if len(texts) != len(ids) or not len(texts):
        raise DataError(
            f"there are {len(texts)} texts and {len(ids)} ids; give one id a text, and at least one"
        )
    require_unique(ids, "the texts")
    blank = next((name for name, text in zip(ids, texts, strict=True) if not text.strip()), None)
    if blank is not None:
        raise DataError(f"the text {blank!r} is blank; leave it out")
    directory = Path(path)
    team = Team(start_processes(), directory)
    source = ItemSource("the texts", "text", [ListedTexts(ids, texts)])
    if overwrite:
        team.main_alone(lambda: _clear(directory))
    return embed_source(team, source, encoder, directory, JobSettings(shard_size, batch_size, dtype))


def embed_source(
    team: Team, source: ItemSource, encoder: DualEncoder, path: Path, settings: JobSettings
) -> EmbeddingStore:
    """Embed a source, the same in every process, into a store; every process calls this."""
    _embed(team, source, encoder, path, settings)
    if settings.retry_rejected:
        positions = team.main_alone(lambda: still_rejected(path, source))
        if positions:
            unlimited = replace(settings, max_rejected=None)
            _embed(team, select_entries(source, positions), encoder, path / RETRIED, unlimited)
        limit = RejectionLimit(settings.max_rejected, streams=False)
        team.main_alone(lambda: _merge_retried(path, len(positions), limit))
    return team.together(lambda: EmbeddingStore.open(path))


def _embed(team: Team, source: ItemSource, encoder: DualEncoder, path: Path, settings: JobSettings) -> None:
    """Write the missing shards of a source; every process calls this."""
    builder = StoreBuilder(path, modality=source.modality, space=encoder.space, dtype=settings.dtype)
    job = _describe(source, settings.shard_size, team.count)

    def prepare() -> tuple[list[Task], dict[str, Any], int]:
        builder.prepare()
        agreed = _require_same_job(path, job, builder)
        team.clear()
        if builder.finished:
            return [], agreed, 0
        committed, plan = builder.committed(), ShardPlan(source, agreed["items_per_shard"])
        tasks = plan.remaining(committed)
        require_free_space(path, plan.entries(tasks), encoder.dim, settings.dtype)
        return tasks, agreed, sum(record.count for record in committed.values())

    tasks, agreed, before = team.main_alone(prepare)
    team.together(lambda: _require_same_source(team.rank, job, agreed))
    plan = ShardPlan(source, agreed["items_per_shard"])
    limit = RejectionLimit(settings.max_rejected, source.length is None)
    workers = settings.num_workers
    if workers is None:
        workers = choose_workers(encoder, cores_per_process(team.state))
    share = tasks[team.rank :: team.count]
    start = time.monotonic()

    def work() -> None:
        with team.alarming():
            embed_tasks(team, plan, share, encoder, builder, settings.batch_size, workers, limit)
            team.wait()

    team.together(work)
    team.main_alone(team.clear)
    if settings.retry_rejected:
        limit.share = None  # the final share is only known after the retry
    team.main_alone(lambda: _finish(builder, plan, time.monotonic() - start, before, limit))


def choose_workers(encoder: DualEncoder, cores: int) -> int:
    """Choose the number of decoding processes for an embedding process with this many cores."""
    if encoder.device.type != "cpu":
        return min(cores, 16)
    # On a CPU the model itself needs the cores, but one decoding process pays off from two cores on.
    return max(1, cores // 4) if cores > 1 else 0


def _finish(
    builder: StoreBuilder, plan: ShardPlan, seconds: float, before: int, limit: RejectionLimit
) -> None:
    if builder.finished:
        print(f"{builder.path} is finished already: {len(EmbeddingStore.open(builder.path))} vectors")
        return
    builder.leave_out_repeated(note_repeated)
    committed = builder.committed()
    # Write these before the store is finished, so that a kill in between does not lose them.
    rejected, notes = write_records(builder.path, committed)
    total = sum(record.count for record in committed.values())
    replace(limit, entries=total + rejected, rejected=rejected).require(f"{REJECTED} says why")
    store = builder.finish(plan.names(committed))
    new = len(store) - before
    what = f"{plan.source.modality}s"
    rest = f", {before} in earlier runs" if before else ""
    print(
        f"embedded {new} {what} in {seconds:.1f} s, {new / max(seconds, 1e-9):.1f} per second{rest}; "
        f"rejected {rejected}, with a note {notes} → {builder.path}"
    )
    if not len(store):
        warnings.warn(f"none of {rejected} {what} could be embedded; {REJECTED} says why", stacklevel=2)


def _merge_retried(path: Path, tried: int, limit: RejectionLimit) -> None:
    if not tried:
        print(f"nothing is left to try again: {path} contains every item that was rejected")
        return
    left = merge_retried(path)
    print(f"tried {tried} rejected items again: {tried - left} embedded, rejected {left} → {path}")
    total = len(EmbeddingStore.open(path)) + left
    replace(limit, entries=total, rejected=left).require(f"{REJECTED} says why")


def _describe(source: ItemSource, shard_size: int, processes: int = 1) -> dict[str, Any]:
    """Describe a job by its source and shard sizes; the description is saved next to the store."""
    return {
        "source": source.name,
        "parts": len(source.parts),
        "items": source.length,
        "digest": source.digest(),
        "shard_size": shard_size,
        "items_per_shard": even_shard_size(shard_size, source.length, processes),
    }


def _require_same_job(path: Path, job: dict[str, Any], builder: StoreBuilder) -> dict[str, Any]:
    """Record the job in a new directory, or compare it with the record in an existing one.

    The result is the job as first started, which keeps its shard size, whatever the number of processes.
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


def _require_same_source(rank: int, job: dict[str, Any], agreed: dict[str, Any]) -> None:
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


def _clear(path: Path) -> None:
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
