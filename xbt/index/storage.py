"""Files of a gallery on disk: one SQLite database, and one file of vectors per segment.

    gallery.sqlite         settings, parts, segments with their ids and metadata, and the log of changes
    segments/<number>.npy  rows of a segment, float16 or float32, written once
    index/                 cache of approximate indexes; see xbt.index.faiss_index
    .lock                  lock of the writing process

The file of a segment is written and synced before the transaction that names it is committed. Files that no
transaction names are ignored. File names are derived from numbers and never read from the database.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from xbt.errors import DataError, StoreError
from xbt.files import Sink, remove_leftovers, write_whole
from xbt.index.faiss_index import FOLDER, IndexCache, IndexPlan
from xbt.index.segments import (
    Change,
    FileSegment,
    PartRecord,
    ascending,
    check_parts,
    check_schema,
    damaged,
    ids_from_json,
    is_count,
    journal_mode,
    npy_header,
    read_settings,
    segment_name,
    translated,
)
from xbt.index.store_segment import StoreRecord, StoreSegment, note_places, require_known
from xbt.store.lock import WriterLock

DATABASE, SEGMENTS = "gallery.sqlite", "segments"
BUSY_SECONDS = 30.0
"""Longest wait for a database lock, in seconds. xbt itself holds a lock for milliseconds."""
_LAST = (
    "SELECT (SELECT MAX(number) FROM segment), (SELECT MAX(version) FROM change), "
    "(SELECT seq FROM sqlite_sequence WHERE name = 'segment')"
)
MOST_ROUNDED = 0.01
"""Maximum relative rounding error of a vector; that of unit rows is below 0.001."""
FILE_ROWS = 1 << 20
"""Maximum rows per file written by compaction. The ids of a file are one value of the database."""


@dataclass(frozen=True)
class NewSegment:
    """Rows to write as one segment: ids, blocks of (m, dim) float32 vectors, and columns if there are any."""

    part: PartRecord
    ids: Sequence[str]
    blocks: Iterable[NDArray[np.float32]]
    table: pa.Table | None


@dataclass(frozen=True)
class Mark:
    """Position up to which a process has read a gallery."""

    stamp: tuple[int, int]
    identity: str
    generation: int
    segment: int
    change: int

    def precedes(self, settings: Mapping[str, str], last: Sequence[int | None]) -> bool:
        """Check for the same gallery and generation, with the same or later segments and changes."""
        same = (self.identity, str(self.generation)) == (settings["identity"], settings["generation"])
        return same and (last[0] or 0) >= self.segment and (last[1] or 0) >= self.change


@dataclass(frozen=True)
class News:
    """Updates found by a read.

    ``plan`` is there if this is the complete state, which replaces everything known before. ``parts`` are all
    parts, or none if there is no new one. ``segments`` hold the part's number, the segment and its row ids.
    """

    mark: Mark
    plan: IndexPlan | None
    parts: list[PartRecord]
    segments: list[tuple[int, FileSegment | StoreSegment, list[str]]]
    changes: list[Change]


class Storage:
    """Directory of a gallery.

    A database connection is open only while it is in use, or while this process holds the write lock (see
    :meth:`begin_writing`). A forked process never reuses it. ``stores`` holds the new paths of moved stores
    by the recorded ones. ``refused`` is set once a write has found another gallery at this path.
    """

    def __init__(
        self,
        path: Path,
        read_only: bool = False,
        mmap: bool = False,
        stores: Mapping[str, str | Path] | None = None,
    ) -> None:
        self.path, self.read_only, self.mmap = path, read_only, mmap
        self.options = read_only, mmap, stores
        self.refused, self.identity, self._has_stores = False, "", False
        self._moved = {str(was): Path(now).expanduser() for was, now in (stores or {}).items()}
        self._lock = threading.RLock()
        self._writer, self._journal = WriterLock(path), ""
        self._next_number = 1
        self._part_records: dict[tuple[Any, ...], PartRecord] = {}
        self._held_stamp: tuple[int, int] | None = None
        self._held: sqlite3.Connection | None = None
        _OPEN.add(self)
        if self._moved:
            with self._session() as db:
                require_known(self._moved, db, path / DATABASE)

    # -- reading ---------------------------------------------------------------------------------------

    def read(self, known: Mark | None) -> News:
        """Read everything written since a mark; ``None`` reads everything.

        The read starts again if a compaction removes a segment file meanwhile.
        """
        for last in (False, False, True):
            try:
                news = self._read(known)
            except _Vanished as error:
                if last:
                    raise StoreError(str(error)) from error
                known = None
                continue
            if self.refused or (self._held is not None and self.identity not in ("", news.mark.identity)):
                raise self._replaced()
            self.identity = news.mark.identity
            return news
        raise AssertionError

    def metadata(self, segment: int) -> bytes:
        """Read the Parquet bytes of a segment's columns."""
        with self._session() as db:
            row = db.execute("SELECT metadata FROM segment WHERE number = ?", (segment,)).fetchone()
        if row is None or not isinstance(row[0], bytes):
            raise StaleError(f"segment {segment} of {self.path} is gone; call reload()")
        return row[0]

    def inspect(self) -> tuple[list[str], dict[int, tuple[str, str, bytes, bytes | None]]]:
        """Check the database itself.

        Returns:
            Faults that SQLite reports, and by segment number: checksum of the file, checksum of the ids and
            columns, ids, and columns.
        """
        with self._session() as db:
            if self.identity not in ("", read_settings(db, self.path / DATABASE)["identity"]):
                raise self._replaced(refuse=False)
            messages = [str(text) for (text,) in db.execute("PRAGMA integrity_check(10)")]
            rows = db.execute("SELECT number, sha256, described, ids, metadata FROM segment")
            described = {number: tuple(row) for number, *row in rows}
        return [text for text in messages if text != "ok"], described

    def cache(self, part: PartRecord, plan: IndexPlan) -> IndexCache:
        """Open the index cache of a part."""

        def segments_now() -> list[str]:
            path, columns = self.path / DATABASE, "segment.number, sha256, store"
            query = f"SELECT {columns} FROM segment JOIN part ON part.number = segment.part WHERE name = ?"
            with self._session() as db:
                rows = db.execute(f"{query} ORDER BY 1", (part.name,)).fetchall()
            return [
                segment_name(number, sha256 if store is None else StoreRecord.from_json(store, path).digest)
                for number, sha256, store in rows
            ]

        return IndexCache(self.path / FOLDER, part.name, plan, segments_now, self.mmap, self.read_only)

    # -- writing ---------------------------------------------------------------------------------------

    @property
    def writing(self) -> bool:
        """``True`` while this object holds the write lock."""
        return self._held is not None

    def begin_writing(self) -> None:
        """Take the write lock."""
        if self.read_only:
            raise StoreError(f"{self.path} was opened read-only; open it without read_only to write")
        with self._lock, translated(self.path / DATABASE):
            stamp = self._stamp()
            self._writer.acquire()
            try:
                self._held_stamp, self._held = stamp, self._connect(write=True)
            except BaseException:
                self._writer.release()
                raise

    def end_writing(self) -> None:
        """Release the write lock."""
        with self._lock:
            connection, self._held = self._held, None
            try:
                if connection is not None:
                    with suppress(sqlite3.Error):  # the next opening replays the remaining log
                        connection.close()
            finally:
                self._writer.release()

    def append(self, known: Mark, new: NewSegment | None, changes: Sequence[Change] = ()) -> News:
        """Write a segment, if there is one, commit it with changes, and return the updates since ``known``.

        Changes with the segment number 0 are of the new segment. On an error the gallery is unchanged.
        """
        self._require_same()
        number, row = self._next_number, None
        segments: list[tuple[int, FileSegment | StoreSegment, list[str]]] = []
        if new is not None:
            row = self._write_segment(number, new)
            path, shape = self.path / SEGMENTS / _file_name(number), (len(new.ids), new.part.dim)
            read_metadata = None if new.table is None else self.metadata
            segment = FileSegment(number, path, new.part.dtype, shape, row[3], read_metadata)
            segments.append((new.part.number, segment, list(new.ids)))
        numbered = [replace(change, segment=change.segment or number) for change in changes]
        with self._transaction() as db:
            if row is not None:
                db.execute("INSERT INTO segment VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            last = _insert_changes(db, numbered, known.change)
        if row is None:
            return News(replace(known, change=last), None, [], [], numbered)
        self._next_number += 1
        return News(replace(known, segment=number, change=last), None, [], segments, numbered)

    def add_part(self, part: PartRecord) -> None:
        """Add a part."""
        with self._transaction() as db:
            insert_part(db, part)

    def rewrite(
        self,
        parts: Sequence[int],
        segments: Sequence[int],
        new: Sequence[NewSegment],
        changes: Sequence[Change],
    ) -> None:
        """Start the next generation: delete parts and segments, add segments, and replace the log."""
        self._require_same()
        first = self._next_number
        rows = [self._write_segment(first + place, segment) for place, segment in enumerate(new)]
        with self._transaction() as db:
            db.executemany("DELETE FROM part WHERE number = ?", [(number,) for number in parts])
            db.executemany("DELETE FROM segment WHERE number = ?", [(number,) for number in segments])
            db.execute("DELETE FROM change")
            db.executemany("INSERT INTO segment VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            _insert_changes(db, changes, 0)
            generation = int(read_settings(db, self.path)["generation"]) + 1
            db.execute("UPDATE setting SET value = ? WHERE key = 'generation'", (str(generation),))

    def sweep(self) -> None:
        """Remove files that no transaction names, and release free space of the database.

        An open reader keeps the files it has mapped. A file that cannot be removed is left for the next call.
        """
        self._require_same()
        folder = self.path / SEGMENTS
        with self._session() as db:
            ours = {_file_name(number) for (number,) in db.execute("SELECT number FROM segment")}
            with suppress(sqlite3.Error):  # for example on a full disk; failing to shrink does no harm
                (free,), (pages,) = (db.execute(f"PRAGMA {what}").fetchone()
                                     for what in ("freelist_count", "page_count"))  # fmt: skip
                if free > 16 and 2 * free > pages:
                    db.execute("VACUUM")
        with suppress(OSError):
            remove_leftovers(self.path, folder, self.path / FOLDER)
        for path in () if folder.is_symlink() else list(folder.glob("*.npy")):
            if re.fullmatch(r"\d{8,}\.npy", path.name) and path.name not in ours:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _write_segment(self, number: int, new: NewSegment) -> tuple[Any, ...]:
        """Write the file of a segment and return its database row."""
        path, part, count = self.path / SEGMENTS / _file_name(number), new.part, len(new.ids)
        if path.parent.is_symlink():
            raise StoreError(
                f"{path.parent} is a link, and links are not followed; replace it with the directory"
            )
        header = npy_header(part.dtype, count, part.dim)

        def produce(sink: Sink) -> None:
            sink.write(header)
            start = 0
            for block in new.blocks:
                sink.write(_as_stored(block, new.ids[start : start + len(block)], part).data.cast("B"))
                start += len(block)

        needed = len(header) + count * part.dim * np.dtype(part.dtype).itemsize
        file = write_whole(path, needed, produce)
        ids = json.dumps(list(new.ids), ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        metadata = None if new.table is None else _parquet(new.table, part.name)
        return number, part.number, count, file.sha256, describe_digest(ids, metadata), None, ids, metadata

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit what is done with the connection of the writer, or nothing."""
        with self._lock, translated(self.path / DATABASE):
            self._require_same()
            db = self._held
            assert db is not None
            db.execute("BEGIN IMMEDIATE")
            try:
                identity = db.execute("SELECT value FROM setting WHERE key = 'identity'").fetchone()
                if identity != (self.identity,):
                    raise self._replaced()
                yield db
                if self._has_stores:
                    note_places(db, self.path, self._moved)
                db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise

    def _require_same(self) -> None:
        """Refuse to write if another gallery is now at this path."""
        if self.refused or self._stamp() != self._held_stamp:
            raise self._replaced()

    def _replaced(self, refuse: bool = True) -> StoreError:
        # Refuse until it is opened again: the user has seen the items of the other gallery.
        self.refused = self.refused or refuse
        return StoreError(
            f"the gallery at {self.path} was replaced by another while it was open; open it again"
        )

    # -- connections -----------------------------------------------------------------------------------

    def _stamp(self) -> tuple[int, int]:
        """Identify the database file; a replacement has another stamp."""
        try:
            status = (self.path / DATABASE).stat()
        except OSError:
            raise _no_gallery(self.path) from None
        return status.st_dev, status.st_ino

    @contextmanager
    def _session(self) -> Iterator[sqlite3.Connection]:
        """Open a connection for one thread at a time, and translate SQLite errors."""
        with self._lock, translated(self.path / DATABASE):
            if self._held is not None:
                yield self._held
                return
            db = self._connect(write=False)
            try:
                yield db
            finally:
                db.close()

    def _connect(self, write: bool) -> sqlite3.Connection:
        path = self.path / DATABASE
        if not path.is_file():
            raise _no_gallery(self.path)
        mode = "mode=rw"
        if not write and not os.access(self.path, os.W_OK):
            wal = path.with_name(f"{DATABASE}-wal")
            # In a directory without write permission, SQLite can only read an immutable database.
            mode = "mode=ro" if wal.exists() and wal.stat().st_size else "mode=ro&immutable=1"
        db = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", BUSY_SECONDS, 0, None, False, uri=True)
        try:
            for pragma in ("trusted_schema=OFF", "cell_size_check=ON", f"query_only={not write:d}"):
                db.execute(f"PRAGMA {pragma}")
            check_schema(db, path)
            if write:
                self._journal = mode = self._journal or journal_mode(self.path)
                db.execute(f"PRAGMA journal_mode={mode}")
                # EXTRA also syncs the directory after deleting the journal of a commit.
                db.execute(f"PRAGMA synchronous={'FULL' if mode == 'WAL' else 'EXTRA'}")
        except BaseException:
            db.close()
            raise
        return db

    def _after_fork(self) -> None:
        """Leave the connection to the parent. Closing it in the child could release the parent's locks."""
        if self._held is not None:
            _LEFT_TO_PARENT.append(self._held)
        self._held, self._lock = None, threading.RLock()

    def _read(self, known: Mark | None) -> News:
        path = self.path / DATABASE
        with self._session() as db:
            stamp = self._stamp()
            if known is not None and known.stamp != stamp:
                known = None
            db.execute("BEGIN")
            try:
                settings = read_settings(db, path)
                last = db.execute(_LAST).fetchone()
                if known is not None and not known.precedes(settings, last):
                    known = None
                parts = []
                for row in db.execute("SELECT * FROM part ORDER BY number"):
                    if row not in self._part_records:  # a record is parsed once: its space includes a probe
                        self._part_records[row] = PartRecord.from_row(row, path)
                    parts.append(self._part_records[row])
                columns = "number, part, count, sha256, ids, store, metadata NOTNULL"
                query = f"SELECT {columns} FROM segment WHERE number > ?"
                last_segment, last_change = (0, 0) if known is None else (known.segment, known.change)
                rows = list(
                    ascending(db.execute(f"{query} ORDER BY number", (last_segment,)), last_segment, path)
                )
                query = "SELECT version, segment, moved, rows FROM change WHERE version > ? ORDER BY version"
                log = list(ascending(db.execute(query, (last_change,)), last_change, path))
            finally:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
        check_parts(parts, path)
        if not is_count(last[2] or 0, 0):
            raise damaged(path, f"its counter of segments is {last[2]!r}")
        self._next_number = 1 + (last[2] or 0)
        plan = IndexPlan(settings["index"], settings["tuning"]) if known is None else None
        mark = Mark(
            stamp, settings["identity"], int(settings["generation"]),
            rows[-1][0] if rows else last_segment, log[-1][0] if log else last_change,
        )  # fmt: skip
        segments = [self._open_segment({part.number: part for part in parts}, row) for row in rows]
        changes = [Change.from_row(row, path) for row in log]
        return News(mark, plan, parts, segments, changes)

    def _open_segment(
        self, parts: Mapping[int, PartRecord], row: Sequence[Any]
    ) -> tuple[int, FileSegment | StoreSegment, list[str]]:
        number, part, count, sha256, ids, store, has_metadata = row
        path = self.path / DATABASE
        if part not in parts or not is_count(count, 1 if store is None else 0) or not isinstance(sha256, str):
            raise damaged(path, f"its segment {number} has the part {part!r} and {count!r} rows")
        of_part = parts[part]
        if store is not None:
            self._has_stores = True
            record = StoreRecord.from_json(store, path)
            place = record.find(self.path, self._moved)
            opened = StoreSegment(number, place, of_part, count, record, self.path)
            return part, opened, opened.read_ids()
        file = self.path / SEGMENTS / _file_name(number)
        if not file.is_file() and file.parent.is_dir():
            with self._session() as db:
                if not db.execute("SELECT 1 FROM segment WHERE number = ?", (number,)).fetchone():
                    raise _Vanished(
                        f"{self.path} is compacted faster than it can be read; wait for its writer"
                    )
        read_metadata = self.metadata if has_metadata else None
        segment = FileSegment(number, file, of_part.dtype, (count, of_part.dim), sha256, read_metadata)
        return part, segment, ids_from_json(ids, count, path)


class StaleError(StoreError):
    """Files of an older generation are gone. Reload the gallery."""


class _Vanished(Exception):
    """A compaction removed a segment during a read."""


_OPEN: weakref.WeakSet[Storage] = weakref.WeakSet()
_LEFT_TO_PARENT: list[sqlite3.Connection] = []


def _leave_connections_to_parent() -> None:
    for storage in list(_OPEN):
        storage._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_connections_to_parent)


def insert_part(db: sqlite3.Connection, part: PartRecord) -> int:
    """Insert a part within a transaction and return its number."""
    space = None if part.space is None else json.dumps(part.space.to_dict())
    row = (part.name, space, part.dim, part.modality, part.dtype)
    made = db.execute("INSERT INTO part (name, space, dim, modality, dtype) VALUES (?, ?, ?, ?, ?)", row)
    assert made.lastrowid is not None
    return made.lastrowid


def _insert_changes(db: sqlite3.Connection, changes: Sequence[Change], last: int) -> int:
    """Insert changes within a transaction and return the version of the last one."""
    for change in changes:
        row = (change.segment, int(change.moved), change.rows.astype("<i8").tobytes())
        made = db.execute("INSERT INTO change (segment, moved, rows) VALUES (?, ?, ?)", row)
        last = made.lastrowid or last
    return last


def describe_digest(ids: Any, metadata: Any) -> str:
    """Compute SHA-256 of the ids and columns of a segment. Values other than bytes count as text."""
    digest = hashlib.sha256()
    for value in (ids, metadata):
        data = b"" if value is None else value
        digest.update(data if isinstance(data, bytes) else repr(data).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _as_stored(block: NDArray[np.float32], ids: Sequence[str], part: PartRecord) -> NDArray[np.floating]:
    """Round rows to the dtype of a part, and refuse rows that this would change or erase."""
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(block.astype(np.dtype(part.dtype).newbyteorder("<"), copy=False))
    if not np.isfinite(rows).all():
        raise DataError(
            f"values up to {np.abs(block).max():.3g} do not fit into {part.dtype}; make a gallery of dtype "
            "float32, or give unit vectors"
        )
    if rows.dtype.itemsize == 2:
        lost = np.linalg.norm(rows.astype(np.float32) - block, axis=1)
        lengths = np.linalg.norm(block.astype(np.float64), axis=1) if lost.any() else lost
        short = np.flatnonzero(lost > MOST_ROUNDED * lengths)
        if len(short):
            raise DataError(
                f"the vector of {ids[short[0]]!r} has length {lengths[short[0]]:.3g}, too short for float16, "
                "in which the gallery is stored; normalise it, or make the gallery with dtype='float32'"
            )
    return rows


def _parquet(table: pa.Table, part: str) -> bytes:
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(table, sink)
    except pa.ArrowException as error:
        raise StoreError(
            f"the columns for the part {part!r} cannot be stored ({str(error).splitlines()[0]}); make them "
            "plain values"
        ) from error
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _file_name(number: int) -> str:
    return f"{number:08d}.npy"


def _no_gallery(path: Path) -> StoreError:
    return StoreError(
        f"{path} holds no gallery: there is no {DATABASE}; check the path, or make one with Gallery.create"
    )
