"""The files of a backfill job: logs that only grow, and the order."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xbt.errors import DataError, StoreError
from xbt.files import write_record, writing_to
from xbt.store.layout import read_record

ORDER, CURVE, REJECTED, RESULT = "order.json", "curve.jsonl", "rejected.jsonl", "result.json"


class JsonLines:
    """A file of JSON objects, one a line; appended lines are on disk, a line that a kill cut off is dropped.

    Args:
        path: The file, which need not exist.
        keys: Keys that every object must have, and the types of their values.

    Attributes:
        entries: The objects.

    Raises:
        DataError: If a whole line is no such JSON object.
        StoreError: If the file cannot be read.
    """

    def __init__(self, path: Path, keys: Mapping[str, type] | None = None) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        content = _read(path)
        self._end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._end].split(b"\n")[:-1], start=1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}, is no JSON; restore the file, or pass --overwrite true"
                ) from error
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(key), kind) for key, kind in (keys or {}).items()
            ):
                needed = f" with the keys {', '.join(keys)}" if keys else ""
                raise DataError(
                    f"{path}, line {number}, is no JSON object{needed}; restore the file, or pass "
                    "--overwrite true"
                )
            self.entries.append(entry)

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Add lines, all of which are on disk when it returns.

        Raises:
            StoreError: If the disk is full or must not be written to.
        """
        if not entries:
            return
        content = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode("utf-8")
        with writing_to(self.path, len(content)):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            with os.fdopen(handle, "r+b") as file:
                file.truncate(self._end)  # what a killed or failed append left
                file.seek(self._end)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self._end += len(content)
        self.entries += entries


def _read(path: Path) -> bytes:
    if not path.is_file():
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def read_order(path: Path) -> tuple[list[str], dict[str, Any]] | None:
    """Read the order of an earlier run, and how it was made; ``None`` if there is none.

    Raises:
        StoreError: If it is damaged.
    """
    if not path.is_file():
        return None
    record = read_record(path)
    ids = record.pop("ids", None)
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise StoreError(f"{path} holds no order; restore the file, or pass --overwrite true")
    return ids, record


def write_order(path: Path, ids: Sequence[str], about: dict[str, Any]) -> None:
    """Write an order whole: its ids, most urgent first, and how it was made.

    Raises:
        StoreError: If the disk is full or must not be written to.
    """
    write_record(path, {**about, "ids": list(ids)})
