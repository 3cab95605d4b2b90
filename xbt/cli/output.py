"""Input and output of the commands: standard output carries the result and nothing else."""

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
    """Send all prints to standard error, also those of C libraries and child processes."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 1)
        os.close(saved)


def escape_on_stdout() -> None:
    """Escape characters that the encoding of standard output lacks, as standard error does."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """Print a result; a closed pipe (``| head``) is no error.

    Raises:
        DataError: If standard output cannot be written, such as a file on a full disk.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # Python flushes again at exit, which would fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise DataError(
                f"standard output cannot be written ({error.strerror}); free disk space or redirect it"
            ) from error


def read_lines(file: str, what: str) -> list[str]:
    """Read the non-blank lines of a UTF-8 file or of standard input (``-``), stripped.

    Only line feeds end a line. ``what`` names the lines in error messages, such as ``"ids"``.

    Raises:
        DataError: If the file does not exist, cannot be read, is too long, is not UTF-8 (the message gives
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
            f"{where} cannot be read ({reason}); give a text file with one of the {what} on each line"
        ) from error
    if len(data) > _MAX_BYTES:
        raise DataError(f"{where} holds more than {_MAX_BYTES:,} bytes; split it and give one part at a time")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}, line {line}: not UTF-8; save the file as UTF-8") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{where} holds no {what}; give one on each line")
    return lines


def _read(file: str) -> bytes:
    """Bytes of a file or of standard input, at most one more than allowed."""
    if file != "-":
        with open(file, "rb") as opened:  # noqa: PTH123 - keep the path as typed
            return opened.read(_MAX_BYTES + 1)
    if sys.stdin is None:  # closed by the parent process
        return b""
    if isinstance(sys.stdin, TextIOWrapper):  # its decoder depends on the locale, so read bytes
        data: bytes = sys.stdin.buffer.read(_MAX_BYTES + 1)
        return data
    return sys.stdin.read().encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class CommandResult:
    """Result of a command.

    Attributes:
        document: JSON-able form, for ``--json``.
        text: Text for people, without a newline at the end.
        status: Exit status: 0, or 1 for a negative answer.
        error: Error to raise after the text has been printed.
    """

    document: Mapping[str, Any]
    text: str
    status: int = 0
    error: XbtError | None = None

    def to_json(self) -> str:
        """The document as ASCII JSON, which every terminal and pipe can carry."""
        return as_json(self.document)


def as_json(document: Mapping[str, Any]) -> str:
    """Serialise to JSON; paths become strings, NaN and infinity become null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a numpy or torch scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
