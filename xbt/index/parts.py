"""Parts of a gallery: rows, masks, and the lookup of items across parts.

A *part* holds the items of one space. Its rows are the rows of its *segments*, in order. A masked row is
either *removed* or *moved*; the item of a moved row is searched in the new part.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.errors import DataError, SpaceMismatchError, StoreError
from xbt.index.faiss_index import ApproximateIndex, IndexManager, IndexPlan
from xbt.index.protocol import EXACT_SCORES, METADATA, IndexInfo, VectorInfo
from xbt.index.segments import Change, PartRecord, Rows, Segment, damaged
from xbt.index.views import MovedRows, PartView, require_space
from xbt.space import EmbeddingSpace
from xbt.store.shards import as_table

OLD = "old"
"""Name of the first part. A later part never gets this name."""
NEXT = 0
"""Placeholder for the number of the segment about to be written."""


@dataclass(frozen=True)
class PartSummary:
    """Description of a part for users.

    Attributes:
        name: ``"old"``, ``"new"``, or the name that the user gave.
        space: Space of the vectors; ``None`` if undeclared.
        dim: Dimension of the vectors.
        count: Number of items searched in this part.
        modality: ``"image"`` or ``"text"``.
        dtype: ``"float16"`` or ``"float32"``, on disk.
    """

    name: str
    space: EmbeddingSpace | None
    dim: int
    count: int
    modality: str
    dtype: str


class Part:
    """Rows of one part. Some are masked: removed, or moved to the new part.

    Rows are numbered over all segments and keep their numbers. A masked row stays masked. Methods take no
    locks, so the gallery admits one thread at a time. Views are immutable, and so are the masks: ``removed``,
    and ``masked`` of removed or moved rows, (n,) bool. ``ids`` are those of all rows; the list only grows.
    """

    def __init__(self, record: PartRecord, make_manager: Callable[[], IndexManager]) -> None:
        self.record = record
        self.name, self.space, self.dim = record.name, record.space, record.dim
        self.rows = Rows((), record.dim)
        self.ids: list[str] = []
        self.removed = self.masked = np.zeros(0, np.bool_)
        self._row_of: dict[str, int] = {}
        self._looked_up = 0
        self._place_of: dict[int, int] = {}
        self._make_manager = make_manager
        self._trusted: weakref.WeakSet[EmbeddingSpace] = weakref.WeakSet()
        self._view: PartView | None = None
        self._moved: list[PartView] | None = None
        self._moved_rows: MovedRows | None = None

    @property
    def count(self) -> int:
        """Number of items searched in this part."""
        return len(self.ids) - int(np.count_nonzero(self.masked))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Segments in order."""
        return self.rows.segments

    def summary(self) -> PartSummary:
        """Describe the current state of the part."""
        record = self.record
        return PartSummary(self.name, self.space, self.dim, self.count, record.modality, record.dtype)

    def with_vector(self) -> list[str]:
        """List the items with a vector in this part, including moved ones, in order."""
        return [self.ids[row] for row in np.flatnonzero(~self.removed)]

    def trusts(self, space: EmbeddingSpace) -> bool:
        """Check for a space already known to be the space of this part."""
        return space in self._trusted

    def trust(self, space: EmbeddingSpace | None) -> None:
        """Accept a space from now on without comparing it again."""
        if space is not None:
            self._trusted.add(space)

    def require_space(self, space: EmbeddingSpace | None, what: str) -> None:
        """Refuse vectors of another space; see :func:`~xbt.index.views.require_space`."""
        if space is not None and space not in self._trusted:
            require_space(space, self.space, self.dim, self._trusted, what)

    def live_ids(self) -> list[str]:
        """List the items searched in this part, in order."""
        return [self.ids[row] for row in np.flatnonzero(~self.masked)]

    def grow(self, segments: Sequence[Segment], ids: Iterable[str]) -> None:
        """Append segments and the ids of their rows."""
        first = len(self.segments)
        self._place_of.update((segment.number, first + place) for place, segment in enumerate(segments))
        self.rows = Rows((*self.segments, *segments), self.dim)
        self.ids += ids
        more = np.zeros(len(self.rows) - len(self.masked), np.bool_)
        self.removed, self.masked = np.append(self.removed, more), np.append(self.masked, more)
        self._view = self._moved = None

    def row(self, item: str) -> int | None:
        """Find the row of an item, moved or not; ``None`` if there is none or it is removed."""
        row = self._rows_by_id().get(item)
        return None if row is None or self.removed[row] else row

    def has_any(self, ids: Sequence[str]) -> bool:
        """Check for any item with a row that is not removed; fast if there is none."""
        rows = [row for row in map(self._rows_by_id().get, ids) if row is not None]
        return bool(rows) and not bool(self.removed[rows].all())

    def _rows_by_id(self) -> dict[str, int]:
        first = self._looked_up
        if first < len(self.ids):  # a process that only searches never runs this
            self._row_of.update(zip(self.ids[first:], range(first, len(self.ids)), strict=True))
            self._looked_up = len(self.ids)
        return self._row_of

    def numbers_of(self, segment: Segment) -> NDArray[np.int64]:
        """List the row numbers of a segment."""
        first = int(self.rows.starts[self._place_of[segment.number]])
        return np.arange(first, first + segment.count)

    @cached_property
    def _manager(self) -> IndexManager:
        return self._make_manager()

    def emptied(self) -> Part:
        """Make an empty part with the same description."""
        return Part(self.record, self._make_manager)

    def unmask_moved(self) -> None:
        """Make moved rows searchable again, for a part that becomes the only one."""
        self.masked, self._view, self._moved = self.removed, None, None
        self._moved_rows = None
        self.__dict__.pop("_manager", None)

    def numbered(self, change: Change, path: Path | None) -> NDArray[np.int64]:
        """Convert the rows of a change of one segment to row numbers over all segments."""
        if change.segment not in self._place_of:  # it is one of the other part
            return np.zeros(0, np.int64)
        place = self._place_of[change.segment]
        if change.rows.min() < 0 or change.rows.max() >= self.segments[place].count:
            raise damaged(path or Path(), f"a change names rows that segment {change.segment} does not have")
        rows: NDArray[np.int64] = change.rows + self.rows.starts[place]
        return rows

    def as_changes(self, rows: Sequence[int], moved: bool) -> list[Change]:
        """Build the changes that mask rows, one per segment."""
        groups = self.rows.by_segment(np.array(sorted(rows), np.int64))
        return [Change(self.segments[place].number, numbers, moved) for place, _, numbers in groups]

    def mask(self, rows: NDArray[np.int64], moved: bool) -> None:
        """Exclude rows from every search from now on. Moved rows can still be read."""
        self.masked = self.masked.copy()
        self.masked[rows] = True
        if not moved:
            self.removed = self.removed.copy()
            self.removed[rows] = True
        self._view = self._moved = None

    def metadata(self, rows: NDArray[np.int64]) -> pa.Table | None:
        """Read columns by row number, in the requested order; ``None`` if no row has columns."""
        columns = [
            (self.segments[number].metadata(numbers), places)
            for number, places, numbers in self.rows.by_segment(rows)
        ]
        return _stacked(columns, f"the part {self.name!r}")

    def checked_columns(self, ids: Sequence[str], metadata: Any) -> pa.Table | None:
        """Convert the columns of new items to a table."""
        where = f"the part {self.name!r}"
        table = as_table(ids, metadata, len(ids), where).drop_columns(["id"])
        for name in table.column_names:
            self._check_column(name, table, where)
        return table if table.num_columns else None

    def _check_column(self, name: str, table: pa.Table, where: str) -> None:
        kind = table.schema.field(name).type
        for segment in self.segments:
            earlier = segment.column_types().get(name, kind)
            if earlier.equals(kind):
                continue
            try:
                before = segment.metadata(np.arange(segment.count))
                assert before is not None
                pa.concat_tables([before.select([name]), table.select([name])], promote_options="permissive")
            except pa.ArrowException as error:
                raise StoreError(
                    f"{where}: column {name!r} is {kind}, which does not go together with {earlier} before "
                    "it; give a column one type over the whole gallery, or take another name"
                ) from error

    def view(self) -> PartView:
        """Build a searchable view of the current part. May read rows, but makes no index."""
        view = self._view
        # A missing index may exist by now although no row has changed.
        if view is None or view.due or view.exact is None:
            names = [segment.name for segment in self.segments]
            kept = self._manager.refreshed(self.rows.gather, self.masked, names)
            self._view = view = PartView(
                self.name, self.space, self.dim, self.ids, self.masked, self.count, kept.exact, kept.index,
                self.rows.gather, tuple(names), self._trusted, kept.due,
            )  # fmt: skip
        return view

    def moved_views(self) -> list[PartView]:
        """Build searchable views of the rows moved to the new part."""
        if self._moved is None:
            self._moved_rows = self._moved_rows or MovedRows()
            self._moved = self._moved_rows.views(self.view(), self.masked & ~self.removed)
        return self._moved

    def made_index(self, view: PartView) -> ApproximateIndex:
        """Make an index of the rows of a view. This takes long; other threads may write meanwhile."""
        return self._manager.made(view.gather, view.masked, list(view.segments))

    def adopt(self, index: ApproximateIndex) -> None:
        """Use an index made from this part in searches."""
        self._manager.adopt(index)
        self._view = None


