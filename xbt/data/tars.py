"""WebDataset tars, read as streams from local files and from any URL that fsspec opens.

Tars are found by path, URL, glob or brace pattern, and may be compressed. Damage and missing data are
detected: a hole of zeros does not count as the end of a tar.

In a WebDataset, consecutive files with the same path up to the first dot of the file name are one sample:
``000017.jpg``, ``000017.txt``, ``000017.json``.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from xbt.data.files import IMAGE_SUFFIXES, one_line
from xbt.data.image_folder import is_hidden
from xbt.data.items import Entry, Item, Rejected, SourceShard, digest_of, readable, text_entry
from xbt.errors import DataError
from xbt.images import MAX_PIXELS

_TAR = re.compile(r"\.(tar|tar\.gz|tgz|tar\.bz2|tar\.xz)$", re.IGNORECASE)
# Version keys of file systems: S3 and HTTP, Google and Azure, the Hub, and those with dates only.
_STAMPS = (
    "ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "last_modified", "mtime", "created"
)  # fmt: skip
_MAX_REQUESTS = 16
_UNPACK: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
_BLOCK = 1 << 20
_UNPACKED_BLOCK = 1 << 16
_EXTENDED_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
"""Member types that describe the next member; tarfile reads them into memory as a whole."""
_MAX_HEADER_BYTES = 1 << 20
_MAX_NAME_LENGTH = 4096
_MAX_GLOBAL_HEADERS = 1_000
_MAX_CONSECUTIVE_HEADERS = 8
_MAX_EMPTY_READS = 8
_KEY = re.compile(r"((?:.*/)?[^/.][^/.]*)\.([^/]+)", re.DOTALL)
# tarfile also passes on errors from parsing a damaged header; gzip and bz2 report damage as OSError. Errors
# in fetching the tar are DataErrors and must be caught first.
DAMAGE = (
    tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, LookupError, ArithmeticError,
    RecursionError,
)  # fmt: skip
_MAX_BYTES: dict[Literal["image", "caption"], int] = {"image": 4 * MAX_PIXELS, "caption": 1 << 22}
"""Maximum size of a member in bytes; an uncompressed image with the maximum number of pixels fits."""


def is_tar(source: str) -> bool:
    """Return True if a source names tar files: one, a glob, or a brace pattern."""
    return _TAR.search(source) is not None


class FoundTar(NamedTuple):
    """A tar file: its path or URL, and a fingerprint, such as size and time, that a replacement changes."""

    url: str
    state: str


def find_tars(source: str) -> list[FoundTar]:
    """Find the tar files that a path, a URL, a glob or a pattern with braces (``{000..099}.tar``) names.

    Those of a glob are in alphabetical order, those of a brace pattern in the order of the pattern.
    """
    locations: list[_Location] = []
    try:
        for pattern in _expand_braces(source):
            files, path = fsspec.core.url_to_fs(pattern)
            if set(path) & set("*?[") and not files.exists(path):
                local = "://" not in pattern
                for name, info in sorted(files.glob(path, detail=True).items()):
                    locations.append(
                        _Location(name if local else files.unstrip_protocol(name), files, name, info)
                    )
            else:
                locations.append(_Location(pattern, files, path, {}))
        # There may be thousands of requests over a network; async file systems allow concurrent ones.
        concurrent = all(location.files.async_impl for location in locations)
        with ThreadPoolExecutor(_MAX_REQUESTS if concurrent else 1) as pool:
            states = list(pool.map(_state, locations))
    except Exception as error:  # fsspec file systems have no common base error
        raise DataError(f"{source} cannot be looked up ({one_line(error)}); check the name") from error
    tars = [FoundTar(location.url, state) for location, state in zip(locations, states, strict=True) if state]
    if not tars:
        raise DataError(f"{source}: there is no such tar file; check the path or pattern")
    if len(tars) < len(locations):
        raise DataError(
            f"{len(locations) - len(tars)} of the {len(locations)} tar files of {source} are missing, first "
            f"{locations[states.index('')].url}; add them, or select the existing ones with a glob such as "
            "*.tar"
        )
    return tars


class _Location(NamedTuple):
    url: str
    files: Any
    path: str
    info: dict[str, Any]


def _state(location: _Location) -> str:
    """Fingerprint of a tar; empty if the tar does not exist."""
    try:
        if isinstance(location.files, LocalFileSystem):
            status = Path(location.path).stat()
            return f"{status.st_size} {status.st_mtime_ns}"
        is_listed = location.info.get("size") is not None
        info = location.info if is_listed else location.files.info(location.path)
    except FileNotFoundError:
        return ""
    stamp = next((info[key] for key in _STAMPS if info.get(key) is not None), "")
    return f"{info.get('size')} {stamp}"


def _expand_braces(pattern: str) -> list[str]:
    """Expand all braces: ``a{08..10}b`` to ``a08b``, ``a09b``, ``a10b``, and ``a{x,y}`` to ``ax``, ``ay``."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    if match[3] is not None:
        options = match[3].split(",")
    else:
        width = len(match[1])
        options = [f"{number:0{width}d}" for number in range(int(match[1]), int(match[2]) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [before + option + rest for option in options for rest in _expand_braces(after)]


def tar_names(tars: Sequence[str]) -> list[str]:
    """Return the name of each tar for ids: its path without suffix, relative to the common folder of all."""
    components = [tar.split("/") for tar in tars]
    common = min(map(len, components)) - 1
    while len({tuple(folders[:common]) for folders in components}) > 1:
        common -= 1
    names = [readable(_TAR.sub("", "/".join(path[common:]))) for path in components]
    if len(set(names)) < len(names):
        repeated = next(name for number, name in enumerate(names) if name in names[:number])
        raise DataError(f"the tar file {repeated} is named twice; name every file once")
    return names


class TarStream:
    """The members of one tar in order; a member can be read until the next one is requested.

    Errors in fetching the bytes are separated from damage in the bytes at the point where they occur, because
    a damaged file and a broken network raise partly the same types of error.
    """

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        while (member := self._archive.next()) is not None:
            yield member
            self._archive.members = []  # type: ignore[attr-defined]  # tarfile keeps them, and a small compressed file may hold millions
        self._require_end()

    def read(self, member: tarfile.TarInfo) -> bytes:
        """Return a member's bytes."""
        file = self._archive.extractfile(member)
        return file.read() if file is not None else b""

    def _require_end(self) -> None:
        """Check that only padding follows the end mark.

        A hole of zeros, as in a partly downloaded file, looks like the end mark. So does the end of the first
        of several concatenated tars.
        """
        file = self._archive.fileobj
        assert file is not None
        while block := file.read(_BLOCK):
            if rest := block.lstrip(b"\0"):
                raise tarfile.ReadError(
                    f"the end mark at byte {self._archive.offset} is followed by data at byte "
                    f"{file.tell() - len(rest)}, which was not read: part of the tar is missing, or several "
                    "were concatenated; download it again, or unpack it with tar --ignore-zeros and pack it "
                    "again"
                )


@contextmanager
def open_tar(url: str) -> Iterator[TarStream]:
    """Open a tar; decompress gzip, bzip2 and xz.

    A tar that does not exist or cannot be fetched is a DataError, a damaged one an error of :data:`DAMAGE`.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(fsspec.open(url, "rb"))
        except FileNotFoundError as error:
            raise DataError(
                f"{url} is not there any more; put it back and run the same command again"
            ) from error
        except Exception as error:
            # A remote PermissionError affects all files, for example when a credential has expired.
            local = fsspec.utils.get_protocol(url) in ("file", "local")
            if isinstance(error, PermissionError | IsADirectoryError) and local:
                raise
            raise _unreachable(url, error) from error
        raw = io.BufferedReader(_Fetched(file, url), _BLOCK)
        unpack = _UNPACK.get(raw.peek(2)[:2])
        plain: Any = raw if unpack is None else _Eager(stack.enter_context(unpack(raw)))
        ending: Any = _Ending(plain)
        with tarfile.open(fileobj=ending, mode="r|", bufsize=_BLOCK, tarinfo=_StrictHeader) as archive:
            yield TarStream(archive)


def _unreachable(url: str, error: Exception) -> DataError:
    return DataError(f"{url} cannot be read ({one_line(error)}); fix that and run the same command again")


class _StrictHeader(tarfile.TarInfo):
    """A tar header that raises an error if damaged; tarfile itself would silently end the tar there.

    Sizes are checked before anything is read, because a few bytes of a compressed file can expand to
    gigabytes.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED_HEADERS and header.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {header.size:,} bytes, which no name needs")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictHeader:
        # tarfile calls this recursively for the header that an extended header describes.
        depth = vars(archive).get("xbt_depth", 0)
        if depth > _MAX_CONSECUTIVE_HEADERS:
            raise tarfile.ReadError(f"more than {_MAX_CONSECUTIVE_HEADERS} headers for one file")
        vars(archive)["xbt_depth"] = depth + 1
        try:
            member = super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the regular end mark
                raise
            raise tarfile.ReadError(f"{error} after {archive.offset} bytes") from error
        finally:
            vars(archive)["xbt_depth"] = depth
        shared = archive.pax_headers  # every later member gets a copy
        if len(shared) > _MAX_GLOBAL_HEADERS or sum(map(len, shared.values())) > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(
                f"global headers of more than {_MAX_HEADER_BYTES:,} bytes or {_MAX_GLOBAL_HEADERS} values"
            )
        if len(member.name) > _MAX_NAME_LENGTH:
            raise tarfile.ReadError(f"a name of {len(member.name):,} characters after {archive.offset} bytes")
        return member

    def _proc_sparse(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # The map of a sparse file may have any length, and images are never sparse.
        raise tarfile.ReadError(f"{self.name[:100]} is stored as a sparse file; pack it without tar --sparse")

    def _proc_gnusparse_10(self, member: tarfile.TarInfo, headers: object, archive: tarfile.TarFile) -> None:
        self._proc_sparse(archive)


class _Fetched(io.RawIOBase):
    """A file whose read errors become DataErrors, to distinguish them from damage in the tar."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # fsspec file systems have no common base error
            raise _unreachable(self._url, error) from error
        buffer[: len(data)] = data
        return len(data)


class _Ending:
    """A file that raises an error when reading goes on beyond its end.

    tarfile skips by reading, even when a damaged header claims 2^88 bytes and the file is over.
    """

    def __init__(self, file: Any) -> None:
        self._file, self._empty_reads = file, 0

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        self._empty_reads += not data
        if self._empty_reads > _MAX_EMPTY_READS:
            raise tarfile.ReadError("unexpected end of data")
        return data


class _Eager:
    """A decompressed file with short reads, so that damage does not lose the intact data before it."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        data: bytes = self._file.read1(min(size, _UNPACKED_BLOCK))
        return data


class _Tar(SourceShard):
    """Base of the readers of one tar, with a name that begins the ids, and the file's fingerprint."""

    def __init__(self, url: str, name: str, state: str) -> None:
        self.url, self.name, self._state = url, name, state

    def digest(self) -> str:
        """SHA-256 of the name and the fingerprint, so that a job does not continue with a replaced tar."""
        return digest_of([self.name, self._state])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Read entries ``start`` to ``stop``; of earlier images, only the headers are read."""
        return islice(_until_damage(self.url, self.name, self._entries(start)), start, stop)

    @abstractmethod
    def _entries(self, start: int) -> Iterator[Entry]: ...


class TarImages(_Tar):
    """The images of one tar, as a stream of their encoded bytes.

    A sample without an image, a second image of a sample, an unreadable member and a damaged end of the tar
    are each recorded as a rejected entry.
    """

    columns = ("image_path",)

    def _entries(self, start: int) -> Iterator[Entry]:
        for position, sample in enumerate(read_samples(self.url, "image")):
            name = readable(f"{self.name}/{sample.key}")
            if sample.fault is not None:
                yield Rejected(name, sample.fault)
            elif position < start:
                yield Item(name, b"", {})  # skipped by read(), so its bytes are not read
            else:
                path = f"tar://{readable(sample.member)}::{self.url}"
                yield Item(name, sample.read(), {"image_path": path})


class TarCaptions(_Tar):
    """The captions of one tar: each line of a sample's ``.txt`` is one, as in CLIP_benchmark."""

    columns = ("caption",)

    def _entries(self, start: int) -> Iterator[Entry]:
        for sample in read_samples(self.url, "caption"):
            name = readable(f"{self.name}/{sample.key}")
            if sample.fault is not None:
                yield Rejected(name, sample.fault)
                continue
            lines = sample.read().decode("utf-8", "surrogateescape").splitlines()
            for number, line in enumerate(lines or [""]):
                yield text_entry(f"{name}#{number}", line)


class Sample(NamedTuple):
    """The image or the caption file of one sample."""

    key: str
    member: str
    """Name of the file in the tar; empty if there is a fault."""
    fault: str | None
    """Reason why it cannot be used, if any; :func:`missing` if there is no such file."""
    range: tuple[int, int]
    """Offset and size of its bytes in the uncompressed tar."""
    read: Callable[[], bytes]
    """Returns its bytes; valid only until the next sample is requested."""


def missing(kind: Literal["image", "caption"]) -> str:
    """Return the fault of a sample that lacks one of its files."""
    return f"the sample holds no {kind} file"


def read_samples(url: str, kind: Literal["image", "caption"]) -> Iterator[Sample]:
    """Yield every sample once, and surplus members with their fault; :attr:`Sample.read` reads the bytes."""
    seen: dict[str, int] = {}
    with open_tar(url) as archive:
        key, is_complete = "", True
        for member in archive:
            parts = _KEY.fullmatch(member.name.removeprefix("./"))
            if parts is None or not member.isfile() or _is_meta(parts[1]) or is_hidden(parts[1]):
                continue
            if parts[1] != key:
                if not is_complete:
                    yield _faulty(key, seen, missing(kind))
                key, is_complete = parts[1], False
            suffix = f".{parts[2].lower()}"
            if suffix in IMAGE_SUFFIXES if kind == "image" else suffix == ".txt":
                is_complete = True
                yield _as_sample(archive, member, key, seen, _MAX_BYTES[kind])
        if not is_complete:
            yield _faulty(key, seen, missing(kind))


def _as_sample(
    archive: TarStream, member: tarfile.TarInfo, key: str, seen: dict[str, int], max_bytes: int
) -> Sample:
    if key in seen:
        fault = f"{member.name} has the key of an earlier sample in its tar; keys are unique"
        return _faulty(key, seen, fault)
    if member.size > max_bytes:
        return _faulty(key, seen, f"{member.name} has {member.size} bytes, which no image or caption needs")
    seen[key] = 1
    return Sample(key, member.name, None, (member.offset_data, member.size), lambda: archive.read(member))


def _faulty(key: str, seen: dict[str, int], fault: str) -> Sample:
    # A repeated key gets a number, so that every entry is recorded once.
    seen[key] = seen.get(key, 0) + 1
    unique_key = key if seen[key] == 1 else f"{key}#{seen[key]}"
    return Sample(unique_key, "", fault, (0, 0), bytes)


def _is_meta(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.startswith("__") and base.endswith("__")


def _until_damage(url: str, name: str, entries: Iterator[Entry]) -> Iterator[Entry]:
    """Yield the entries, and a final rejected one if the tar cannot be read to its end."""
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
        raise _unreachable(url, error) from error
