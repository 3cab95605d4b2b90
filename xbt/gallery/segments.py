"""What a part's rows stand in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.errors import StoreError
from xbt.gallery.layout import PartRecord, SegmentRecord
from xbt.store import EmbeddingStore
from xbt.store.layout import MANIFEST, metadata_file
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

    def __init__(self, directory: Path, part: PartRecord, record: SegmentRecord) -> None:
        """Opens a segment.

        Args:
            directory: The folder of the gallery's own segments.
            part: The part it belongs to.
            record: Which.

        Raises:
            StoreError: If it is missing or damaged.
            SpaceMismatchError: If it holds vectors of another space than the part.
        """
        path = directory / record.name if record.elsewhere is None else Path(record.elsewhere)
        self._seen = _stamp(path)  # before it is read: what changes meanwhile is read again
        self.store = EmbeddingStore.open(path, part.modality, part.space)
        self.name, self._limit = record.name, record.rows
        self.writable = record.elsewhere is None
        if self._limit is not None and len(self.store) < self._limit:
            raise StoreError(
                f"{path} has {len(self.store)} rows, but the gallery was made of {self._limit}; copy the "
                "store again"
            )

    def __len__(self) -> int:
        return len(self.store) if self._limit is None else self._limit

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`Segment`."""
        return self.store.rows(rows)

    def slice(self, start: int, stop: int) -> NDArray[np.float32]:
        """See :class:`Segment`."""
        return self.store.read(start, stop)

    def ids(self, start: int, stop: int) -> list[str]:
        """See :class:`Segment`."""
        return self.store.read_ids(start, stop)

    def metadata(self, rows: NDArray[np.int64]) -> pa.Table | None:
        """See :class:`Segment`; every shard that has one of the rows is read."""
        tables, first = [], 0
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
        self.store.append(vectors, ids, metadata)

    def reload(self) -> None:
        """See :class:`Segment`; the manifest is read if it has changed."""
        now = _stamp(self.store.path) if self._limit is None else self._seen
        if now != self._seen:
            if not now:
                raise StoreError(
                    f"{self.store.path} has lost its {MANIFEST} while the gallery was open; put the store "
                    "back, or open the gallery anew"
                )
            self.store.reload()
            self._seen = now


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes whenever a manifest does, since it is replaced as a whole."""
    try:
        about = (path / MANIFEST).stat()
    except OSError:
        return ()
    return about.st_ino, about.st_size, about.st_mtime_ns
