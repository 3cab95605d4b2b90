"""Segments of gallery parts, and database records of parts and changes.

A segment never changes. Values from the database are untrusted and are checked here.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import sqlite3
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from xbt.errors import StoreError
from xbt.space import EmbeddingSpace
from xbt.store.layout import Header

_MAPPED_BYTES = 65_536
"""Minimum size of mapped files. Smaller files are read, since the number of maps per process is limited."""

DAMAGED = "copy the gallery again, or build it again from its vectors"
_LARGEST = 1 << 62
APPLICATION_ID, VERSION = 0x78627467, 4
_SCHEMA = {
    "setting": "CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "part": "CREATE TABLE part (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, space TEXT, "
    "dim INTEGER NOT NULL, modality TEXT NOT NULL, dtype TEXT NOT NULL)",
    "segment": "CREATE TABLE segment (number INTEGER PRIMARY KEY AUTOINCREMENT, part INTEGER NOT NULL, "
    "count INTEGER NOT NULL, sha256 TEXT NOT NULL, described TEXT NOT NULL, store TEXT, "
    "ids BLOB, metadata BLOB)",
    "change": "CREATE TABLE change (version INTEGER PRIMARY KEY AUTOINCREMENT, segment INTEGER NOT NULL, "
    "moved INTEGER NOT NULL, rows BLOB NOT NULL)",
}
_SETTINGS = {"identity", "generation", "index", "tuning"}


@dataclass(frozen=True)
class PartRecord:
    """Description of a part, with its number in the database; ``space`` is ``None`` if undeclared."""

    name: str
    space: EmbeddingSpace | None
    dim: int
    modality: str
    dtype: str
    number: int = 0

    @classmethod
    def from_row(cls, row: Sequence[Any], path: Path) -> Self:
        """Parse an untrusted row of the table ``part``; the path of the database is for the message."""
        number, name, space, dim, modality, dtype = row
        try:
            part_name(name)
            declared = None if space is None else EmbeddingSpace.from_dict(json.loads(space))
            if (
                not is_count(number, 1)
                or not is_count(dim, 1)
                or (declared is not None and declared.dim != dim)
            ):
                raise ValueError(f"a part has the number {number!r} and the dimension {dim!r}")
            Header(modality, declared, dtype, dim)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise damaged(path, f"its part {name!r} cannot be read: {error}") from error
        return cls(name, declared, dim, modality, dtype, number)


@dataclass(frozen=True)
class Change:
    """Row numbers within a segment that are no longer searched there: removed, or moved to the new part."""

    segment: int
    rows: NDArray[np.int64]
    moved: bool = False

    @classmethod
    def from_row(cls, row: Sequence[Any], path: Path) -> Self:
        """Parse an untrusted row of the table ``change``."""
        version, segment, moved, data = row
        if moved not in (0, 1) or not isinstance(data, bytes) or not data or len(data) % 8:
            raise damaged(path, f"its change {version} cannot be read")
        return cls(segment, np.frombuffer(data, "<i8").astype(np.int64), bool(moved))


def ids_from_json(data: Any, count: int, path: Path) -> list[str]:
    """Parse the untrusted ids of a segment."""
    try:
        names = json.loads(data.decode("utf-8"))
        whole = isinstance(names, list) and len(names) == count and set(map(type, names)) <= {str}
    except (ValueError, AttributeError, RecursionError) as error:
        raise damaged(path, f"the ids of a segment cannot be read: {error}") from error
    if not whole:
        raise damaged(path, f"a segment with {count} rows does not have one string id per row")
    ids: list[str] = names
    return ids


def is_count(value: Any, least: int) -> bool:
    """Check that a database value is an integer of at least ``least``."""
    return type(value) is int and least <= value < _LARGEST


def part_name(name: str) -> str:
    """Validate the name of a part, which is used in file names."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,100}", name):
        raise StoreError(
            f"a part's name is made of letters, digits and underscores, such as 'new', got {name!r}"
        )
    return name


def damaged(path: Path, reason: str) -> StoreError:
    """Build the error for a database with contents that no gallery writes."""
    return StoreError(f"{path} is damaged or not a gallery ({reason}); {DAMAGED}")


