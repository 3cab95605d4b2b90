"""One part of a gallery: the items of one space, over one or more segments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.gallery.approximate import ApproximateIndex
from xbt.gallery.columns import PartColumns, stacked
from xbt.gallery.index_cache import IndexCache
from xbt.gallery.index_plan import IndexPlan
from xbt.gallery.journal import Removed
from xbt.gallery.part_view import PartView, vectors_of
from xbt.gallery.segments import Segment
from xbt.gallery.upkeep import Upkeep
from xbt.space import EmbeddingSpace


class Part:
    """The rows of one part, of which some are masked: removed, or superseded by the new part.

    Rows are numbered over all segments and keep their numbers; what is masked stays so. No method takes a
    lock: the gallery sees to it that one thread at a time is here. What :meth:`view` gives is immutable.

    Args:
        name: The part's name.
        space: The space of its vectors, if it is known.
        dim: Their dimension.
        plan: Which index it is searched with.
        cache: Where the index is kept, if it is.

    Attributes:
        plan: Which index it is searched with.
        segments: Where its rows stand; only the last one grows.
        removed: (n,) bool: the rows that were removed; a row that is masked besides is superseded.
        ids: The ids of all rows, those of masked ones too; the list only grows.
        masked: (n,) bool, never changed in place.
    """

    def __init__(
        self,
        name: str,
        space: EmbeddingSpace | None,
        dim: int,
        plan: IndexPlan,
        cache: IndexCache | None = None,
    ) -> None:
        self.name, self.space, self.dim = name, space, dim
        self.segments: list[Segment] = []
        self.ids: list[str] = []
        self.masked = np.zeros(0, np.bool_)
        self.removed = np.zeros(0, np.bool_)
        self._rows: dict[str, int] = {}
        self._to_remove: dict[str, list[int]] = {}
        self.plan = plan
        self._columns = PartColumns()
        self._upkeep = Upkeep(dim, plan, cache)
        self._view: PartView | None = None

    @property
    def count(self) -> int:
        """Items that are searched here."""
        return len(self.ids) - int(self.masked.sum())

    def live_ids(self) -> list[str]:
        """The items that are searched here, in order."""
        return [self.ids[row] for row in np.flatnonzero(~self.masked)]

    def grow(self) -> range:
        """Takes in the rows that the segments have got; returns their numbers."""
        first, start = len(self.ids), 0
        for segment in self.segments:
            stop = start + len(segment)
            if stop > len(self.ids):
                self.ids += segment.ids(len(self.ids) - start, len(segment))
            start = stop
        news = range(first, len(self.ids))
        if news:
            self._rows.update(zip(self.ids[first:], news, strict=True))
            more = np.zeros(len(news), np.bool_)
            self.masked, self.removed = (np.append(mask, more) for mask in (self.masked, self.removed))
            self._view = None
            self.remove({})
        return news

    def row(self, item: str) -> int | None:
        """The row of an item that has not been removed, superseded or not."""
        row = self._rows.get(item)
        return None if row is None or self.removed[row] else row

    def remove(self, removed: Removed) -> None:
        """Masks rows for good, given by segment; of rows that have not been seen yet it is remembered."""
        for segment, rows in removed.items():
            self._to_remove.setdefault(segment, []).extend(rows)
        start, found = 0, []
        for each in self.segments:
            rows_here = self._to_remove.pop(each.name, [])
            found += [start + row for row in rows_here if start + row < len(self.ids)]
            if later := [row for row in rows_here if start + row >= len(self.ids)]:
                self._to_remove[each.name] = later
            start += len(each)
        if found:
            self.removed = self.removed.copy()
            self.removed[found] = True
            self.mask(found)

    def mask(self, rows: Iterable[int]) -> None:
        """Leaves rows out of every search from now on."""
        masked = self.masked.copy()
        masked[list(rows)] = True
        self.masked, self._view = masked, None

    def places(self, rows: Sequence[int]) -> dict[str, list[int]]:
        """Rows by segment, as the journal has them."""
        found: dict[str, list[int]] = {}
        starts = np.cumsum([0, *map(len, self.segments)])
        for row in rows:
            home = int(np.searchsorted(starts, row, side="right")) - 1
            found.setdefault(self.segments[home].name, []).append(int(row - starts[home]))
        return found

    def takes(self, ids: Sequence[str]) -> bool:
        """Whether the last segment can take these ids: it grows, and has never had one of them."""
        if not self.segments or not self.segments[-1].writable:
            return False
        first = len(self.ids) - len(self.segments[-1])
        return all(self._rows.get(item, -1) < first for item in ids)

    def vectors(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, dim) vectors by row number, masked or not."""
        return vectors_of(tuple(self.segments), self.dim, np.asarray(rows, np.int64))

    def checked_columns(self, ids: Sequence[str], metadata: Any) -> pa.Table | None:
        """Columns for items to be added, as a table.

        Raises:
            StoreError: If they do not fit the items, or one does not go together with what the part has.
        """
        return self._columns.checked(self.segments, ids, metadata, f"the part {self.name!r}")

    def metadata(self, rows: Sequence[int] | NDArray[np.int64]) -> pa.Table | None:
        """Columns by row number, in the order asked for; ``None`` if no row has any.

        Raises:
            StoreError: If the rows are of segments whose columns do not go together.
        """
        wanted = np.asarray(rows, np.int64)
        order = np.argsort(wanted, kind="stable")
        tables, start = [], 0
        for segment in self.segments:
            own = wanted[order]
            own = own[(own >= start) & (own < start + len(segment))] - start
            if len(own):
                columns = segment.metadata(own)
                tables.append(_blank(len(own)) if columns is None else columns)
            start += len(segment)
        if all(table.column_names == [_ABSENT] for table in tables):
            return None
        table = stacked(tables, f"the part {self.name!r}")
        named = table.select([name for name in table.column_names if name != _ABSENT])
        return named.take(pa.array(np.argsort(order)))

    def view(self, keep: Any = None) -> PartView:
        """What a search of the part as it is now needs; whatever has to be read is, but no index is made.

        Args:
            keep: Anything that must live as long as the view.

        Raises:
            StoreError: If a segment cannot be read.
        """
        known = self._view
        # An index that was missing may be there by now, although no row has changed.
        if known is None or known.keep is not keep or known.due or known.exact is None:
            kept = self._upkeep.refreshed(self.vectors, self.masked, [each.name for each in self.segments])
            self._view = known = PartView(
                self.name, self.space, self.dim, self.ids, self.masked, self.count, kept.exact, kept.index,
                tuple(self.segments), kept.due, keep,
            )  # fmt: skip
        return known

    def made_index(self, view: PartView) -> ApproximateIndex:
        """An index of the part as it was; takes long, and may run while others search and write.

        Raises:
            StoreError: If a segment cannot be read.
        """
        return self._upkeep.made(view.gather, view.masked, [each.name for each in view.segments])

    def adopt(self, index: ApproximateIndex) -> None:
        """Searches with an index that was made of this part."""
        self._upkeep.adopt(index)
        self._view = None


_ABSENT = "__absent__"


def _blank(count: int) -> pa.Table:
    return pa.table({_ABSENT: pa.nulls(count)})
