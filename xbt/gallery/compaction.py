"""Writing a gallery anew without the rows that nobody finds any more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from xbt.gallery.contents import Contents
from xbt.gallery.home import Home
from xbt.gallery.layout import PartRecord, SegmentRecord, segment_name
from xbt.gallery.memory_segment import MemorySegment
from xbt.gallery.part import Part
from xbt.gallery.segments import StoredSegment

SHARD_ROWS = 65_536
"""Rows of the shards that are written."""
MANY_SHARDS = 16
"""Shards from which on a part is written anew even where none of its rows is masked."""


def compact(home: Home, contents: Contents) -> bool:
    """Writes the rows that count into new segments, large shard by large shard, and makes them the gallery's.

    A store elsewhere is not written anew: it stays a segment as long as one of its rows counts, and what was
    removed of it goes into the new journal. An old part that is wholly backfilled is dropped. The gallery's
    old files are removed once no reader has them open. A kill leaves the gallery as it was, or compacted.

    Args:
        home: The directory, locked by the caller.
        contents: What is in it, up to date.

    Returns:
        Whether there was anything to do.

    Raises:
        StoreError: If the disk is full; the gallery is as it was then.
    """
    home.sweep()
    if not (_is_spent(contents) or any(_wants_it(part, about) for part, about in _both(home, contents))):
        return False
    made, parts = home.record.segments_made, []
    removed: dict[str, list[int]] = {}
    for part, about in _both(home, contents):
        if part is contents.old and _is_spent(contents):
            continue
        kept = tuple(each for each in _elsewhere(part, about) if _live(part, each.name).any())
        for each in kept:
            removed[each.name] = np.flatnonzero(part.removed[_span(part, each.name)]).tolist()
        rows = np.concatenate([np.zeros(0, np.int64), *(_live_rows(part, name) for name in _own(about))])
        if len(rows):
            name = segment_name(part.name, made)
            made += 1
            _write(home, about, name, part, rows)
            kept += (SegmentRecord(name),)
        parts.append(replace(about, segments=kept))
    generation = home.record.generation + 1
    record = replace(home.record, parts=tuple(parts), generation=generation, segments_made=made)
    home.commit_generation(record, removed)
    return True


def _is_spent(contents: Contents) -> bool:
    """Whether the old part has no items left, and the new part can take its place."""
    return contents.new is not None and contents.new.count > 0 and contents.old.count == 0


def _both(home: Home, contents: Contents) -> Iterator[tuple[Part, PartRecord]]:
    return zip(contents.parts, home.record.parts, strict=True)


def _wants_it(part: Part, about: PartRecord) -> bool:
    own = _own(about)
    masked = any(not _live(part, name).all() for name in own)
    outside = any(not _live(part, each.name).any() for each in _elsewhere(part, about))
    stores = [each.store for each in part.segments if isinstance(each, StoredSegment) and each.writable]
    shards = sum(len(store.shards) for store in stores)
    return masked or outside or len(own) > 1 or shards >= MANY_SHARDS


def _own(about: PartRecord) -> list[str]:
    return [each.name for each in about.segments if each.elsewhere is None]


def _elsewhere(part: Part, about: PartRecord) -> list[SegmentRecord]:
    return [each for each in about.segments if each.elsewhere is not None]


def _span(part: Part, name: str) -> slice:
    """The rows of a segment."""
    start = 0
    for segment in part.segments:
        if segment.name == name:
            return slice(start, start + len(segment))
        start += len(segment)
    raise AssertionError(name)


def _live(part: Part, name: str) -> NDArray[np.bool_]:
    live: NDArray[np.bool_] = ~part.masked[_span(part, name)]
    return live


def _live_rows(part: Part, name: str) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = np.flatnonzero(_live(part, name)) + _span(part, name).start
    return rows


def _write(home: Home, about: PartRecord, name: str, part: Part, rows: NDArray[np.int64]) -> None:
    store = home.make_store(about, name)
    for start in range(0, len(rows), SHARD_ROWS):
        some = rows[start : start + SHARD_ROWS]
        store.append(part.vectors(some), [part.ids[row] for row in some], part.metadata(some))


def compact_memory(contents: Contents) -> Contents:
    """The same items without rows that are masked, for a gallery that is not on disk."""
    parts = []
    for part in contents.parts:
        if part is contents.old and _is_spent(contents):
            continue
        rows = np.flatnonzero(~part.masked)
        fresh = Part(part.name, part.space, part.dim, part.plan)
        fresh.segments.append(MemorySegment(segment_name(part.name, 0), part.dim))
        if len(rows):
            ids = [part.ids[row] for row in rows]
            fresh.segments[0].append(part.vectors(rows), ids, part.metadata(rows))
        parts.append(fresh)
    compacted = Contents(parts)
    compacted.refresh()
    return compacted
