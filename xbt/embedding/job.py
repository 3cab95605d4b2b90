"""The job that turns images or captions into a store: in many processes, resumable, every item on record.

The settings of an embedding job.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from xbt.data.captions import CaptionSource, require_unique
from xbt.data.image_collection import ImageCollection, open_captions, open_images
from xbt.data.items import ItemSource, ListedTexts
from xbt.embedding.checks import (
    clear,
    describe,
    require_free_space,
    require_same_job,
    require_same_source,
    require_writable,
)
from xbt.embedding.plan import ShardPlan, Task
from xbt.embedding.rejected import (
    REJECTED,
    RETRIED,
    RejectionLimit,
    chosen,
    note_repeated,
    refuse_streams,
    still_rejected,
    take_over,
    write_records,
)
from xbt.embedding.work import embed_tasks
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError, DataError
from xbt.processes import Team, cores_per_process, start_processes
from xbt.run_dir import RunDirectory
from xbt.store import EmbeddingStore, StoreBuilder

MAY_CHANGE = ("batch_size", "num_workers", "compile", "retry_rejected", "max_rejected")
"""Settings that may be others when a job is continued: they change at most the last digits of a vector, or
what is done about rejected items."""


@dataclass
class EmbedConfig:
    """Embed images or captions into a store, with any number of processes; a killed job continues.

    The output directory is the store (open it with ``xbt.EmbeddingStore.open``), with ``rejected.jsonl``
    (what could not be embedded, and why) and ``notes.jsonl`` (what was converted or dropped to embed it)
    beside it.
    """

    encoder: str
    """The encoder, such as open_clip:ViT-B-32-quickgelu/openai."""
    output_dir: str
    """Where the store goes; with several machines, on a file system that all of them see."""
    images: ImageCollection | None = None
    """The images to embed, or ..."""
    captions: CaptionSource | None = None
    """... the captions; WebDataset tars will do here as well."""
    shard_size: int = 10_000
    """Items per shard of the store, at most: what a killed job loses per process. Of a list that several
    processes share, so many fewer that all of them have equal shares, but not below 256."""
    batch_size: int = 256
    """Items per forward pass. It may change when a job is continued."""
    num_workers: int | None = None
    """Processes that decode images or tokenise texts, for each process that embeds; chosen by the cores where
    it is left out."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the vectors on disk."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass."""
    compile: bool = False
    """Compile the towers with torch.compile: slower to start, faster for millions of items on a GPU."""
    retry_rejected: bool = False
    """Try again what was rejected, also of a finished job: images may have been unreadable for a while. What
    can be embedded now is appended to the store. Not with streams."""
    max_rejected: float | None = None
    """Stop when more than this share of at least 100 items was rejected; what is done is kept."""
    overwrite: bool = False
    """Start afresh in an output directory that holds another job."""

    def __post_init__(self) -> None:
        """Checks the values.

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
        for name, least in (("shard_size", 1), ("batch_size", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} must be at least {least}, got {value}")
        if self.max_rejected is not None and not 0 <= self.max_rejected < 1:
            raise ConfigError(f"--max_rejected is a share from 0 to below 1, got {self.max_rejected}")

    def open_source(self) -> ItemSource:
        """Opens the images or captions; nothing is decoded yet.

        Raises:
            DataError: If they cannot be used.
            ConfigError: If what was rejected of streams is to be tried again.
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
    """How a source becomes a store.

    Attributes:
        shard_size: Entries of the source per shard.
        batch_size: Items per forward pass.
        dtype: ``"float16"`` or ``"float32"``, on disk.
        num_workers: Decoding processes; ``None`` chooses.
        retry_rejected: Whether to try again, at the end, what was rejected.
        max_rejected: The share of items that may be rejected; ``None`` is no limit.
    """

    shard_size: int = 10_000
    batch_size: int = 256
    dtype: str = "float16"
    num_workers: int | None = None
    retry_rejected: bool = False
    max_rejected: float | None = None


def embed(config: EmbedConfig) -> EmbeddingStore:
    """Embeds images or captions into a store.

    Every process that ``accelerate launch`` or ``torchrun`` started calls this. Shards are written one by
    one; a job that was killed or ran out of disk continues where it was when the same command is given again,
    with any number of processes, and ends with the store of one that was not.

    Args:
        config: What to do.

    Returns:
        The finished store, open in every process.

    Raises:
        XbtError: If a setting, the source, the encoder or the directory cannot be used, or the encoder gives
            NaN. Images that cannot be decoded are no error; they are listed in ``rejected.jsonl``.
    """
    path = Path(config.output_dir)
    team = Team(start_processes(), path)
    run = team.together(lambda: RunDirectory(path, config, config.overwrite, MAY_CHANGE))
    source = team.together(config.open_source)
    team.main_alone(lambda: require_writable(path))
    encoder = team.together(lambda: _load(config, team))

    def prepare() -> None:
        if config.overwrite:
            clear(path)
        run.prepare()

    team.main_alone(prepare)
    settings = JobSettings(
        config.shard_size,
        config.batch_size,
        config.dtype,
        config.num_workers,
        config.retry_rejected,
        config.max_rejected,
    )
    return embed_source(team, source, encoder, path, settings)


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
    """Embeds texts into a store, in all processes of the run that calls it; see :func:`embed`.

    Args:
        encoder: The encoder, in every process.
        texts: n texts, the same in every process.
        ids: n unique ids.
        path: The store's directory. A finished store of the same texts is returned as it is.
        shard_size: Texts per shard.
        batch_size: Texts per forward pass.
        dtype: ``"float16"`` or ``"float32"``, on disk.
        overwrite: Drop a store of other texts that is there.

    Returns:
        The store, with the texts as column ``caption``.

    Raises:
        DataError: If ids and texts do not go together, a text is blank, or the store holds other texts.
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
        team.main_alone(lambda: clear(directory))
    return embed_source(team, source, encoder, directory, JobSettings(shard_size, batch_size, dtype))


def embed_source(
    team: Team, source: ItemSource, encoder: DualEncoder, path: Path, settings: JobSettings
) -> EmbeddingStore:
    """Embeds a source into a store; every process calls it.

    Args:
        team: The processes.
        source: What to embed, the same in every process.
        encoder: With what.
        path: The store's directory.
        settings: How.

    Returns:
        The finished store.

    Raises:
        XbtError: See :func:`embed`.
    """
    _embed(team, source, encoder, path, settings)
    if settings.retry_rejected:
        places = team.main_alone(lambda: still_rejected(path, source))
        if places:
            again = replace(settings, max_rejected=None)
            _embed(team, chosen(source, places), encoder, path / RETRIED, again)
        limit = RejectionLimit(settings.max_rejected, streams=False)
        team.main_alone(lambda: _take_over(path, len(places), limit))
    return team.together(lambda: EmbeddingStore.open(path))


def _embed(team: Team, source: ItemSource, encoder: DualEncoder, path: Path, settings: JobSettings) -> None:
    """Makes a store of a source, or of what is left of it; every process calls this."""
    builder = StoreBuilder(path, modality=source.modality, space=encoder.space, dtype=settings.dtype)
    job = describe(source, settings.shard_size, team.count)

    def prepare() -> tuple[list[Task], dict[str, Any], int]:
        builder.prepare()
        agreed = require_same_job(path, job, builder)
        team.clear()
        if builder.finished:
            return [], agreed, 0
        committed, plan = builder.committed(), ShardPlan(source, agreed["items_per_shard"])
        tasks = plan.remaining(committed)
        require_free_space(path, plan.entries(tasks), encoder.dim, settings.dtype)
        return tasks, agreed, sum(record.count for record in committed.values())

    tasks, agreed, before = team.main_alone(prepare)
    team.together(lambda: require_same_source(team.rank, job, agreed))
    plan = ShardPlan(source, agreed["items_per_shard"])
    limit = RejectionLimit(settings.max_rejected, source.length is None)
    workers = settings.num_workers
    if workers is None:
        workers = choose_workers(encoder, cores_per_process(team.state))
    share = tasks[team.rank :: team.count]
    began = time.monotonic()

    def work() -> None:
        with team.alarming():
            embed_tasks(team, plan, share, encoder, builder, settings.batch_size, workers, limit)
            team.wait()

    team.together(work)
    team.main_alone(team.clear)
    if settings.retry_rejected:
        limit.share = None  # what is tried again is only counted then
    team.main_alone(lambda: _finish(builder, plan, time.monotonic() - began, before, limit))


def _load(config: EmbedConfig, team: Team) -> DualEncoder:
    encoder = load_encoder(config.encoder, team.state.device)
    encoder.precision = config.precision
    return encoder.compile_towers() if config.compile else encoder


def choose_workers(encoder: DualEncoder, cores: int) -> int:
    """Number of processes that decode ahead, for each one that embeds and has so many cores."""
    if encoder.device.type != "cpu":
        return min(cores, 16)
    # On a CPU the model needs the cores itself; one process that reads ahead pays as soon as there are two.
    return max(1, cores // 4) if cores > 1 else 0


def _finish(
    builder: StoreBuilder, plan: ShardPlan, seconds: float, before: int, limit: RejectionLimit
) -> None:
    if builder.finished:
        print(f"{builder.path} is finished already: {len(EmbeddingStore.open(builder.path))} vectors")
        return
    builder.leave_out_repeated(note_repeated)
    committed = builder.committed()
    # Before the store is declared whole: a kill in between must not lose them.
    rejected, notes = write_records(builder.path, committed)
    total = sum(record.count for record in committed.values())
    replace(limit, entries=total + rejected, rejected=rejected).require(f"{REJECTED} says why")
    store = builder.finish(plan.names(committed))
    made = len(store) - before
    what = f"{plan.source.modality}s"
    rest = f", {before} in earlier runs" if before else ""
    print(
        f"embedded {made} {what} in {seconds:.1f} s, {made / max(seconds, 1e-9):.1f} per second{rest}; "
        f"rejected {rejected}, with a note {notes} → {builder.path}"
    )
    if not len(store):
        warnings.warn(f"none of {rejected} {what} could be embedded; {REJECTED} says why", stacklevel=2)


def _take_over(path: Path, tried: int, limit: RejectionLimit) -> None:
    if not tried:
        print(f"nothing is left to try again: {path} has every item that was rejected")
        return
    left = take_over(path)
    print(f"tried {tried} rejected items again: {tried - left} embedded, rejected {left} → {path}")
    total = len(EmbeddingStore.open(path)) + left
    replace(limit, entries=total, rejected=left).require(f"{REJECTED} says why")
