"""Finding tar files by path, URL, glob or brace pattern, on any file system of fsspec.

Tars read front to back, packed or not, wherever fsspec opens them; a hole does not pass for their end.

WebDataset tars, read in stream mode from local files and from any URL that fsspec opens.

In a WebDataset the files that share a name up to the first dot of its last component are one sample, and
stand side by side: ``000017.jpg``, ``000017.txt``, ``000017.json``.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from xbt.data.files import IMAGE_SUFFIXES
from xbt.data.image_folder import is_hidden
from xbt.data.items import Entry, Item, Rejected, SourceShard, digest_of, readable, text_entry
from xbt.errors import DataError
from xbt.images import MAX_PIXELS

_TAR = re.compile(r"\.(tar|tar\.gz|tgz|tar\.bz2|tar\.xz)$", re.IGNORECASE)
# What file systems call it: S3 and HTTP, Google and Azure, the Hub, and those that know dates alone.
_STAMPS = (
    "ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "last_modified", "mtime", "created"
)  # fmt: skip
_QUESTIONS = 16


def is_tar(source: str) -> bool:
    """Whether a source names tar files: one, a glob, or a brace pattern."""
    return _TAR.search(source) is not None


class FoundTar(NamedTuple):
    """A tar file.

    Attributes:
        url: Its path or URL.
        state: Its size and when it was last written (its ETag, or whatever else its file system tells): what
            tells it from one that has taken its place.
    """

    url: str
    state: str


def find_tars(source: str) -> list[FoundTar]:
    """Finds the tar files that a source names.

    Args:
        source: A path or URL of a tar file, a glob (``*.tar``), or a pattern with braces
            (``{000..099}.tar``).

    Returns:
        The tars: a glob's in alphabetical order, a brace pattern's in its own.

    Raises:
        DataError: If there is none, one that is named is missing, or the file system cannot be asked.
    """
    places: list[_Place] = []
    try:
        for pattern in _expand_braces(source):
            files, path = fsspec.core.url_to_fs(pattern)
            if set(path) & set("*?[") and not files.exists(path):
                local = "://" not in pattern
                for name, info in sorted(files.glob(path, detail=True).items()):
                    places.append(_Place(name if local else files.unstrip_protocol(name), files, name, info))
            else:
                places.append(_Place(pattern, files, path, {}))
        # Thousands of questions over a network, where its file system can be asked several at once.
        together = all(place.files.async_impl for place in places)
        with ThreadPoolExecutor(_QUESTIONS if together else 1) as pool:
            states = list(pool.map(_state, places))
    except Exception as error:  # every file system of fsspec has its own errors
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{source} cannot be looked up ({reason}); check the name") from error
    tars = [FoundTar(place.url, state) for place, state in zip(places, states, strict=True) if state]
    if not tars:
        raise DataError(f"{source}: there is no such tar file; check the path or pattern")
    if len(tars) < len(places):
        raise DataError(
            f"{len(places) - len(tars)} of the {len(places)} tar files of {source} are missing, first "
            f"{places[states.index('')].url}; put them there, or name those that are with a glob such as "
            "*.tar"
        )
    return tars


def is_local(tar: str) -> bool:
    """Whether a path or URL is on this machine's file systems."""
    return fsspec.utils.get_protocol(tar) in ("file", "local")


class _Place(NamedTuple):
    url: str
    files: Any
    path: str
    info: dict[str, Any]


def _state(place: _Place) -> str:
    """What tells a tar from one that has taken its place; empty if there is none."""
    try:
        if isinstance(place.files, LocalFileSystem):
            status = Path(place.path).stat()
            return f"{status.st_size} {status.st_mtime_ns}"
        known = place.info.get("size") is not None
        info = place.info if known else place.files.info(place.path)
    except FileNotFoundError:
        return ""
    stamp = next((info[key] for key in _STAMPS if info.get(key) is not None), "")
    return f"{info.get('size')} {stamp}"


