"""Parts of a gallery: rows, masks, and the lookup of items across parts.

A *part* holds the items of one space. Its rows are the rows of its *segments*, in order. A masked row is
either *removed* or *moved*; the item of a moved row is searched in the new part.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.errors import DataError, SpaceMismatchError, StoreError
from xbt.index.faiss_index import ApproximateIndex, IndexManager, IndexPlan
from xbt.index.protocol import EXACT_SCORES, METADATA, IndexInfo, VectorInfo
from xbt.index.segments import Change, PartRecord, Rows, Segment, damaged
from xbt.index.views import MovedRows, PartView
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
    locks, so the gallery admits one thread at a time. Views are immutable.

    Args:
        record: Description of the part.
        make_manager: Factory of the manager of the search structures.

    Attributes:
        rows: Reader of the vectors.
        ids: Ids of all rows, including masked ones. The list only grows.
        removed: (n,) bool mask of removed rows, never changed in place.
        masked: (n,) bool mask of removed or moved rows, never changed in place.
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
        self._manager_made: IndexManager | None = None
        self._trusted: weakref.WeakSet[EmbeddingSpace] = weakref.WeakSet()
        self._view: PartView | None = None
        self._moved: list[PartView] | None = None
        self._moved_rows = MovedRows()

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
        about = self.record
        return PartSummary(self.name, self.space, self.dim, self.count, about.modality, about.dtype)

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
        """Refuse vectors of another space.

        Args:
            space: Space of the vectors; ``None`` is not checked.
            what: Name of the vectors in the message.

        Raises:
            SpaceMismatchError: If the spaces differ. If the part has no declared space, if the dimensions do.
        """
        if space is None or space in self._trusted:
            return
        require_space(self, space, what)
        if self.space is not None and self.space.compare(space).verified:
            self.trust(space)

    def live_ids(self) -> list[str]:
        """List the items searched in this part, in order."""
        return [self.ids[row] for row in np.flatnonzero(~self.masked)]

    def grow(self, segments: Sequence[Segment], ids: Iterable[str]) -> None:
        """Append segments and the ids of their rows."""
        first = len(self.segments)
        self._place_of.update((each.number, first + place) for place, each in enumerate(segments))
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
        known = self._looked_up
        if known < len(self.ids):  # a process that only searches never runs this
            self._row_of.update(zip(self.ids[known:], range(known, len(self.ids)), strict=True))
            self._looked_up = len(self.ids)
        return self._row_of

    def numbers_of(self, segment: Segment) -> NDArray[np.int64]:
        """List the row numbers of a segment."""
        first = int(self.rows.starts[self._place_of[segment.number]])
        return np.arange(first, first + segment.count)

    def emptied(self) -> Part:
        """Make an empty part with the same description."""
        return Part(self.record, self._make_manager)

    def unmask_moved(self) -> None:
        """Make moved rows searchable again, for a part that becomes the only one."""
        self.masked, self._view, self._moved = self.removed, None, None
        self._manager_made, self._moved_rows = None, MovedRows()

    @property
    def _manager(self) -> IndexManager:
        if self._manager_made is None:
            self._manager_made = self._make_manager()
        return self._manager_made

    def has_segment(self, number: int) -> bool:
        """Check for a segment of this part."""
        return number in self._place_of

    def numbered(self, change: Change, path: Path | None) -> NDArray[np.int64]:
        """Convert the rows of a change to row numbers over all segments.

        Args:
            change: Change of a segment of this part.
            path: Directory of the gallery, for the message.

        Raises:
            StoreError: If the segment has no such rows.
        """
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
        """Read columns by row number, in the requested order; ``None`` if no row has columns.

        Raises:
            StoreError: If the segments of the rows have incompatible columns.
        """
        found = [
            (self.segments[number].metadata(numbers), places)
            for number, places, numbers in self.rows.by_segment(rows)
        ]
        return _stacked(found, f"the part {self.name!r}")

    def checked_columns(self, ids: Sequence[str], metadata: Any) -> pa.Table | None:
        """Convert the columns of new items to a table.

        Raises:
            StoreError: If they do not fit the items, or a type is incompatible with a column of the part.
        """
        where = f"the part {self.name!r}"
        table = as_table(ids, metadata, len(ids), where).drop_columns(["id"])
        for name in table.column_names:
            self._check_column(name, table, where)
        return table if table.num_columns else None

    def _check_column(self, name: str, table: pa.Table, where: str) -> None:
        kind = table.schema.field(name).type
        for segment in self.segments:
            known = segment.column_types().get(name, kind)
            if known.equals(kind):
                continue
            try:
                own = segment.metadata(np.arange(segment.count))
                assert own is not None
                pa.concat_tables([own.select([name]), table.select([name])], promote_options="permissive")
            except pa.ArrowException as error:
                raise StoreError(
                    f"{where}: column {name!r} is {kind}, which does not go together with {known} before it; "
                    "give a column one type over the whole gallery, or take another name"
                ) from error

    def view(self) -> PartView:
        """Build a searchable view of the current part. May read rows, but makes no index.

        Raises:
            StoreError: If a segment cannot be read.
        """
        known = self._view
        # A missing index may exist by now although no row has changed.
        if known is None or known.due or known.exact is None:
            names = [each.name for each in self.segments]
            kept = self._manager.refreshed(self.rows.gather, self.masked, names)
            self._view = known = PartView(
                self.name, self.space, self.dim, self.ids, self.masked, self.count, kept.exact, kept.index,
                self.rows.gather, tuple(names), self._trusted, kept.due,
            )  # fmt: skip
        return known

    def moved_views(self) -> list[PartView]:
        """Build searchable views of the rows moved to the new part; raises as :meth:`view`."""
        if self._moved is None:
            self._moved = self._moved_rows.views(self.view(), self.masked & ~self.removed)
        return self._moved

    def made_index(self, view: PartView) -> ApproximateIndex:
        """Make an index of the rows of a view; raises as :meth:`view`.

        This takes long. Other threads may search and write meanwhile.
        """
        return self._manager.made(view.gather, view.masked, list(view.segments))

    def adopt(self, index: ApproximateIndex) -> None:
        """Use an index made from this part in searches."""
        self._manager.adopt(index)
        self._view = None


class Parts:
    """All parts of a gallery, oldest first: one, or two during a backfill.

    Args:
        plan: Kind of index.
        path: Directory of the gallery, for messages; ``None`` in memory.
    """

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
            each.name: VectorInfo(each.dim, each.space, len(each.ids) - int(np.count_nonzero(each.removed)))
            for each in self
        }
        return IndexInfo(self.old.dim, "dot", self.count, vectors, frozenset({EXACT_SCORES, METADATA}))

    def part(self, name: str) -> Part:
        """Look up a part by name.

        Raises:
            DataError: If there is no such part.
        """
        for part in self:
            if part.name == name:
                return part
        names = " and ".join(repr(part.name) for part in self)
        raise DataError(f"the gallery has no part {name!r}; it has {names}")

    def of_space(self, space: EmbeddingSpace | None, what: str) -> Part:
        """Find the part that vectors of a space belong to.

        Raises:
            DataError: If there are two parts and no space is given.
            SpaceMismatchError: If no part has this space, or either part could have it.
        """
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
        known = " and ".join(str(part.space) for part in self)
        raise SpaceMismatchError(
            f"the space of {what} is {space}, but the gallery's parts are of {known}; use the model of one "
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
        """Exclude rows from every search from now on.

        Raises:
            StoreError: If a row does not exist, for example because the database was altered.
        """
        for part in self:
            for moved in (False, True):
                rows = [part.numbered(each, self._path) for each in changes
                        if each.moved == moved and part.has_segment(each.segment)]  # fmt: skip
                if rows:
                    part.mask(np.concatenate(rows), moved)

    def find(self, item: str) -> tuple[Part, int] | None:
        """Find the part and row in which an item is searched; ``None`` if it is unknown."""
        for part in reversed(self._all):
            row = part.row(item)
            if row is not None:
                return part, row
        return None

    def rows(self, ids: Sequence[str], name: str | None) -> tuple[Part, NDArray[np.int64]]:
        """Find the rows of items in the named part, or in the part where they are searched.

        Raises:
            DataError: If an item is unknown, or the items are searched in two parts.
        """
        chosen = None if name is None else self.part(name)
        places: list[tuple[Part, int]] = []
        for item in ids:
            row = None if chosen is None else chosen.row(item)
            place = self.find(item) if chosen is None else None if row is None else (chosen, row)
            if place is None:
                raise _not_there(item, "gallery" if name is None else f"part {name!r}")
            places.append(place)
        owners = {part.name: item for (part, _), item in zip(places, ids, strict=True)}
        if len(owners) > 1:
            (first, one), (second, other) = list(owners.items())[:2]
            raise DataError(
                f"{one!r} is in the part {first!r}, but {other!r} in {second!r}; ask for the items of one "
                "part at a time"
            )
        owner = places[0][0] if places else chosen or self.alone
        return owner, np.array([row for _, row in places], np.int64)

    def refuse_known(self, ids: Sequence[str]) -> None:
        """Refuse ids that are already in the gallery.

        Raises:
            DataError: If an id is known. The message names it and its part.
        """
        for part in reversed(self._all):
            if part.has_any(ids):
                known = next(item for item in ids if part.row(item) is not None)
                raise DataError(
                    f"the id {known!r} is already in the gallery (part {part.name!r}); remove it first, or "
                    "give the new item a new id"
                )

    def removal(self, ids: Sequence[str]) -> list[Change]:
        """Build the changes that remove items from every part.

        Raises:
            DataError: If an item is not in the gallery.
        """
        changes = []
        for part in self:
            rows = [row for item in ids if (row := part.row(item)) is not None]
            changes += part.as_changes(rows, moved=False)
        for item in ids:
            if self.find(item) is None:
                raise _not_there(item, "gallery")
        return changes

    def backfilling(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Find the old rows of items to backfill.

        Raises:
            DataError: If an item is unknown, or is already in the new part.
        """
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
        """Collect the columns and changes of an upsert of known items into a part.

        Args:
            ids: Ids of the items.
            part: Part that gets the vectors as its next segment.

        Raises:
            DataError: If an item is not in the gallery.
        """
        places = [self.find(item) for item in ids]
        columns, hidden = [], []
        for number, (item, place) in enumerate(zip(ids, places, strict=True)):
            if place is None:
                raise _not_there(item, "gallery")
            if part is self.old and place[0] is not part:
                hidden.append(number)  # mixed search uses the new vector; the old one stays readable
        for owner in self:
            own = np.array([n for n, place in enumerate(places) if place is not None and place[0] is owner])
            if len(own):
                rows = np.array([place[1] for place in places if place is not None and place[0] is owner])
                columns.append((owner.metadata(rows), own))
        replaced = [row for item in ids if (row := part.row(item)) is not None]
        changes = part.as_changes(replaced, moved=False)
        if part is self.newest and part is not self.old:
            moved = [place[1] for place in places if place is not None and place[0] is self.old]
            changes += self.old.as_changes(moved, moved=True)
        if hidden:
            changes.append(Change(NEXT, np.array(hidden, np.int64), moved=True))
        return _stacked(columns, f"the part {part.name!r}"), changes

    def check_next(self, space: EmbeddingSpace, name: str) -> None:
        """Check that a new part can be added.

        Raises:
            DataError: If there are two parts already, the name is taken, or the space is the old one.
            ConfigError: If the index of the gallery cannot be made for the new dimension.
        """
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


