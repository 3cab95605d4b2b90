"""What was removed from a gallery: a file that only grows, a line a removal.

A line is its checksum (CRC-32) and JSON, ``{segment: [rows]}``; the first one names the gallery and the
generation instead. A line counts once it is whole; what a killed writer left of one, which does not end in
a line feed, is ignored by readers, and cut off by the next writer. A whole line with another checksum is
damage.
"""

from __future__ import annotations

import json
import os
import weakref
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from xbt.errors import StoreError
from xbt.store.files import sync_directory, write_bytes, writing_to

if os.name == "nt":  # pragma: no cover

    def _share(handle: int) -> None:
        """There are no shared locks; Windows itself keeps files that are open from being removed."""

else:
    import fcntl

    def _share(handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # a file system without locks: old generations may be removed under a reader
            return


Removed = Mapping[str, Sequence[int]]
"""Row numbers by segment."""

_GALLERY = "gallery"
"""Key of the first line; a segment's name has a number."""


class Journal:
    """The removals of one generation of a gallery.

    Being open, it keeps the files of its generation: :func:`in_use` tells a writer that somebody reads them.

    Args:
        path: The file, which must exist.
        identity: The gallery's; empty if it has none yet.
        least: Bytes that are known to have been written.

    Attributes:
        least: As given; the writer raises it.

    Raises:
        StoreError: If it cannot be opened.
    """

    def __init__(self, path: Path, identity: str = "", least: int = 0) -> None:
        self.path, self.identity, self.least = path, identity, least
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read ({error.strerror}); copy the gallery's files again"
            ) from error
        # Not __del__: what it would need may be gone when the interpreter ends.
        self._closing = weakref.finalize(self, os.close, self._handle)
        self._closing.atexit = False
        _share(self._handle)
        self._good = 0

    @classmethod
    def create(cls, path: Path, removed: Removed, identity: str, generation: int) -> Self:
        """Writes a journal that begins with some removals, and opens it."""
        first = _line({_GALLERY: identity, "generation": generation})
        lines = first + (_line_of(removed) if any(removed.values()) else b"")
        write_bytes(path, lines)
        return cls(path, identity, len(lines))

    @property
    def read(self) -> int:
        """Bytes of the lines that have been read or written so far."""
        return self._good

    def news(self) -> list[Removed]:
        """The removals since the last call.

        Raises:
            StoreError: If a line is damaged, bytes are lost, or the file is another gallery's.
        """
        known = max(self._good, self.least)
        size = self._size(known)
        if size < known:
            raise StoreError(
                f"{self.path} has {size} bytes, but {known} were written: removals are lost, and their items "
                "would be found again; copy it again, restore the gallery, or build it anew from its "
                "segments"
            )
        found: list[Removed] = []
        data = self._rest()
        while (end := data.find(b"\n") + 1) > 0:
            content = _parsed(data[:end])
            if content is None:
                again = self._rest()
                if again == data:
                    raise StoreError(
                        f"{self.path} is damaged at byte {self._good}: which items were removed there is not "
                        "known; copy it again, restore the gallery, or build it anew from its segments"
                    )
                data = again  # a writer has put a line in the place of half a one meanwhile
                continue
            if _GALLERY not in content:
                found.append(content)
            elif self.identity and content[_GALLERY] != self.identity:
                raise StoreError(f"{self.path} is of another gallery; copy the gallery's files again")
            self._good += end
            data = data[end:]
        return found

    def rewind(self) -> None:
        """Makes everything news again."""
        self._good = 0

    def in_place(self) -> bool:
        """Whether this file is still what stands under its path."""
        try:
            return not self.closed and os.path.samestat(self.path.stat(), os.fstat(self._handle))
        except OSError:
            return False

    def append(self, removed: Removed) -> None:
        """Writes a removal durably. Only a sole writer may do so, when it has read all news.

        Raises:
            StoreError: If the disk is full, or the file is another one by now; nothing is removed then.
        """
        line = _line_of(removed)
        with writing_to(self.path, len(line)):
            handle = os.open(self.path, os.O_RDWR)
            try:
                self._require_own(handle)
                os.ftruncate(handle, self._good)  # what a killed writer left
                os.lseek(handle, self._good, os.SEEK_SET)
                try:
                    _write_all(handle, line)
                    os.fsync(handle)
                except OSError:
                    os.ftruncate(handle, self._good)
                    raise
            finally:
                os.close(handle)
        self._good += len(line)

    def sync(self) -> None:
        """Makes durable what was read: a killed writer may have left a line that is not.

        Raises:
            StoreError: If the file cannot be written to.
        """
        with writing_to(self.path, 0):
            handle = os.open(self.path, os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def faults(self) -> list[str]:
        """Damage, a sentence each; the whole file is read again."""
        try:
            Journal(self.path, self.identity, max(self.least, self._good)).news()
        except StoreError as error:
            return [str(error)]
        return []

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return not self._closing.alive

    def close(self) -> None:
        """Lets the files of the generation go."""
        self._closing()

    def _require_own(self, handle: int) -> None:
        """Refuses to write to a file that was put in the place of the one that was read."""
        if not os.path.samestat(os.fstat(handle), os.fstat(self._handle)):
            raise replaced(self.path.parent)
        if os.fstat(handle).st_size < self._good:
            self.news()

    def _size(self, expected: int) -> int:
        size = os.fstat(self._handle).st_size
        if size < expected:  # network file systems may show an old size until the file is opened again
            with suppress(OSError):
                os.close(os.open(self.path, os.O_RDONLY))
            size = os.fstat(self._handle).st_size
        return size

    def _rest(self) -> bytes:
        size = os.fstat(self._handle).st_size
        if size <= self._good:
            return b""
        with os.fdopen(os.dup(self._handle), "rb") as file:
            file.seek(self._good)
            return file.read()


def replaced(gallery: Path) -> StoreError:
    """What a writer is told in whose gallery's place another one stands."""
    return StoreError(f"the gallery at {gallery} was replaced by another while it was open; open it again")


def in_use(path: Path) -> bool:
    """Whether somebody has a journal open, and with it the files of its generation."""
    if os.name == "nt":  # pragma: no cover
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def remove(path: Path) -> None:
    """Removes the journal of a generation that nobody reads any more."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def _line_of(removed: Removed) -> bytes:
    return _line({segment: [int(row) for row in rows] for segment, rows in removed.items() if len(rows)})


def _line(plain: Mapping[str, Any]) -> bytes:
    content = json.dumps(plain, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _parsed(line: bytes) -> dict[str, Any] | None:
    checksum, _, content = line[:-1].partition(b" ")
    if checksum != b"%08x" % zlib.crc32(content):
        return None
    plain: dict[str, Any] = json.loads(content)
    return plain


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
