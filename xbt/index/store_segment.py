"""Stores that a gallery reads in place: rows, identity and path."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path, PurePath
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.errors import DataError, StoreError
from xbt.files import FileRecord
from xbt.index.segments import PartRecord, Segment, damaged, require_finite, segment_name
from xbt.store.layout import ID, MANIFEST, ShardRecord, metadata_file, read_manifest, vectors_file
from xbt.store.metadata import read_columns, read_types
from xbt.store.store import EmbeddingStore, find_faults

_IDS_AT_ONCE = 65_536
_UNIT_ERROR = 0.01
"""Length by which a row may differ from 1 in a space of unit rows; float16 rounds by a tenth of it."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoreRecord:
    """Place and identity of a store whose first rows are a segment.

    Attributes:
        path: Where it was, absolute.
        nearby: Its path from the gallery's directory, where it lies beside the gallery: both may be moved.
        digest: Identifies those rows; see :func:`digest`.
    """

    path: str
    nearby: str | None
    digest: str

    @classmethod
    def of(cls, store: EmbeddingStore, rows: int, gallery: Path) -> Self:
        """Describe the first rows of a store."""
        path = store.path.resolve()
        return cls(str(path), cls.nearby_path(path, gallery), digest(store, rows))

    @staticmethod
    def nearby_path(path: Path, gallery: Path) -> str | None:
        """Compute the relative path of a store that lies beside the gallery."""
        directory = gallery.resolve()
        if not path.is_relative_to(directory.parent):
            return None
        return Path(os.path.relpath(path, directory)).as_posix()

    @classmethod
    def from_json(cls, text: Any, path: Path) -> Self:
        """Read the text of :meth:`to_json`, which may be a stranger's."""
        try:
            return cls(**json.loads(text))._checked()
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise damaged(path, f"the store of a segment cannot be read: {error}") from error

    def _checked(self) -> Self:
        nearby = () if self.nearby is None else PurePath(self.nearby).parts
        beside = nearby[1:] if nearby[:1] == ("..",) else nearby
        whole = PurePath(self.path).is_absolute() and not PurePath(self.nearby or "").is_absolute()
        if not whole or ".." in (*beside, *PurePath(self.path).parts):
            raise ValueError(f"the path {self.path!r} or {self.nearby!r} leaves its folder")
        if not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"it has the digest {self.digest!r}")
        return self

    def to_json(self) -> str:
        """Serialise the record for the database."""
        return json.dumps(vars(self))

    def find(self, gallery: Path, moved: Mapping[str, Path]) -> Path:
        """Locate the store: at the new path in ``moved``, beside the gallery, or at its old path."""
        if self.path in moved:
            return moved[self.path]
        nearby = [] if self.nearby is None else [Path(os.path.normpath(gallery.resolve() / self.nearby))]
        for path in (*nearby, Path(self.path)):
            if path.is_dir():
                return path
        raise StoreError(
            f"there is no store at {self.path}, but the gallery at {gallery} was made of it; put it back, "
            f"or give its new path: Gallery.open(path, stores={{{self.path!r}: 'its new path'}})"
        )


def require_known(moved: Mapping[str, Path], db: sqlite3.Connection, path: Path) -> None:
    """Refuse new paths of stores, by the recorded paths, that the gallery was not made of."""
    texts = db.execute("SELECT store FROM segment WHERE store IS NOT NULL").fetchall()
    recorded = [StoreRecord.from_json(text, path).path for (text,) in texts]
    for was in moved:
        if was not in recorded:
            raise StoreError(
                f"stores= names {was!r}, but the gallery at {path.parent} was made of no such store; it was "
                f"made of {', '.join(recorded) or 'none'}"
            )


def note_places(db: sqlite3.Connection, gallery: Path, moved: dict[str, Path]) -> None:
    """Record the new paths of moved stores, so that a user gives them only once; updates ``moved`` too."""
    query = "SELECT number, store FROM segment WHERE store IS NOT NULL"
    for number, text in db.execute(query).fetchall():
        record = StoreRecord.from_json(text, gallery)
        with suppress(StoreError):  # of a store that is gone the record stays as it is
            now = record.find(gallery, moved).resolve()
            moved_record = replace(record, path=str(now), nearby=StoreRecord.nearby_path(now, gallery))
            if moved_record != record:
                db.execute("UPDATE segment SET store = ? WHERE number = ?", (moved_record.to_json(), number))
                if record.path in moved:
                    moved[str(now)] = moved.pop(record.path)


def digest(store: EmbeddingStore, rows: int) -> str:
    """Compute the SHA-256 of the first rows of a store, which end with a shard; later rows do not change it.

    A store of ours knows the checksums of its files. Of a folder that clip-retrieval wrote, the files' sizes
    and the ids are taken: vectors that are replaced by as many others under the same ids are not noticed.
    """
    ends = accumulate(shard.count for shard in store.shards)
    covered = [shard for shard, end in zip(store.shards, ends, strict=True) if end <= rows]
    counted = sum(shard.count for shard in covered)
    plain = [shard.to_dict(with_extra=False) for shard in covered]
    what = hashlib.sha256(json.dumps([rows - counted, *plain], sort_keys=True).encode("ascii"))
    if any(not file.sha256 for shard in covered for file in shard.files.values()):
        for start in range(0, counted, _IDS_AT_ONCE):
            ids = store.read_ids(start, min(start + _IDS_AT_ONCE, counted))
            what.update(json.dumps(ids).encode("ascii"))
    return what.hexdigest()


