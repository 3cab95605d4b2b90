"""WebDataset tars, read in stream mode from local files and from any URL that fsspec opens.

In a WebDataset the files that share a name up to the first dot of its last component are one sample, and
stand side by side: ``000017.jpg``, ``000017.txt``, ``000017.json``.
"""

from __future__ import annotations

import lzma
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal, NamedTuple

from xbt.data.image_folder import IMAGE_SUFFIXES, is_hidden
from xbt.data.image_text_pairs import Rejected
from xbt.data.items import Entry, Item, Part, digest_of, readable, text_entry
from xbt.data.tar_streams import TarStream, one_line, open_tar
from xbt.errors import DataError
from xbt.images import MAX_PIXELS

_KEY = re.compile(r"((?:.*/)?[^/.][^/.]*)\.([^/]+)", re.DOTALL)
# tarfile also lets through what parsing a damaged header raises; gzip and bz2 call a damage an OSError. What
# befalls the way to the tar comes as a DataError, which has to be caught first.
DAMAGE = (
    tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, LookupError, ArithmeticError,
    RecursionError,
)  # fmt: skip
_LARGEST: dict[Literal["image", "caption"], int] = {"image": 4 * MAX_PIXELS, "caption": 1 << 22}
"""Sizes in bytes above which a member is not read; an image of the most pixels needs no more unpacked."""


class _Tar(Part):
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
