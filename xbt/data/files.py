"""Text and JSON files, plain or gzipped, and files found by name; errors say what is wrong and where.

What the option ``split`` may say: one name, several joined by ``+``, or ``all``.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import posixpath
import unicodedata
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from xbt.errors import ConfigError, DataError


def check_source(source: str, limit: int | None) -> None:
    """Checks what caption and pair sources share.

    Raises:
        ConfigError: If ``limit`` is below 1 or ``source`` is empty.
    """
    if not source.strip():
        raise ConfigError("source is empty; name a file, hf:REPOSITORY or scenes")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, but must be at least 1; leave it out to take everything")


DEFAULT_COUNT = 10_000


_COLUMN = "name the column that holds text"


def _raw(value: Any) -> Any:
    return value["raw"] if isinstance(value, dict) and "raw" in value else value


def unpacked(value: Any, where: str = "") -> Any:
    """Captions that a table without lists holds as JSON in a string, as a list; anything else as it is."""
    if isinstance(value, str) and value.startswith('["') and value.endswith('"]'):
        try:
            return parse_json(value, where)
        except DataError:
            return value
    return value


def as_captions(value: Any, where: str, fix: str = _COLUMN) -> list[str | None]:
    """Returns a cell as a list of captions.

    It may hold a string, a list of strings, or nothing; in place of a string or of the list, also Karpathy's
    structure with the string or strings under ``raw``.

    Args:
        value: The cell.
        where: Its place, for the error.
        fix: What to do about it, likewise.

    Returns:
        Its captions; None where the data has none.

    Raises:
        DataError: If it holds something else.
    """
    raw = _raw(value)
    told = [_raw(item) for item in raw] if isinstance(raw, list) else [raw]
    for item in told:
        if item is not None and not isinstance(item, str):
            raise DataError(
                f"{where}: a {type(item).__name__} ({str(item)[:40]!r}) where a caption should be; {fix}"
            )
    return told


IMAGE_SUFFIXES = frozenset(
    [
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm",
        ".avif", ".heic", ".heif", ".hif", ".jxl",
    ]
)  # fmt: skip
"""Suffixes, in lower case, by which images are recognised in folders and in tar files. What Pillow needs a
plugin for is among them: without the plugin it goes on record rather than be passed over."""


MAX_UNPACKED = 2 << 30
"""Largest size in bytes to which a packed file may unpack."""
MAX_RATIO = 50
"""Largest ratio of unpacked to packed size, above :data:`FREE_UNPACKED`; captions pack 3 to 15 times."""
FREE_UNPACKED = 64 << 20
"""Unpacked size in bytes below which the ratio may be any."""
_BLOCK = 1 << 20
_FORMS: tuple[Literal["NFC"], Literal["NFKC"]] = ("NFC", "NFKC")
_ABSENT = (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR)
"""Errors that mean that there is no such file."""


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, unpacking it if its name ends in ``.gz``.

    Args:
        path: The file.

    Returns:
        Its text, without a byte order mark.

    Raises:
        DataError: If it is missing, no regular file, unreadable, not gzip, cut short, empty or not UTF-8, or
            unpacks to more than :data:`MAX_UNPACKED` bytes or :data:`MAX_RATIO` times its size.
    """
    check_is_file(path)
    try:
        data = _unpack(path) if path.suffix.lower() == ".gz" and path.stat().st_size else path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if not data:
        raise DataError(f"{path} is empty; give a file with something in it")
    return decode(data, str(path))


def decode(data: bytes, where: str) -> str:
    """Decodes UTF-8, with or without a byte order mark.

    Raises:
        DataError: If it is not UTF-8; the message gives the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}, line {line}: not UTF-8; save the file in UTF-8") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file, plain or gzipped.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        DataError: As :func:`read_text`, or if it is not JSON; the message gives the line.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str | bytes, where: str, first_line: int | None = 1) -> Any:
    """Parses JSON that came from a file.

    Args:
        text: The document; bytes are UTF-8.
        where: The file, and the line of a document of one line, for the error.
        first_line: Line of the file on which the document begins; ``None`` where ``where`` names the line.

    Raises:
        DataError: If it is no valid JSON, nested too deeply, or holds a number of too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where}: not valid JSON (nested too deeply); fix or remove it") from error
    except ValueError as error:  # broken UTF-8 and numbers of thousands of digits too
        place, reason = "", str(error)
        if isinstance(error, json.JSONDecodeError):
            place = "" if first_line is None else f", line {error.lineno + first_line - 1}"
            reason = error.msg
        elif isinstance(error, UnicodeDecodeError):
            reason = "not UTF-8"
        raise DataError(f"{where}{place}: not valid JSON ({reason}); fix it or download it again") from error