def _expand_braces(pattern: str) -> list[str]:
    """``a{08..10}b`` as ``a08b``, ``a09b``, ``a10b``; ``{x,y}`` likewise; several in one pattern."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    if found[3] is not None:
        options = found[3].split(",")
    else:
        width = len(found[1])
        options = [f"{number:0{width}d}" for number in range(int(found[1]), int(found[2]) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [before + option + rest for option in options for rest in _expand_braces(after)]


def tar_names(tars: Sequence[str]) -> list[str]:
    """What to call each tar in ids: its path without suffix, relative to the folder that all have in common.

    Raises:
        DataError: If a tar is named twice.
    """
    components = [tar.split("/") for tar in tars]
    common = min(map(len, components)) - 1
    while len({tuple(folders[:common]) for folders in components}) > 1:
        common -= 1
    names = [readable(_TAR.sub("", "/".join(each[common:]))) for each in components]
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise DataError(f"the tar file {twice} is named twice; name every file once")
    return names


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
            tarfile.TarError: If the tar is damaged; so do other errors of ``xbt.data.tars.DAMAGE``.
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
        tarfile.TarError: If it is no tar; so do other errors of ``xbt.data.tars.DAMAGE``.
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


_KEY = re.compile(r"((?:.*/)?[^/.][^/.]*)\.([^/]+)", re.DOTALL)
# tarfile also lets through what parsing a damaged header raises; gzip and bz2 call a damage an OSError. What
# befalls the way to the tar comes as a DataError, which has to be caught first.
DAMAGE = (
    tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, LookupError, ArithmeticError,
    RecursionError,
)  # fmt: skip
_LARGEST: dict[Literal["image", "caption"], int] = {"image": 4 * MAX_PIXELS, "caption": 1 << 22}
"""Sizes in bytes above which a member is not read; an image of the most pixels needs no more unpacked."""


class _Tar(SourceShard):
    """What two readers of one tar share: its place, its name, and how to tell it from another."""

    def __init__(self, url: str, name: str, state: str = "") -> None:
        """Keeps the path or URL, the name that ids begin with, and what a replaced tar would change."""
        self.url, self.name, self._state = url, name, state

    def digest(self) -> str:
        """SHA-256 of the name and the state: after a tar was replaced, its samples would be mixed."""
        return digest_of([self.name, self._state])


class TarImages(_Tar):
    """The images of one tar, as a stream of their encoded bytes.

    A sample without an image, a second image of a sample, a member that cannot be read and a damaged end of
    the tar each become an entry on record.
    """

    columns = ("image_path",)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Reads entries ``start`` to ``stop``; of what comes before, only the headers are looked at."""
        return islice(_until_damage(self.url, self.name, self._entries(start)), start, stop)

    def _entries(self, start: int) -> Iterator[Entry]:
        for position, sample in enumerate(read_samples(self.url, "image")):
            name = readable(f"{self.name}/{sample.key}")
            if sample.fault is not None:
                yield Rejected(name, sample.fault)
            elif position < start:
                yield Item(name, b"", {})  # left out by read(); its bytes are not even fetched
            else:
                yield Item(
                    name, sample.read(), {"image_path": f"tar://{readable(sample.member)}::{self.url}"}
                )


class TarCaptions(_Tar):
    """The captions of one tar: every line of a sample's ``.txt`` is one, as CLIP_benchmark writes them."""

    columns = ("caption",)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Reads entries ``start`` to ``stop``."""
        return islice(_until_damage(self.url, self.name, self._entries()), start, stop)

    def _entries(self) -> Iterator[Entry]:
        for sample in read_samples(self.url, "caption"):
            name = readable(f"{self.name}/{sample.key}")
            if sample.fault is not None:
                yield Rejected(name, sample.fault)
                continue
            lines = sample.read().decode("utf-8", "surrogateescape").splitlines()
            for number, line in enumerate(lines or [""]):
                yield text_entry(f"{name}#{number}", line)


class Sample(NamedTuple):
    """The image or the caption file of one sample.

    Attributes:
        key: The sample's key.
        member: Name of the file in the tar; empty if there is a fault.
        fault: Why it cannot be used, if so; :func:`missing` if there is no such file.
        place: Offset and size of its bytes in the (uncompressed) tar.
        read: Returns its bytes; only before the next sample is asked for.
    """

    key: str
    member: str
    fault: str | None
    place: tuple[int, int]
    read: Callable[[], bytes]


def missing(kind: Literal["image", "caption"]) -> str:
    """The fault of a sample that lacks one of its files."""
    return f"the sample holds no {kind} file"


def read_samples(url: str, kind: Literal["image", "caption"]) -> Iterator[Sample]:
    """Every sample once, and surplus members with their fault; bytes are read when they are asked for."""
    seen: dict[str, int] = {}
    with open_tar(url) as archive:
        key, found = "", True
        for member in archive:
            named = _KEY.fullmatch(member.name.removeprefix("./"))
            if named is None or not member.isfile() or _is_meta(named[1]) or is_hidden(named[1]):
                continue
            if named[1] != key:
                if not found:
                    yield _faulty(key, seen, missing(kind))
                key, found = named[1], False
            suffix = f".{named[2].lower()}"
            if suffix in IMAGE_SUFFIXES if kind == "image" else suffix == ".txt":
                found = True
                yield _as_sample(archive, member, key, seen, _LARGEST[kind])
        if not found:
            yield _faulty(key, seen, missing(kind))


def _as_sample(
    archive: TarStream, member: tarfile.TarInfo, key: str, seen: dict[str, int], largest: int
) -> Sample:
    if key in seen:
        return _faulty(
            key, seen, f"{member.name} has the key of an earlier sample in its tar; keys are unique"
        )
    if member.size > largest:
        return _faulty(key, seen, f"{member.name} has {member.size} bytes, which no image or caption needs")
    seen[key] = 1

    place = (member.offset_data, member.size)
    return Sample(key, member.name, None, place, lambda: archive.read(member))


def _faulty(key: str, seen: dict[str, int], fault: str) -> Sample:
    # The second of a name gets a name of its own: every entry is on record once.
    seen[key] = seen.get(key, 0) + 1
    own = key if seen[key] == 1 else f"{key}#{seen[key]}"
    return Sample(own, "", fault, (0, 0), bytes)


def _is_meta(name: str) -> bool:
    base = posixpath.basename(name)
    return base.startswith("__") and base.endswith("__")


def _until_damage(url: str, name: str, entries: Iterator[Entry]) -> Iterator[Entry]:
    """The entries, and one more on record if the tar cannot be read to its end.

    Raises:
        DataError: If it is not the tar that is at fault but the way to it, such as a network.
    """
    count = 0
    try:
        for entry in entries:
            yield entry
            count += 1
    except DataError:
        raise
    except DAMAGE as error:
        yield Rejected(name, f"{url} cannot be read beyond its first {count} samples ({one_line(error)})")
    except Exception as error:
        raise DataError(
            f"{url} cannot be read any more ({one_line(error)}); fix that and run the same command again"
        ) from error
