"""What was removed from a gallery: a file that only grows, a line a removal.

A line is its checksum (CRC-32) and JSON, ``{segment: [rows]}``. It counts once it is whole; what a killed
writer left of one is ignored by readers, and cut off by the next writer.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

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


class Journal:
    """The removals of one generation of a gallery.

    Being open, it keeps the files of its generation: :func:`in_use` tells a writer that somebody reads them.

    Args:
        path: The file, which must exist.

    Raises:
        StoreError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read ({error.strerror}); copy the gallery's files again"
            ) from error
        _share(self._handle)
        self._good = 0

    @classmethod
    def create(cls, path: Path, removed: Removed) -> Self:
        """Writes a journal that begins with some removals, and opens it."""
        write_bytes(path, _line(removed) if any(removed.values()) else b"")
        return cls(path)

    def news(self) -> list[Removed]:
        """The removals since the last call.

        Raises:
            StoreError: If a line in the middle is damaged.
        """
        data = self._rest()
        found: list[Removed] = []
        while (end := data.find(b"\n") + 1) > 0:
            removed = _parsed(data[:end])
            if removed is None:
                if data.find(b"\n", end) >= 0:
                    raise StoreError(
                        f"{self.path} is damaged at byte {self._good}; copy it again, or restore the gallery"
                    )
                break  # the last line: its writer was killed, or is about to finish it
            found.append(removed)
            self._good += end
            data = data[end:]
        return found

    def rewind(self) -> None:
        """Makes everything news again."""
        self._good = 0

    def append(self, removed: Removed) -> None:
        """Writes a removal durably. Only a sole writer may do so, when it has read all news.

        Raises:
            StoreError: If the disk is full; nothing is removed then.
        """
        line = _line(removed)
        with writing_to(self.path, len(line)):
            handle = os.open(self.path, os.O_RDWR)
            try:
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

    def faults(self) -> list[str]:
        """Damage, a sentence each; the whole file is read again."""
        try:
            Journal(self.path).news()
        except StoreError as error:
            return [str(error)]
        return []

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._handle < 0

    def close(self) -> None:
        """Lets the files of the generation go."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.close()

    def _rest(self) -> bytes:
        size = os.fstat(self._handle).st_size
        if size <= self._good:
            return b""
        with os.fdopen(os.dup(self._handle), "rb") as file:
            file.seek(self._good)
            return file.read()


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


def _line(removed: Removed) -> bytes:
    plain = {segment: [int(row) for row in rows] for segment, rows in removed.items() if len(rows)}
    content = json.dumps(plain, separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _parsed(line: bytes) -> Removed | None:
    checksum, _, content = line[:-1].partition(b" ")
    if checksum != b"%08x" % zlib.crc32(content):
        return None
    removed: Removed = json.loads(content)
    return removed


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
