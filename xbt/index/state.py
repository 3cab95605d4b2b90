"""State of a gallery: its parts in memory, kept equal to its files, and the views that searches use."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xbt.errors import DataError, StoreError
from xbt.index.faiss_index import IndexManager, IndexPlan
from xbt.index.parts import NEXT, Part, Parts
from xbt.index.segments import Change, MemorySegment, PartRecord
from xbt.index.storage import Mark, News, NewSegment, Storage
from xbt.index.views import PartView


class State:
    """Parts of a gallery and their views.

    A write holds the lock of the writer throughout, and :attr:`lock` only while the parts change. A search
    takes immutable views and holds neither. An index is made by the thread that finds that one is due, under
    :attr:`indexing`; others search without it meanwhile. ``storage`` is ``None`` in memory.
    """

    def __init__(self, plan: IndexPlan, storage: Storage | None) -> None:
        self.storage = storage
        self._parts = Parts(plan, self.path)
        self._mark: Mark | None = None
        self._closed = False
        self._ids: list[str] | None = None
        self._views: tuple[PartView, ...] | None = None
        self._new_locks()
        _OPEN.add(self)

    @property
    def path(self) -> Path | None:
        """Directory of the gallery; ``None`` in memory."""
        return None if self.storage is None else self.storage.path

    @property
    def plan(self) -> IndexPlan:
        """Kind of index."""
        return self._parts.plan

    # -- parts -----------------------------------------------------------------------------------------

    @property
    def parts(self) -> Parts:
        """Parts as this process knows them. The caller holds one of the locks."""
        if self._closed:
            raise DataError(f"the gallery {self.path or 'in memory'} is closed; open it again")
        if self.storage is not None and self._mark is None:
            self.reload()
        return self._parts

    @contextmanager
    def reading(self) -> Iterator[Parts]:
        """Yield the parts, which do not change meanwhile."""
        with self.lock:
            yield self.parts

    def ids(self) -> list[str]:
        """List every item once: those searched in the old part, then those in the new part."""
        with self.reading() as parts:
            if self._ids is None:
                self._ids = [item for part in parts for item in part.live_ids()]
            return self._ids

    @contextmanager
    def writing(self) -> Iterator[Parts]:
        """Hold the lock of the writer and yield the latest parts."""
        with self._writer:
            storage = self.storage
            if storage is None or storage.writing:
                yield self.parts
                return
            storage.begin_writing()
            try:
                self.reload()  # another process may have written since
                yield self._parts
            finally:
                storage.end_writing()

    def reload(self) -> None:
        """Load the writes of other processes; do nothing in memory."""
        if self.storage is None:
            return
        with self.lock:
            self._closed = False
            mark, self._mark = self._mark, None  # never use partly updated parts
            self._take(self.storage.read(mark))

    def close(self) -> None:
        """Release the vectors in memory and the mapped files."""
        with self.lock:
            self._parts, self._mark, self._closed = Parts(self.plan, self.path), None, True
            self._views = self._ids = None

    # -- writes ----------------------------------------------------------------------------------------

    def add_part(self, record: PartRecord) -> Part:
        """Add a part, whose own space needs no further comparison."""
        if self.storage is not None:
            self.storage.add_part(record)
            self.reload()
        else:
            with self.lock:
                self._parts.add(self._made_part(record))
                self._views = self._ids = None
        self._parts.newest.trust(record.space)
        return self._parts.newest

    def append(
        self,
        part: Part,
        rows: NDArray[np.float32],
        ids: list[str],
        metadata: Any,
        changes: Sequence[Change] = (),
    ) -> None:
        """Commit rows as a new segment of a part, with changes of other segments."""
        columns = None if metadata is None else part.checked_columns(ids, metadata)
        if self.storage is not None:
            if part.space is None:
                raise StoreError(
                    f"the part {part.name!r} of {self.path} is read-only, since the space of its vectors is "
                    "unknown; make the gallery with space="
                )
            self._commit(NewSegment(part.record, ids, (rows,), columns), changes)
            return
        with self.lock:
            numbers = [segment.number for each in self._parts for segment in each.segments]
            number = 1 + max(numbers, default=0)
            part.grow([MemorySegment(number, rows.copy(), columns)], ids)
            self._mask([replace(c, segment=number) if c.segment == NEXT else c for c in changes])

    def change(self, changes: Sequence[Change]) -> None:
        """Commit changes of segments."""
        if self.storage is None:
            self._mask(changes)
        elif changes:
            self._commit(None, changes)

    def swap(self, parts: Parts | None) -> None:
        """Use rewritten parts, unless there was nothing to rewrite, and remove the files of the old ones."""
        if self.storage is not None:
            if parts is not None:
                self.reload()
            self.storage.sweep()
        elif parts is not None:
            with self.lock:
                self._parts, self._views, self._ids = parts, None, None

    def _commit(self, new: NewSegment | None, changes: Sequence[Change]) -> None:
        with self.lock:
            _ = self.parts  # up to date, also if another thread's reload has failed
            mark = self._mark
        assert self.storage is not None
        assert mark is not None
        news = self.storage.append(mark, new, changes)
        with self.lock:
            if self._mark is not mark:  # another thread has read the updates already
                self.reload()
            else:
                self._mark = None
                self._take(news)

    def _take(self, news: News) -> None:
        """Apply updates to the parts. The caller holds the lock."""
        if news.plan is not None:
            self._parts = Parts(news.plan, self.path)
        for record in news.parts[len(self._parts) :] if news.parts else ():
            self._parts.add(self._made_part(record))
        if news.segments:
            self._parts.grow(news.segments)
        if news.changes:
            self._parts.mask(news.changes)
        self._mark, self._views, self._ids = news.mark, None, None

    def _mask(self, changes: Sequence[Change]) -> None:
        with self.lock:
            if changes:
                self._parts.mask(changes)
            self._views = self._ids = None

    def _made_part(self, record: PartRecord) -> Part:
        storage, plan = self.storage, self.plan

        def manager() -> IndexManager:
            return IndexManager(record.dim, plan, None if storage is None else storage.cache(record, plan))

        return Part(record, manager)

    # -- views -----------------------------------------------------------------------------------------

    def views(self, wait: bool = False) -> tuple[PartView, ...]:
        """Build views of all parts, and any due index unless another thread is making it."""
        views = self._current_views()
        if any(view.due for view in views) and self.indexing.acquire(blocking=wait):
            try:
                self._make_indexes()
            finally:
                self.indexing.release()
            views = self._current_views()
        return views

    def view(self, part: str | None) -> PartView:
        """Build a view of the named part, or of the only part with items."""
        views = self.views()
        if part is not None:
            name = self.parts.part(part).name
            return next(view for view in views if view.name == name)
        filled = [view for view in views if view.count] or [views[0]]
        if len(filled) > 1:
            raise DataError(
                f"the gallery is being backfilled: {views[0].count} items are in the part {views[0].name!r} "
                f"and {views[1].count} in {views[1].name!r}; use search_mixed(), or name one with part="
            )
        return filled[0]

    def views_of(self, using: str, without: str | None) -> list[PartView]:
        """Build views of all vectors of a part, except items with a vector in ``without``."""
        self.views()
        with self.reading() as parts:
            views = self._current_views()
            part, other = parts.part(using), None if without is None else parts.part(without)
            view = views[[each.name for each in views].index(part.name)]
            if other is None:
                return [view] if part is parts.newest else [view, *part.moved_views()]
            return [view.without(set(other.with_vector())) if other is not parts.newest else view]

    def _make_indexes(self) -> None:
        with self.reading() as parts:
            due = [(part, view) for part, view in zip(parts, self._current_views(), strict=True) if view.due]
        for part, view in due:
            index = part.made_index(view)
            with self.lock:
                if self.parts is parts:  # and was not compacted in between
                    part.adopt(index)
                    self._views = None

    def _current_views(self) -> tuple[PartView, ...]:
        views = self._views
        if views is None:
            with self.reading() as parts:
                if self._views is None:
                    self._views = tuple(part.view() for part in parts)
                views = self._views
        return views

    # -- processes -------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        if self.storage is not None:
            return _reopened, (self.storage.path, *self.storage.options)
        with self.reading() as parts:
            live = [(part, np.flatnonzero(~part.masked)) for part in parts]
            contents = [
                (part.record, [part.ids[row] for row in rows], part.rows.gather(rows), part.metadata(rows))
                for part, rows in live
            ]
            return _rebuilt, (self.plan, contents)

    def _new_locks(self) -> None:
        self._writer, self.lock, self.indexing = threading.RLock(), threading.RLock(), threading.Lock()

    def after_fork(self) -> None:
        """Replace the locks in a forked child, since other threads of the parent may have held them."""
        if self.storage is not None and not self.lock.acquire(blocking=False):
            self._mark = None  # that thread was changing the parts, so read them again
        self._new_locks()
        self._views = None


def _reopened(*options: Any) -> State:
    state = State(IndexPlan(), Storage(*options))
    state.reload()
    return state


def _rebuilt(plan: IndexPlan, contents: Sequence[tuple[Any, ...]]) -> State:
    state = State(plan, None)
    for record, ids, rows, columns in contents:
        part = state.add_part(record)
        if ids:
            state.append(part, rows, ids, columns)
    return state


_OPEN: weakref.WeakSet[State] = weakref.WeakSet()


def _after_fork() -> None:
    for state in list(_OPEN):
        state.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
