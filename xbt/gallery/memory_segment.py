"""A part's rows in memory, for galleries that are not on disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.vectors import Vectors


class MemorySegment:
    """See :class:`~xbt.gallery.segments.Segment`."""

    writable = True

    def __init__(self, name: str, dim: int) -> None:
        self.name = name
        self._rows = np.zeros((0, dim), np.float32)
        self._ids: list[str] = []
        self._metadata: pa.Table | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`Segment`."""
        taken: NDArray[np.float32] = self._rows[rows]
        return taken

    def slice(self, start: int, stop: int) -> NDArray[np.float32]:
        """See :class:`Segment`."""
        rows = self._rows[start:stop]
        rows.flags.writeable = False
        return rows

    def ids(self, start: int, stop: int) -> list[str]:
        """See :class:`Segment`."""
        return self._ids[start:stop]

    def metadata(self, rows: NDArray[np.int64]) -> pa.Table | None:
        """See :class:`Segment`."""
        return None if self._metadata is None else self._metadata.take(pa.array(rows))

    @property
    def table(self) -> pa.Table | None:
        """All metadata, row by row; ``None`` if there are no columns."""
        return self._metadata

    def append(self, vectors: Vectors, ids: Sequence[str], metadata: pa.Table | None) -> None:
        """See :class:`Segment`; capacity doubles, so that a row is copied a logarithmic number of times."""
        rows, count = np.asarray(vectors, np.float32), len(self)
        if count + len(rows) > len(self._rows):
            room = np.empty((max(count + len(rows), 2 * count), rows.shape[1]), np.float32)
            room[:count] = self._rows[:count]
            self._rows = room
        self._rows[count : count + len(rows)] = rows
        self._metadata = _stacked(self._metadata, count, metadata, len(rows))
        self._ids += ids

    def reload(self) -> None:
        """See :class:`Segment`; nobody else writes to it."""


def _stacked(above: pa.Table | None, n_above: int, below: pa.Table | None, n_below: int) -> pa.Table | None:
    """Two tables, one above the other; null where one lacks a column."""
    if above is None and below is None:
        return None
    names = list(
        dict.fromkeys([*(above.column_names if above else ()), *(below.column_names if below else ())])
    )
    blank = [pa.table({name: pa.nulls(count) for name in names}) for count in (n_above, n_below)]
    return pa.concat_tables(
        [blank[0] if above is None else above, blank[1] if below is None else below],
        promote_options="permissive",
    )