class Segment(ABC):
    """Rows that never change.

    Later segments have higher numbers. ``name`` identifies the contents uniquely, also among segments of
    other galleries. ``own`` is false for rows of a read-only store.
    """

    own = True

    def __init__(self, number: int, name: str, count: int) -> None:
        self.number, self.name, self.count = number, name, count

    @abstractmethod
    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Read a slice of the rows, or rows by number in the requested order; not to be modified."""

    @abstractmethod
    def metadata(self, rows: NDArray[np.int64]) -> pa.Table | None:
        """Read columns of rows in the requested order; ``None`` if there are no columns."""

    @abstractmethod
    def column_types(self) -> dict[str, pa.DataType]:
        """Return the types of the columns."""


class MemorySegment(Segment):
    """Segment of a gallery in memory."""

    def __init__(self, number: int, rows: NDArray[np.float32], table: pa.Table | None) -> None:
        super().__init__(number, str(number), len(rows))
        self._rows, self._table = rows, table

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`Segment`."""
        vectors: NDArray[np.float32] = self._rows[rows]
        return vectors

    def metadata(self, rows: NDArray[np.int64]) -> pa.Table | None:
        """See :class:`Segment`."""
        return None if self._table is None else self._table.take(pa.array(rows))

    def column_types(self) -> dict[str, pa.DataType]:
        """See :class:`Segment`."""
        return {} if self._table is None else {field.name: field.type for field in self._table.schema}


def segment_name(number: int, digest: str) -> str:
    """Build the name of a segment for the record of an index."""
    return f"{number}-{digest[:32]}"


def npy_header(dtype: str, count: int, dim: int) -> bytes:
    """Build the 128-byte header of a segment file, in ``.npy`` format version 1.0."""
    code = {"float16": "<f2", "float32": "<f4"}[dtype]
    text = f"{{'descr': '{code}', 'fortran_order': False, 'shape': ({count}, {dim}), }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode("ascii") + b"\n"


