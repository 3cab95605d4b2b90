"""A gallery's directory: what is written there, by one writer at a time, and what may be removed."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

from xbt.errors import StoreError
from xbt.gallery import journal
from xbt.gallery.contents import Contents
from xbt.gallery.elsewhere import find_store, located, moved_stores
from xbt.gallery.index_cache import FOLDER, IndexCache
from xbt.gallery.index_plan import IndexPlan
from xbt.gallery.journal import Journal, Removed
from xbt.gallery.layout import RECORD, SEGMENTS, GalleryRecord, PartRecord, SegmentRecord
from xbt.gallery.part import Part
from xbt.gallery.segments import StoredSegment
from xbt.store import EmbeddingStore
from xbt.store.files import remove_leftovers, sync_directory, writing_to
from xbt.store.layout import store_path
from xbt.store.lock import WriterLock

_ATTEMPTS = 100


class Home:
    """The files of one gallery.

    The record ``gallery.json`` names the segments, a segment's manifest its rows, and the journal what was
    removed: each is replaced or grows in one step, and what none of them vouches for does not exist.

    Args:
        path: The directory.
        read_only: Whether nothing may be written.
        mmap: Whether indexes are mapped.
        stores: Where stores elsewhere are now, by the paths that are on record.

    Attributes:
        record: What the gallery is, as it was read or written last.
        journal: Its removals; open, so that nobody removes the files of this generation.

    Raises:
        StoreError: If there is no gallery, it is damaged, or ``stores`` names one that it was not made of.
    """

    def __init__(
        self,
        path: Path,
        read_only: bool = False,
        mmap: bool = False,
        stores: Mapping[str, str | Path] | None = None,
    ) -> None:
        self.path, self.read_only, self.mmap = path, read_only, mmap
        self.lock = WriterLock(path)
        self._refused = False
        self.record, self.journal = self._read()
        self._moved = moved_stores(self.record, path, stores)

    @classmethod
    def create(cls, path: str | Path, plan: IndexPlan, part: PartRecord) -> Self:
        """Makes a gallery of one part.

        Raises:
            StoreError: If the directory holds anything, or cannot be written.
        """
        directory = store_path(path)
        identity = _new_identity()
        record = GalleryRecord(plan, (part,), segments_made=len(part.segments), identity=identity)
        _refuse_what_is_there(directory, record)
        with writing_to(directory, 0):
            directory.mkdir(parents=True, exist_ok=True)
        with WriterLock(directory):
            _refuse_what_is_there(directory, record)  # another process may have made one meanwhile
            opened = Journal.create(directory / record.journal, {}, identity, record.generation)
            replace(record, removals=opened.least).write(directory)
            opened.close()
        return cls(directory)

    def contents(self) -> Contents:
        """Opens every part and segment of the record.

        Raises:
            StoreError: If a segment is missing or damaged.
        """
        parts = []
        for about in self.record.parts:
            part = self._part(about)
            part.segments += [self._segment(about, each) for each in about.segments]
            parts.append(part)
        contents = Contents(parts)
        self.journal.rewind()
        contents.refresh(self.journal.news)
        return contents

    def refresh(self, contents: Contents | None) -> Contents:
        """Sees what writers elsewhere have done.

        Args:
            contents: What was known; ``None`` reads everything.

        Returns:
            The contents: the same, grown, or others if the gallery was compacted meanwhile.

        Raises:
            StoreError: If the gallery is gone or damaged, or another one while this one is being written.
        """
        for last in (False, False, True):
            try:
                contents = self._refreshed(contents)
            except StoreError:
                if last or self._refused or not self._is_displaced():
                    raise
            else:
                if self.journal.in_place():
                    break
            contents = None  # half of it may be another gallery's, which was put here meanwhile
        else:
            raise self._unsteady()
        if self.lock.held and not self.record.identity:
            self.commit(self.record)  # the first write since version 2
        return contents

    def _refreshed(self, contents: Contents | None) -> Contents:
        known = self.journal
        record, opened = self._read(known)
        if self._refused or (self.lock.held and not self._is_same(record)):
            self._refused = True  # until it is opened again: what the user knows of it is another gallery's
            raise journal.replaced(self.path)
        self.record, self.journal = record, opened
        if contents is None or opened is not known or len(contents.parts) > len(record.parts):
            return self.contents()
        for number, about in enumerate(record.parts):
            if number == len(contents.parts):
                contents.parts.append(self._part(about))
            segments = contents.parts[number].segments
            segments += [self._segment(about, each) for each in about.segments[len(segments) :]]
        contents.refresh(self.journal.news)
        return contents

    def add_segment(self, part: Part) -> None:
        """Gives a part an empty segment, which grows from now on.

        Raises:
            StoreError: If the disk is full or may not be written to.
        """
        record, segment = self.record.with_segment(part.name)
        about = next(each for each in record.parts if each.name == part.name)
        self.make_store(about, segment.name)
        self.commit(record)
        part.segments.append(self._segment(about, segment))

    def make_store(self, part: PartRecord, name: str) -> EmbeddingStore:
        """An empty store for a segment; what a killed writer left under that name is replaced."""
        self.require_same()
        path = self.path / SEGMENTS / name
        shutil.rmtree(path, ignore_errors=True)
        if part.space is None:
            raise StoreError(
                f"the part {part.name!r} of {self.path} can only be read: nobody has said of which space its "
                "vectors are; make the gallery with space="
            )
        store = EmbeddingStore.create(path, modality=part.modality, space=part.space, dtype=part.dtype)
        sync_directory(path.parent)
        return store

    def add_part(self, part: PartRecord, contents: Contents) -> None:
        """Begins a part; raises as :meth:`add_segment`."""
        self.commit(replace(self.record, parts=(*self.record.parts, part)))
        contents.parts.append(self._part(part))

    def commit(self, record: GalleryRecord) -> None:
        """Makes a record the gallery's; raises as :meth:`add_segment`."""
        self.require_same()
        self.journal.sync()
        self._write(replace(record, removals=self.journal.read), self.journal)

    def commit_generation(self, record: GalleryRecord, removed: Removed) -> None:
        """Makes a record with other segments the gallery's, and what was removed of them."""
        self.require_same()
        record = replace(record, identity=record.identity or _new_identity())
        opened = Journal.create(self.path / record.journal, removed, record.identity, record.generation)
        self._write(replace(record, removals=opened.least), opened)
        self.journal = opened

    def _write(self, record: GalleryRecord, journal: Journal) -> None:
        parts = tuple(located(part, self.path, self._moved) for part in record.parts)
        record = replace(record, parts=parts, identity=record.identity or _new_identity())
        record.write(self.path)
        self.record = record
        journal.identity, journal.least = record.identity, record.removals

    def require_same(self) -> None:
        """Refuses to write if another gallery stands here.

        Raises:
            StoreError: If it does, or there is none.
        """
        same = self._is_same(GalleryRecord.read(self.path)) and self.journal.in_place()
        if self._refused or not same:
            self._refused = True
            raise journal.replaced(self.path)

    def faults(self) -> list[str]:
        """Damage to the record and to the journal, a sentence each."""
        try:
            if not self._is_same(GalleryRecord.read(self.path)):
                return [str(journal.replaced(self.path))]
        except StoreError as error:
            return [str(error)]
        return self.journal.faults()

    def sweep(self) -> None:
        """Removes what killed writers left, and the files of generations that nobody reads any more.

        Raises:
            StoreError: If another gallery stands here.
        """
        self.require_same()
        remove_leftovers(self.path, self.path / FOLDER)
        current = self.record.journal
        others = [path for path in self.path.glob("removals-*.log") if path.name != current]
        unused = [path for path in others if not journal.in_use(path)]
        if len(unused) < len(others):
            return
        ours = set(self.record.own_segments())
        for folder in (self.path / SEGMENTS).glob("*"):
            if folder.name not in ours:
                shutil.rmtree(folder, ignore_errors=True)
        parts = {part.name for part in self.record.parts}
        for file in (self.path / FOLDER).glob("*"):
            if file.stem.split("-")[0] not in parts:
                file.unlink(missing_ok=True)
        for path in unused:
            journal.remove(path)

    def cache(self, part: str) -> IndexCache:
        """Where a part's index is kept."""
        return IndexCache(self.path / FOLDER, part, self.record.plan, self.mmap, self.read_only)

    def _segment(self, about: PartRecord, record: SegmentRecord) -> StoredSegment:
        outside = record.elsewhere is not None
        path = find_store(record, self.path, self._moved) if outside else self.path / SEGMENTS / record.name
        return StoredSegment(path, about, record, self.path, self.require_same)

    def _part(self, about: PartRecord) -> Part:
        return Part(about.name, about.space, about.dim, self.record.plan, self.cache(about.name))

    def _read(self, known: Journal | None = None) -> tuple[GalleryRecord, Journal]:
        """The record and its open journal, both of one generation."""
        for _ in range(_ATTEMPTS):
            record = GalleryRecord.read(self.path)
            path = self.path / record.journal
            there = known is not None and known.path == path and not known.closed and known.in_place()
            if known is not None and there and self._is_same(record):
                known.identity, known.least = record.identity, record.removals
                return record, known
            try:
                opened = Journal(path, record.identity, record.removals)
            except StoreError:
                if _are_one(record, GalleryRecord.read(self.path)):
                    raise
                continue  # it was compacted, and the generation removed, in between
            if _are_one(record, GalleryRecord.read(self.path)):
                return record, opened
        raise self._unsteady()

    def _unsteady(self) -> StoreError:
        return StoreError(f"{self.path / RECORD} changes faster than it can be read; wait for its writer")

    def _is_same(self, record: GalleryRecord) -> bool:
        """Whether a record is that of the gallery that is open, and not of one that was put in its place."""
        if self.record.identity and record.identity:
            return self.record.identity == record.identity
        # One of version 2 has none, but as long as its journal is open no other file can pass for it.
        return self.journal.closed or self.journal.in_place()

    def _is_displaced(self) -> bool:
        """Whether there is a gallery, but with another journal than the one that is open."""
        return (self.path / RECORD).is_file() and not self.journal.closed and not self.journal.in_place()


def _new_identity() -> str:
    return secrets.token_hex(16)


def _are_one(first: GalleryRecord, second: GalleryRecord) -> bool:
    """Whether two records are of one generation of one gallery."""
    return (first.identity, first.journal) == (second.identity, second.journal)


def _refuse_what_is_there(directory: Path, record: GalleryRecord) -> None:
    ours = (".lock", record.journal)  # what a killed attempt leaves
    found = next((file for file in directory.glob("[!.]*") if file.name not in ours), None)
    if found is not None:
        raise StoreError(
            f"{directory} already holds {found.name}; open that gallery, or choose another directory"
        )
