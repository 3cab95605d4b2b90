"""Input of an embedding job: items with ids, in shards that can be read from any position."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import numpy as np

from xbt.errors import ConfigError, DataError
from xbt.images import ImageSource


class LazyImages(Sequence[ImageSource], ABC):
    """Images that are read on access; a slice is a view."""

    @abstractmethod
    def source_at(self, row: int) -> ImageSource:
        """One image, undecoded."""

    @overload
    def __getitem__(self, index: int) -> ImageSource: ...
    @overload
    def __getitem__(self, index: slice) -> SelectedImages: ...
    def __getitem__(self, index: int | slice) -> ImageSource | SelectedImages:
        if isinstance(index, slice):
            return SelectedImages(self, list(range(*index.indices(len(self)))))
        return self.source_at(index)


class SelectedImages(LazyImages):
    """View of some rows of a sequence of images; nothing is read."""

    def __init__(self, images: Sequence[ImageSource], rows: list[int]) -> None:
        # A selection of a selection refers to the original, so that chains do not grow.
        self._images: Sequence[ImageSource] = images
        self._rows: list[int] = rows
        if isinstance(images, SelectedImages):
            self._images = images._images
            self._rows = [images._rows[row] for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def source_at(self, row: int) -> ImageSource:
        """One image, undecoded."""
        return self._images[self._rows[row]]

    def __iter__(self) -> Iterator[ImageSource]:
        return (self._images[row] for row in self._rows)


class RawPairs(NamedTuple):
    """Ids, undecoded images, and the unchanged captions of each image, blank ones included."""

    ids: list[str]
    images: Sequence[ImageSource]
    captions: list[list[str]]


def require_unique(ids: Sequence[str], source: str) -> None:
    """Check that no id occurs twice; the message names the first that does."""
    seen: set[str] = set()
    for name in ids if len(set(ids)) < len(ids) else ():
        if name in seen:
            raise DataError(f"{source}: the id {name!r} occurs more than once; ids must be unique")
        seen.add(name)


def choose_subset(count: int, limit: int | None, seed: int) -> list[int]:
    """Draw ``limit`` of ``count`` positions at random, in ascending order; all if there are not more."""
    if seed < 0:
        raise ConfigError(f"seed is {seed}, but must not be negative")
    if limit is None or limit >= count:
        return list(range(count))
    chosen = np.random.default_rng(seed).choice(count, limit, replace=False)
    return [int(position) for position in np.sort(chosen)]


@dataclass(frozen=True)
class Rejected:
    """An item that was left out, and the reason."""

    id: str
    """Id of the item."""
    reason: str
    """One sentence."""


class Item(NamedTuple):
    """One image or text: id, undecoded image or text, and one value for each metadata column of its shard."""

    id: str
    value: ImageSource
    metadata: dict[str, str]


Entry = Item | Rejected
"""An item, or one that is known to be unusable without decoding it."""


class SourceShard(ABC):
    """A sequence of entries that is the same on every read."""

    name: str
    """Name within the source."""
    length: int | None = None
    """Number of entries; ``None`` for a stream, whose end is unknown until it is reached."""
    columns: tuple[str, ...] = ()
    """Names of the items' metadata."""

    @abstractmethod
    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Read entries ``start`` to ``stop`` (or the end) in order, without decoding earlier ones."""

    def digest(self) -> str:
        """SHA-256 that identifies the content: the ids (and texts), or the files behind a stream.

        A job can continue only if it is unchanged.
        """
        return digest_of([self.name])


@dataclass(frozen=True)
class ItemSource:
    """All items of an embedding job."""

    name: str
    """Name of the source in messages."""
    modality: Literal["image", "text"]
    parts: Sequence[SourceShard]
    """One shard of known length, or any number of streams."""

    @property
    def length(self) -> int | None:
        """Number of entries; ``None`` for streams."""
        lengths = [part.length for part in self.parts]
        return None if None in lengths else sum(length or 0 for length in lengths)

    def digest(self) -> str:
        """SHA-256 over the digests of all parts in order."""
        return hashlib.sha256("".join(part.digest() for part in self.parts).encode()).hexdigest()


class ListedImages(SourceShard):
    """Images with random access: files, rows of a data set, an array."""

    def __init__(self, ids: Sequence[str], images: Sequence[ImageSource]) -> None:
        """Keep a unique id per image, and its path, PIL image or encoded image, accessed when it is read.

        If the first is a path, all must be paths, and they become the column ``image_path``.
        """
        self.name = "images"
        self.length = len(ids)
        self.columns = ("image_path",) if len(ids) and isinstance(images[0], str) else ()
        self._ids, self._images = ids, images

    @property
    def ids(self) -> list[str]:
        """Ids of all images, as :meth:`read` returns them; no image is read."""
        return [readable(name) for name in self._ids]

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Read images ``start`` to ``stop`` without decoding them."""
        for row in range(*slice(start, stop).indices(len(self._ids))):
            image = self._images[row]
            path = readable(str(image)) if isinstance(image, str) else ""
            metadata = {"image_path": path} if self.columns else {}
            yield Item(readable(self._ids[row]), image, metadata)

    def digest(self) -> str:
        """SHA-256 of the ids in order."""
        return digest_of(self._ids)


class ListedTexts(SourceShard):
    """Texts in memory. Blank and invalid Unicode texts are recorded as rejected."""

    columns = ("caption",)

    def __init__(self, ids: Sequence[str], texts: Sequence[str | None]) -> None:
        """Keep n ids and n texts; ``None`` means that the source has no text."""
        self.name = "texts"
        self.length = len(ids)
        self._ids, self._texts = ids, texts

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Read texts ``start`` to ``stop``, stripped."""
        for row in range(*slice(start, stop).indices(len(self._ids))):
            yield text_entry(self._ids[row], self._texts[row])

    def digest(self) -> str:
        """SHA-256 of the ids and texts in order."""
        return digest_of(self._ids, [text or "" for text in self._texts])


def text_entry(name: str, text: str | None) -> Entry:
    """Make an item of a caption, or reject it with a reason."""
    caption = (text or "").strip()
    if not caption:
        return Rejected(readable(name), "the caption is blank")
    if readable(caption) != caption:
        return Rejected(readable(name), f"the caption is not valid Unicode: {readable(caption)!r}")
    return Item(readable(name), caption, {"caption": caption})


def readable(text: str) -> str:
    """Escape lone surrogates (as in file names that are not UTF-8), so that the text is valid Unicode."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def digest_of(*columns: Sequence[str]) -> str:
    """SHA-256 of all texts in order."""
    digest = hashlib.sha256()
    for column in columns:
        for text in column:
            digest.update(text.encode("utf-8", "surrogatepass"))
            digest.update(b"\0")
    return digest.hexdigest()
