"""Approximate indexes kept on disk: a cache beside the stores, which can be made from them at any time.

    index/<part>.json            what was indexed, and which files hold it; written last
    index/<part>-<token>.faiss   FAISS's own file
    index/<part>-<token>.npy     row numbers of its entries

Files are never changed: a new index has new ones, and whoever has mapped the old ones keeps them.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xbt.errors import StoreError
from xbt.gallery.approximate import ApproximateIndex
from xbt.gallery.index_plan import IndexPlan
from xbt.store.files import Sink, checksum, write_record, write_whole
from xbt.store.layout import read_record

FOLDER = "index"


@dataclass(frozen=True)
class IndexCache:
    """Where one part's index is kept.

    Attributes:
        folder: The gallery's folder ``index/``.
        part: The part's name.
        plan: Which index.
        mmap: Whether the index is mapped rather than read; inverted files only.
        read_only: Whether nothing may be written.
    """

    folder: Path
    part: str
    plan: IndexPlan
    mmap: bool = False
    read_only: bool = False

    def load(self, segments: list[str], count: int) -> ApproximateIndex | None:
        """Reads the index, if there is one of these rows.

        Args:
            segments: Names of the part's segments.
            count: Rows of the part.

        Returns:
            The index; ``None`` if there is none, it is of other rows or another kind, or it is damaged:
            it can be made anew.
        """
        record = self._record()
        if record is None or record["index"] != self.plan.factory or record["upto"] > count:
            return None
        if record["segments"] != segments[: len(record["segments"])]:
            return None
        return self._read(record)

    def save(self, made: ApproximateIndex, segments: list[str]) -> None:
        """Writes an index, and removes the files of the one before.

        Raises:
            StoreError: If the disk is full or may not be written to.
        """
        import faiss

        token = secrets.token_hex(4)
        names = {"faiss": f"{self.part}-{token}.faiss", "rows": f"{self.part}-{token}.npy"}

        def write_index(sink: Sink) -> None:
            # FAISS buffers nothing itself, and calls back with what it has.
            library: Any = faiss
            library.write_index(made.index, library.PyCallbackIOWriter(sink.write))

        needed = 4 * made.index.d * len(made.rows)  # about; codes take less, and graphs more
        files = {
            names["faiss"]: write_whole(self.folder / names["faiss"], needed, write_index),
            names["rows"]: write_whole(
                self.folder / names["rows"], made.rows.nbytes, lambda sink: np.save(_Buffer(sink), made.rows)
            ),
        }
        plain = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()}
        what = {"index": self.plan.factory, "segments": segments, "upto": made.upto}
        write_record(self.folder / f"{self.part}.json", {**what, **names, "files": plain})
        for path in self.folder.glob(f"{self.part}-*"):
            if path.name not in files:
                path.unlink(missing_ok=True)

    def faults(self) -> list[str]:
        """Damage to the files, a sentence each."""
        try:
            record = self._record()
        except (KeyError, TypeError) as error:
            return [f"{self.folder / self.part}.json is damaged ({error!r}): remove {self.folder}"]
        damaged = []
        for name, file in ({} if record is None else record["files"]).items():
            path = self.folder / name
            if not path.is_file() or checksum(path) != file["sha256"]:
                damaged.append(f"{path} is missing or damaged: remove {self.folder}, it is made anew")
        return damaged

    def _record(self) -> dict[str, Any] | None:
        path = self.folder / f"{self.part}.json"
        try:
            return read_record(path) if path.is_file() else None
        except StoreError:
            return None

    def _read(self, record: dict[str, Any]) -> ApproximateIndex | None:
        import faiss

        flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if self.mmap else 0
        path = self.folder / record["faiss"]
        try:
            if path.stat().st_size != record["files"][record["faiss"]]["bytes"]:
                return None
            rows = np.load(self.folder / record["rows"], allow_pickle=False)
            index = faiss.read_index(str(path), flags)
        except (OSError, ValueError, EOFError, RuntimeError):
            return None
        if len(rows) != index.ntotal or rows.dtype != np.int64:
            return None
        self.plan.tune(index)
        return ApproximateIndex(index, rows, int(record["upto"]), self.plan.proposals)


class _Buffer:
    """A sink as numpy wants it."""

    def __init__(self, sink: Sink) -> None:
        self.write = sink.write
