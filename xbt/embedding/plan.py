"""How a source is cut into shards and batches: by its own order alone, whoever does the work and when."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from xbt.data.items import Entry, Item, ItemSource, Rejected, SourceShard

LAST = "last"
"""Key in the record of a stream's last shard."""
_CHUNK_DIGITS = 5
_LEAST = 256  # a smaller shard is not worth its files


class Record(Protocol):
    """What is kept of a written shard."""

    @property
    def extra(self) -> Mapping[str, Any]:
        """What the job noted beside it."""
        ...


class Task(NamedTuple):
    """Work for one process: some consecutive shards of one part.

    Attributes:
        part: Position of the part in its source.
        start: First entry, a multiple of the shard size.
        stop: Entry to stop before; ``None`` means to the end of a stream, over any number of shards.
    """

    part: int
    start: int
    stop: int | None


@dataclass
class Batch:
    """Entries that are embedded together; all belong to one shard.

    Attributes:
        shard: Name of the shard.
        items: The items.
        rejected: Entries that are known to be unusable.
        ends_shard: Whether the shard is complete with this batch.
        ends_part: Whether the part is.
    """

    shard: str
    items: list[Item] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    ends_shard: bool = False
    ends_part: bool = False


def even_shard_size(shard_size: int, entries: int | None, processes: int) -> int:
    """The size at which the shards of a list can be dealt out to all processes alike.

    Args:
        shard_size: What was asked for, and the most it will be.
        entries: Entries of the list; ``None`` for streams, whose parts are dealt out instead.
        processes: How many there are.

    Returns:
        Entries per shard; not below 256 unless that was asked for.
    """
    if entries is None or processes == 1:
        return shard_size
    rounds = -(-entries // (shard_size * processes))
    return min(shard_size, max(_LEAST, -(-entries // max(1, rounds * processes))))


class ShardPlan:
    """The shards of a source.

    Args:
        source: What is embedded: one part with a length, or streams.
        shard_size: Entries per shard.
    """

    def __init__(self, source: ItemSource, shard_size: int) -> None:
        self.source, self.shard_size = source, shard_size
        self._streams = source.length is None
        self._count = 0 if source.length is None else max(1, -(-source.length // shard_size))

    def name(self, part: int, chunk: int) -> str:
        """``"007"`` of at most a thousand shards; ``"03_00007"`` for the eighth of the fourth stream."""
        if not self._streams:
            return f"{chunk:0{len(str(self._count - 1))}d}"
        return f"{part:0{len(str(len(self.source.parts) - 1))}d}_{chunk:0{_CHUNK_DIGITS}d}"

    def remaining(self, committed: Mapping[str, Record]) -> list[Task]:
        """What is left to do once these shards are written; an empty list means that the source is done.

        Of lists only the names are looked at, and of each stream the record of its last shard.
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
        """The names of all shards, in order, once nothing remains."""
        if not self._streams:
            return [self.name(0, chunk) for chunk in range(self._count)]
        return sorted(committed)

    def entries(self, tasks: list[Task]) -> int | None:
        """How many entries these tasks have, or ``None`` for streams."""
        if self._streams:
            return None
        length = self.source.length or 0
        return sum(min(task.stop or length, length) - task.start for task in tasks)

    def batches(self, tasks: list[Task], batch_size: int) -> Iterator[Batch]:
        """Reads the tasks' entries in order, undecoded, in batches that never straddle shards.

        Args:
            tasks: This process's share.
            batch_size: Items per batch; the last of a shard may have fewer.

        Yields:
            Every shard has at least one batch, be it without items.
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
    # One entry is looked at ahead: whoever writes a shard must know whether it is its part's last.
    upcoming = next(entries, None)
    taken, chunk = 0, 0
    while True:
        batch = Batch(name(chunk))
        while upcoming is not None and taken < shard_size and len(batch.items) < batch_size:
            if isinstance(upcoming, Item):
                batch.items.append(upcoming)
            else:
                batch.rejected.append(upcoming)
            taken += 1
            upcoming = next(entries, None)
        batch.ends_part = upcoming is None
        batch.ends_shard = batch.ends_part or taken == shard_size
        yield batch
        if batch.ends_part:
            return
        if batch.ends_shard:
            taken, chunk = 0, chunk + 1
