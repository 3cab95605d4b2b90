"""What a job embeds: items with ids, in parts that can be read from anywhere on."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import numpy as np

from xbt.errors import ConfigError
from xbt.images import ImageSource


class SelectedImages(Sequence[ImageSource]):
    """Some rows of a sequence of images, still unread."""

    def __init__(self, images: Sequence[ImageSource], rows: list[int]) -> None:
        # A selection of a selection looks into the original, so that chains do not grow.
        self._images: Sequence[ImageSource] = images
        self._rows: list[int] = rows
        if isinstance(images, SelectedImages):
            self._images = images._images
            self._rows = [images._rows[row] for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> ImageSource: ...
    @overload
    def __getitem__(self, index: slice) -> SelectedImages: ...
    def __getitem__(self, index: int | slice) -> ImageSource | SelectedImages:
        if isinstance(index, slice):
            return SelectedImages(self._images, self._rows[index])
        return self._images[self._rows[index]]

    def __iter__(self) -> Iterator[ImageSource]:
        return (self._images[row] for row in self._rows)


def choose_subset(count: int, limit: int | None, seed: int) -> list[int]:
    """Chooses ``limit`` of ``count`` positions at random, in ascending order; all where that is not fewer."""
    if seed < 0:
        raise ConfigError(f"seed is {seed}, but must not be negative")
    if limit is None or limit >= count:
        return list(range(count))
    chosen = np.random.default_rng(seed).choice(count, limit, replace=False)
    return [int(position) for position in np.sort(chosen)]


@dataclass(frozen=True)
class Rejected:
    """An item that was left out."""

    id: str
    """Which one."""
    reason: str
    """Why, in a sentence."""


class Item(NamedTuple):
    """One image or text.

    Attributes:
        id: Its name, unique in its source.
        value: The undecoded image, or the text.
        metadata: One value for each of its part's columns.
    """

    id: str
    value: ImageSource
    metadata: dict[str, str]


Entry = Item | Rejected
"""An item, or one that is known to be unusable before anything is decoded."""


class SourceShard(ABC):
    """A sequence of entries that is the same whenever it is read.

    Attributes:
        name: Names it within its source.
        length: Its number of entries, or ``None`` for a stream, whose end is only known when it is reached.
        columns: Names of the items' metadata.
    """

    name: str
    length: int | None = None
    columns: tuple[str, ...] = ()

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Reads entries ``start`` to ``stop`` (or the end) in order, without decoding what comes before."""

    def digest(self) -> str:
        """SHA-256 that tells this part from others: of its ids (and texts), or of what a stream is read from.

        A job continues only while it is the same.
        """
        return digest_of([self.name])


@dataclass(frozen=True)
class ItemSource:
    """Everything that a job embeds.

    Attributes:
        name: What to call it in messages.
        modality: ``"image"`` or ``"text"``.
        parts: One part with a length, or any number of streams.
    """

    name: str
    modality: Literal["image", "text"]
    parts: Sequence[SourceShard]

    @property
    def length(self) -> int | None:
        """Number of entries, or ``None`` where it cannot be known beforehand."""
        lengths = [part.length for part in self.parts]
        return None if None in lengths else sum(length or 0 for length in lengths)

    def digest(self) -> str:
        """SHA-256 over all parts in their order."""
        return hashlib.sha256("".join(part.digest() for part in self.parts).encode()).hexdigest()


class ListedImages(SourceShard):
    """Images that can be read in any order: files, rows of a data set, an array."""

    def __init__(self, ids: Sequence[str], images: Sequence[ImageSource]) -> None:
        """Keeps the lists.

        Args:
            ids: One unique name per image.
            images: One path, PIL image or encoded image each; indexed only when it is its turn. If the first
                is a path, all must be, and they become the column ``image_path``.
        """
        self.name = "images"
        self.length = len(ids)
        self.columns = ("image_path",) if len(ids) and isinstance(images[0], str) else ()
        self._ids, self._images = ids, images

    @property
    def ids(self) -> list[str]:
        """The ids of all images, as :meth:`read` gives them; no image is touched."""
        return [readable(name) for name in self._ids]

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Reads images ``start`` to ``stop`` undecoded."""
        for row in range(*slice(start, stop).indices(len(self._ids))):
            image = self._images[row]
            path = readable(str(image)) if isinstance(image, str) else ""
            metadata = {"image_path": path} if self.columns else {}
            yield Item(readable(self._ids[row]), image, metadata)

    def digest(self) -> str:
        """SHA-256 of the ids in their order."""
        return digest_of(self._ids)


class ListedTexts(SourceShard):
    """Texts in memory. Blank ones and those that are not valid Unicode are on record as rejected."""

    columns = ("caption",)

    def __init__(self, ids: Sequence[str], texts: Sequence[str | None]) -> None:
        """Keeps n ids and n texts; ``None`` stands for a text that the source does not have."""
        self.name = "texts"
        self.length = len(ids)
        self._ids, self._texts = ids, texts

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Reads texts ``start`` to ``stop``, stripped."""
        for row in range(*slice(start, stop).indices(len(self._ids))):
            yield text_entry(self._ids[row], self._texts[row])

    def digest(self) -> str:
        """SHA-256 of the ids and texts in their order."""
        return digest_of(self._ids, [text or "" for text in self._texts])


def text_entry(name: str, text: str | None) -> Entry:
    """A caption as an item, or the reason why it is none."""
    told = (text or "").strip()
    if not told:
        return Rejected(readable(name), "the caption is blank")
    if readable(told) != told:
        return Rejected(readable(name), f"the caption is not valid Unicode: {readable(told)!r}")
    return Item(readable(name), told, {"caption": told})


def readable(text: str) -> str:
    """The text in valid Unicode: half surrogates, as in file names that are not UTF-8, are spelled out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def digest_of(*columns: Sequence[str]) -> str:
    """SHA-256 of texts in their order."""
    digest = hashlib.sha256()
    for column in columns:
        for text in column:
            digest.update(text.encode("utf-8", "surrogatepass"))
            digest.update(b"\0")
    return digest.hexdigest()
