"""Construction of a store by several processes.

Each process writes whole shards. A killed job is run again and continues. Rows of a committed shard can be
dropped: the new files are written beside the old ones, then the record is replaced, then the files are moved.
A kill at any moment loses no other row, because the next run finishes the move of all files that match their
record.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from xbt.errors import StoreError
from xbt.files import (
    FileRecord,
    checksum,
    make_directory,
    remove_leftovers,
    sync_directory,
    write_lines,
    write_record,
    writing_to,
)
from xbt.space import EmbeddingSpace
from xbt.store import layout
from xbt.store.layout import Header, Manifest, ShardRecord
from xbt.store.lock import WriterLock
from xbt.store.metadata import ColumnTypes, Repetition, read_columns, repeated_ids, require_unique
from xbt.store.rows import NpyRows
from xbt.store.shards import Metadata, remove_strays, write_shard
from xbt.store.store import EmbeddingStore
from xbt.vectors import Vectors

_NEW = "new"
NoteRepeated = Callable[[Mapping[str, Any], Sequence[tuple[str, str]]], Mapping[str, Any]]


class CommittedShards(Mapping[str, ShardRecord]):
    """Records of the committed shards of a store under construction, by name and in order.

    The names are listed once. A record is read on each access and not cached, because notes may be long.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = {path.stem for path in folder.glob("*.json") if layout.is_shard_name(path.stem)}
        self._names = dict.fromkeys(sorted(names, key=lambda name: (layout.shard_key(name), name)))

    def __getitem__(self, name: str) -> ShardRecord:
        if name not in self._names:
            raise KeyError(name)
        return layout.read_shard_record(self._folder / f"{name}.json")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def drop_rows(
    path: Path, header: Header, shard: ShardRecord, rows: Sequence[int], extra: Mapping[str, Any]
) -> None:
    """Rewrite a committed shard without some rows, with a new note; the main process calls this."""
    keep = np.ones(shard.count, bool)
    keep[rows] = False
    table = read_columns(path / layout.metadata_file(shard.name), None).filter(pa.array(keep))
    vectors = NpyRows([path / layout.vectors_file(header.modality, shard.name)], [shard.count], header.dim)
    kept = vectors.slice(0, shard.count)[keep]
    ids = table[layout.ID].to_pylist()
    new = path / layout.IN_PROGRESS / _NEW
    record = write_shard(new, header, shard.name, kept, ids, table.drop([layout.ID]), extra)
    write_record(path / layout.IN_PROGRESS / f"{shard.name}.json", record.to_dict())
    complete_replacements(path, header.modality)


def complete_replacements(path: Path, modality: str) -> None:
    """Finish the move of rewritten files that match their record, and remove the others."""
    new = path / layout.IN_PROGRESS / _NEW
    if not new.is_dir():
        return
    for folder in (layout.FOLDERS[modality], layout.METADATA):
        for name, file in layout.shard_files(new, folder).items():
            record, target = path / layout.IN_PROGRESS / f"{name}.json", f"{folder}/{file.name}"
            actual = FileRecord(file.stat().st_size, checksum(file))
            if record.is_file() and layout.read_shard_record(record).files.get(target) == actual:
                with writing_to(path / target, 0):
                    file.replace(path / target)
        sync_directory(path / folder)
    shutil.rmtree(new)


