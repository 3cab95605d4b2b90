"""A gallery's directory: what is written there, by one writer at a time, and what may be removed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Self

from xbt.errors import StoreError
from xbt.gallery import journal
from xbt.gallery.contents import Contents
from xbt.gallery.index_cache import FOLDER, IndexCache
from xbt.gallery.index_plan import IndexPlan
from xbt.gallery.journal import Journal, Removed
from xbt.gallery.layout import RECORD, SEGMENTS, GalleryRecord, PartRecord
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

    Attributes:
        record: What the gallery is, as it was read or written last.
        journal: Its removals; open, so that nobody removes the files of this generation.

    Raises:
        StoreError: If there is no gallery, or it is damaged.
    """

    def __init__(self, path: Path, read_only: bool = False, mmap: bool = False) -> None:
        self.path, self.read_only, self.mmap = path, read_only, mmap
        self.lock = WriterLock(path)
        self.record, self.journal = self._read()

    @classmethod
    def create(cls, path: str | Path, plan: IndexPlan, part: PartRecord) -> Self:
        """Makes a gallery of one part.

        Raises:
            StoreError: If the directory holds anything, or cannot be written.
        """
        directory = store_path(path)
        record = GalleryRecord(plan, (part,), segments_made=len(part.segments))
        ours = (".lock", record.journal)  # what a killed attempt leaves
        found = next((file for file in directory.glob("[!.]*") if file.name not in ours), None)
        if found is not None:
            raise StoreError(
                f"{directory} already holds {found.name}; open that gallery, or choose another directory"
            )
        with writing_to(directory, 0):
            directory.mkdir(parents=True, exist_ok=True)
        with WriterLock(directory):
            Journal.create(directory / record.journal, {}).close()
            record.write(directory)
        return cls(directory)

    def contents(self) -> Contents:
        """Opens every part and segment of the record.

        Raises:
            StoreError: If a segment is missing or damaged.
        """
        parts = []
        for about in self.record.parts:
            part = self._part(about)
            part.segments += [StoredSegment(self.path / SEGMENTS, about, each) for each in about.segments]
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
            StoreError: If the gallery is gone or damaged.
        """
        generation = self.record.generation
        record, opened = self._read(self.journal)
        self.record, self.journal = record, opened
        if contents is None or record.generation != generation or len(contents.parts) > len(record.parts):
            return self.contents()
        for number, about in enumerate(record.parts):
            if number == len(contents.parts):
                contents.parts.append(self._part(about))
            known = contents.parts[number].segments
            known += [
                StoredSegment(self.path / SEGMENTS, about, each) for each in about.segments[len(known) :]
            ]
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
        part.segments.append(StoredSegment(self.path / SEGMENTS, about, segment))

    def make_store(self, part: PartRecord, name: str) -> EmbeddingStore:
        """An empty store for a segment; what a killed writer left under that name is replaced."""
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
        """Makes a record the gallery's."""
        record.write(self.path)
        self.record = record

    def commit_generation(self, record: GalleryRecord, removed: Removed) -> None:
        """Makes a record with other segments the gallery's, and what was removed of them."""
        opened = Journal.create(self.path / record.journal, removed)
        self.commit(record)
        self.journal = opened

    def sweep(self) -> None:
        """Removes what killed writers left, and the files of generations that nobody reads any more."""
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

    def _part(self, about: PartRecord) -> Part:
        return Part(about.name, about.space, about.dim, self.record.plan, self.cache(about.name))

    def _read(self, known: Journal | None = None) -> tuple[GalleryRecord, Journal]:
        """The record and its open journal, both of one generation."""
        for _ in range(_ATTEMPTS):
            record = GalleryRecord.read(self.path)
            path = self.path / record.journal
            if known is not None and known.path == path and not known.closed:
                return record, known
            try:
                opened = Journal(path)
            except StoreError:
                if GalleryRecord.read(self.path).journal == record.journal:
                    raise
                continue  # it was compacted, and the generation removed, in between
            if GalleryRecord.read(self.path).journal == record.journal:
                return record, opened
        raise StoreError(f"{self.path / RECORD} changes faster than it can be read; wait for its writer")
