"""The images of an index's items, by id, in any order."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from xbt.data.files import IMAGE_SUFFIXES
from xbt.data.image_collection import ImageCollection, open_images
from xbt.data.items import Item, ItemSource, ListedImages, readable
from xbt.data.tars import TarImages
from xbt.errors import ConfigError, DataError
from xbt.images import ImageSource


class ItemsById:
    """Images that are looked up one by one; nothing is decoded, and files are opened on demand.

    Attributes:
        name: Name of the source, for messages.
    """

    def __init__(self, source: ItemSource) -> None:
        """List the images of a source.

        Args:
            source: The images.

        Raises:
            ConfigError: If it can only be read in its own order.
            DataError: If a tar cannot be read.
        """
        self.name = source.name
        self._readers: dict[str, tuple[Callable[[int], ImageSource], int]] = {}
        for part in source.parts:
            if isinstance(part, ListedImages):
                self._enter(part.ids, _from_list(part), range(len(part.ids)))
            elif isinstance(part, TarImages):
                names, places = _tar_members(part)
                self._enter(names, _from_tar(part.url, places), range(len(names)))
            else:
                raise ConfigError(
                    f"{source.name} is a stream, which can only be read in its own order; leave out streaming"
                )

    def __contains__(self, item: str) -> bool:
        return item in self._readers

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, item: str) -> ImageSource:
        """The undecoded image of an item.

        Raises:
            KeyError: If there is none.
        """
        read, place = self._readers[item]
        return read(place)

    def _enter(self, names: Iterable[str], read: Callable[[int], ImageSource], places: Iterable[int]) -> None:
        for name, place in zip(names, places, strict=True):
            self._readers[name] = (read, place)


def open_items(images: ImageCollection) -> ItemsById:
    """Open the images that an index's items were made of.

    Args:
        images: Their source, with the ids of :func:`~xbt.data.image_collection.open_images`.

    Raises:
        ConfigError: If they can only be read in their own order.
        DataError: If there is no such source, or it has no image.
    """
    return ItemsById(open_images(images))


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