class StoreBuilder:
    """Writer of a store for any number of processes and machines, shard by shard.

    The directory is on a file system that all processes see. The main process calls :meth:`prepare` before
    the others start. Then every process calls :meth:`write` for its shards; no shard has two writers. At the
    end the main process calls :meth:`finish`. A record in ``in_progress/`` commits a shard, and the manifest
    commits the store. After a kill the job is run again: it asks :meth:`committed` for the shards that exist
    and writes the rest.

    Args:
        path: The store's directory.
        modality: ``"image"`` or ``"text"``.
        space: The space of the vectors.
        dtype: ``"float16"`` or ``"float32"``, on disk.

    Raises:
        StoreError: If the path is empty or a file, or modality or dtype are unknown.

    Example:
        >>> builder = StoreBuilder("gallery", modality="image", space=encoder.space)
        >>> builder.prepare()
        >>> builder.write("0", vectors, ids, {"image_path": paths})
        >>> store = builder.finish(["0"])
    """

    def __init__(
        self, path: str | Path, *, modality: str, space: EmbeddingSpace, dtype: str = "float16"
    ) -> None:
        self.path = layout.store_path(path)
        self.header = Header(modality, space, dtype, space.dim)
        self._lock = WriterLock(self.path, reentrant=True)

    @property
    def finished(self) -> bool:
        """True once the store has its manifest."""
        return layout.has_manifest(self.path)

    def prepare(self) -> None:
        """Create the directories, or continue in those of an earlier run of the same job.

        Only the main process calls this, before the others start. It locks the store until :meth:`finish` or
        its exit, and removes temporary files of killed writers. On a finished store with the same header it
        only removes them and releases the lock; see :attr:`finished`.

        Raises:
            StoreError: If the directory cannot be written, is being written by another job, or holds
                another store or other vectors.
            SpaceMismatchError: If it holds a store of another space.
        """
        make_directory(self.path)
        self._lock.acquire()
        header = self.path / layout.IN_PROGRESS / layout.HEADER
        complete_replacements(self.path, self.header.modality)
        if self.finished:
            layout.read_manifest(self.path / layout.MANIFEST).header.require(self.header, self.path)
        elif header.is_file():
            layout.read_header(header).require(self.header, self.path)
        else:
            self._refuse_foreign_files()
        folders = [
            self.path / name
            for name in (layout.FOLDERS[self.header.modality], layout.METADATA, layout.IN_PROGRESS)
        ]
        remove_leftovers(self.path, *folders)
        if self.finished:
            shutil.rmtree(self.path / layout.IN_PROGRESS, ignore_errors=True)
            self._lock.release()  # nothing is left to build, so others may append
            return
        for folder in folders:
            make_directory(folder)
        if not header.is_file():
            write_record(header, self.header.to_dict())

    def committed(self) -> Mapping[str, ShardRecord]:
        """Committed shards by name and in order; any process may call this at any time.

        Until the store is finished, each access reads a record.
        """
        if self.finished:
            store = EmbeddingStore.open(self.path)
            notes = dict(store.extra())
            records = (replace(shard, extra=notes.get(shard.name, {})) for shard in store.shards)
            return {record.name: record for record in records}
        return CommittedShards(self.path / layout.IN_PROGRESS)

    def write(
        self,
        name: str,
        vectors: Vectors,
        ids: Sequence[str],
        metadata: Metadata | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> ShardRecord:
        """Write one shard and commit it; a shard of that name is replaced.

        Args:
            name: Digits, or digits joined by underscores; shards are read in numerical order of their names.
                Pad them with zeros, as clip-retrieval does, so that the alphabetical order agrees.
            vectors: (n, dim) float vectors; n may be 0.
            ids: n strings, unique over the whole store (checked within the shard here, and over all shards by
                :meth:`finish`).
            metadata: Columns of n values each beside the ids, such as ``image_path`` and ``caption``; a
                mapping or a ``pyarrow.Table``.
            extra: JSON note for the shard's record, returned by :meth:`committed`; for example items that
                could not be embedded.

        Returns:
            The record of the shard, which is durable now.

        Raises:
            DataError: If a value is NaN or infinite, or too large for the dtype.
            SpaceMismatchError: If the dimension differs.
            StoreError: If the store is not prepared or already finished, ids or metadata do not fit, or the
                disk is full; shards already written are kept.
        """
        layout.shard_name(name)
        if self.finished:
            raise StoreError(
                f"{self.path} is a finished store; open it and append, or choose another directory"
            )
        if not (self.path / layout.IN_PROGRESS / layout.HEADER).is_file():
            raise StoreError(f"{self.path} is not prepared; let the main process call prepare() first")
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise StoreError(
                f"the note of shard {name!r} is not JSON ({error}); give plain values"
            ) from error
        # An old record must not commit new files.
        (self.path / layout.IN_PROGRESS / f"{name}.json").unlink(missing_ok=True)
        record = write_shard(self.path, self.header, name, vectors, ids, metadata, extra)
        write_record(self.path / layout.IN_PROGRESS / f"{name}.json", record.to_dict())
        return record

    def leave_out_repeated(self, note: NoteRepeated) -> int:
        """Drop rows whose id occurs in an earlier shard; the main process calls this before :meth:`finish`.

        A kill at any moment loses nothing: the next run continues.

        Args:
            note: Function that returns the new note of a shard. Its arguments are the old note and, for each
                dropped row, the id and the name of the earlier shard.

        Returns:
            Number of dropped rows.

        Raises:
            StoreError: If a shard is damaged, or the disk is full.
        """
        committed = {} if self.finished else self.committed()
        records = [_without_note(record) for record in committed.values()]
        repetitions: dict[int, list[Repetition]] = {}
        for repetition in repeated_ids(self.path, records):
            repetitions.setdefault(repetition.part, []).append(repetition)
        for part, repeated in sorted(repetitions.items()):
            old_note = committed[records[part].name].extra
            extra = note(old_note, [(item.name, records[item.first].name) for item in repeated])
            drop_rows(self.path, self.header, records[part], [item.row for item in repeated], extra)
        return sum(map(len, repetitions.values()))

    def finish(self, names: Iterable[str]) -> EmbeddingStore:
        """Write the manifest; only the main process calls this, when all processes are done.

        Args:
            names: All shards of the store, in any order.

        Returns:
            The open store.

        Raises:
            StoreError: If a shard is missing, surplus or damaged, an id occurs twice, or a column has
                incompatible types; the message names it, and nothing is lost.
        """
        records = self._all_records(list(names))
        if not self.finished:
            faults = layout.wrong_sizes(self.path, records)
            if faults:
                raise StoreError(f"{faults[0]} ({len(faults)} such files); remove it and run the job again")
            require_unique(self.path, records)
            faults = ColumnTypes().add(self.path / layout.metadata_file(record.name) for record in records)
            if faults:
                raise StoreError(faults[0])
            remove_strays(self.path, self.header.modality, records)
            notes = ({"name": r.name, "extra": r.extra} for r in self.committed().values() if r.extra)
            lines = (json.dumps(note) + "\n" for note in notes)
            first = next(lines, None)
            extra = None
            if first is not None:
                extra = write_lines(self.path / layout.EXTRA, chain([first], lines))
            manifest = Manifest(self.header, tuple(records), extra)
            write_record(self.path / layout.MANIFEST, manifest.to_dict())
        shutil.rmtree(self.path / layout.IN_PROGRESS, ignore_errors=True)
        self._lock.release()
        return EmbeddingStore.open(self.path)

    def _all_records(self, names: list[str]) -> list[ShardRecord]:
        committed = self.committed()
        expected = sorted(
            {layout.shard_name(name) for name in names}, key=lambda name: (layout.shard_key(name), name)
        )
        missing = [name for name in expected if name not in committed]
        if missing:
            raise StoreError(
                f"{self.path} lacks {len(missing)} of {len(expected)} shards, first {missing[0]!r}; "
                "run the job again to write them"
            )
        surplus = sorted(committed.keys() - set(expected))
        if surplus:
            raise StoreError(
                f"{self.path} holds {len(surplus)} shards that are not this job's, first {surplus[0]!r}; "
                "was it run with other shard settings? choose another directory, or remove that one"
            )
        layout.require_distinct(expected, self.path)
        return [_without_note(committed[name]) for name in expected]

    def _refuse_foreign_files(self) -> None:
        for folder in (*layout.FOLDERS.values(), layout.METADATA):
            file = next(iter(layout.shard_files(self.path, folder).values()), None)
            if file is not None:
                raise StoreError(
                    f"{self.path} already holds {folder}/{file.name}, which does not belong to this job; "
                    "choose another directory"
                )


def _without_note(record: ShardRecord) -> ShardRecord:
    return replace(record, extra={})  # notes may be long