class Parts:
    """All parts of a gallery, oldest first: one, or two during a backfill."""

    def __init__(self, plan: IndexPlan, path: Path | None = None) -> None:
        self.plan, self._path = plan, path
        self._all: list[Part] = []

    def __iter__(self) -> Iterator[Part]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def old(self) -> Part:
        """First part."""
        return self._all[0]

    @property
    def newest(self) -> Part:
        """Second part, or the only one."""
        return self._all[-1]

    @property
    def alone(self) -> Part:
        """Part that can be searched alone: the old one until every item is backfilled."""
        return self.newest if self.newest.count and not self.old.count else self.old

    @property
    def count(self) -> int:
        """Number of items searched in all parts."""
        return sum(part.count for part in self)

    @property
    def fraction_backfilled(self) -> float:
        """Fraction of the items that are in a part added by a backfill."""
        begun = self.newest  # the only part once the old one is dropped
        return begun.count / self.count if begun.name != OLD and begun.count else 0.0

    def info(self) -> IndexInfo:
        """Describe the gallery as an index with one named vector per part."""
        vectors = {
            part.name: VectorInfo(part.dim, part.space, len(part.ids) - int(np.count_nonzero(part.removed)))
            for part in self
        }
        return IndexInfo(self.old.dim, "dot", self.count, vectors, frozenset({EXACT_SCORES, METADATA}))

    def part(self, name: str) -> Part:
        """Look up a part by name."""
        for part in self:
            if part.name == name:
                return part
        names = " and ".join(repr(part.name) for part in self)
        raise DataError(f"the gallery has no part {name!r}; it has {names}")

    def of_space(self, space: EmbeddingSpace | None, what: str) -> Part:
        """Find the part that vectors of a space belong to."""
        if len(self._all) == 1:
            self._all[0].require_space(space, what)
            return self._all[0]
        if space is None:
            raise DataError(
                f"the gallery has two parts, {self.old.name!r} and {self.newest.name!r}; give space= to "
                f"choose the part of {what}"
            )
        for part in self._all:
            if part.trusts(space):
                return part
        same = [part for part in self if part.space is not None and part.space.same_as(space)]
        if same:
            same[0].require_space(space, what)  # warns where the space is not verified
            return same[0]
        # The undeclared space may be this one, unless this one could also be the space of another part.
        unknown = next((part for part in self if part.space is None and part.dim == space.dim), None)
        unsure = [p for p in self if p.space is not None and not p.space.compare(space).verified]
        if unknown is not None and not unsure:
            return unknown
        if unknown is not None:
            raise SpaceMismatchError(
                f"the space of {what} is {space}, which could be that of {unknown.name!r} as well as of "
                f"{unsure[0].name!r}: it has no probe; use a space with one, as encoder.space has"
            )
        spaces = " and ".join(str(part.space) for part in self)
        raise SpaceMismatchError(
            f"the space of {what} is {space}, but the gallery's parts are of {spaces}; use the model of one "
            "of them"
        )

    def add(self, part: Part) -> None:
        """Append a part."""
        self._all.append(part)

    def grow(self, segments: Sequence[tuple[int, Segment, list[str]]]) -> None:
        """Append segments, each with the number of its part and the ids of its rows."""
        for part in self._all:
            grown: list[Segment] = []
            names: list[str] = []
            for number, segment, ids in segments:
                if number == part.record.number:
                    grown.append(segment)
                    names += ids
            if grown:
                part.grow(grown, names)

    def mask(self, changes: Sequence[Change]) -> None:
        """Exclude rows from every search from now on."""
        for part in self:
            for moved in (False, True):
                rows = [part.numbered(change, self._path) for change in changes if change.moved == moved]
                if any(map(len, rows)):
                    part.mask(np.concatenate(rows), moved)

    def find(self, item: str) -> tuple[Part, int] | None:
        """Find the part and row in which an item is searched; ``None`` if it is unknown."""
        for part in reversed(self._all):
            row = part.row(item)
            if row is not None:
                return part, row
        return None

    def _places(self, ids: Sequence[str]) -> list[tuple[Part, int]]:
        places = []
        for item in ids:
            place = self.find(item)
            if place is None:
                raise _not_there(item, "gallery")
            places.append(place)
        return places

    def rows(self, ids: Sequence[str], name: str | None) -> tuple[Part, NDArray[np.int64]]:
        """Find the rows of items in the named part, or in the part where they are searched."""
        if name is not None:
            part, rows = self.part(name), []
            for item in ids:
                row = part.row(item)
                if row is None:
                    raise _not_there(item, f"part {name!r}")
                rows.append(row)
            return part, np.array(rows, np.int64)
        places = self._places(ids)
        example_of = {part.name: item for (part, _), item in zip(places, ids, strict=True)}
        if len(example_of) > 1:
            (first, one), (second, other) = list(example_of.items())[:2]
            raise DataError(
                f"{one!r} is in the part {first!r}, but {other!r} in {second!r}; ask for the items of one "
                "part at a time"
            )
        return places[0][0] if places else self.alone, np.array([row for _, row in places], np.int64)

    def refuse_known(self, ids: Sequence[str]) -> None:
        """Refuse ids that are already in the gallery."""
        for part in reversed(self._all):
            if part.has_any(ids):
                taken = next(item for item in ids if part.row(item) is not None)
                raise DataError(
                    f"the id {taken!r} is already in the gallery (part {part.name!r}); remove it first, or "
                    "give the new item a new id"
                )

    def removal(self, ids: Sequence[str]) -> list[Change]:
        """Build the changes that remove items from every part."""
        self._places(ids)
        changes = []
        for part in self:
            rows = [row for item in ids if (row := part.row(item)) is not None]
            changes += part.as_changes(rows, moved=False)
        return changes

    def backfilling(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Find the old rows of items to backfill."""
        rows = []
        for item in ids:
            place = self.find(item)
            if place is None:
                raise DataError(
                    f"the id {item!r} is not in the gallery, so it cannot be backfilled; add it with add()"
                )
            if place[0] is not self.old:
                raise DataError(
                    f"the id {item!r} is in the part {place[0].name!r} already; leave it out, or remove it "
                    "and add it again"
                )
            rows.append(place[1])
        return np.array(rows, np.int64)

    def upserting(self, ids: Sequence[str], part: Part) -> tuple[pa.Table | None, list[Change]]:
        """Collect the columns and changes of an upsert of known items into the next segment of a part."""
        places = self._places(ids)
        columns = []
        for owner in self:
            positions = [number for number, (holder, _) in enumerate(places) if holder is owner]
            if positions:
                rows = np.array([places[number][1] for number in positions])
                columns.append((owner.metadata(rows), np.array(positions)))
        replaced = [row for item in ids if (row := part.row(item)) is not None]
        changes = part.as_changes(replaced, moved=False)
        if part is not self.old:
            moved = [row for owner, row in places if owner is self.old]
            changes += self.old.as_changes(moved, moved=True)
        else:  # mixed search uses the new vectors; the old ones are readable all the same
            hidden = [number for number, (owner, _) in enumerate(places) if owner is not part]
            changes += [Change(NEXT, np.array(hidden), moved=True)] if hidden else []
        return _stacked(columns, f"the part {part.name!r}"), changes

    def check_next(self, space: EmbeddingSpace, name: str) -> None:
        """Check that a new part can be added."""
        old = self.old
        if len(self) > 1:
            raise DataError(
                f"the gallery has two parts already, {old.name!r} and {self.newest.name!r}; backfill all "
                "items and call compact() before you begin another part"
            )
        if name == old.name:
            raise DataError(f"the gallery has a part {name!r} already; give another name=")
        if name == OLD:  # readers recognise a gallery without a backfill by this name
            raise DataError(
                f"the name {OLD!r} is reserved for the first part of a gallery; give another name="
            )
        if old.space is not None and old.dim == space.dim and old.space.same_as(space):
            raise DataError(f"the gallery already has the space {space}; add the vectors with add()")
        self.plan.check(space.dim)


def _not_there(item: str, where: str) -> DataError:
    return DataError(f"the id {item!r} is not in the {where}; check the id, or reload the gallery")


def _stacked(columns: Sequence[tuple[pa.Table | None, NDArray[np.int64]]], where: str) -> pa.Table | None:
    """Concatenate columns in the order of their positions; ``None`` if no row has any."""
    if all(table is None for table, _ in columns):
        return None
    tables = [
        pa.table({_ABSENT: pa.nulls(len(places))}) if table is None else table for table, places in columns
    ]
    try:
        stacked = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise StoreError(
            f"{where}: {str(error).splitlines()[0]}; give a column one type over the whole gallery"
        ) from error
    named = stacked.select([name for name in stacked.column_names if name != _ABSENT])
    return named.take(pa.array(np.argsort(np.concatenate([places for _, places in columns]))))


_ABSENT = "__absent__"
