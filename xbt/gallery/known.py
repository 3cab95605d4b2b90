"""What is known of a gallery: its items and its parts."""

from __future__ import annotations

import threading
from pathlib import Path

from xbt.errors import DataError
from xbt.gallery.contents import Contents
from xbt.gallery.home import Home
from xbt.gallery.part import Part
from xbt.gallery.part_view import PartView
from xbt.gallery.result import PartSummary
from xbt.gallery.verifying import faults_of
from xbt.space import EmbeddingSpace


class KnownGallery:
    """See :class:`~xbt.gallery.Gallery`.

    Two locks: ``_writer`` is held for as long as a write takes, ``_state`` only while what is known of the
    gallery changes. A search takes ``_state`` for a moment to get views, which never change.

    Args:
        contents: What is in it; ``None`` reads it from its home.
        home: Its directory; ``None`` in memory.
    """

    def __init__(self, contents: Contents | None, home: Home | None = None) -> None:
        self._writer, self._state = threading.RLock(), threading.RLock()
        self._home, self._contents = home, contents
        self._views: tuple[PartView, ...] | None = None
        self._ids: list[str] | None = None
        if contents is None:
            self.reload()

    @property
    def path(self) -> Path | None:
        """The directory; ``None`` in memory."""
        return None if self._home is None else self._home.path

    @property
    def parts(self) -> tuple[PartSummary, ...]:
        """One part, or two while the gallery is backfilled: the old one first."""
        with self._state:
            return tuple(PartSummary(p.name, p.space, p.dim, p.count) for p in self._known.parts)

    @property
    def space(self) -> EmbeddingSpace | None:
        """The space of the part that can be searched alone: the old one's until all is backfilled."""
        return self._alone().space

    @property
    def dim(self) -> int:
        """Dimension of that part's vectors."""
        return self._alone().dim

    @property
    def ids(self) -> list[str]:
        """Every item once: those that are searched in the old part, then those of the new part."""
        with self._state:
            if self._ids is None:
                self._ids = [item for part in self._known.parts for item in part.live_ids()]
            return self._ids

    def ids_of(self, part: str) -> list[str]:
        """The items that are searched in one part, in its order: of ``"old"``, those yet to be backfilled.

        Raises:
            DataError: If there is no such part.
        """
        with self._state:
            return self._known.part(part).live_ids()

    @property
    def fraction_backfilled(self) -> float:
        """Share of the items that are in the new part: 0 until it is begun, 1 once it is left alone."""
        with self._state:
            return self._known.fraction_backfilled

    def __len__(self) -> int:
        with self._state:
            return self._known.count

    def __contains__(self, item: object) -> bool:
        with self._state:
            return isinstance(item, str) and self._known.find(item) is not None

    def reload(self) -> None:
        """Sees what has been written elsewhere since the gallery was opened; in memory there is nothing.

        Raises:
            StoreError: If the gallery is gone or damaged.
        """
        with self._state:
            if self._home is not None:
                known, self._contents = self._contents, None  # half-grown contents are not to be used
                self._contents = self._home.refresh(known)
            self._views = self._ids = None

    def verify(self) -> list[str]:
        """Reads every byte and compares it with what was written.

        Returns:
            A sentence for each fault, which names the file and says what to do; empty if all is well.
        """
        with self._state:
            return faults_of(self._home, self._known)

    def close(self) -> None:
        """Lets go of the files: a writer elsewhere may then remove what has been compacted."""
        with self._state:
            self._views = self._contents = None
            if self._home is not None:
                self._home.journal.close()

    @property
    def _known(self) -> Contents:
        if self._contents is None:
            if self._home is None or self._home.journal.closed:
                raise DataError(f"the gallery {self.path or 'in memory'} is closed; open it again")
            self.reload()
            assert self._contents is not None
        return self._contents

    def _alone(self) -> Part:
        with self._state:
            known = self._known
            return (
                known.new if known.new is not None and known.new.count and not known.old.count else known.old
            )

    def __repr__(self) -> str:
        parts = [f"{p.count} items, space={'unknown' if p.space is None else p.space}" for p in self.parts]
        where = "" if self.path is None else f"'{self.path}', "
        return f"Gallery({where}{'; '.join(parts)})"
