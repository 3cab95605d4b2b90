"""Durable file writes and safe file reads.

A file is written under a temporary name, synchronised to disk and then renamed. A kill or a full disk at any
moment leaves the old file or the new one, never a part of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

from xbt.errors import StoreError

_PARTIAL = ".partial"
_PARTIAL_NAME = re.compile(rf"\..+-[0-9]+-[0-9a-f]+\{_PARTIAL}")
_DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
_BLOCK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_COUNT = 2**62
_FIX = "copy the file again or write the store again"


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 (hexadecimal) of one file."""

    bytes: int
    sha256: str

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read the output of ``asdict``.

        Raises:
            ValueError: If it is not a size and a checksum.
        """
        if not isinstance(data["sha256"], str) or not _SHA256.fullmatch(data["sha256"]):
            raise ValueError(f"{data['sha256']!r} is not a SHA-256")
        return cls(parse_count(data["bytes"], "bytes"), data["sha256"])


def parse_count(value: Any, name: str) -> int:
    """Check a count or a size that was read from JSON.

    Raises:
        ValueError: If it is not a whole number in [0, 2⁶²).
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"{name} is {value!r:.40}, not a whole number from 0")
    return value


class Sink(Protocol):
    """Receiver of a file's content."""

    def write(self, data: Any, /) -> int:
        """Write bytes and return their number."""
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
    """Write a file durably: under a temporary name, synchronised to disk, then renamed.

    Args:
        path: The file. Its directory is created.
        needed: Size in bytes, for the error message; ``None`` if it is not known.
        produce: Function that writes the content to a sink.

    Returns:
        The file's size and checksum.

    Raises:
        StoreError: If the disk is full or the file cannot be written; nothing is left behind.
    """
    partial = path.with_name(
        f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}"
    )
    if not path.parent.is_dir():
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
    """Write bytes durably; see :func:`write_whole`."""
    return write_whole(path, len(content), lambda sink: sink.write(content))


def write_lines(path: Path, lines: Iterable[str]) -> FileRecord:
    """Write lines that end in a line feed, one at a time; see :func:`write_whole`."""

    def produce(sink: Sink) -> None:
        for line in lines:
            sink.write(line.encode("utf-8"))

    return write_whole(path, None, produce)


def write_record(path: Path, data: Any) -> FileRecord:
    """Write a JSON file durably; see :func:`write_whole`."""
    return write_bytes(path, (json.dumps(data, indent=1) + "\n").encode("ascii"))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a library to write to, then synchronise the file and rename it.

    Args:
        path: The file. Its directory is created, and an existing file is replaced.

    Raises:
        StoreError: If the disk is full or the file cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}{path.suffix}")
    try:
        with writing_to(path, None):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
            sync_directory(path.parent)
    finally:
        # Without access to the directory there is nothing to remove.
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)


@contextmanager
def writing_to(path: Path, needed: int | None) -> Iterator[None]:
    """Translate an ``OSError`` of a write to ``path`` into a :class:`StoreError`.

    Args:
        path: The file or directory.
        needed: Size in bytes, for the error message; ``None`` if it is not known.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _DISK_FULL:
            problem = f"{needed} bytes are needed for {path}, but there is no space"
            if needed is None:
                problem = f"there is no space for {path}"
            raise StoreError(
                f"{problem} ({reason}); free some space or raise the limit and run again: files that are "
                "already written are kept"
            ) from error
        raise StoreError(
            f"{path} cannot be written ({reason}); choose a directory you may write to"
        ) from error


def make_directory(path: Path) -> None:
    """Create a directory and its parents durably; an existing directory is left alone.

    Raises:
        StoreError: If it cannot be created.
    """
    with writing_to(path, 0):
        missing = [directory for directory in (path, *path.parents) if not directory.exists()]
        path.mkdir(parents=True, exist_ok=True)
    for created in reversed(missing):
        sync_directory(created.parent)  # the parent holds the name of a new directory


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, on systems that support it.

    Raises:
        StoreError: If the system fails to synchronise.
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


def remove_leftovers(*directories: Path) -> None:
    """Remove the temporary files of killed writers; the caller must be the only writer."""
    for directory in directories:
        for leftover in directory.glob(f".*{_PARTIAL}"):
            if _PARTIAL_NAME.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)


def refuse_irregular(path: Path, root: Path | None = None) -> None:
    """Refuse pipes, devices, directories, and links that lead out of a directory.

    Args:
        path: The file.
        root: The directory that must contain it; ``None`` accepts links to any place.

    Raises:
        OSError: If there is no such file.
        StoreError: If it is not a regular file, or lies outside ``root``.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise StoreError(f"{path} is a directory, pipe or device instead of a file; {_FIX}")
    if root is not None and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise StoreError(f"{path} is a link that leads out of {root}; put the file itself there")


def open_regular(path: Path, root: Path | None = None) -> BinaryIO:
    """Open a regular file for reading; see :func:`refuse_irregular`."""
    refuse_irregular(path, root)
    # A pipe may have replaced the file since the check. Without O_NONBLOCK, opening it would block.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags), "rb")


def checksum(path: Path) -> str:
    """SHA-256 of a regular file, hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
