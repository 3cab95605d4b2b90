"""Shards and batches of a source: determined only by the order of its entries, not by processes or time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from xbt.data.items import Entry, Item, ItemSource, Rejected, SourceShard
from xbt.store.layout import ShardRecord

LAST = "last"
"""Key in the record of a stream's last shard."""
_CHUNK_DIGITS = 5
_MIN_SHARD_SIZE = 256  # smaller shards cost more in files than they gain


class Task(NamedTuple):
    """Work for one process: consecutive shards of one part.

    Attributes:
        part: Index of the part in its source.
        start: First entry, a multiple of the shard size.
        stop: End of the entries, exclusive; ``None`` means the end of a stream, over any number of shards.
    """

    part: int
    start: int
    stop: int | None


@dataclass
class Batch:
    """Entries of one shard that are embedded together.

    Attributes:
        shard: Name of the shard.
        items: The items.
        rejected: Entries that are known to be unusable.
        ends_shard: Whether the shard is complete with this batch.
        ends_part: Whether the part is complete with this batch.
    """

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
    """The shards of a source.

    Args:
        source: The source: one part of known length, or streams.
        shard_size: Entries per shard.
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