def require_usable(store: EmbeddingStore) -> None:
    """Read every row of a store, and refuse NaN, infinity, and wrong lengths in a space of unit rows."""
    unit = store.space is not None and store.space.normalisation == "unit"
    start = 0
    for shard in store.shards:
        path = store.path / vectors_file(store.modality, shard.name)
        for first in range(0, shard.count, _IDS_AT_ONCE):
            rows = store.read(start + first, start + min(first + _IDS_AT_ONCE, shard.count))
            try:
                require_finite(rows, path, slice(first, first + len(rows)))
            except StoreError as error:
                raise DataError(str(error)) from None
            lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
            wrong = np.flatnonzero(np.abs(lengths - 1) > _UNIT_ERROR)
            if unit and len(wrong):
                raise DataError(
                    f"{path} has a row of length {lengths[wrong[0]]:.3g} in row {first + int(wrong[0])}, but "
                    f"the rows of the space {store.space} have length 1; normalise the rows, or give a space "
                    "with normalisation='none'"
                )
        start += shard.count


class StoreSegment(Segment):
    """Segment of the first rows of a read-only store. Rows added later are ignored."""

    own = False

    def __init__(
        self, number: int, path: Path, part: PartRecord, count: int, record: StoreRecord, gallery: Path
    ) -> None:
        """Open the store, and refuse one that is damaged, of another space, or not the recorded one."""
        self._seen = self._compared = _stamp(path)  # before it is read: a later change is read again
        self.store = EmbeddingStore.open(path, part.modality, part.space)
        super().__init__(number, segment_name(number, record.digest), count)
        if len(self.store) < count:
            raise StoreError(
                f"{path} has {len(self.store)} rows, but the gallery was made of {count}; copy it again"
            )
        if self.store.dim != part.dim or digest(self.store, count) != record.digest:
            raise StoreError(
                f"the store at {path} is not the one that the gallery at {gallery} was made of: its first "
                f"{count} rows are others; put the old store back, or build the gallery again"
            )

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`~xbt.index.segments.Segment`."""
        with self._same_store():
            vectors = (
                self.store.read(rows.start, rows.stop) if isinstance(rows, slice) else self.store.rows(rows)
            )
        require_finite(vectors, self.store.path, rows)
        return vectors

    def read_ids(self) -> list[str]:
        """Read the ids of all rows."""
        with self._same_store():
            return self.store.read_ids(0, self.count)

    def metadata(self, rows: NDArray[np.int64]) -> pa.Table | None:
        """See :class:`~xbt.index.segments.Segment`; reads every shard with one of the rows."""
        if not self.store.columns:
            return None
        tables, placed, first = [], [np.zeros(0, np.int64)], 0
        with self._same_store():
            for shard in self.store.shards:
                in_shard = np.flatnonzero((rows >= first) & (rows < first + shard.count))
                if len(in_shard):
                    table = read_columns(self.store.path / metadata_file(shard.name), None)
                    tables.append(table.take(pa.array(rows[in_shard] - first)))
                    placed.append(in_shard)
                first += shard.count
        table = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
        table = table.take(pa.array(np.argsort(np.concatenate(placed))))
        columns = [name for name in table.column_names if name != ID]
        return table.select(columns) if columns else None

    def column_types(self) -> dict[str, pa.DataType]:
        """See :class:`~xbt.index.segments.Segment`; takes each type from the first shard with the column."""
        types: dict[str, pa.DataType] = {}
        for shard in self.store.shards if self.store.columns else ():
            types = {**read_types(self.store.path / metadata_file(shard.name)), **types}
        types.pop(ID, None)
        return types

    def faults(self) -> list[str]:
        """Read every byte and list damage, one sentence per fault."""
        try:
            self._compared = ()
            self._require_same()
        except StoreError as error:
            return [str(error)]
        return find_faults(self.store.path, self.store.modality)

    @contextmanager
    def _same_store(self) -> Iterator[None]:
        """Guard a read: files are opened on demand, and may belong to another store by then."""
        try:
            yield
        finally:
            self._require_same()

    def _require_same(self) -> None:
        """Refuse a store that has replaced the opened one."""
        now = _stamp(self.store.path)
        if now == self._compared or not self._seen:  # a folder that clip-retrieval wrote has no manifest
            return
        if now:
            if not _begins_with(read_manifest(self.store.path / MANIFEST).shards, self.store.shards):
                raise StoreError(
                    f"{self.store.path} was replaced by another store while it was open; open the "
                    "gallery again"
                )
            self._compared = now
        elif self.store.path.is_dir():  # if it is gone as a whole, the files that are still open are read
            raise StoreError(
                f"{self.store.path} has lost its {MANIFEST} while the gallery was open; put the store back, "
                "or open the gallery again"
            )


def _begins_with(shards: Iterable[ShardRecord], first: Iterable[ShardRecord]) -> bool:
    """Check that a store still begins with the known shards; more may follow."""
    before = [_files_of(shard) for shard in first]
    return [_files_of(shard) for shard in islice(shards, len(before))] == before


def _files_of(shard: ShardRecord) -> tuple[str, int, dict[str, FileRecord]]:
    return shard.name, shard.count, dict(shard.files)


def _stamp(path: Path) -> tuple[int, ...]:
    """Identify a version of the manifest, which is always replaced as a whole."""
    try:
        status = (path / MANIFEST).stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
