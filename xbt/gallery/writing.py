"""What can be written to a gallery, by one process and one thread at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xbt.errors import DataError, StoreError
from xbt.gallery.checks import as_ids, as_rows, require_storable
from xbt.gallery.compaction import compact, compact_memory
from xbt.gallery.contents import NEW, OLD, Contents, require_space
from xbt.gallery.home import Home
from xbt.gallery.layout import PartRecord, part_name, segment_name
from xbt.gallery.memory_segment import MemorySegment
from xbt.gallery.part import Part
from xbt.gallery.searching import SearchableGallery
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors


class WritableGallery(SearchableGallery):
    """See :class:`~xbt.gallery.Gallery`."""

    def __init__(self, contents: Contents | None, home: Home | None = None) -> None:
        self._depth = 0
        super().__init__(contents, home)

    def add(
        self, vectors: Vectors, ids: Sequence[str], space: EmbeddingSpace | None = None, metadata: Any = None
    ) -> None:
        """Adds items; on an error the gallery is left as it was. Add many at a time.

        Args:
            vectors: (n, dim) vectors, stored as they are: nothing is normalised.
            ids: n strings, unique and not in the gallery. To replace an item, remove it first.
            space: The space the vectors live in, which says which part they go to; needed if there are two.
            metadata: Columns of n values each beside the ids; a mapping or a ``pyarrow.Table``.

        Raises:
            DataError: If there are no vectors, a value is NaN, a vector is too short for float16, or ids are
                repeated or there already.
            SpaceMismatchError: If the space or the dimension is not the gallery's.
            StoreError: If another process is writing, the disk is full, or metadata cannot be stored.
        """
        with self._state:
            dim = self._known.part_of(space, "the vectors to add").dim
        rows, names = as_rows(vectors, "vectors to add", dim), as_ids(ids, "ids", len(vectors))
        with self.writing():
            part = self._known.part_of(space, "the vectors to add")
            self._known.refuse_known(names)
            self._append(part, rows, names, metadata)

    def remove(self, ids: Sequence[str]) -> None:
        """Removes items from every part; :meth:`compact` frees their room.

        Args:
            ids: Of items of the gallery; either all are removed or none.

        Raises:
            DataError: If one is not in the gallery, or is given twice.
            StoreError: If another process is writing, or the disk is full.
        """
        names = as_ids(ids, "ids")
        with self.writing():
            rows = self._known.rows_of(names)
            if not rows:
                return
            if self._home is not None:
                self._home.journal.append(rows)
            with self._state:
                self._known.remove(rows)
                self._views = self._ids = None

    def begin_part(
        self,
        space: EmbeddingSpace,
        name: str | None = None,
        dtype: str | None = None,
        modality: str | None = None,
    ) -> None:
        """Opens a second part, for the vectors of the new model: the backfill may begin.

        Args:
            space: The new space.
            name: What the part is called; left out, ``"new"``, and after that ``"new2"``, ``"new3"`` …
            dtype: ``"float16"`` or ``"float32"``, on disk; that of the old part unless given.
            modality: ``"image"`` or ``"text"``; that of the old part unless given.

        Raises:
            DataError: If there are two parts already, or one of that name, or the space is the old one.
            ConfigError: If the gallery's index cannot be made for the new dimension.
            StoreError: If another process is writing, or the disk is full.
        """
        if name is not None:
            part_name(name)
        with self.writing():
            known, old = self._known, self._known.old
            name = _name_after(old.name) if name is None else name
            if known.new is not None:
                raise DataError(
                    f"the gallery has two parts already, {old.name!r} and {known.new.name!r}; backfill all "
                    "items and call compact() before you begin another part"
                )
            if name == old.name:
                raise DataError(f"the gallery has a part {name!r} already; give another name=")
            if name == OLD:  # by which a reader tells what was never backfilled
                raise DataError(
                    f"{OLD!r} is what a gallery's first part is called; give another name= for a later one"
                )
            if old.space is not None and old.dim == space.dim and old.space.same_as(space):
                raise DataError(f"the gallery is of the space {space} already; add the vectors with add()")
            old.plan.check(space.dim)
            with self._state:
                if self._home is None:
                    known.parts.append(Part(name, space, space.dim, old.plan))
                else:
                    about = self._home.record.parts[0]
                    kind = modality or about.modality, dtype or about.dtype
                    self._home.add_part(PartRecord(name, space, space.dim, *kind), known)
                self._views = self._ids = None

    def backfill(
        self, vectors: Vectors, ids: Sequence[str], space: EmbeddingSpace | None = None, metadata: Any = None
    ) -> None:
        """Gives items of the old part vectors of the new space; from now on they are searched there.

        Args:
            vectors: (n, new_dim) vectors of the new model.
            ids: n items that are searched in the old part.
            space: The space of the vectors, to be checked.
            metadata: Columns beside the ids; left out, what is known of the items stays with them.

        Raises:
            DataError: If there is no second part, or an item is not in the old part.
            SpaceMismatchError: If the space or the dimension is not the new part's.
            StoreError: If another process is writing, or the disk is full.
        """
        with self.writing():
            new, old = self._known.new, self._known.old
            if new is None:
                raise DataError("the gallery has no new part to backfill; call begin_part(space) first")
            require_space(new, space, "the vectors to backfill")
            rows, names = as_rows(vectors, "vectors to backfill", new.dim), as_ids(ids, "ids", len(vectors))
            moved = self._known.old_rows(names)
            self._append(new, rows, names, old.metadata(moved) if metadata is None else metadata)

    def compact(self) -> None:
        """Writes the gallery anew without removed and superseded rows, in few large files.

        An old part of which every item is backfilled is dropped; :meth:`search_mixed` asks the new queries
        alone from then on, and another part may begin. Readers that are open go on with the files
        they have, which are removed when the last of them has called :meth:`reload` or ended and a writer
        compacts again. A kill leaves the gallery as it was, or compacted.

        Raises:
            StoreError: If another process is writing, or the disk is full; the gallery is as it was then.
        """
        # What is half written is swept away, and an index that another thread writes is not to be.
        with self.writing(), self._indexing:
            if self._home is None:
                with self._state:
                    self._contents = compact_memory(self._known)
                    self._views = self._ids = None
            elif compact(self._home, self._known):
                with self._state:
                    self._contents, self._views = None, None
                    self.reload()
                self._home.sweep()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps the right to write over many writes; every write takes it by itself otherwise.

        Raises:
            StoreError: If another process is writing (the message names it), or the gallery was opened to be
                read only.

        Example:
            >>> with gallery.writing():
            ...     for vectors, ids in batches:
            ...         gallery.backfill(vectors, ids)
        """
        home = self._home
        if home is not None and home.read_only:
            raise StoreError(f"{home.path} was opened to be read only; open it without read_only to write")
        with self._writer:
            if home is not None and self._depth == 0:
                home.lock.acquire()
            self._depth += 1
            try:
                if home is not None and self._depth == 1:
                    self.reload()  # another writer may have been here since
                yield
            finally:
                self._depth -= 1
                if home is not None and self._depth == 0:
                    home.lock.release()

    def _append(self, part: Part, rows: NDArray[np.float32], ids: list[str], metadata: Any) -> None:
        """Commits rows to a part's last segment, or to a new one if that has had one of the ids before."""
        if self._home is not None:
            about = next(each for each in self._home.record.parts if each.name == part.name)
            require_storable(rows, ids, about.dtype)
        columns = part.checked_columns(ids, metadata)
        if not part.takes(ids):
            with self._state:
                if self._home is None:
                    part.segments.append(MemorySegment(segment_name(part.name, len(part.segments)), part.dim))
                else:
                    self._home.add_segment(part)
        part.segments[-1].append(rows, ids, columns)
        with self._state:
            self._known.refresh()
            self._views = self._ids = None


def _name_after(name: str) -> str:
    """What the part after one is called: ``new``, ``new2``, ``new3`` …, which never comes back."""
    found = re.fullmatch(rf"{NEW}(\d*)", name)
    return NEW if found is None else f"{NEW}{int(found[1] or 1) + 1}"
