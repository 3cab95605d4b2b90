"""One process's share of a backfill: ids in, vectors out, a chunk at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from accelerate.utils import gather_object
from numpy.typing import NDArray

from xbt.backfilling.items import ItemsById
from xbt.backfilling.pace import Pace
from xbt.embedding.processes import Team
from xbt.encoders import DualEncoder
from xbt.images import ImageSource


@dataclass(frozen=True)
class Chunk:
    """Items that are written to the gallery at once.

    Attributes:
        ids: Which, most urgent first; of the order's stretch those that are not done yet.
        end: The order's position behind the stretch.
    """

    ids: list[str]
    end: int


@dataclass
class Embedded:
    """What became of a chunk, or of one process's share of it.

    Attributes:
        places: Places in the chunk of the items that were embedded.
        vectors: (n, dim) float32 of these.
        rejected: Place → reason, of the others.
    """

    places: list[int]
    vectors: NDArray[np.float32]
    rejected: dict[int, str] = field(default_factory=dict)


def embed_chunks(
    encoder: DualEncoder,
    items: ItemsById,
    chunks: Sequence[Chunk],
    share: tuple[int, int],
    batch_size: int,
    workers: int,
    pace: Pace,
) -> Generator[Embedded, None, None]:
    """Embeds every n-th item of every chunk; images are decoded ahead, across chunks.

    Args:
        encoder: With what.
        items: Where the images are.
        chunks: What to embed.
        share: Number of this process, and how many there are.
        batch_size: Images per forward pass.
        workers: Processes that decode.
        pace: How fast this process may go.

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
        strange = [place for place in range(rank, len(chunk.ids), count) if chunk.ids[place] not in items]
        done = Embedded([], np.zeros((0, encoder.dim), dtype=np.float32))
        done.rejected = dict.fromkeys(strange, f"there is no such image in {items.name}")
        parts = [done.vectors]
        for places in _batches(chunk, items, rank, count, batch_size):
            found = next(results)
            parts.append(found.vectors.numpy())
            done.places += [places[kept] for kept in found.kept]
            done.rejected |= {places[at]: reason for at, reason in found.rejected.items()}
            pace.wait(len(places))
        done.vectors = np.concatenate(parts)
        yield done


def _batches(chunk: Chunk, items: ItemsById, rank: int, count: int, size: int) -> Iterator[list[int]]:
    """A process's places in a chunk, batch by batch."""
    mine = [place for place in range(rank, len(chunk.ids), count) if chunk.ids[place] in items]
    return (mine[start : start + size] for start in range(0, len(mine), size))


def gathered(team: Team, share: Embedded) -> Embedded:
    """A chunk's items of all processes, in the chunk's order."""
    shares: list[Embedded] = gather_object([share]) if team.count > 1 else [share]
    places = [place for each in shares for place in each.places]
    order = sorted(range(len(places)), key=places.__getitem__)
    vectors = np.concatenate([each.vectors for each in shares])[order]
    rejected = {place: why for each in shares for place, why in each.rejected.items()}
    return Embedded([places[row] for row in order], vectors, dict(sorted(rejected.items())))
