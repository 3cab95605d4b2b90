"""Stores that a gallery reads where they are: what they were when it was made, and where they are now."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path

from xbt.errors import StoreError
from xbt.gallery.layout import GalleryRecord, PartRecord, SegmentRecord
from xbt.store import EmbeddingStore, FileRecord, ShardRecord

_IDS_AT_ONCE = 65_536


def digest(store: EmbeddingStore, rows: int) -> str:
    """What the first rows of a store are; appending to it changes nothing.

    A store of ours knows the checksums of its files. Of a folder that clip-retrieval wrote, the files' sizes
    and the ids are taken: vectors that are replaced by as many others under the same ids are not noticed.

    Args:
        store: The store.
        rows: How many rows, which end with a shard.

    Returns:
        A SHA-256, hexadecimal, which that of other rows differs from.
    """
    ends = accumulate(shard.count for shard in store.shards)
    covered = [shard for shard, end in zip(store.shards, ends, strict=True) if end <= rows]
    counted = sum(shard.count for shard in covered)
    plain = [shard.to_dict(with_extra=False) for shard in covered]
    what = hashlib.sha256(json.dumps([rows - counted, *plain], sort_keys=True).encode("ascii"))
    if any(not file.sha256 for shard in covered for file in shard.files.values()):
        for start in range(0, counted, _IDS_AT_ONCE):
            ids = store.read_ids(start, min(start + _IDS_AT_ONCE, counted))
            what.update(json.dumps(ids).encode("ascii"))
    return what.hexdigest()


def begins_with(shards: Iterable[ShardRecord], known: Iterable[ShardRecord]) -> bool:
    """Whether a store has the shards that were known, and perhaps more after them."""
    before = [_files_of(shard) for shard in known]
    return [_files_of(shard) for shard in islice(shards, len(before))] == before


def _files_of(shard: ShardRecord) -> tuple[str, int, dict[str, FileRecord]]:
    return shard.name, shard.count, dict(shard.files)


def record_of(store: EmbeddingStore, rows: int, name: str, gallery: Path) -> SegmentRecord:
    """The record of a segment that is a store elsewhere.

    Args:
        store: The store.
        rows: How many of its rows count.
        name: The segment's name.
        gallery: The gallery's directory.
    """
    path, home = store.path.resolve(), gallery.resolve()
    nearby = Path(os.path.relpath(path, home)).as_posix() if path.is_relative_to(home.parent) else None
    return SegmentRecord(name, str(path), rows, nearby, digest(store, rows))


def find_store(record: SegmentRecord, gallery: Path, moved: Mapping[str, Path]) -> Path:
    """Where a store elsewhere is now: where the user says, beside the gallery, or where it was.

    Args:
        record: The segment.
        gallery: The gallery's directory.
        moved: New paths by those that are on record.

    Raises:
        StoreError: If it is in none of these places.
    """
    assert record.elsewhere is not None
    if record.elsewhere in moved:
        return moved[record.elsewhere]
    nearby = [] if record.nearby is None else [Path(os.path.normpath(gallery.resolve() / record.nearby))]
    for path in (*nearby, Path(record.elsewhere)):
        if path.is_dir():
            return path
    raise StoreError(
        f"there is no store at {record.elsewhere}, of which the gallery at {gallery} was made; put it back, "
        f"or say where it is now: Gallery.open(path, stores={{{record.elsewhere!r}: 'its new path'}})"
    )


def moved_stores(
    record: GalleryRecord, gallery: Path, stores: Mapping[str, str | Path] | None
) -> dict[str, Path]:
    """What a user says of stores that have been moved, checked.

    Raises:
        StoreError: If the gallery was not made of such a store.
    """
    known = [s.elsewhere for part in record.parts for s in part.segments if s.elsewhere is not None]
    for path in stores or ():
        if str(path) not in known:
            raise StoreError(
                f"stores= names {str(path)!r}, but the gallery at {gallery} was made of no such store; it "
                f"was made of {', '.join(known) or 'none'}"
            )
    return {str(was): Path(now).expanduser() for was, now in (stores or {}).items()}


def located(part: PartRecord, gallery: Path, moved: Mapping[str, Path]) -> PartRecord:
    """A part's record with the places in which its stores were found, and with what they are.

    Of a store that is gone it says what it said.

    Raises:
        StoreError: If a store is damaged.
    """

    def renewed(segment: SegmentRecord) -> SegmentRecord:
        if segment.elsewhere is None:
            return segment
        try:
            path = find_store(segment, gallery, moved)
        except StoreError:
            return segment
        if segment.digest is not None and str(path.resolve()) == segment.elsewhere:
            return segment
        store = EmbeddingStore.open(path, part.modality, part.space)
        rows = len(store) if segment.rows is None else segment.rows
        found = record_of(store, rows, segment.name, gallery)
        return replace(found, rows=segment.rows, digest=segment.digest or found.digest)

    return replace(part, segments=tuple(map(renewed, part.segments)))
