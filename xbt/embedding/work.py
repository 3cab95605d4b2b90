"""Work of one process: reads entries, embeds them and writes shards."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor
from tqdm import tqdm

from xbt.embedding.plan import LAST, Batch, ShardPlan, Task
from xbt.embedding.rejected import RejectionLimit, as_extra
from xbt.encoders import DualEncoder
from xbt.errors import TruncationWarning
from xbt.images import ImageSource
from xbt.processes import Team
from xbt.store.builder import StoreBuilder


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
    """Embed and write shards until this process's tasks are done or another process has failed.

    ``workers`` processes decode images or tokenise texts.
    """
    if not tasks:
        return
    with closing(_Writer(team, plan, tasks, builder, limit)) as writer:
        if plan.source.modality == "image":
            _embed_images(team, plan.batches(tasks, batch_size), encoder, writer, workers)
        else:
            _embed_texts(team, plan.batches(tasks, plan.shard_size), encoder, writer, batch_size, workers)


def _embed_images(
    team: Team, batches: Iterator[Batch], encoder: DualEncoder, writer: _Writer, workers: int
) -> None:
    pending: deque[Batch] = deque()

    def images() -> Iterator[Sequence[ImageSource]]:
        # Batches are read ahead of the results, so that decoding does not pause between shards.
        for batch in batches:
            if team.stopped:
                return
            pending.append(batch)
            if batch.items:
                yield [item.value for item in batch.items]

    for result in encoder.encode_image_batches(images(), num_workers=workers):
        while not pending[0].items:
            writer.add(pending.popleft())
        writer.add(pending.popleft(), result.vectors, result.kept, result.rejected, result.notes)
    while pending:
        writer.add(pending.popleft())


def _embed_texts(
    team: Team, shards: Iterator[Batch], encoder: DualEncoder, writer: _Writer, batch_size: int, workers: int
) -> None:
    # One shard at a time, because the encoder itself sorts texts by length and batches them.
    has_warned = False
    for shard in shards:
        if team.stopped:
            return
        texts = [str(item.value) for item in shard.items]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vectors = encoder.encode_texts(texts, batch_size, num_workers=workers)
        for warning in caught:
            # Warn of truncated texts only once, not for each of thousands of shards.
            is_truncation = issubclass(warning.category, TruncationWarning)
            if not (is_truncation and has_warned):
                warnings.warn(f"shard {shard.shard}: {warning.message}", warning.category, stacklevel=2)
            has_warned = has_warned or is_truncation
        writer.add(shard, vectors, range(len(texts)))


class _Writer:
    """Writer of one shard after another; collects batches until a shard is complete."""

    def __init__(
        self, team: Team, plan: ShardPlan, tasks: list[Task], builder: StoreBuilder, limit: RejectionLimit
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

    def close(self) -> None:
        """Close the progress bar."""
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
        """Add a batch with its (m, dim) vectors and the positions of their m items."""
        if vectors is not None:
            self._vectors.append(vectors)
        for position in kept:
            item = batch.items[position]
            self._ids.append(item.id)
            for name in self._columns:
                self._metadata[name].append(item.metadata[name])
        all_rejected = [(entry.id, entry.reason) for entry in batch.rejected]
        all_rejected += [(batch.items[at].id, reason) for at, reason in sorted((rejected or {}).items())]
        self._limit.add(len(batch.items) + len(batch.rejected), all_rejected)
        self._rejected += all_rejected
        self._notes += [(batch.items[at].id, note) for at, note in sorted((notes or {}).items())]
        if batch.ends_shard:
            self._write(batch)
        self._bar.update(len(batch.items) + len(batch.rejected))

    def _write(self, batch: Batch) -> None:
        self._drop_repeated()
        extra = as_extra(self._rejected, self._notes)
        if self._streams and batch.ends_part:
            extra[LAST] = True
        rows = torch.cat(self._vectors) if self._ids else torch.zeros(0, self._builder.header.dim)
        self._builder.write(batch.shard, rows, self._ids, self._metadata, extra)
        self._start_shard()

    def _drop_repeated(self) -> None:
        # Ids of a stream may repeat. Repetitions across shards are removed when the store is finished.
        first: dict[str, int] = {}
        for row, name in enumerate(self._ids):
            if first.setdefault(name, row) != row:
                self._rejected.append((name, f"the id {name!r} is already that of an earlier item"))
        if len(first) < len(self._ids):
            keep = list(first.values())
            self._vectors = [torch.cat(self._vectors)[keep]]
            self._ids = list(first)
            self._metadata = {name: [values[row] for row in keep] for name, values in self._metadata.items()}
