"""Integrity check of all files of a gallery."""

from __future__ import annotations

import numpy as np

from xbt.errors import StoreError
from xbt.files import checksum
from xbt.index.parts import Parts
from xbt.index.segments import DAMAGED, FileSegment
from xbt.index.storage import DATABASE, Storage, describe_digest
from xbt.index.store_segment import StoreSegment


def faults_of(storage: Storage | None, parts: Parts) -> list[str]:
    """Read every byte of a gallery and list its faults, one sentence each.

    Args:
        storage: Its files; in memory there are none, and only ids can be wrong.
        parts: Its parts.
    """
    faults = _items_searched_twice(parts)
    if storage is None:
        return faults
    database = storage.path / DATABASE
    try:
        said, described = storage.inspect()
    except StoreError as error:
        return [*faults, str(error)]
    faults += [f"{database} is damaged ({text}); {DAMAGED}" for text in said]
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
            fresh.slice(start, min(start + 65_536, fresh.count))  # refuses NaN
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
