"""Work on a whole gallery: creation, compaction, removal of a part, and verification."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xbt.errors import DataError, StoreError
from xbt.files import checksum, make_directory, sync_directory
from xbt.index.faiss_index import IndexPlan
from xbt.index.parts import OLD, Part, Parts
from xbt.index.segments import (
    DAMAGED,
    Change,
    FileSegment,
    MemorySegment,
    PartRecord,
    Segment,
    journal_mode,
    prepare_database,
    translated,
)
from xbt.index.storage import DATABASE, FILE_ROWS, SEGMENTS, NewSegment, Storage, describe_digest, insert_part
from xbt.index.store_segment import StoreRecord, StoreSegment, require_usable
from xbt.space import EmbeddingSpace
from xbt.store.layout import Header, store_path
from xbt.store.lock import WriterLock
from xbt.store.store import EmbeddingStore

MANY_FILES = 16
"""Number of files from which a part is rewritten even if no row is masked."""
_ROWS_AT_ONCE = 65_536


def create_gallery(
    path: str | Path,
    space: EmbeddingSpace | None,
    store: EmbeddingStore | str | Path | None,
    modality: str | None,
    plan: IndexPlan,
    dtype: str,
) -> tuple[Path, EmbeddingSpace | None]:
    """Make the files of a gallery of one part; return the directory, and the space of the part.

    Arguments and errors are those of :meth:`Gallery.create <xbt.index.Gallery.create>`. A kill leaves the
    whole gallery or none.
    """
    if store is None and space is None:
        raise DataError(
            f"the gallery {path} needs a space; give space=encoder.space, or a store that has one"
        )
    if isinstance(store, EmbeddingStore) and space is not None and store.space is not None:
        space.require(store.space, f"the vectors of {store.path}")
    if store is not None:
        store = store if isinstance(store, EmbeddingStore) else EmbeddingStore.open(store, modality, space)
        space, modality = store.space, store.modality
    dim = store.dim if store is not None else space.dim if space is not None else 0
    plan.check(dim)
    Header(modality or "image", space, dtype, dim)  # refuses other modalities and dtypes
    part = PartRecord(OLD, space, dim, modality or "image", dtype)
    directory = store_path(path)
    _refuse_files(directory)
    if store is not None:
        require_usable(store)
    make_directory(directory)
    settings = {"identity": secrets.token_hex(16), "generation": "0"}
    settings |= {"index": plan.factory, "tuning": plan.tuning}
    with WriterLock(directory), translated(directory / DATABASE):
        _refuse_files(directory)  # another process may have made one meanwhile
        make_directory(directory / SEGMENTS)
        partial = directory / f".{DATABASE}.partial"
        for leftover in directory.glob(f"{partial.name}*"):
            leftover.unlink()
        db = sqlite3.connect(partial, isolation_level=None)
        try:
            prepare_database(db, journal_mode(directory, warn=True))
            db.execute("BEGIN")
            db.executemany("INSERT INTO setting VALUES (?, ?)", settings.items())
            number = insert_part(db, part)
            if store is not None:
                record = StoreRecord.of(store, len(store), directory)
                values = (number, len(store), "", "", record.to_json())
                columns = "(part, count, sha256, described, store)"
                db.execute(f"INSERT INTO segment {columns} VALUES (?, ?, ?, ?, ?)", values)
            db.execute("COMMIT")
        finally:
            db.close()
        partial.replace(directory / DATABASE)
        sync_directory(directory)
    return directory, space


def _refuse_files(directory: Path) -> None:
    """Refuse a directory with anything but leftovers of a killed attempt."""
    try:
        names = [path.name for path in directory.glob("[!.]*")] if directory.exists() else []
        unexpected = [name for name in sorted(names) if name != SEGMENTS or any((directory / name).iterdir())]
    except OSError as error:
        raise StoreError(
            f"{directory} cannot be read ({error.strerror}); choose another directory"
        ) from error
    if unexpected:
        raise StoreError(
            f"{directory} already holds {unexpected[0]}; open that gallery, or choose another directory"
        )


def compact(parts: Parts, storage: Storage | None) -> Parts | None:
    """Rewrite the searched rows of a gallery as new segments.

    A store elsewhere is not written again: it stays a segment as long as one of its rows is searched, and the
    log keeps its masked rows. An old part that is wholly backfilled is dropped. A kill leaves the gallery as
    it was, or compacted.

    Returns:
        In memory the new parts; on disk the parts as they were, to be read again. ``None`` if there was
        nothing to do.
    """
    spent = len(parts) > 1 and parts.newest.count > 0 and parts.old.count == 0
    if not (spent or any(_needs_it(part) for part in parts)):
        return None
    left = [part for part in parts if not (spent and part is parts.old)]
    if storage is None:
        return _in_memory(parts, left)
    new: list[NewSegment] = []
    gone = [segment.number for segment in parts.old.segments] if spent else []
    changes: list[Change] = []
    for part in left:
        again = _needs_it(part)
        kept = [segment for segment in part.segments if not _is_written_again(part, segment, again)]
        gone += [segment.number for segment in part.segments if segment not in kept]
        changes += [change for segment in kept for change in _changes(part, segment)]
        rows = [_live_rows(part, segment) for segment in part.segments if again and segment.own]
        new += _new_segments(part, np.concatenate([np.zeros(0, np.int64), *rows]))
    storage.rewrite([parts.old.record.number] if spent else [], gone, new, changes)
    if spent:
        storage.cache(parts.old.record, parts.plan).remove()
    return parts


def drop_part(parts: Parts, name: str, storage: Storage | None) -> Parts:
    """Remove a part. Items moved to it are searched in the other part again. See :func:`compact`."""
    part = parts.part(name)
    others = [another for another in parts if another is not part]
    if not others:
        raise DataError(f"the part {name!r} is the gallery's only one; remove the gallery instead")
    (other,) = others
    alone = set(part.with_vector()) - set(other.with_vector())
    if alone:
        raise DataError(
            f"{len(alone)} items, such as {min(alone)!r}, have a vector in the part {name!r} alone; remove "
            f"them first, or give them vectors in the part {other.name!r}"
        )
    if storage is None:
        other.unmask_moved()
        result = Parts(parts.plan)
        result.add(other)
        return result
    changes = [
        change for segment in other.segments for change in _changes(other, segment) if not change.moved
    ]
    storage.rewrite([part.record.number], [segment.number for segment in part.segments], [], changes)
    storage.cache(part.record, parts.plan).remove()
    return parts


def _needs_it(part: Part) -> bool:
    written_here = [segment for segment in part.segments if segment.own]
    few = MANY_FILES + -(-sum(segment.count for segment in written_here) // FILE_ROWS)
    masked = any(len(_live_rows(part, segment)) < segment.count for segment in written_here)
    spent = any(not segment.own and not len(_live_rows(part, segment)) for segment in part.segments)
    return masked or spent or len(written_here) >= few


def _is_written_again(part: Part, segment: Segment, again: bool) -> bool:
    """Check that a segment can go: its live rows are rewritten elsewhere, or it has none."""
    return (segment.own and again) or (not segment.own and not len(_live_rows(part, segment)))


def _live_rows(part: Part, segment: Segment) -> NDArray[np.int64]:
    rows = part.numbers_of(segment)
    live: NDArray[np.int64] = rows[~part.masked[rows]]
    return live


def _changes(part: Part, segment: Segment) -> list[Change]:
    """List the masked rows of a segment that is kept."""
    rows = part.numbers_of(segment)
    removed = part.removed[rows]
    kinds = (removed, False), (part.masked[rows] & ~removed, True)
    return [Change(segment.number, np.flatnonzero(mask), moved) for mask, moved in kinds if mask.any()]


def _new_segments(part: Part, rows: NDArray[np.int64]) -> Iterator[NewSegment]:
    for start in range(0, len(rows), FILE_ROWS):
        some = rows[start : start + FILE_ROWS]
        blocks = (
            part.rows.gather(some[first : first + _ROWS_AT_ONCE])
            for first in range(0, len(some), _ROWS_AT_ONCE)
        )
        yield NewSegment(part.record, [part.ids[row] for row in some], blocks, part.metadata(some))


def _in_memory(parts: Parts, left: list[Part]) -> Parts:
    compacted = Parts(parts.plan)
    for number, part in enumerate(left, start=1):
        rows = np.flatnonzero(~part.masked)
        fresh = part.emptied()
        if len(rows):
            ids = [part.ids[row] for row in rows]
            fresh.grow([MemorySegment(number, part.rows.gather(rows).copy(), part.metadata(rows))], ids)
        compacted.add(fresh)
    return compacted


def faults_of(storage: Storage | None, parts: Parts) -> list[str]:
    """Read every byte of a gallery and list its faults, one sentence each."""
    faults = _items_searched_twice(parts)
    if storage is None:
        return faults
    database = storage.path / DATABASE
    try:
        messages, described = storage.inspect()
    except StoreError as error:
        return [*faults, str(error)]
    faults += [f"{database} is damaged ({text}); {DAMAGED}" for text in messages]
    for part in parts:
        for segment in part.segments:
            if isinstance(segment, StoreSegment):
                faults += segment.faults()
            elif isinstance(segment, FileSegment) and segment.number in described:
                sha256, digest, ids, metadata = described[segment.number]
                faults += _file_faults(segment, sha256)
                if describe_digest(ids, metadata) != digest:
                    faults.append(
                        f"{database} has other ids or metadata of {segment.path.name} than were written; "
                        f"{DAMAGED}"
                    )
        faults += storage.cache(part.record, parts.plan).faults()
    return faults


def _file_faults(segment: FileSegment, sha256: str) -> list[str]:
    path = segment.path
    try:
        if path.is_file() and checksum(path) != sha256:
            return [f"{path} has other bytes than were written; {DAMAGED}"]
        fresh = FileSegment(segment.number, path, *segment.shape)
        for start in range(0, fresh.count, 65_536):
            fresh.read(slice(start, min(start + 65_536, fresh.count)))  # refuses NaN
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror}); {DAMAGED}"]
    except StoreError as error:
        return [str(error)]
    return []


def _items_searched_twice(parts: Parts) -> list[str]:
    """A sentence for each; only altered files make such."""
    seen: set[str] = set()
    twice = []
    for part in parts:
        for row in np.flatnonzero(~part.masked):
            item = part.ids[row]
            if item in seen:
                twice.append(f"the id {item!r} is searched twice, again in row {row} of part {part.name!r}")
            seen.add(item)
    return twice
