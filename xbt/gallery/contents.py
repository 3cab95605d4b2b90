"""A gallery's parts together: which item is where, and which of its rows counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from xbt.errors import DataError, SpaceMismatchError
from xbt.gallery.journal import Removed
from xbt.gallery.layout import part_of_segment
from xbt.gallery.part import Part
from xbt.gallery.part_view import PartView
from xbt.space import EmbeddingSpace

OLD, NEW = "old", "new"
"""What the first part is called, always, and the second one, unless the user names it."""


class Place(NamedTuple):
    """Where an item is searched."""

    part: Part
    row: int


class Contents:
    """One part, or two: the old one and the new one.

    An item that is in both counts in the new part, and its old row is masked. That follows from the parts
    alone, so a backfilled item is seen to move in the one moment in which its new row is committed.

    Args:
        parts: The old part first.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)

    @property
    def old(self) -> Part:
        """The first part."""
        return self.parts[0]

    @property
    def new(self) -> Part | None:
        """The second part, if there is one."""
        return self.parts[1] if len(self.parts) > 1 else None

    @property
    def fraction_backfilled(self) -> float:
        """Share of the items that are in a part which was begun beside another one."""
        only = self.old if self.old.name != OLD else None  # what was before it is dropped
        begun = self.new if self.new is not None else only
        return 0.0 if begun is None or not begun.count else begun.count / self.count

    @property
    def count(self) -> int:
        """Items that are searched."""
        return sum(part.count for part in self.parts)

    def part(self, name: str) -> Part:
        """A part by name.

        Raises:
            DataError: If there is none of that name.
        """
        for part in self.parts:
            if part.name == name:
                return part
        names = " and ".join(repr(part.name) for part in self.parts)
        raise DataError(f"the gallery has no part {name!r}; it has {names}")

    def part_of(self, space: EmbeddingSpace | None, what: str) -> Part:
        """The part of a space, to which vectors are to be added.

        Raises:
            DataError: If there are two parts and no space is given.
            SpaceMismatchError: If it is the space of no part, or could be that of either.
        """
        if len(self.parts) == 1:
            require_space(self.old, space, what)
            return self.old
        if space is None:
            raise DataError(
                f"the gallery has two parts, {self.old.name!r} and {self.parts[1].name!r}; say with space= "
                f"which space {what} are of"
            )
        same = [part for part in self.parts if part.space is not None and part.space.same_as(space)]
        if same:
            require_space(same[0], space, what)  # warns where it is not sure
            return same[0]
        # A space that nobody knows may be this one, unless it is not sure that it is not another part's.
        unknown = next((part for part in self.parts if part.space is None and part.dim == space.dim), None)
        unsure = [p for p in self.parts if p.space is not None and not p.space.compare(space).verified]
        if unknown is not None and not unsure:
            return unknown
        if unknown is not None:
            raise SpaceMismatchError(
                f"the space of {what} is {space}, which could be that of {unknown.name!r} as well as of "
                f"{unsure[0].name!r}: it has no probe; use a space with one, as encoder.space has"
            )
        known = " and ".join(str(part.space) for part in self.parts)
        raise SpaceMismatchError(
            f"the space of {what} is {space}, but the gallery's parts are of {known}; use the model of one "
            "of them"
        )

    def refresh(self, removals: Callable[[], Iterable[Removed]] = list) -> None:
        """Takes in the rows that the segments have got and what was removed, and masks what is superseded.

        Args:
            removals: Gives the removals since the last time. It is asked after the rows are read: an item
                that was removed and added again is then never there twice.
        """
        for part in self.parts:
            for segment in part.segments:
                segment.reload()
        grown = [(part, part.grow()) for part in self.parts]
        for removed in removals():
            self.remove(removed)
        if self.new is not None:
            moved = [self._superseded(part.ids[row]) for part, rows in grown for row in rows]
            self.old.mask(row for row in moved if row is not None)

    def remove(self, removed: Removed) -> None:
        """Masks rows, given by segment; segments that are not known yet are remembered."""
        for part in self.parts:
            mine = {name: rows for name, rows in removed.items() if part_of_segment(name) == part.name}
            if mine:
                part.remove(mine)

    def find(self, item: str) -> Place | None:
        """Where an item is searched; ``None`` if the gallery does not have it."""
        for part in reversed(self.parts):
            row = part.row(item)
            if row is not None:
                return Place(part, row)
        return None

    def rows_of(self, ids: Sequence[str]) -> dict[str, list[int]]:
        """By segment, every row that items have, superseded ones too.

        Raises:
            DataError: If an item is not in the gallery.
        """
        found: dict[str, list[int]] = {}
        for part in self.parts:
            rows = [row for row in map(part.row, ids) if row is not None]
            found.update(part.places(rows))
        for item in ids:
            if self.find(item) is None:
                raise DataError(f"the id {item!r} is not in the gallery; check the id, or reload the gallery")
        return found

    def refuse_known(self, ids: Sequence[str]) -> None:
        """Refuses ids that are in the gallery already.

        Raises:
            DataError: If there is one; the message names it and its part.
        """
        for item in ids:
            place = self.find(item)
            if place is not None:
                raise DataError(
                    f"the id {item!r} is already in the gallery (part {place.part.name!r}); remove it first, "
                    "or give the new item a new id"
                )

    def old_rows(self, ids: Sequence[str]) -> list[int]:
        """Rows of the items to be backfilled, all of which are searched in the old part so far.

        Raises:
            DataError: If one is not in the gallery, or is in the new part already.
        """
        rows = []
        for item in ids:
            place = self.find(item)
            if place is None:
                raise DataError(
                    f"the id {item!r} is not in the gallery, so it cannot be backfilled; add it with add()"
                )
            if place.part is not self.old:
                raise DataError(
                    f"the id {item!r} is in the part {place.part.name!r} already; leave it out, or remove it "
                    "and add it again"
                )
            rows.append(place.row)
        return rows

    def views(self, keep: Any = None) -> tuple[PartView, ...]:
        """What a search needs of every part, as they are now."""
        return tuple(part.view(keep) for part in self.parts)

    def _superseded(self, item: str) -> int | None:
        """The old row of an item that is in both parts."""
        assert self.new is not None
        return self.old.row(item) if self.new.row(item) is not None else None


def require_space(part: Part | PartView, space: EmbeddingSpace | None, what: str) -> None:
    """Refuses vectors of another space than a part's.

    Raises:
        SpaceMismatchError: If the spaces differ, or where the part's is not known, their dimensions.
    """
    if space is not None and part.space is not None:
        part.space.require(space, what)
    elif space is not None and space.dim != part.dim:
        raise SpaceMismatchError(
            f"{what} belongs to the space of {space}, but the gallery has dimension {part.dim}; "
            "use the model that made the gallery or project into its space"
        )
