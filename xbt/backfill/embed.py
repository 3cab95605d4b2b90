"""One process's share of a backfill: ids in, vectors out, a chunk at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from accelerate.utils import gather_object
from numpy.typing import NDArray

from xbt.backfill.items import ItemsById
from xbt.backfill.plan import Chunk
from xbt.encoders import DualEncoder
from xbt.images import ImageSource
from xbt.processes import Team


@dataclass
class Embedded:
    """The vectors of a chunk, or of one process's share of it.

    Attributes:
        places: Places in the chunk of the items that were embedded.
        vectors: (n, dim) float32 of these.
        rejected: Place → reason, of the other items.
    """

    places: list[int]
    vectors: NDArray[np.float32]
    rejected: dict[int, str] = field(default_factory=dict)


class RateLimiter:
    """Waits where a job would be faster than it may.

    Time spent on other things is not made up for by a burst.

    Args:
        per_second: Items per second; ``None`` never waits.
        clock: Time in seconds, from any start.
        sleep: Waits so many seconds.

    Example:
        >>> limiter = RateLimiter(100)
        >>> for batch in batches:
        ...     encode(batch)
        ...     limiter.wait(len(batch))
    """

    def __init__(
        self,
        per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._per_second, self._clock, self._sleep = per_second, clock, sleep
        self._free_at = clock()

    def wait(self, items: int) -> None:
        """Wait until this many items may be done since the last call."""
        if self._per_second is None:
            return
        now = self._clock()
        # The later of the two: an idle hour gives no credit.
        self._free_at = max(self._free_at + items / self._per_second, now)
        if self._free_at > now:
            self._sleep(self._free_at - now)


def embed_chunks(
    encoder: DualEncoder,
    items: ItemsById,
    chunks: Sequence[Chunk],
    share: tuple[int, int],
    batch_size: int,
    workers: int,
    limiter: RateLimiter,
) -> Generator[Embedded, None, None]:
    """Embed every n-th item of every chunk; images are decoded ahead, across chunks.

    Args:
        encoder: The new encoder.
        items: The images.
        chunks: Items to embed.
        share: Number of this process, and number of processes.
        batch_size: Images per forward pass.
        workers: Processes that decode.
        limiter: Limits the rate of this process.

    Yields:
        One result per chunk.

    Raises:
        DataError: If the encoder gives NaN, or the system rather than an image is at fault.
    """
    rank, count = share

    def batches() -> Iterator[list[ImageSource]]:
        for chunk in chunks:
            for places in _batches(chunk, items, rank, count, batch_size):
                yield [items[chunk.ids[place]] for place in places]

    results = encoder.encode_image_batches(batches(), workers)
    for chunk in chunks:
        missing = [place for place in range(rank, len(chunk.ids), count) if chunk.ids[place] not in items]
        done = Embedded([], np.zeros((0, encoder.dim), dtype=np.float32))
        done.rejected = dict.fromkeys(missing, f"there is no such image in {items.name}")
        vectors = [done.vectors]
        for places in _batches(chunk, items, rank, count, batch_size):
            batch = next(results)
            vectors.append(batch.vectors.numpy())
            done.places += [places[kept] for kept in batch.kept]
            done.rejected |= {places[at]: reason for at, reason in batch.rejected.items()}
            limiter.wait(len(places))
        done.vectors = np.concatenate(vectors)
        yield done


def _batches(chunk: Chunk, items: ItemsById, rank: int, count: int, size: int) -> Iterator[list[int]]:
    """A process's places in a chunk, batch by batch."""
    mine = [place for place in range(rank, len(chunk.ids), count) if chunk.ids[place] in items]
    return (mine[start : start + size] for start in range(0, len(mine), size))


def gathered(team: Team, share: Embedded) -> Embedded:
    """Gather a chunk's items from all processes, in the chunk's order."""
    shares: list[Embedded] = gather_object([share]) if team.count > 1 else [share]
    places = [place for one in shares for place in one.places]
    order = sorted(range(len(places)), key=places.__getitem__)
    vectors = np.concatenate([one.vectors for one in shares])[order]
    rejected = {place: reason for one in shares for place, reason in one.rejected.items()}
    return Embedded([places[row] for row in order], vectors, dict(sorted(rejected.items())))
