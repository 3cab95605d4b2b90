"""Shards and batches of a source, and the work of one process: reads entries, embeds them, writes shards."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from xbt.data.items import Entry, Item, ItemSource, Rejected, SourceShard
from xbt.embedding.rejected import RejectionLimit, as_extra
from xbt.encoders import DualEncoder
from xbt.errors import TruncationWarning
from xbt.images import ImageSource
from xbt.processes import Team
from xbt.store.builder import StoreBuilder
from xbt.store.layout import ShardRecord

LAST = "last"
"""Key in the record of a stream's last shard."""
_CHUNK_DIGITS = 5
_MIN_SHARD_SIZE = 256  # smaller shards cost more in files than they gain


class Task(NamedTuple):
    """Work for one process: the entries ``start`` to ``stop``, in whole shards, of one part of a source.

    ``stop`` is ``None`` for the end of a stream, over any number of shards.
    """

    part: int
    start: int
    stop: int | None


@dataclass
class Batch:
    """Entries of one shard that are embedded together, which may complete the shard and its part."""

    shard: str
    items: list[Item] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    ends_shard: bool = False
    ends_part: bool = False


def even_shard_size(shard_size: int, entries: int | None, processes: int) -> int:
    """Choose a shard size at which all processes get equal shares of a list.

    It is at most ``shard_size``, and below 256 only if ``shard_size`` is. ``entries`` is ``None`` for
    streams, whose parts are distributed instead.
    """
    if entries is None or processes == 1:
        return shard_size
    rounds = -(-entries // (shard_size * processes))
    return min(shard_size, max(_MIN_SHARD_SIZE, -(-entries // max(1, rounds * processes))))


class ShardPlan:
    """The shards of a source, which is one part of known length, or streams.

    They are determined only by the order of its entries, not by processes or time.
    """

    def __init__(self, source: ItemSource, shard_size: int) -> None:
        self.source, self.shard_size = source, shard_size
        self._streams = source.length is None
        self._count = 0 if source.length is None else max(1, -(-source.length // shard_size))

    def name(self, part: int, chunk: int) -> str:
        """Name a shard: ``"007"`` for a list, ``"03_00007"`` for the eighth shard of the fourth stream."""
        if not self._streams:
            return f"{chunk:0{len(str(self._count - 1))}d}"
        return f"{part:0{len(str(len(self.source.parts) - 1))}d}_{chunk:0{_CHUNK_DIGITS}d}"

    def remaining(self, committed: Mapping[str, ShardRecord]) -> list[Task]:
        """List the work that remains after these shards; an empty list means that the source is done.

        For a list only the names matter, and for a stream also the record of its last shard.
        """
        size = self.shard_size
        if not self._streams:
            return [
                Task(0, chunk * size, (chunk + 1) * size)
                for chunk in range(self._count)
                if self.name(0, chunk) not in committed
            ]
        tasks = []
        for part in range(len(self.source.parts)):
            chunk = 0
            while self.name(part, chunk) in committed:
                chunk += 1
            if not chunk or not committed[self.name(part, chunk - 1)].extra.get(LAST):
                tasks.append(Task(part, chunk * size, None))
        return tasks

    def names(self, committed: Collection[str]) -> list[str]:
        """Names of all shards in order, once nothing remains."""
        if not self._streams:
            return [self.name(0, chunk) for chunk in range(self._count)]
        return sorted(committed)

    def entries(self, tasks: list[Task]) -> int | None:
        """Count the entries of these tasks; ``None`` for streams."""
        if self._streams:
            return None
        length = self.source.length or 0
        return sum(min(task.stop or length, length) - task.start for task in tasks)

    def batches(self, tasks: list[Task], batch_size: int) -> Iterator[Batch]:
        """Read the entries of tasks in order, undecoded, in batches within one shard.

        Every shard has at least one batch, even without items; its last one may be smaller.
        """
        for task in tasks:
            part: SourceShard = self.source.parts[task.part]
            first = task.start // self.shard_size

            def name(chunk: int, number: int = task.part, first: int = first) -> str:
                return self.name(number, first + chunk)

            yield from _cut(part.read(task.start, task.stop), self.shard_size, batch_size, name)


def _cut(
    entries: Iterator[Entry], shard_size: int, batch_size: int, name: Callable[[int], str]
) -> Iterator[Batch]:
    # Read one entry ahead: the writer of a shard must know whether it is the last of its part.
    upcoming = next(entries, None)
    count, chunk = 0, 0
    while True:
        batch = Batch(name(chunk))
        while upcoming is not None and count < shard_size and len(batch.items) < batch_size:
            if isinstance(upcoming, Item):
                batch.items.append(upcoming)
            else:
                batch.rejected.append(upcoming)
            count += 1
            upcoming = next(entries, None)
        batch.ends_part = upcoming is None
        batch.ends_shard = batch.ends_part or count == shard_size
        yield batch
        if batch.ends_part:
            return
        if batch.ends_shard:
            count, chunk = 0, chunk + 1


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
    """Embed and write shards until this process's tasks are done or another process has failed."""
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
