"""Lock for the only writer of a store; the operating system releases it when the holder dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from xbt.errors import BusyError, StoreError
from xbt.files import writing_to

_FILE = ".lock"
_LOCKED_ERRORS = frozenset({errno.EAGAIN, errno.EACCES, errno.EDEADLK})

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 30  # after the holder's name, which other processes must be able to read

    def _take(handle: int) -> None:
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


class WriterLock:
    """Exclusive right to write to a store's directory, as a context manager.

    If another writer holds it, the error names that process and host. With ``reentrant``, a lock that another
    object of this process holds is accepted.
    """

    def __init__(self, path: Path, reentrant: bool = False) -> None:
        self._path, self._reentrant = path, reentrant
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        """True while this object holds the lock."""
        return self._handle is not None

    def acquire(self) -> None:
        """Take the lock, unless this object holds it already."""
        if self._handle is not None:
            return
        me = {"pid": os.getpid(), "host": socket.gethostname()}
        with writing_to(self._path / _FILE, 64):
            handle = os.open(self._path / _FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(handle)
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno not in _LOCKED_ERRORS:
                raise StoreError(
                    f"{self._path} cannot be locked ({error.strerror}); use a file system with file locks"
                ) from error
            if self._reentrant and holder == me:
                return
            raise BusyError(
                f"{self._path} is being written by process {holder.get('pid', '?')} on "
                f"{holder.get('host', 'an unknown host')}; wait until it is done, or end it"
            ) from error
        self._handle = handle
        _HELD_LOCKS.add(self)
        try:
            with writing_to(self._path / _FILE, 64):
                os.ftruncate(handle, 0)
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, json.dumps(me).encode())
        except BaseException:
            self.release()  # otherwise this process could never write again
            raise

    def release(self) -> None:
        """Release the lock."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
            _HELD_LOCKS.discard(self)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


_HELD_LOCKS: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _drop_inherited() -> None:
    """Close the lock in a forked child: a worker may outlive a killed writer and must not keep its lock."""
    for lock in list(_HELD_LOCKS):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_inherited)


def _holder(handle: int) -> dict[str, object]:
    """Process and host that the lock's file names; empty if it is unreadable."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        data = json.loads(os.read(handle, 4096))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
