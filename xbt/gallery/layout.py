"""Where things stand in a gallery's directory, and the record that vouches for them.

    gallery.json                what the gallery is: its index, its parts and their segments
    segments/<name>/            an EmbeddingStore; a segment may also be a store elsewhere, which is only read
    removals-<generation>.log   what was removed; see xbt.gallery.journal
    index/                      approximate indexes, a cache; see xbt.gallery.index_cache

A *part* is the items of one space; its rows are those of its *segments*, one after the other. Only the last
segment grows. Compacting makes new segments and a new journal: the next *generation*.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from xbt.errors import StoreError
from xbt.gallery.index_plan import IndexPlan
from xbt.space import EmbeddingSpace
from xbt.store.files import write_record
from xbt.store.layout import Header, read_record

RECORD, SEGMENTS = "gallery.json", "segments"
FORMAT, VERSION = "xbt-gallery", 3
READABLE = (2, VERSION)
"""Versions that are read; version 2 had no identity, and did not say what a store elsewhere was."""
_MEND = "copy it again or build the gallery anew"


@dataclass(frozen=True)
class SegmentRecord:
    """One store of a part.

    Attributes:
        name: Its name, never used twice within a gallery.
        elsewhere: Path of a store that is not the gallery's own, and is only read.
        rows: How many of its rows count, where it is elsewhere; ``None`` for all.
        nearby: Its path from the gallery's directory, where it lies beside the gallery: both may be moved.
        digest: What those rows were; see :mod:`xbt.gallery.elsewhere`. ``None`` if that was never noted.
    """

    name: str
    elsewhere: str | None = None
    rows: int | None = None
    nearby: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class PartRecord:
    """The items of one space.

    Attributes:
        name: Such as ``"old"`` or ``"new"``.
        space: The space of the vectors; ``None`` where nobody knows it.
        dim: Dimension of the vectors.
        modality: ``"image"`` or ``"text"``.
        dtype: Of the gallery's own segments on disk.
        segments: Its stores in order.
    """

    name: str
    space: EmbeddingSpace | None
    dim: int
    modality: str
    dtype: str
    segments: tuple[SegmentRecord, ...] = ()

    def __post_init__(self) -> None:
        """Refuses what no store could be made of."""
        Header(self.modality, self.space, self.dtype, self.dim)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        space = None if self.space is None else self.space.to_dict()
        return {**vars(self), "space": space, "segments": [vars(segment) for segment in self.segments]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote."""
        space = None if data["space"] is None else EmbeddingSpace.from_dict(data["space"])
        segments = tuple(SegmentRecord(**segment) for segment in data["segments"])
        return cls(**{**data, "space": space, "segments": segments})


@dataclass(frozen=True)
class GalleryRecord:
    """All that a gallery is, but for its rows.

    Attributes:
        plan: Its index.
        parts: One, or two while it is backfilled: the old one first.
        generation: How often it has been compacted.
        segments_made: How many segments there have ever been; the next one is named after it.
        identity: Drawn when it was made: another gallery under the same path has another one. It is empty
            until the first change of the record, if the gallery is of version 2.
        removals: Bytes that the generation's journal had, at least, when the record was written.
    """

    plan: IndexPlan
    parts: tuple[PartRecord, ...]
    generation: int = 0
    segments_made: int = 0
    identity: str = ""
    removals: int = 0

    @property
    def journal(self) -> str:
        """Name of the generation's journal."""
        return f"removals-{self.generation:06d}.log"

    def with_segment(self, part: str) -> tuple[GalleryRecord, SegmentRecord]:
        """The record with one more segment of a part, and that segment."""
        segment = SegmentRecord(segment_name(part, self.segments_made))
        parts = tuple(
            replace(each, segments=(*each.segments, segment)) if each.name == part else each
            for each in self.parts
        )
        return replace(self, parts=parts, segments_made=self.segments_made + 1), segment

    def own_segments(self) -> Iterator[str]:
        """Names of the segments that are in the gallery's directory."""
        return (s.name for part in self.parts for s in part.segments if s.elsewhere is None)

    def write(self, directory: Path) -> None:
        """Makes this the gallery's record, whole or not at all.

        Raises:
            StoreError: If the disk is full or may not be written to.
        """
        plain = {
            "format": FORMAT,
            "version": VERSION,
            "index": self.plan.factory,
            "tuning": self.plan.tuning,
            "generation": self.generation,
            "segments_made": self.segments_made,
            "identity": self.identity,
            "removals": self.removals,
            "parts": [part.to_dict() for part in self.parts],
        }
        write_record(directory / RECORD, {**plain, "checksum": _checksum(plain)})

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads a gallery's record.

        Raises:
            StoreError: If there is none, or it is damaged or of another version.
        """
        path = directory / RECORD
        if not path.is_file():
            raise StoreError(
                f"{directory} holds no gallery: there is no {RECORD}; check the path, or make one with "
                "Gallery.create"
            )
        data = read_record(path)
        if data.get("format") != FORMAT or data.get("version") not in READABLE:
            found = data.get("version", data.get("format"))
            raise StoreError(
                f"{path} is of format version {found!r}, and this xbt reads version {VERSION}; build the "
                "gallery anew from its vectors"
            )
        if data.pop("checksum", None) != _checksum(data):
            raise StoreError(f"{path} was edited or damaged: its own checksum does not agree; {_MEND}")
        try:
            return cls(
                IndexPlan(str(data["index"]), str(data["tuning"])),
                tuple(PartRecord.from_dict(part) for part in data["parts"]),
                int(data["generation"]),
                int(data["segments_made"]),
                str(data.get("identity", "")),
                int(data.get("removals", 0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{path} is incomplete ({error!r}); {_MEND}") from error


def segment_name(part: str, number: int) -> str:
    """What a segment is called."""
    return f"{part}-{number:06d}"


def part_of_segment(name: str) -> str:
    """The part that a segment belongs to."""
    return name.rsplit("-", 1)[0]


def part_name(name: str) -> str:
    """Checks a part's name, which becomes part of file names.

    Raises:
        StoreError: If it is not made of letters, digits and underscores.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise StoreError(
            f"a part's name is made of letters, digits and underscores, such as 'new', got {name!r}"
        )
    return name


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode("ascii")).hexdigest()
