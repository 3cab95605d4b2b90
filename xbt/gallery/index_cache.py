"""Approximate indexes kept on disk: a cache beside the stores, which can be made from them at any time.

    index/<part>.json            what was indexed, and which files hold it; written last
    index/<part>-<token>.faiss   FAISS's own file
    index/<part>-<token>.npy     row numbers of its entries

Files are never changed: a new index has new ones, and whoever has mapped the old ones keeps them.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xbt.errors import StoreError
from xbt.gallery.approximate import ApproximateIndex
from xbt.gallery.index_plan import IndexPlan
from xbt.gallery.layout import GalleryRecord
from xbt.store.files import Sink, checksum, write_record, write_whole, writing_to
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
        try:
            fits = record is not None and self._is_of(record, segments) and record["upto"] <= count
            return self._read(record) if record is not None and fits else None
        except (KeyError, TypeError, AttributeError):  # it was edited or damaged
            return None

    def save(self, made: ApproximateIndex, segments: list[str]) -> bool:
        """Writes an index, and removes the files of the one before.

        Whoever searches makes an index that is missing, and needs no right to write to the gallery for it. So
        one is left out, and made again some day, that somebody else is writing at the same moment, that is of
        rows which are no longer the gallery's, or behind one that is there.

        Returns:
            Whether it was written.

        Raises:
            StoreError: If the disk is full or may not be written to.
        """
        with writing_to(self.folder, 0):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder) as alone:
            if not alone or not self._is_wanted(made, segments):
                return False
            self._write(made, segments)
        return True

    def _write(self, made: ApproximateIndex, segments: list[str]) -> None:
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

    def _is_of(self, record: dict[str, Any], segments: list[str]) -> bool:
        """Whether a record is of this kind of index, and of rows that these segments begin with."""
        known: list[str] = record["segments"]
        return bool(record["index"] == self.plan.factory and known == segments[: len(known)])

    def _is_wanted(self, made: ApproximateIndex, segments: list[str]) -> bool:
        try:
            parts = GalleryRecord.read(self.folder.parent).parts
        except StoreError:
            return False
        now = [segment.name for part in parts if part.name == self.part for segment in part.segments]
        record = self._record()
        try:
            behind = record is not None and self._is_of(record, now) and record["upto"] > made.upto
        except (KeyError, TypeError):
            behind = False
        return now[: len(segments)] == segments and not behind

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
        if len(rows) != index.ntotal or rows.dtype != np.int64 or not _ascend(rows, record["upto"]):
            return None
        self.plan.tune(index)
        return ApproximateIndex(index, rows, int(record["upto"]), self.plan.proposals)


def _ascend(rows: NDArray[np.int64], upto: int) -> bool:
    """Whether these are numbers of rows, as an index has them."""
    return len(rows) == 0 or bool(rows[0] >= 0 and rows[-1] < upto and (np.diff(rows) > 0).all())


if os.name == "nt":  # pragma: no cover

    @contextmanager
    def _alone(folder: Path) -> Iterator[bool]:
        yield True  # a directory cannot be locked there

else:
    import fcntl

    @contextmanager
    def _alone(folder: Path) -> Iterator[bool]:
        """Whether nobody else writes an index meanwhile, in this process or another."""
        with writing_to(folder, 0):
            handle = os.open(folder, os.O_RDONLY)
        try:
            yield _taken(handle)
        finally:
            os.close(handle)

    def _taken(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)  # there are file systems without locks
        return True


class _Buffer:
    """A sink as numpy wants it."""

    def __init__(self, sink: Sink) -> None:
        self.write = sink.write
