"""Files written whole: a kill or a full disk at any moment leaves the old file or the new one.

Files of an export: each appears whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from xbt.errors import StoreError
from xbt.store.layout import FileRecord, open_regular

_PARTIAL = ".partial"
_PARTIAL_NAME = re.compile(rf"\..+-[0-9]+-[0-9a-f]+\{_PARTIAL}")
_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
_BLOCK = 1 << 20


class Sink(Protocol):
    """What a file's content is written into."""

    def write(self, data: Any, /) -> int:
        """Takes bytes and returns how many."""
        ...


class _HashingSink:
    def __init__(self, file: Any) -> None:
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0

    def write(self, data: Any, /) -> int:
        written = int(self._file.write(data))
        self._digest.update(data)
        self._bytes += written
        return written

    def record(self) -> FileRecord:
        return FileRecord(self._bytes, self._digest.hexdigest())


def write_whole(path: Path, needed: int | None, produce: Callable[[Sink], object]) -> FileRecord:
    """Writes a file durably: under a temporary name, synchronised to disk, then renamed.

    Args:
        path: The file; its directory is made.
        needed: Bytes it will take, for the error; ``None`` if that is not known.
        produce: Writes the content into what it is given.

    Returns:
        The file's size and checksum.

    Raises:
        StoreError: If the disk is full or the place cannot be written; nothing is left behind.
    """
    partial = path.with_name(
        f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}"
    )
    make_directory(path.parent)
    with writing_to(path, needed):
        try:
            with partial.open("xb") as file:
                sink = _HashingSink(file)
                produce(sink)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
    return sink.record()


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Writes bytes as :func:`write_whole` does."""
    return write_whole(path, len(content), lambda sink: sink.write(content))


def write_lines(path: Path, lines: Iterable[str]) -> FileRecord:
    """Writes lines, which end in a line feed, as :func:`write_whole` does; they are never all in memory."""

    def produce(sink: Sink) -> None:
        for line in lines:
            sink.write(line.encode("utf-8"))

    return write_whole(path, None, produce)


def write_record(path: Path, data: Any) -> FileRecord:
    """Writes a JSON file as :func:`write_whole` does."""
    return write_bytes(path, (json.dumps(data, indent=1) + "\n").encode("ascii"))


@contextmanager
def writing_to(path: Path, needed: int | None) -> Iterator[None]:
    """Turns what the operating system says against writing into one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            size = "more bytes" if needed is None else f"{needed} bytes"
            raise StoreError(
                f"{size} are needed for {path}, but there is no room ({reason}); free some space or raise "
                "the limit and run again: what has been written is kept"
            ) from error
        raise StoreError(
            f"{path} cannot be written ({reason}); choose a directory you may write to"
        ) from error


def make_directory(path: Path) -> None:
    """Makes a directory and those above it, durably; does nothing where it is.

    Raises:
        StoreError: If it cannot be made.
    """
    with writing_to(path, 0):
        missing = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_directory(made.parent)  # a directory's own name is kept in the one above it


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable, where the system knows how to.

    Raises:
        StoreError: If the system fails to.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows does not open directories
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            with writing_to(path, 0):
                raise
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a regular file, hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def remove_leftovers(*directories: Path) -> None:
    """Removes the temporary files that killed writers left; only a sole writer may do so."""
    for directory in directories:
        for leftover in directory.glob(f".*{_PARTIAL}"):
            if _PARTIAL_NAME.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)


_FULL_FILES = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to; at the end the file is synchronised and renamed.

    Args:
        path: The file; its directory is made, and one that is there is replaced.

    Raises:
        StoreError: If the disk is full or the place cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL_FILES:
            raise StoreError(
                f"there is no space for {path} ({reason}); free some space and export again"
            ) from error
        raise StoreError(
            f"{path} cannot be written ({reason}); choose a directory you may write to"
        ) from error
    finally:
        # Where the place cannot be looked into either, there is nothing to remove.
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)
