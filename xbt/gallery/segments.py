"""What a part's rows stand in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.errors import StoreError
from xbt.gallery.elsewhere import begins_with, digest
from xbt.gallery.layout import PartRecord, SegmentRecord
from xbt.store import EmbeddingStore, find_faults
from xbt.store.layout import MANIFEST, metadata_file, read_manifest
from xbt.store.metadata import read_columns
from xbt.store.shards import ID
from xbt.vectors import Vectors


class Segment(Protocol):
    """Numbered rows with ids, of which there may become more, but never others.

    Attributes:
        name: Its name within the gallery.
        writable: Whether it may grow.
    """

    name: str
    writable: bool

    def __len__(self) -> int:
        """Rows."""
        ...

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, dim) float32 rows by number, in the order asked for."""
        ...

    def slice(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start`` … ``stop − 1``, which must not be written to."""
        ...

    def ids(self, start: int, stop: int) -> list[str]:
        """Their ids."""
        ...

    def metadata(self, rows: NDArray[np.int64]) -> pa.Table | None:
        """Columns of rows by ascending number; ``None`` if there are no columns."""
        ...

    def append(self, vectors: Vectors, ids: Sequence[str], metadata: Any) -> None:
        """Adds rows at the end, all or none."""
        ...

    def reload(self) -> None:
        """Sees what another process has appended."""
        ...


class StoredSegment:
    """A store on disk; rows that a store elsewhere gets later on are not seen."""

    def __init__(
        self,
        path: Path,
        part: PartRecord,
        record: SegmentRecord,
        gallery: Path,
        may_write: Callable[[], None],
    ) -> None:
        """Opens a segment.

        Args:
            path: The store.
            part: The part it belongs to.
            record: Which.
            gallery: The gallery's directory.
            may_write: Raises if the gallery is another one by now.

        Raises:
            StoreError: If it is missing or damaged, or is elsewhere and another one than it was.
            SpaceMismatchError: If it holds vectors of another space than the part.
        """
        self._seen = self._compared = _stamp(path)  # before it is read: what changes meanwhile is read again
        self.store = EmbeddingStore.open(path, part.modality, part.space)
        self.name, self._limit, self._may_write = record.name, record.rows, may_write
        self.writable = record.elsewhere is None
        if self._limit is not None and len(self.store) < self._limit:
            raise StoreError(
                f"{path} has {len(self.store)} rows, but the gallery was made of {self._limit}; copy the "
                "store again"
            )
        if record.digest is not None and digest(self.store, len(self)) != record.digest:
            raise StoreError(
                f"the store at {path} is not the one that the gallery at {gallery} was made of: its first "
                f"{len(self)} rows are others; put the old store back, or build the gallery anew"
            )

    def __len__(self) -> int:
        return len(self.store) if self._limit is None else self._limit

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`Segment`."""
        with self._same_store():
            return self.store.rows(rows)

    def slice(self, start: int, stop: int) -> NDArray[np.float32]:
        """See :class:`Segment`."""
        with self._same_store():
            return self.store.read(start, stop)

    def ids(self, start: int, stop: int) -> list[str]:
        """See :class:`Segment`."""
        with self._same_store():
            return self.store.read_ids(start, stop)

    def metadata(self, rows: NDArray[np.int64]) -> pa.Table | None:
        """See :class:`Segment`; every shard that has one of the rows is read."""
        tables, first = [], 0
        with self._same_store():
            for shard in self.store.shards if self.store.columns else ():
                own = rows[(rows >= first) & (rows < first + shard.count)]
                if len(own):
                    table = read_columns(self.store.path / metadata_file(shard.name), None)
                    tables.append(table.take(pa.array(own - first)))
                first += shard.count
        table = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
        columns = [name for name in table.column_names if name != ID]
        return table.select(columns) if columns else None

    def append(self, vectors: Vectors, ids: Sequence[str], metadata: Any) -> None:
        """See :class:`Segment`."""
        self._may_write()
        self.store.append(vectors, ids, metadata)

    def reload(self) -> None:
        """See :class:`Segment`; the manifest is read if it has changed."""
        now = _stamp(self.store.path) if self._limit is None else self._seen
        if now != self._seen:
            if not now:
                raise self._lost()
            known = self.store.shards
            self.store.reload()
            if not begins_with(self.store.shards, known):
                raise self._replaced()
            self._seen = self._compared = now

    def faults(self) -> list[str]:
        """Damage, a sentence each; every byte is read."""
        try:
            self._compared = ()
            self._require_same()
        except StoreError as error:
            return [str(error)]
        return find_faults(self.store.path, self.store.modality)

    @contextmanager
    def _same_store(self) -> Iterator[None]:
        """Around reading: files are opened when they are needed, and may be another store's by then."""
        try:
            yield
        finally:
            self._require_same()

    def _require_same(self) -> None:
        """Refuses another store that was put in the place of the one that was opened."""
        now = _stamp(self.store.path)
        if now == self._compared or not self._seen:  # a folder that clip-retrieval wrote has no manifest
            return
        if now:
            if not begins_with(read_manifest(self.store.path / MANIFEST).shards, self.store.shards):
                raise self._replaced()
            self._compared = now
        elif self.store.path.is_dir():  # if it is gone as a whole, what was read is from files still open
            raise self._lost()

    def _lost(self) -> StoreError:
        return StoreError(
            f"{self.store.path} has lost its {MANIFEST} while the gallery was open; put the store back, or "
            "open the gallery anew"
        )

    def _replaced(self) -> StoreError:
        return StoreError(
            f"{self.store.path} was replaced by another store while it was open; open the gallery again"
        )


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes whenever a manifest does, since it is replaced as a whole."""
    try:
        about = (path / MANIFEST).stat()
    except OSError:
        return ()
    return about.st_ino, about.st_size, about.st_mtime_ns