def is_unicode(text: str) -> bool:
    """Tells valid Unicode from a text with half of a surrogate pair, which no encoder can read."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_is_file(path: Path) -> None:
    """Checks that a path names a regular file.

    Raises:
        DataError: If it does not exist, is a directory, or is a pipe or device, which may never end.
    """
    if path.is_dir():
        raise DataError(f"{path} is a directory; name a file in it, or write hf:{path} for a data set in it")
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")
    if not path.is_file():
        raise DataError(f"{path} is a pipe or device; give a regular file")


def kind_of(path: Path) -> str:
    """Returns a file's suffix in lower case, the one before ``.gz`` where it is gzipped."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def name_within(folder: str | Path, name: str, where: str | None = None) -> str:
    """Returns a file's name relative to a folder, and refuses one that leads out of it.

    Args:
        folder: The folder.
        name: A name with forward slashes, relative to the folder, or an absolute path in it.
        where: The record that names the file, for the error.

    Returns:
        The name without ``.`` and ``..``.

    Raises:
        DataError: If the name leaves the folder.
    """
    if ".." not in name and "//" not in name and not name.startswith(("/", "./")):
        return name  # almost every name: the rest takes time
    inside = posixpath.normpath(name)
    if inside.startswith("/"):
        root = posixpath.abspath(os.fspath(folder)).rstrip("/")
        inside = inside.removeprefix(f"{root}/") if inside.startswith(f"{root}/") else ".."
    if inside == ".." or inside.startswith("../"):
        raise DataError(
            f"{where or 'a record'} names the file {name[:100]!r}, which lies outside of the folder "
            f"{folder}; write names relative to that folder, or set image_root to one that holds them all"
        )
    return inside


def find_file(folder: str | Path, name: str, where: str | None = None) -> Path | None:
    """Finds a file below a folder, by its name in any Unicode normal form.

    macOS and some archives write ``é`` as two characters (NFD) where most files name it as one (NFC). A name
    is taken as it stands if there is such a file. Otherwise each of its parts, folders too, is compared in
    normal form with what is in the folder.

    Args:
        folder: The folder.
        name: A name with forward slashes, relative to the folder.
        where: The record that names the file, for the error.

    Returns:
        The file's path as it is spelled on disk; ``None`` if there is no such file.

    Raises:
        DataError: If the name leaves the folder, or cannot be looked up.
    """
    inside = name_within(folder, name, where)
    path = Path(folder, inside)
    try:
        if path.is_file():
            return path
        for form in _FORMS:
            paths = [Path(folder)]
            for part in inside.split("/"):
                paths = [above / name for above in paths for name in _spelled(above, part, form)]
            found = [each for each in paths if each.is_file()]
            # In NFC equal names are one text; in NFKC they may be two.
            if found and (form == "NFC" or len(found) == 1):
                return found[0]
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise DataError(f"{path} cannot be looked up ({error.strerror}); fix that") from error


def _spelled(folder: Path, part: str, form: Literal["NFC", "NFKC"]) -> list[str]:
    """The names in a folder that are equal to one in a normal form, that name itself first."""
    if not folder.is_dir():
        return []
    normal = unicodedata.normalize(form, part)
    listed = _names(str(folder), folder.stat().st_mtime_ns, form).get(normal, [])
    # Names in ASCII are not listed.
    return list(dict.fromkeys([each for each in (part, normal) if (folder / each).exists()] + listed))


@lru_cache(maxsize=64)
def _names(folder: str, changed: int, form: Literal["NFC", "NFKC"]) -> dict[str, list[str]]:
    """The names in a folder that are not ASCII, by their normal form.

    ``changed`` makes a folder that has changed another one for the cache.
    """
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):  # noqa: PTH208 - names alone
        if not name.isascii():
            names.setdefault(unicodedata.normalize(form, name), []).append(name)
    return names


def check_unpacked(path: Path, size: int) -> None:
    """Checks what a packed file unpacks to, or has unpacked to so far.

    Args:
        path: The packed file.
        size: Unpacked bytes.

    Raises:
        DataError: If they are more than :data:`MAX_UNPACKED` or :data:`MAX_RATIO` times the file's size.
    """
    packed = path.stat().st_size
    limit = min(MAX_UNPACKED, max(FREE_UNPACKED, MAX_RATIO * packed))
    if size > limit:
        raise DataError(
            f"{path} ({packed:,} bytes) unpacks to more than {limit:,} bytes, the limit for its size; if it "
            "can be trusted, unpack it with gunzip, or write it again without compression"
        )


def _unpack(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            size = 0
            # Measured before anything is kept: a bomb then takes no memory.
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


ALL_SPLITS = "all"


def choose_splits(split: str | None, present: Sequence[str], where: str) -> list[str]:
    """Reads the option ``split``.

    Args:
        split: A name, several joined by ``+`` (``"val+restval"``), ``"all"``, or ``None`` for all as well.
        present: The splits that there are.
        where: What to call the source in the error.

    Returns:
        The chosen names, each once, in the order of ``present``.

    Raises:
        DataError: If a split does not exist; the message lists those that do.
    """
    if split is None or (split.strip() == ALL_SPLITS and ALL_SPLITS not in present):
        return list(present)
    wanted = [name.strip() for name in split.split("+")]
    for name in wanted:
        if name not in present:
            raise DataError(f"{where} has no split {name!r}; it has {', '.join(present)}")
    return [name for name in present if name in wanted]
