"""Reading text and JSON files, plain or gzipped, with errors that say what is wrong and where."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from xbt.errors import DataError


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, unpacking it if its name ends in ``.gz``.

    Args:
        path: The file.

    Returns:
        Its text, without a byte order mark.

    Raises:
        DataError: If it is missing, a directory, unreadable, not gzip, cut short, empty or not UTF-8.
    """
    check_is_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    if data and path.suffix == ".gz":
        data = _unpack(data, path)
    if not data:
        raise DataError(f"{path} is empty; give a file with something in it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file in UTF-8") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file, plain or gzipped.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        DataError: As :func:`read_text`, or if it is not JSON; the message gives the line.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{path}{place}: not valid JSON ({reason}); mend or download it again") from error


def check_is_file(path: Path) -> None:
    """Checks that a path names a file.

    Raises:
        DataError: If it does not exist or is a directory.
    """
    if path.is_dir():
        raise DataError(f"{path} is a directory; name a file in it, or write hf:{path} for a data set in it")
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path")


def kind_of(path: Path) -> str:
    """Returns a file's suffix in lower case, the one before ``.gz`` where it is gzipped."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _unpack(data: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(data)
    except gzip.BadGzipFile as error:
        raise DataError(
            f"{path} is not a gzip file although its name says so; rename it or pack it"
        ) from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is a truncated or damaged gzip file; copy or download it again") from error
