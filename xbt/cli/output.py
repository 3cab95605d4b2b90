"""Standard output for what was found, and for nothing else.

What a command has found: for people, and for programs.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from xbt.errors import DataError, XbtError

_MAX_BYTES = 1 << 28


@contextmanager
def prints_on_stderr() -> Iterator[None]:
    """Sends to standard error whatever is printed meanwhile, by libraries in C and by child processes too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 1)
        os.close(kept)


def escape_on_stdout() -> None:
    """Lets standard output show as an escape what its encoding lacks, as standard error does."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """Prints what was found; a reader that has gone away (``| head``) is no error.

    Raises:
        DataError: If standard output cannot be written, such as a file on a full disk.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise DataError(
                f"standard output cannot be written ({error.strerror}); make room, or send it elsewhere"
            ) from error


def read_lines(file: str, what: str) -> list[str]:
    """Reads the lines of a UTF-8 file, or of standard input, stripped and without blank ones.

    Args:
        file: A path, or ``-`` for standard input.
        what: Name of what the lines are, for the error.

    Returns:
        The lines. Only line feeds end a line.

    Raises:
        DataError: If there is no such file, it cannot be read, is too long, is not UTF-8 (the message gives
            the line) or holds no line.
    """
    where = "standard input" if file == "-" else file
    try:
        data = _read(file)
    except FileNotFoundError as error:
        raise DataError(f"{where} does not exist; check the path") from error
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{where} cannot be read ({reason}); give a text file with one of the {what} a line"
        ) from error
    if len(data) > _MAX_BYTES:
        raise DataError(f"{where} holds more than {_MAX_BYTES:,} bytes; split it and give one part at a time")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}, line {line}: not UTF-8; save it in UTF-8") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{where} holds no {what}; give one on each line")
    return lines


def _read(file: str) -> bytes:
    """The bytes of a file or of standard input, or one more than are allowed."""
    if file != "-":
        with open(file, "rb") as opened:  # noqa: PTH123 - a path as it was typed
            return opened.read(_MAX_BYTES + 1)
    if sys.stdin is None:  # closed by whoever started this process
        return b""
    if isinstance(sys.stdin, TextIOWrapper):  # whose own decoder depends on the locale
        data: bytes = sys.stdin.buffer.read(_MAX_BYTES + 1)
        return data
    return sys.stdin.read().encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Outcome:
    """What a command has found.

    Attributes:
        document: JSON-able, for ``--json``.
        text: For people, without a newline at the end.
        status: Exit status: 0, or 1 for an answer that is no.
        error: What ends the command after all, once people have been shown the text.
    """

    document: Mapping[str, Any]
    text: str
    status: int = 0
    error: XbtError | None = None

    def to_json(self) -> str:
        """The document as JSON of ASCII characters, which every terminal and pipe can carry."""
        return as_json(self.document)


def as_json(document: Mapping[str, Any]) -> str:
    """JSON with what JSON does not know in its nearest form: paths as strings, NaN and infinity as null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of numpy's or torch's
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