def require_space(part: Part | PartView, space: EmbeddingSpace | None, what: str) -> None:
    """See :meth:`Part.require_space`."""
    if space is not None and part.space is not None:
        part.space.require(space, what)
    elif space is not None and space.dim != part.dim:
        raise SpaceMismatchError(
            f"{what} belongs to the space of {space}, but the gallery has dimension {part.dim}; "
            "use the model that made the gallery or project into its space"
        )


def _not_there(item: str, where: str) -> DataError:
    return DataError(f"the id {item!r} is not in the {where}; check the id, or reload the gallery")


def _stacked(found: Sequence[tuple[pa.Table | None, NDArray[np.int64]]], where: str) -> pa.Table | None:
    """Concatenate columns in the order of their positions; ``None`` if no row has any."""
    if all(table is None for table, _ in found):
        return None
    tables = [
        pa.table({_ABSENT: pa.nulls(len(places))}) if table is None else table for table, places in found
    ]
    try:
        stacked = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise StoreError(
            f"{where}: {str(error).splitlines()[0]}; give a column one type over the whole gallery"
        ) from error
    named = stacked.select([name for name in stacked.column_names if name != _ABSENT])
    return named.take(pa.array(np.argsort(np.concatenate([places for _, places in found]))))


_ABSENT = "__absent__"
