"""What a job keeps of its own on disk: lines that only grow, and the order."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xbt.errors import DataError, StoreError
from xbt.store.files import write_record, writing_to
from xbt.store.layout import read_record

ORDER, CURVE, REJECTED, RESULT = "order.json", "curve.jsonl", "rejected.jsonl", "result.json"


class Lines:
    """A file of JSON objects, one a line: what was appended is on disk, and a line that a kill cut off goes.

    Args:
        path: The file, which need not exist.

    Attributes:
        entries: Everything in it.

    Raises:
        DataError: If a whole line is no JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        content = path.read_bytes() if path.is_file() else b""
        self._end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._end].splitlines(), start=1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}, is no JSON; restore the file, or pass --overwrite true"
                ) from error
            self.entries.append(entry)

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Adds lines, all of which are on disk when it returns.

        Raises:
            StoreError: If the disk is full or may not be written to.
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


def read_order(path: Path) -> tuple[list[str], dict[str, Any]] | None:
    """The order that an earlier run has drawn, and how it came about; ``None`` if there was none.

    Raises:
        StoreError: If it is damaged.
    """
    if not path.is_file():
        return None
    record = read_record(path)
    ids = record.pop("ids", None)
    if not isinstance(ids, list):
        raise StoreError(f"{path} holds no order; restore the file, or pass --overwrite true")
    return ids, record


def write_order(path: Path, ids: Sequence[str], about: dict[str, Any]) -> None:
    """Writes an order whole: its ids, most urgent first, and how it came about.

    Raises:
        StoreError: If the disk is full or may not be written to.
    """
    write_record(path, {**about, "ids": list(ids)})
