"""One process's share of a backfill: images by id in, vectors out, a chunk at a time."""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from numpy.typing import NDArray

from xbt.data.files import IMAGE_SUFFIXES
from xbt.data.items import Item, ItemSource, ListedImages, readable
from xbt.data.tars import TarImages
from xbt.encoders import DualEncoder
from xbt.errors import ConfigError, DataError
from xbt.images import ImageSource
from xbt.processes import Team


class ItemsById:
    """Images that are looked up one by one; nothing is decoded, and files are opened on demand.

    Attributes:
        name: Name of the source, for messages.
    """

    def __init__(self, source: ItemSource) -> None:
        """List the images of a source, which can be read in any order."""
        self.name = source.name
        self._readers: dict[str, tuple[Callable[[int], ImageSource], int]] = {}
        for part in source.parts:
            if isinstance(part, ListedImages):
                listed = _from_list(part)
                self._readers |= {name: (listed, row) for row, name in enumerate(part.ids)}
            elif isinstance(part, TarImages):
                names, places = _tar_members(part)
                read = _from_tar(part.url, places)
                self._readers |= {name: (read, row) for row, name in enumerate(names)}
            else:
                raise ConfigError(
                    f"{source.name} is a stream, which can only be read in its own order; leave out streaming"
                )

    def __contains__(self, item: str) -> bool:
        return item in self._readers

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, item: str) -> ImageSource:
        """The undecoded image of an item."""
        read, place = self._readers[item]
        return read(place)


def _from_list(part: ListedImages) -> Callable[[int], ImageSource]:
    def read(row: int) -> ImageSource:
        entry = next(part.read(row, row + 1))
        assert isinstance(entry, Item)
        return entry.value

    return read


def _from_tar(url: str, places: list[tuple[int, int]]) -> Callable[[int], ImageSource]:
    def read(row: int) -> ImageSource:
        start, size = places[row]
        try:
            with Path(url).open("rb") as file:
                file.seek(start)
                return file.read(size)
        except FileNotFoundError as error:
            raise DataError(f"{url} is gone since the job began; put it back and run again") from error

    return read


def _tar_members(part: TarImages) -> tuple[list[str], list[tuple[int, int]]]:
    """Ids of a tar's images, as the embedding job names them, with offset and size of their bytes."""
    path = Path(part.url)
    if path.suffix.lower() != ".tar" or "://" in part.url:
        raise ConfigError(f"{part.url} cannot be read in any order; give uncompressed tars on this machine")
    places: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                key, _, kind = base.partition(".")
                if not member.isfile() or not key or f".{kind.lower()}" not in IMAGE_SUFFIXES:
                    continue
                whole = f"{folder}/{key}" if folder else key
                # Of two images of one sample the first counts, as in the embedding job.
                places.setdefault(readable(f"{part.name}/{whole}"), (member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{part.url} cannot be read ({error}); fix it, or leave it out") from error
    return list(places), list(places.values())


@dataclass
class Embedded:
    """The (n, dim) vectors of a chunk, or of one process's share of it, and their places in the chunk.

    ``rejected`` holds the reasons of the other items by place.
    """

    places: list[int]
    vectors: NDArray[np.float32]
    rejected: dict[int, str] = field(default_factory=dict)


class RateLimiter:
    """Waits where a job would be faster than ``per_second`` items; ``None`` never waits.

    Time spent on other things is not made up for by a burst.
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
    chunks: Sequence[Sequence[str]],
    share: tuple[int, int],
    batch_size: int,
    workers: int,
    limiter: RateLimiter,
) -> Generator[Embedded, None, None]:
    """Embed every n-th item of every chunk of ids; images are decoded ahead, across chunks.

    ``share`` is the number of this process, and the number of processes.

    Yields:
        One result per chunk.
    """
    rank, count = share

    def batches() -> Iterator[list[ImageSource]]:
        for chunk in chunks:
            for places in _batches(chunk, items, rank, count, batch_size):
                yield [items[chunk[place]] for place in places]

    results = encoder.encode_image_batches(batches(), workers)
    for chunk in chunks:
        missing = [place for place in range(rank, len(chunk), count) if chunk[place] not in items]
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


def _batches(chunk: Sequence[str], items: ItemsById, rank: int, count: int, size: int) -> Iterator[list[int]]:
    """A process's places in a chunk, batch by batch."""
    mine = [place for place in range(rank, len(chunk), count) if chunk[place] in items]
    return (mine[start : start + size] for start in range(0, len(mine), size))


def gathered(team: Team, share: Embedded) -> Embedded:
    """Gather a chunk's items from all processes, in the chunk's order."""
    shares: list[Embedded] = gather_object([share]) if team.count > 1 else [share]
    places = [place for one in shares for place in one.places]
    order = sorted(range(len(places)), key=places.__getitem__)
    vectors = np.concatenate([one.vectors for one in shares])[order]
    rejected = {place: reason for one in shares for place, reason in one.rejected.items()}
    return Embedded([places[row] for row in order], vectors, dict(sorted(rejected.items())))
