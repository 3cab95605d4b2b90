"""Standard output for what was found, and for nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper

from xbt.errors import DataError


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
    """The lines of a file of UTF-8, or of standard input, stripped and without blank ones.

    Args:
        file: A path, or ``-`` for standard input.
        what: What the lines are, for the message.

    Raises:
        DataError: If there is none, or it is no text.
        FileNotFoundError: If there is no such file.
    """
    where = "standard input" if file == "-" else file
    try:
        if file == "-":
            data = sys.stdin.read()
        else:
            with open(file, encoding="utf-8-sig") as opened:  # noqa: PTH123 - a path as it was typed
                data = opened.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not a text of UTF-8 ({error.reason}); convert it") from error
    lines = [line.strip() for line in data.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{where} holds no {what}; give one on each line")
    return lines
