"""Tars read front to back, packed or not, wherever fsspec opens them; a hole does not pass for their end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import fsspec  # type: ignore[import-untyped]

from xbt.data.tar_files import is_local
from xbt.errors import DataError

_UNPACK: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_BLOCK = 1 << 20
_UNPACKED_BLOCK = 1 << 16
_ABOUT_THE_NEXT = frozenset(
    [
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    ]
)
"""Types of members that say something about the next one; tarfile reads them into memory at once."""
_LARGEST_HEADER = 1 << 20
_LONGEST_NAME = 4096
_MOST_GLOBAL = 1_000
_MOST_IN_A_ROW = 8


class TarStream:
    """The members of one tar in their order; each can be read until the next is asked for.

    Whatever goes wrong on the way to the tar's bytes is kept apart from what is wrong with them where it
    happens: the kinds of error do not tell, for a damaged file and a broken network share some.
    """

    def __init__(self, archive: tarfile.TarFile) -> None:
        """Keeps the archive; :func:`open_tar` opens it."""
        self._archive = archive

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """The members.

        Raises:
            tarfile.TarError: If the tar is damaged; so do other errors of ``xbt.data.web_datasets.DAMAGE``.
            DataError: If its bytes cannot be fetched any more.
        """
        while (member := self._archive.next()) is not None:
            yield member
            self._archive.members = []  # type: ignore[attr-defined]  # which tarfile keeps: a small packed file may hold millions
        self._require_end()

    def read(self, member: tarfile.TarInfo) -> bytes:
        """A member's bytes."""
        file = self._archive.extractfile(member)
        return file.read() if file is not None else b""

    def _require_end(self) -> None:
        """Reads on behind the end mark, where nothing but padding may be.

        A hole of zeros, as in a file that was not fetched completely, looks like the mark, and so does the
        end of the first of several tars that were joined.
        """
        file = self._archive.fileobj
        assert file is not None
        while block := file.read(_BLOCK):
            if rest := block.lstrip(b"\0"):
                raise tarfile.ReadError(
                    f"the end mark at byte {self._archive.offset} is followed by data at byte "
                    f"{file.tell() - len(rest)}, which was not read: part of the tar is missing, or several "
                    "were joined; fetch it again, or unpack it with tar --ignore-zeros and pack that"
                )


@contextmanager
def open_tar(url: str) -> Iterator[TarStream]:
    """Opens a tar, unpacking it if it is packed with gzip, bzip2 or xz.

    Raises:
        DataError: If it is not there, or cannot be reached.
        PermissionError: If it is on this machine and may not be read.
        IsADirectoryError: If it is a folder.
        tarfile.TarError: If it is no tar; so do other errors of ``xbt.data.web_datasets.DAMAGE``.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(fsspec.open(url, "rb"))
        except FileNotFoundError as error:
            raise DataError(
                f"{url} is not there any more; put it back and run the same command again"
            ) from error
        except Exception as error:
            # Of another machine's files, all are refused alike once a permission has run out.
            if isinstance(error, PermissionError | IsADirectoryError) and is_local(url):
                raise
            raise DataError(
                f"{url} cannot be opened ({one_line(error)}); fix that and run the same command again"
            ) from error
        raw = io.BufferedReader(_Fetched(file, url), _BLOCK)
        unpack = _UNPACK.get(raw.peek(2)[:2])
        plain: Any = raw if unpack is None else _Eager(stack.enter_context(unpack(raw)))
        yield TarStream(
            stack.enter_context(tarfile.open(fileobj=plain, mode="r|", bufsize=_BLOCK, tarinfo=_StrictHeader))
        )


def one_line(error: BaseException) -> str:
    """An error's kind and message without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class _StrictHeader(tarfile.TarInfo):
    """A header whose damage is an error: tarfile itself takes it for the end, and drops what follows.

    Sizes are checked before anything is read: a few bytes of a packed file can unpack to gigabytes.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _ABOUT_THE_NEXT and header.size > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header has {header.size:,} bytes, which no name needs")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictHeader:
        # tarfile calls this again for the header after one that says something about it.
        depth = vars(archive).get("xbt_depth", 0)
        if depth > _MOST_IN_A_ROW:
            raise tarfile.ReadError(f"more than {_MOST_IN_A_ROW} headers about one file")
        vars(archive)["xbt_depth"] = depth + 1
        try:
            member = super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the mark at the end, as it should be
                raise
            raise tarfile.ReadError(f"{error} after {archive.offset} bytes") from error
        finally:
            vars(archive)["xbt_depth"] = depth
        shared = archive.pax_headers  # of which every member that follows carries a copy
        if len(shared) > _MOST_GLOBAL or sum(map(len, shared.values())) > _LARGEST_HEADER:
            raise tarfile.ReadError(
                f"global headers of more than {_LARGEST_HEADER:,} bytes or {_MOST_GLOBAL} values"
            )
        if len(member.name) > _LONGEST_NAME:
            raise tarfile.ReadError(f"a name of {len(member.name):,} characters after {archive.offset} bytes")
        return member

    def _proc_sparse(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # The map of a sparse file may be of any length. No image has holes.
        raise tarfile.ReadError(f"{self.name[:100]} is stored as a sparse file; pack it without tar --sparse")

    def _proc_gnusparse_10(self, member: tarfile.TarInfo, headers: object, archive: tarfile.TarFile) -> None:
        self._proc_sparse(archive)


class _Fetched(io.RawIOBase):
    """A file whose every failure is the way's, not the tar's."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # every file system of fsspec has its own errors
            raise DataError(
                f"{self._url} cannot be read any more ({one_line(error)}); fix that and run the same "
                "command again"
            ) from error
        buffer[: len(data)] = data
        return len(data)


class _Eager:
    """An unpacking file that hands out at once what it has: a damage behind it would cost it otherwise."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read1(min(size, _UNPACKED_BLOCK))
        return data
