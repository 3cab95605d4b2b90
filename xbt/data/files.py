"""Shared helpers for data files: text and JSON (plain or gzipped), caption cells, file lookup and splits.

Every error names the file, the line if there is one, and the fix.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import posixpath
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from xbt.errors import ConfigError, DataError

DEFAULT_COUNT = 10_000
"""Number of built-in scenes if no limit is given."""
ALL_SPLITS = "all"
COLUMN_HINT = "name the column that holds text"
IMAGE_SUFFIXES = frozenset(
    [
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm",
        ".avif", ".heic", ".heif", ".hif", ".jxl",
    ]
)  # fmt: skip
"""Suffixes, in lower case, of images in folders and tar files. Formats that need a Pillow plugin are
included: without the plugin such an image is recorded as rejected, not silently skipped."""
MAX_UNPACKED = 2 << 30
"""Maximum unpacked size of a compressed file, in bytes."""
MAX_RATIO = 50
"""Maximum compression ratio of files that unpack to more than :data:`FREE_UNPACKED` bytes; captions reach 3
to 15."""
FREE_UNPACKED = 64 << 20
"""Unpacked size in bytes up to which any compression ratio is accepted."""
_BLOCK = 1 << 20
_HALF = re.compile("[\ud800-\udfff]")
_FORMS: tuple[Literal["NFC"], Literal["NFKC"]] = ("NFC", "NFKC")
_ABSENT = (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR)
"""Error numbers for a file that does not exist."""


def check_source(source: str, limit: int | None) -> None:
    """Check the options that all sources share."""
    if not source.strip():
        raise ConfigError("source is empty; name a file, hf:REPOSITORY or scenes")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, but must be at least 1; leave it out to take everything")


def refuse_options(options: Any, names: Iterable[str], reason: str) -> None:
    """Refuse options with another value than the default, which do not apply to this kind of source."""
    defaults = {field.name: field.default for field in fields(options)}
    for name in names:
        if getattr(options, name) != defaults[name]:
            raise ConfigError(
                f"{name} {getattr(options, name)!r} was given with {options.source}, {reason.format(name)}; "
                "leave it out"
            )


def refuse_split(split: str | None, path: Path) -> None:
    """Refuse a split of a file that has none."""
    if split is not None:
        raise ConfigError(
            f"split {split!r} was given, but {path} has no splits; leave split out and give the file of the "
            "split that you want"
        )


def one_line(error: BaseException) -> str:
    """Describe an error by its type and message, without line breaks and in at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def unpacked(value: Any, where: str = "") -> Any:
    """Parse a string that holds a JSON list of captions; return any other value unchanged."""
    if isinstance(value, str) and value.startswith('["') and value.endswith('"]'):
        try:
            return parse_json(value, where)
        except DataError:
            return value
    return value


def as_captions(value: Any, where: str, fix: str = COLUMN_HINT) -> list[str | None]:
    """Convert a cell to a list of captions, with None where the data has none.

    A cell holds a string, a list of strings, or nothing. A string or list may also be wrapped in Karpathy's
    structure, under the key ``raw``. ``fix`` is the hint at the end of the error message.
    """
    raw = _raw(value)
    captions = [_raw(item) for item in raw] if isinstance(raw, list) else [raw]
    for caption in captions:
        if caption is not None and not isinstance(caption, str):
            raise DataError(
                f"{where}: a {type(caption).__name__} ({str(caption)[:40]!r}) where a caption should be; "
                f"{fix}"
            )
    return captions


def _raw(value: Any) -> Any:
    return value["raw"] if isinstance(value, dict) and "raw" in value else value


def read_text(path: Path) -> str:
    """Read a UTF-8 file without its byte order mark; unpack it if its name ends in ``.gz``."""
    check_is_file(path)
    try:
        data = _unpack(path) if path.suffix.lower() == ".gz" and path.stat().st_size else path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if not data:
        raise DataError(f"{path} is empty; give a file with content")
    return decode(data, str(path))