class FileSegment(Segment):
    """Segment in a mapped ``.npy`` file of the gallery. The file may be removed meanwhile.

    ``shape`` (rows and dimension) and ``sha256`` are those on record; the checksum is not verified here.
    ``read_metadata`` reads the Parquet bytes of the columns; it is ``None`` if there are none.
    """

    def __init__(
        self,
        number: int,
        path: Path,
        dtype: str,
        shape: tuple[int, int],
        sha256: str,
        read_metadata: Callable[[int], bytes] | None = None,
    ) -> None:
        super().__init__(number, segment_name(number, sha256), shape[0])
        self.path, self.shape = path, (dtype, shape, sha256)
        self._read_metadata = read_metadata
        self._types: dict[str, pa.DataType] | None = None
        header, width = npy_header(dtype, *shape), np.dtype(dtype).itemsize
        size = len(header) + shape[0] * shape[1] * width
        if not path.is_file():
            raise StoreError(f"{path} with {self.count} rows of the gallery is missing; {DAMAGED}")
        try:
            with path.open("rb") as file:
                actual = os.fstat(file.fileno()).st_size
                if actual != size:
                    raise StoreError(f"{path} has {actual} bytes instead of {size}; {DAMAGED}")
                # A private map avoids the warning of torch about read-only memory.
                mapped = size >= _MAPPED_BYTES
                data: Any = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else bytearray(file.read())
                )
        except (OSError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise StoreError(f"{path} cannot be read ({reason}); {DAMAGED}") from error
        if bytes(data[: len(header)]) != header:
            raise StoreError(f"{path} has a wrong header; {DAMAGED}")
        self._map = data if mapped else None
        self._rows: NDArray[np.floating] = np.frombuffer(
            data, np.dtype(dtype).newbyteorder("<"), -1, len(header)
        ).reshape(shape)

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`Segment`."""
        vectors = widened(self._rows[rows])
        require_finite(vectors, self.path, rows)
        if isinstance(rows, slice) and self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # pages read so far count as memory of the process
        return vectors

    def metadata(self, rows: NDArray[np.int64]) -> pa.Table | None:
        """See :class:`Segment`."""
        if self._read_metadata is None:
            return None

        def read(file: pq.ParquetFile) -> pa.Table:
            table = file.read()
            table.validate(full=True)
            if table.num_rows != self.count:
                raise pa.ArrowInvalid(f"{table.num_rows} rows instead of {self.count}")
            return table.take(pa.array(rows))

        return self._parquet(read)

    def column_types(self) -> dict[str, pa.DataType]:
        """See :class:`Segment`."""
        if self._types is None:
            schema = () if self._read_metadata is None else self._parquet(lambda file: file.schema_arrow)
            self._types = {field.name: field.type for field in schema}
        return self._types

    def _parquet(self, read: Callable[[pq.ParquetFile], Any]) -> Any:
        assert self._read_metadata is not None
        data = self._read_metadata(self.number)
        try:
            with pq.ParquetFile(pa.BufferReader(data)) as file:
                if file.metadata.num_rows != self.count:
                    raise pa.ArrowInvalid(f"{file.metadata.num_rows} rows instead of {self.count}")
                return read(file)
        except (pa.ArrowException, OSError, ValueError, LookupError, MemoryError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StoreError(
                f"the metadata of {self.path} in the gallery's database is damaged ({reason}); {DAMAGED}"
            ) from error


def widened(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """Copy rows as float32. Torch converts float16 several times as fast as numpy."""
    if rows.dtype == np.float16 and rows.dtype.isnative:
        result: NDArray[np.float32] = torch.from_numpy(rows).float().numpy()
        return result
    return rows.astype(np.float32)


def require_finite(rows: NDArray[np.float32], path: Path, numbers: slice | NDArray[np.int64]) -> None:
    """Refuse rows with NaN or infinity, which cannot be ranked; the message names path and row."""
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(rows.sum(dtype=np.float32)):
            return
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        row = int(numbers.start + bad[0] if isinstance(numbers, slice) else numbers[bad[0]])
        raise StoreError(
            f"{path} has NaN or infinite values in row {row}; remove the row, or embed its item again"
        )


def prepare_database(db: sqlite3.Connection, mode: str) -> None:
    """Initialise a new database with the empty tables of a gallery."""
    db.execute(f"PRAGMA application_id={APPLICATION_ID}")
    db.execute(f"PRAGMA user_version={VERSION}")
    db.execute(f"PRAGMA journal_mode={mode}")
    for statement in _SCHEMA.values():
        db.execute(statement)


def check_schema(db: sqlite3.Connection, path: Path) -> None:
    """Check the format version and the exact tables of a gallery database."""
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise damaged(path, "it is not the database of a gallery")
    if version != VERSION:
        raise StoreError(
            f"{path} has format version {version}, but this xbt reads version {VERSION}; build the gallery "
            "again from its vectors"
        )
    tables = {}
    for kind, name, statement in db.execute("SELECT type, name, sql FROM sqlite_schema LIMIT 50"):
        if not str(name).startswith("sqlite_") or kind not in ("table", "index"):
            tables[name] = statement if kind == "table" else kind
    if tables != _SCHEMA:
        odd = sorted(str(name) for name in tables.keys() ^ _SCHEMA.keys()) or ["a table definition"]
        raise damaged(path, f"its schema differs in {odd[0]!r}")


def read_settings(db: sqlite3.Connection, path: Path) -> dict[str, str]:
    """Read the settings of a gallery."""
    settings = dict(db.execute("SELECT key, value FROM setting LIMIT 50").fetchall())
    whole = settings.keys() == _SETTINGS and set(map(type, settings.values())) == {str}
    if not whole or not re.fullmatch(r"[0-9]{1,18}", settings["generation"]):
        raise damaged(path, f"its settings are {sorted(map(str, settings))}")
    return settings


def ascending(rows: Iterable[Any], last: int, path: Path) -> Iterator[Any]:
    """Yield rows, and check that their numbers ascend. A damaged B-tree could otherwise loop for ever."""
    for row in rows:
        if not is_count(row[0], last + 1):
            raise damaged(path, f"number {row[0]!r} follows {last}")
        last = row[0]
        yield row


def check_parts(parts: Sequence[PartRecord], path: Path) -> None:
    """Refuse an impossible combination of parts."""
    names = [part.name for part in parts]
    if not 1 <= len(parts) <= 2 or len(set(names)) < len(names):
        raise damaged(path, f"its parts are {names}")


class Rows:
    """Immutable sequence of rows, numbered over several segments."""

    def __init__(self, segments: Sequence[Segment], dim: int) -> None:
        self.segments, self.dim = tuple(segments), dim
        self.starts = np.cumsum([0, *(segment.count for segment in segments)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read vectors by row number: (n, dim) float32 in the requested order, not to be modified."""
        if not len(rows):
            return np.zeros((0, self.dim), np.float32)
        if rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            start, stop = int(rows[0]), int(rows[-1]) + 1
            first = int(np.searchsorted(self.starts, start, side="right")) - 1
            last = int(np.searchsorted(self.starts, stop, side="left"))
            borders = [start, *self.starts[first + 1 : last].tolist(), stop]
            blocks = [
                self.segments[number].read(slice(*(int(end - self.starts[number]) for end in (low, high))))
                for number, low, high in zip(range(first, last), borders[:-1], borders[1:], strict=True)
                if high > low
            ]
            return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        result = np.empty((len(rows), self.dim), np.float32)
        for number, places, numbers in self.by_segment(rows):
            result[places] = self.segments[number].read(numbers)
        return result

    def by_segment(
        self, rows: NDArray[np.int64]
    ) -> Iterable[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Group rows as segment position, positions in ``rows``, and row numbers within the segment."""
        order = np.argsort(rows, kind="stable")
        owners = np.searchsorted(self.starts, rows[order], side="right") - 1
        borders = np.flatnonzero(np.diff(owners, prepend=-1, append=-1))
        for first, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            number, places = int(owners[first]), order[first:last]
            yield number, places, rows[places] - self.starts[number]


_CODES = {
    "FULL": "cannot grow, since the disk is full ({}); free some space and run again: nothing was changed",
    "IOERR": "cannot be read or written ({}); check the disk and run again: the gallery is as it was",
    "BUSY": "is locked by another program ({}); close that program and run again",
    "LOCKED": "is locked by another program ({}); close that program and run again",
    "READONLY": "cannot be written ({}); choose a directory you may write to",
    "CANTOPEN": "cannot be opened ({}); check the permissions of the file and of its directory",
    "PERM": "cannot be opened ({}); check the permissions of the file and of its directory",
}


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Translate errors of SQLite and of the operating system to :class:`StoreError`."""
    try:
        yield
    except sqlite3.Error as error:
        code = str(getattr(error, "sqlite_errorname", "")).removeprefix("SQLITE_").split("_")[0]
        sentence = _CODES.get(code, f"is damaged ({{}}); {DAMAGED}")
        raise StoreError(f"{path} {sentence.format(error)}") from error
    except (UnicodeDecodeError, MemoryError) as error:  # from a damaged message or size
        raise damaged(path, str(error) or "a value is larger than the memory") from error
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read or written ({error.strerror or error}); check the disk and run again"
        ) from error


_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs",
            "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.ceph"}  # fmt: skip


def journal_mode(path: Path, warn: bool = False) -> str:
    """Choose ``WAL``, or ``DELETE`` on a network disk, since ``WAL`` needs shared memory."""
    kind = _file_system(path)
    if kind not in _NETWORK:
        return "WAL"
    if warn:
        warnings.warn(
            f"{path} is on a network disk ({kind}): one machine at a time may write, and compact() may take "
            "the files of readers on other machines away",
            stacklevel=4,
        )
    return "DELETE"


def _file_system(path: Path) -> str:
    """Look up the file system type of a directory; empty if unknown."""
    try:
        mounts = Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    place, best = f"{path.resolve()}/", ("", "")
    for mount in mounts:
        _, where, kind, *_ = [*mount.split(" "), "", "", ""]
        prefix = where.replace(r"\040", " ").rstrip("/") + "/"
        if place.startswith(prefix) and len(prefix) >= len(best[0]):
            best = (prefix, kind)
    return best[1]
