"""One process's share of a job: entries in, shards out."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from tqdm import tqdm

from xbt.embedding.plan import LAST, Batch, ShardPlan, Task
from xbt.embedding.rejected import RejectionLimit, as_extra
from xbt.encoders import DualEncoder
from xbt.errors import TruncationWarning
from xbt.images import ImageSource
from xbt.processes import Team
from xbt.store import StoreBuilder


def embed_tasks(
    team: Team,
    plan: ShardPlan,
    tasks: list[Task],
    encoder: DualEncoder,
    builder: StoreBuilder,
    batch_size: int,
    workers: int,
    limit: RejectionLimit,
) -> None:
    """Embeds and writes some shards, until they are done or another process has given up.

    Args:
        team: The processes.
        plan: The shards of the source.
        tasks: This process's share.
        encoder: With what.
        builder: Where the shards go.
        batch_size: Items per forward pass.
        workers: Processes that decode images or tokenise texts.
        limit: How much may be rejected.

    Raises:
        XbtError: If the encoder gives NaN, a shard cannot be written, or too much was rejected.
    """
    if not tasks:
        return
    with _Writer(team, plan, tasks, builder, limit) as writer:
        if plan.source.modality == "image":
            _embed_images(team, plan.batches(tasks, batch_size), encoder, writer, workers)
        else:
            _embed_texts(team, plan.batches(tasks, plan.shard_size), encoder, writer, batch_size, workers)


def _embed_images(
    team: Team, batches: Iterator[Batch], encoder: DualEncoder, writer: _Writer, workers: int
) -> None:
    waiting: deque[Batch] = deque()

    def images() -> Iterator[Sequence[ImageSource]]:
        # Read ahead of the results, so that decoding never pauses where a shard ends.
        for batch in batches:
            if team.stopped:
                return
            waiting.append(batch)
            if batch.items:
                yield [item.value for item in batch.items]

    for result in encoder.encode_image_batches(images(), num_workers=workers):
        while not waiting[0].items:
            writer.add(waiting.popleft())
        writer.add(waiting.popleft(), result.vectors, result.kept, result.rejected, result.notes)
    while waiting:
        writer.add(waiting.popleft())


def _embed_texts(
    team: Team, shards: Iterator[Batch], encoder: DualEncoder, writer: _Writer, batch_size: int, workers: int
) -> None:
    # A shard at a time: the encoder itself sorts texts by length and batches them.
    said = False
    for shard in shards:
        if team.stopped:
            return
        texts = [str(item.value) for item in shard.items]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vectors = encoder.encode_texts(texts, batch_size, num_workers=workers)
        for warning in caught:
            # That texts were cut is said of the first shard where it happened, not of each of thousands.
            cut = issubclass(warning.category, TruncationWarning)
            if not (cut and said):
                warnings.warn(f"shard {shard.shard}: {warning.message}", warning.category, stacklevel=2)
            said = said or cut
        writer.add(shard, vectors, range(len(texts)))


class _Writer:
    """Gathers the batches of a shard and writes it when it is complete."""

    def __init__(
        self,
        team: Team,
        plan: ShardPlan,
        tasks: list[Task],
        builder: StoreBuilder,
        limit: RejectionLimit,
    ) -> None:
        self._builder, self._limit = builder, limit
        self._columns = plan.source.parts[0].columns
        self._streams = plan.source.length is None
        share = f" (process 1 of {team.count})" if team.count > 1 else ""
        self._bar = tqdm(
            total=plan.entries(tasks),
            desc=f"embedding{share}",
            unit=plan.source.modality,
            disable=not team.is_main,
        )
        self._start_shard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def _start_shard(self) -> None:
        self._vectors: list[Tensor] = []
        self._ids: list[str] = []
        self._metadata: dict[str, list[str]] = {name: [] for name in self._columns}
        self._rejected: list[tuple[str, str]] = []
        self._notes: list[tuple[str, str]] = []

    def add(
        self,
        batch: Batch,
        vectors: Tensor | None = None,
        kept: Sequence[int] = (),
        rejected: Mapping[int, str] | None = None,
        notes: Mapping[int, str] | None = None,
    ) -> None:
        """Takes a batch with its (m, dim) vectors and the positions of the m items that they belong to."""
        if vectors is not None:
            self._vectors.append(vectors)
        for position in kept:
            item = batch.items[position]
            self._ids.append(item.id)
            for name in self._columns:
                self._metadata[name].append(item.metadata[name])
        new = [(each.id, each.reason) for each in batch.rejected]
        new += [(batch.items[at].id, reason) for at, reason in sorted((rejected or {}).items())]
        self._limit.add(len(batch.items) + len(batch.rejected), new)
        self._rejected += new
        self._notes += [(batch.items[at].id, note) for at, note in sorted((notes or {}).items())]
        if batch.ends_shard:
            self._write(batch)
        self._bar.update(len(batch.items) + len(batch.rejected))

    def _write(self, batch: Batch) -> None:
        self._leave_out_repeated()
        extra = as_extra(self._rejected, self._notes)
        if self._streams and batch.ends_part:
            extra[LAST] = True
        rows = torch.cat(self._vectors) if self._ids else torch.zeros(0, self._builder.header.dim)
        self._builder.write(batch.shard, rows, self._ids, self._metadata, extra)
        self._start_shard()

    def _leave_out_repeated(self) -> None:
        # Streams promise no unique ids; those that another shard has are found when all are there.
        first: dict[str, int] = {}
        for row, name in enumerate(self._ids):
            if first.setdefault(name, row) != row:
                self._rejected.append((name, f"the id {name!r} is already that of an item before it"))
        if len(first) < len(self._ids):
            keep = list(first.values())
            self._vectors = [torch.cat(self._vectors)[keep]]
            self._ids = list(first)
            self._metadata = {name: [v[row] for row in keep] for name, v in self._metadata.items()}