def decode(data: bytes, where: str) -> str:
    """Decode UTF-8, with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}, line {line}: not UTF-8; save the file in UTF-8") from error


def read_json(path: Path) -> Any:
    """Read a JSON file, plain or gzipped."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str | bytes, where: str, first_line: int | None = 1) -> Any:
    """Parse JSON that was read from the file ``where``.

    The document begins on ``first_line`` of the file; ``None`` if ``where`` names the line.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where}: not valid JSON (nested too deeply); fix or remove it") from error
    except ValueError as error:  # also raised for broken UTF-8 and for numbers with thousands of digits
        position, reason = "", str(error)
        if isinstance(error, json.JSONDecodeError):
            position = "" if first_line is None else f", line {error.lineno + first_line - 1}"
            reason = error.msg
        elif isinstance(error, UnicodeDecodeError):
            reason = "not UTF-8"
        raise DataError(
            f"{where}{position}: not valid JSON ({reason}); fix it or download it again"
        ) from error


def is_unicode(text: str) -> bool:
    """Return False if the text contains half of a surrogate pair, which no encoder can read."""
    return text.isascii() or _HALF.search(text) is None


def check_is_file(path: Path) -> None:
    """Check that a path names a regular file; reading a pipe or a device may never end."""
    if path.is_dir():
        raise DataError(f"{path} is a directory; name a file in it, or write hf:{path} for a data set in it")
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if not path.is_file():
        raise DataError(f"{path} is a pipe or device; give a regular file")


def kind_of(path: Path) -> str:
    """Return a file's suffix in lower case; for a gzipped file, the suffix before ``.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def name_within(folder: str | Path, name: str, where: str | None = None) -> str:
    """Return a file's name relative to a folder, without ``.`` and ``..``; refuse one that leaves it.

    The name has forward slashes, and may be an absolute path in the folder. ``where`` names its record in the
    error message.
    """
    if ".." not in name and "//" not in name and not name.startswith(("/", "./")):
        return name  # fast path for almost every name
    relative = posixpath.normpath(name)
    if relative.startswith("/"):
        root = posixpath.abspath(os.fspath(folder)).rstrip("/")
        relative = relative.removeprefix(f"{root}/") if relative.startswith(f"{root}/") else ".."
    if relative == ".." or relative.startswith("../"):
        raise DataError(
            f"{where or 'a record'} names the file {name[:100]!r}, which lies outside of the folder "
            f"{folder}; write names relative to that folder, or set image_root to one that holds them all"
        )
    return relative


def find_file(folder: str | Path, name: str, where: str | None = None) -> Path | None:
    """Find a file below a folder by its name in any Unicode normal form; ``None`` if there is none.

    macOS and some archives write ``é`` as two characters (NFD), while most files write it as one (NFC). The
    exact name is tried first. Otherwise every component of the name, folders too, is compared in normal form
    with the entries of its folder. The result is spelled as on disk. See :func:`name_within`.
    """
    relative = name_within(folder, name, where)
    path = Path(folder, relative)
    try:
        if path.is_file():
            return path
        for form in _FORMS:
            paths = [Path(folder)]
            for component in relative.split("/"):
                paths = [parent / name for parent in paths for name in _spellings(parent, component, form)]
            matches = [path for path in paths if path.is_file()]
            # Names with equal NFC are the same text. Names with equal NFKC may be different texts.
            if matches and (form == "NFC" or len(matches) == 1):
                return matches[0]
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise DataError(
            f"{path} cannot be looked up ({error.strerror}); check the disk and permissions"
        ) from error


def _spellings(folder: Path, name: str, form: Literal["NFC", "NFKC"]) -> list[str]:
    """Entries of a folder whose normal form equals that of ``name``; an exact match comes first."""
    if not folder.is_dir():
        return []
    normal = unicodedata.normalize(form, name)
    listed = _names(str(folder), folder.stat().st_mtime_ns, form).get(normal, [])
    exact = [spelling for spelling in (name, normal) if (folder / spelling).exists()]  # ASCII is not listed
    return list(dict.fromkeys(exact + listed))


@lru_cache(maxsize=64)
def _names(folder: str, changed: int, form: Literal["NFC", "NFKC"]) -> dict[str, list[str]]:
    """Non-ASCII names in a folder by their normal form; ``changed`` is the folder's mtime, a cache key."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):  # noqa: PTH208 - only names are needed
        if not name.isascii():
            names.setdefault(unicodedata.normalize(form, name), []).append(name)
    return names


def check_unpacked(path: Path, size: int) -> None:
    """Check the unpacked bytes so far of a compressed file against the limits above."""
    packed = path.stat().st_size
    limit = min(MAX_UNPACKED, max(FREE_UNPACKED, MAX_RATIO * packed))
    if size > limit:
        raise DataError(
            f"{path} ({packed:,} bytes) unpacks to more than {limit:,} bytes, the limit for its size; if you "
            "trust it, unpack it with gunzip, or write it again without compression"
        )


def _unpack(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            size = 0
            # Measure the size before keeping anything, so that a gzip bomb takes no memory.
            while block := file.read(_BLOCK):
                size += len(block)
                check_unpacked(path, size)
            file.seek(0)
            return file.read()
    except gzip.BadGzipFile as error:
        raise DataError(
            f"{path} is not a gzip file although its name says so; rename it or pack it"
        ) from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is a truncated or damaged gzip file; copy or download it again") from error


def choose_splits(split: str | None, present: Sequence[str], where: str, required: bool = False) -> list[str]:
    """Parse the option ``split``: a name, several joined by ``+``, or ``"all"``; ``None`` also means all.

    The result is in the order of the splits that are present, and without repetition. With ``required``, a
    split must be named if there are several.
    """
    if required and split is None and len(present) > 1:
        raise DataError(f"{where} has the splits {', '.join(present)}; choose one with split")
    if split is None or (split.strip() == ALL_SPLITS and ALL_SPLITS not in present):
        return list(present)
    chosen = [name.strip() for name in split.split("+")]
    for name in chosen:
        if name not in present:
            raise DataError(f"{where} has no split {name!r}; it has {', '.join(present)}")
    return [name for name in present if name in chosen]
