"""Files of a gallery: one SQLite database, and a file of vectors for each segment.

    gallery.sqlite         settings, parts, segments with their ids and metadata, and the log of changes
    segments/<number>.npy  the rows of a segment, float16 or float32, written once
    index/                 approximate indexes, a cache; see xbt.index.faiss_index
    .lock                  held by the process that writes

A segment's file is written and synced before the transaction that names it is committed; a file that no
transaction names does not exist. Names of files follow from numbers, and are never read from the database.
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
"""A reader or writer waits this long for a lock of the database; xbt itself holds one for milliseconds."""
_LAST = (
    "SELECT (SELECT MAX(number) FROM segment), (SELECT MAX(version) FROM change), "
    "(SELECT seq FROM sqlite_sequence WHERE name = 'segment')"
)
FILE_ROWS = 1 << 20
"""Rows of the largest files that compaction writes; the ids of a file are one value of the database."""


@dataclass(frozen=True)
class NewSegment:
    """Rows that are to be written as one segment.

    Attributes:
        part: Number of their part.
        ids: Their ids.
        blocks: The vectors, (m, dim) float32 at a time.
        table: Columns beside the ids.
    """

    part: PartRecord
    ids: Sequence[str]
    blocks: Iterable[NDArray[np.float32]]
    table: pa.Table | None


@dataclass(frozen=True)
class Mark:
    """How far a process has read a gallery: everything before it is known."""

    stamp: tuple[int, int]
    identity: str
    generation: int
    segment: int
    change: int


@dataclass(frozen=True)
class News:
    """What a read has found that is not known yet.

    Attributes:
        mark: How far the gallery is read now.
        whole: Whether this is everything; whatever was known before is void.
        plan: Kind of index, where this is everything.
        parts: All parts, or none if none is new.
        segments: New segments with the part's number, and the ids of their rows.
        changes: New changes.
    """

    mark: Mark
    whole: bool
    plan: IndexPlan | None
    parts: list[PartRecord]
    segments: list[tuple[int, FileSegment | StoreSegment, list[str]]]
    changes: list[Change]


class Storage:
    """The directory of a gallery.

    A connection to the database is open only while it is used, or for as long as :meth:`begin_writing` holds
    the right to write. It is never taken over by a forked process.

    Args:
        path: The directory.
        read_only: Whether to refuse every write.
        mmap: Whether indexes are mapped.
        stores: Where stores elsewhere are now, by the paths that are on record.

    Attributes:
        refused: Whether another gallery was found in the place of this one when it was to be written.

    Raises:
        StoreError: If there is no gallery, it is damaged, or ``stores`` names one that it was not made of.
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
        """Read what has been written since a mark.

        Args:
            known: The mark; ``None`` reads everything.

        Returns:
            The news. A segment's file that a compaction removes meanwhile makes the read start again.

        Raises:
            StoreError: If the gallery is gone or damaged, or another one while this one is being written.
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
        """Read the Parquet bytes of a segment's columns.

        Raises:
            StaleError: If a compaction has removed the segment.
            StoreError: If the database cannot be read.
        """
        with self._session() as db:
            found = db.execute("SELECT metadata FROM segment WHERE number = ?", (segment,)).fetchone()
        if found is None or not isinstance(found[0], bytes):
            raise StaleError(f"segment {segment} of {self.path} is gone; call reload()")
        return found[0]

    def inspect(self) -> tuple[list[str], dict[int, tuple[str, str, bytes, bytes | None]]]:
        """Check the database itself.

        Returns:
            The faults that SQLite finds, and for each segment the checksum of its file, that of its ids and
            columns, and these.

        Raises:
            StoreError: If it cannot be read, or is another gallery's.
        """
        with self._session() as db:
            if self.identity not in ("", read_settings(db, self.path / DATABASE)["identity"]):
                raise self._replaced(refuse=False)
            said = [str(text) for (text,) in db.execute("PRAGMA integrity_check(10)")]
            rows = db.execute("SELECT number, sha256, described, ids, metadata FROM segment")
            described = {number: tuple(row) for number, *row in rows}
        return [text for text in said if text != "ok"], described

    def segment_names(self, part: str) -> list[str]:
        """Names of the segments that a part has at the moment, as an index's record has them."""
        path, columns = self.path / DATABASE, "segment.number, sha256, store"
        query = f"SELECT {columns} FROM segment JOIN part ON part.number = segment.part WHERE name = ?"
        with self._session() as db:
            rows = db.execute(f"{query} ORDER BY 1", (part,)).fetchall()
        return [
            segment_name(number, sha256 if store is None else StoreRecord.from_json(store, path).digest)
            for number, sha256, store in rows
        ]

    def cache(self, part: PartRecord, plan: IndexPlan) -> IndexCache:
        """Files of a part's index."""
        folder, name = self.path / FOLDER, part.name
        return IndexCache(folder, name, plan, lambda: self.segment_names(name), self.mmap, self.read_only)

    # -- writing ---------------------------------------------------------------------------------------

    @property
    def writing(self) -> bool:
        """Whether this process holds the right to write through this object."""
        return self._held is not None

    def begin_writing(self) -> None:
        """Take the right to write.

        Raises:
            StoreError: If another process holds it (the message names it), or the gallery is read only.
        """
        if self.read_only:
            raise StoreError(f"{self.path} was opened to be read only; open it without read_only to write")
        with self._lock, translated(self.path / DATABASE):
            stamp = self._stamp()
            self._writer.acquire()
            try:
                self._held_stamp, self._held = stamp, self._connect(write=True)
            except BaseException:
                self._writer.release()
                raise

    def end_writing(self) -> None:
        """Give the right to write back."""
        with self._lock:
            held, self._held = self._held, None
            try:
                if held is not None:
                    with suppress(sqlite3.Error):  # the log that is left is taken in at the next opening
                        held.close()
            finally:
                self._writer.release()

    def append(self, known: Mark, new: NewSegment, changes: Sequence[Change] = ()) -> News:
        """Write a segment and make it the gallery's, together with changes.

        Args:
            known: How far the gallery was read when the right to write was taken, or written since.
            new: The segment's rows.
            changes: Of other segments, or with the number 0 of this one.

        Returns:
            What is new since ``known``.

        Raises:
            DataError: If a value is too large for the part's dtype.
            StoreError: If the disk is full or may not be written to; the gallery is as it was then.
        """
        self._require_same()
        number = self._next_number
        row = self._write_segment(number, new)
        path, shape = self.path / SEGMENTS / _file_name(number), (len(new.ids), new.part.dim)
        read_metadata = None if new.table is None else self.metadata
        segment = FileSegment(number, path, new.part.dtype, shape, row[3], read_metadata)
        own = [replace(each, segment=each.segment or number) for each in changes]
        with self._transaction() as db:
            db.execute("INSERT INTO segment VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            last = _insert_changes(db, own, known.change)
        self._next_number += 1
        mark = replace(known, segment=number, change=last)
        return News(mark, False, None, [], [(new.part.number, segment, list(new.ids))], own)

    def log(self, known: Mark, changes: Sequence[Change]) -> News:
        """Commit changes; as :meth:`append`."""
        with self._transaction() as db:
            last = _insert_changes(db, changes, known.change)
        return News(replace(known, change=last), False, None, [], [], list(changes))

    def add_part(self, part: PartRecord) -> None:
        """Begin a part; raises as :meth:`append`."""
        with self._transaction() as db:
            insert_part(db, part)

    def rewrite(
        self,
        parts: Sequence[int],
        segments: Sequence[int],
        new: Sequence[NewSegment],
        changes: Sequence[Change],
    ) -> None:
        """Begin the next generation: some parts and segments are replaced, and the log is written again.

        Args:
            parts: Numbers of the parts that go.
            segments: Numbers of the segments that go.
            new: Segments that come.
            changes: All changes from now on; their segments stay.

        Raises:
            StoreError: As :meth:`append`.
        """
        self._require_same()
        first = self._next_number
        rows = [self._write_segment(first + place, each) for place, each in enumerate(new)]
        with self._transaction() as db:
            db.executemany("DELETE FROM part WHERE number = ?", [(number,) for number in parts])
            db.executemany("DELETE FROM segment WHERE number = ?", [(number,) for number in segments])
            db.execute("DELETE FROM change")
            db.executemany("INSERT INTO segment VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            _insert_changes(db, changes, 0)
            generation = int(read_settings(db, self.path)["generation"]) + 1
            db.execute("UPDATE setting SET value = ? WHERE key = 'generation'", (str(generation),))

    def sweep(self) -> None:
        """Remove files that no transaction names, and give free space of the database back.

        An open reader keeps the files that it has mapped. A file that cannot be removed is left to the next
        time.

        Raises:
            StoreError: If another gallery is in the place of this one, or the database is damaged.
        """
        self._require_same()
        folder = self.path / SEGMENTS
        with self._session() as db:
            ours = {_file_name(number) for (number,) in db.execute("SELECT number FROM segment")}
            with suppress(sqlite3.Error):  # as on a disk that is full: it is free space, no more
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
        """Write a segment's file; returns its row of the database."""
        path, part, count = self.path / SEGMENTS / _file_name(number), new.part, len(new.ids)
        if path.parent.is_symlink():
            raise StoreError(
                f"{path.parent} is a link, which is not followed; put the directory in its place"
            )
        header = npy_header(part.dtype, count, part.dim)

        def produce(sink: Sink) -> None:
            sink.write(header)
            for block in new.blocks:
                sink.write(_as_stored(block, part, path).data.cast("B"))

        needed = len(header) + count * part.dim * np.dtype(part.dtype).itemsize
        file = write_whole(path, needed, produce)
        ids = json.dumps(list(new.ids), ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        metadata = None if new.table is None else _parquet(new.table, part.name)
        return number, part.number, count, file.sha256, describe_digest(ids, metadata), None, ids, metadata

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._session() as db:
            self._require_same()
            db.execute("BEGIN IMMEDIATE")
            try:
                found = db.execute("SELECT value FROM setting WHERE key = 'identity'").fetchone()
                if found != (self.identity,):
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
        """Refuse to write if another gallery is in the place of this one."""
        if self.refused or self._stamp() != self._held_stamp:
            raise self._replaced()

    def _replaced(self, refuse: bool = True) -> StoreError:
        # Until it is opened again: the user knows the other gallery's items.
        self.refused = self.refused or refuse
        return StoreError(
            f"the gallery at {self.path} was replaced by another while it was open; open it again"
        )

    # -- connections -----------------------------------------------------------------------------------

    def _stamp(self) -> tuple[int, int]:
        """Identify the database's file; another one in its place has another stamp."""
        try:
            about = (self.path / DATABASE).stat()
        except OSError:
            raise _no_gallery(self.path) from None
        return about.st_dev, about.st_ino

    @contextmanager
    def _session(self) -> Iterator[sqlite3.Connection]:
        """A connection, for one thread at a time; errors of SQLite become one sentence."""
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
            # Without the right to make files beside it, a database is read as one that does not change.
            mode = "mode=ro" if wal.exists() and wal.stat().st_size else "mode=ro&immutable=1"
        db = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", BUSY_SECONDS, 0, None, False, uri=True)
        try:
            for pragma in ("trusted_schema=OFF", "cell_size_check=ON", f"query_only={not write:d}"):
                db.execute(f"PRAGMA {pragma}")
            check_schema(db, path)
            if write:
                self._journal = mode = self._journal or journal_mode(self.path)
                db.execute(f"PRAGMA journal_mode={mode}")
                # Beyond FULL, EXTRA syncs the directory after the journal of a commit is deleted.
                db.execute(f"PRAGMA synchronous={'FULL' if mode == 'WAL' else 'EXTRA'}")
        except BaseException:
            db.close()
            raise
        return db

    def _after_fork(self) -> None:
        """Leave the connection to the parent: a child that closed it could end the parent's locks."""
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
                known = _still_known(known, settings, last)
                parts = list(map(self._part_record, db.execute("SELECT * FROM part ORDER BY number")))
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
            raise damaged(path, f"it has made {last[2]!r} segments")
        self._next_number = 1 + (last[2] or 0)
        plan = IndexPlan(settings["index"], settings["tuning"])
        mark = Mark(
            stamp, settings["identity"], int(settings["generation"]),
            rows[-1][0] if rows else last_segment, log[-1][0] if log else last_change,
        )  # fmt: skip
        segments = [self._open_segment({part.number: part for part in parts}, row) for row in rows]
        changes = [Change.from_row(row, path) for row in log]
        return News(mark, known is None, plan, parts, segments, changes)

    def _part_record(self, row: tuple[Any, ...]) -> PartRecord:
        """A part's record; its space, which has a probe, is read once."""
        if row not in self._part_records:
            self._part_records[row] = PartRecord.from_row(row, self.path / DATABASE)
        return self._part_records[row]

    def _open_segment(
        self, parts: Mapping[int, PartRecord], row: Sequence[Any]
    ) -> tuple[int, FileSegment | StoreSegment, list[str]]:
        number, part, count, sha256, ids, store, has_metadata = row
        path = self.path / DATABASE
        if part not in parts or not is_count(count, 1 if store is None else 0) or not isinstance(sha256, str):
            raise damaged(path, f"its segment {number} is of part {part!r} and has {count!r} rows")
        about = parts[part]
        if store is not None:
            self._has_stores = True
            record = StoreRecord.from_json(store, path)
            place = record.find(self.path, self._moved)
            opened = StoreSegment(number, place, about, count, record, self.path)
            return part, opened, opened.read_ids()
        file = self.path / SEGMENTS / _file_name(number)
        if not file.is_file() and file.parent.is_dir() and self._is_compacted(number):
            raise _Vanished(f"{self.path} is compacted faster than it can be read; wait for its writer")
        read_metadata = self.metadata if has_metadata else None
        segment = FileSegment(number, file, about.dtype, (count, about.dim), sha256, read_metadata)
        return part, segment, ids_from_json(ids, count, path)

    def _is_compacted(self, number: int) -> bool:
        with self._session() as db:
            return db.execute("SELECT 1 FROM segment WHERE number = ?", (number,)).fetchone() is None


class StaleError(StoreError):
    """The files of an older generation are gone; reading the gallery again helps."""


class _Vanished(Exception):
    """A segment was removed while it was read."""


_OPEN: weakref.WeakSet[Storage] = weakref.WeakSet()
_LEFT_TO_PARENT: list[sqlite3.Connection] = []


def _leave_connections_to_parent() -> None:
    for storage in list(_OPEN):
        storage._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_connections_to_parent)


def _still_known(known: Mark | None, settings: Mapping[str, str], last: Sequence[int | None]) -> Mark | None:
    """The mark, unless it is of another gallery or generation, or of a later state than this one."""
    if known is None:
        return None
    same = (known.identity, str(known.generation)) == (settings["identity"], settings["generation"])
    return known if same and (last[0] or 0) >= known.segment and (last[1] or 0) >= known.change else None


def insert_part(db: sqlite3.Connection, part: PartRecord) -> int:
    """Add a part within a transaction; returns its number."""
    space = None if part.space is None else json.dumps(part.space.to_dict())
    row = (part.name, space, part.dim, part.modality, part.dtype)
    made = db.execute("INSERT INTO part (name, space, dim, modality, dtype) VALUES (?, ?, ?, ?, ?)", row)
    assert made.lastrowid is not None
    return made.lastrowid


def _insert_changes(db: sqlite3.Connection, changes: Sequence[Change], last: int) -> int:
    """Write changes within a transaction; returns the version of the last one."""
    for each in changes:
        row = (each.segment, int(each.moved), each.rows.astype("<i8").tobytes())
        made = db.execute("INSERT INTO change (segment, moved, rows) VALUES (?, ?, ?)", row)
        last = made.lastrowid or last
    return last


def describe_digest(ids: Any, metadata: Any) -> str:
    """SHA-256 of the ids and columns of a segment; of any other value than bytes, of its text."""
    found = hashlib.sha256()
    for value in (ids, metadata):
        data = b"" if value is None else value
        found.update(data if isinstance(data, bytes) else repr(data).encode("utf-8", "backslashreplace"))
    return found.hexdigest()


def _as_stored(block: NDArray[np.float32], part: PartRecord, path: Path) -> NDArray[np.floating]:
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(block.astype(np.dtype(part.dtype).newbyteorder("<"), copy=False))
    if not np.isfinite(rows).all():
        raise DataError(
            f"{path}: values up to {np.abs(block).max():.3g} do not fit into {part.dtype}; make a gallery of "
            "dtype float32, or give unit vectors"
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


# -- errors --------------------------------------------------------------------------------------------


def _file_name(number: int) -> str:
    return f"{number:08d}.npy"


def _no_gallery(path: Path) -> StoreError:
    return StoreError(
        f"{path} holds no gallery: there is no {DATABASE}; check the path, or make one with Gallery.create"
    )
