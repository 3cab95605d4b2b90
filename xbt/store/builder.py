"""Building one store with many processes: each writes whole shards, and a killed job is run again.

The shards that are committed to a store that is being built, read from their records one at a time.

Taking rows out of a shard of a store that is being built: a kill at any moment loses none of the others.

The new files are written whole beside the old ones, then the record is replaced, which decides, and then the
files are moved to their places. Whoever finds new files that the record vouches for goes on with the moving.
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
from xbt.store.layout import (
    EXTRA,
    FOLDERS,
    HEADER,
    ID,
    IN_PROGRESS,
    MANIFEST,
    METADATA,
    Header,
    Manifest,
    ShardRecord,
    has_manifest,
    is_shard_name,
    metadata_file,
    read_header,
    read_manifest,
    read_shard_record,
    shard_files,
    shard_key,
    shard_name,
    store_path,
    vectors_file,
)
from xbt.store.lock import WriterLock
from xbt.store.metadata import ColumnTypes, Repetition, read_columns, repeated_ids, require_unique
from xbt.store.rows import NpyRows
from xbt.store.shards import Metadata, remove_strays, write_shard
from xbt.store.store import EmbeddingStore, wrong_sizes
from xbt.vectors import Vectors


class CommittedShards(Mapping[str, ShardRecord]):
    """Records by the shards' names, in their order.

    Which shards there are is looked up once, in the names of the files. A record is read whenever it is asked
    for and not kept: what writers note beside their shards may be long.

    Args:
        folder: Where the records are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = {path.stem for path in folder.glob("*.json") if is_shard_name(path.stem)}
        self._names = dict.fromkeys(sorted(names, key=lambda name: (shard_key(name), name)))

    def __getitem__(self, name: str) -> ShardRecord:
        if name not in self._names:
            raise KeyError(name)
        return read_shard_record(self._folder / f"{name}.json")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_NEW = "new"


def drop_rows(
    path: Path, header: Header, shard: ShardRecord, rows: Sequence[int], extra: Mapping[str, Any]
) -> None:
    """Writes a committed shard again without some of its rows; the main process alone does this.

    Args:
        path: The store's directory.
        header: What the store is.
        shard: The shard.
        rows: Which of its rows to leave out.
        extra: The shard's new note.

    Raises:
        StoreError: If the shard cannot be read, or there is no room for it to stand there twice.
    """
    keep = np.ones(shard.count, bool)
    keep[rows] = False
    table = read_columns(path / metadata_file(shard.name), None).filter(pa.array(keep))
    vectors = NpyRows([path / vectors_file(header.modality, shard.name)], [shard.count], header.dim)
    kept = vectors.slice(0, shard.count)[keep]
    ids = table[ID].to_pylist()
    new = path / IN_PROGRESS / _NEW
    record = write_shard(new, header, shard.name, kept, ids, table.drop([ID]), extra)
    write_record(path / IN_PROGRESS / f"{shard.name}.json", record.to_dict())
    complete_replacements(path, header.modality)


def complete_replacements(path: Path, modality: str) -> None:
    """Moves new files that their shard's record vouches for, and removes others that a killed writer left.

    Raises:
        StoreError: If a record is damaged, or the directory cannot be written.
    """
    new = path / IN_PROGRESS / _NEW
    if not new.is_dir():
        return
    for folder in (FOLDERS[modality], METADATA):
        for name, file in shard_files(new, folder).items():
            record, place = path / IN_PROGRESS / f"{name}.json", f"{folder}/{file.name}"
            found = FileRecord(file.stat().st_size, checksum(file))
            if record.is_file() and read_shard_record(record).files.get(place) == found:
                with writing_to(path / place, 0):
                    file.replace(path / place)
        sync_directory(path / folder)
    shutil.rmtree(new)


NoteRepeated = Callable[[Mapping[str, Any], Sequence[tuple[str, str]]], Mapping[str, Any]]


class StoreBuilder:
    """A store that any number of processes on any number of machines write together, shard by shard.

    The directory is on a file system that all of them see. The main process calls :meth:`prepare` before the
    others start; then every process calls :meth:`write` for the shards that are its own (no shard has two
    writers); at the end the main process calls :meth:`finish`. A shard is committed once its record is
    in ``in_progress/``, the store once its manifest does: a job killed at any moment is run again, asks
    :meth:`committed` what is there, and writes the rest.

    Args:
        path: The store's directory.
        modality: ``"image"`` or ``"text"``.
        space: The space of the vectors.
        dtype: ``"float16"`` or ``"float32"``, on disk.

    Raises:
        StoreError: If the path is empty or a file, or modality or dtype are not known.

    Example:
        >>> builder = StoreBuilder("gallery", modality="image", space=encoder.space)
        >>> builder.prepare()
        >>> builder.write("0", vectors, ids, {"image_path": paths})
        >>> store = builder.finish(["0"])
    """

    def __init__(
        self, path: str | Path, *, modality: str, space: EmbeddingSpace, dtype: str = "float16"
    ) -> None:
        self.path = store_path(path)
        self.header = Header(modality, space, dtype, space.dim)
        self._lock = WriterLock(self.path, reentrant=True)

    @property
    def finished(self) -> bool:
        """Whether the store is whole: its manifest is there."""
        return has_manifest(self.path)

    def prepare(self) -> None:
        """Makes the directories, or finds them as an earlier run of the same job left them.

        The main process alone calls this, before the others start. It keeps the right to write until
        :meth:`finish` or its end, and removes what killed writers left half-written. On a finished store of
        the same kind it only removes that, and gives the right back: see :attr:`finished`.

        Raises:
            StoreError: If the directory cannot be written, is being written by another job, or holds
                another store or other vectors.
            SpaceMismatchError: If it holds a store of another space.
        """
        make_directory(self.path)
        self._lock.acquire()
        header = self.path / IN_PROGRESS / HEADER
        complete_replacements(self.path, self.header.modality)
        if self.finished:
            read_manifest(self.path / MANIFEST).header.require(self.header, self.path)
        elif header.is_file():
            read_header(header).require(self.header, self.path)
        else:
            self._refuse_foreign_files()
        folders = [self.path / name for name in (FOLDERS[self.header.modality], METADATA, IN_PROGRESS)]
        remove_leftovers(self.path, *folders)
        if self.finished:
            shutil.rmtree(self.path / IN_PROGRESS, ignore_errors=True)
            self._lock.release()  # there is nothing left to build: others may append
            return
        for folder in folders:
            make_directory(folder)
        if not header.is_file():
            write_record(header, self.header.to_dict())

    def committed(self) -> Mapping[str, ShardRecord]:
        """The shards that are written, by name and in order; any process may ask at any time.

        Until the store is finished, a record is read when it is asked for.
        """
        if self.finished:
            store = EmbeddingStore.open(self.path)
            notes = dict(store.extra())
            records = (replace(shard, extra=notes.get(shard.name, {})) for shard in store.shards)
            return {record.name: record for record in records}
        return CommittedShards(self.path / IN_PROGRESS)

    def write(
        self,
        name: str,
        vectors: Vectors,
        ids: Sequence[str],
        metadata: Metadata | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> ShardRecord:
        """Writes one shard and commits it; a shard of that name is replaced.

        Args:
            name: Digits, or digits joined by underscores: shards are read in numerical order of their
                names. Pad them with zeros as clip-retrieval does, so that the alphabet agrees.
            vectors: (n, dim) float vectors; n may be 0.
            ids: n strings, unique over the whole store (checked within the shard now, over all shards by
                :meth:`finish`).
            metadata: Columns of n values each beside the ids, such as ``image_path`` and ``caption``; a
                mapping or a ``pyarrow.Table``.
            extra: JSON kept in the shard's record and returned by :meth:`committed`, such as items that
                could not be embedded.

        Returns:
            The shard's record; the shard is durable by now.

        Raises:
            DataError: If a value is NaN or infinite, or too large for the dtype.
            SpaceMismatchError: If the dimension is another.
            StoreError: If the store is not prepared or already finished, ids or metadata do not fit, or the
                disk is full; shards already written are kept.
        """
        shard_name(name)
        if self.finished:
            raise StoreError(
                f"{self.path} is a finished store; open it and append, or choose another directory"
            )
        if not (self.path / IN_PROGRESS / HEADER).is_file():
            raise StoreError(f"{self.path} is not prepared; let the main process call prepare() first")
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise StoreError(f"what is noted beside shard {name!r} is not JSON ({error})") from error
        # Withdrawn first: an old record must not vouch for new files.
        (self.path / IN_PROGRESS / f"{name}.json").unlink(missing_ok=True)
        record = write_shard(self.path, self.header, name, vectors, ids, metadata, extra)
        write_record(self.path / IN_PROGRESS / f"{name}.json", record.to_dict())
        return record

    def leave_out_repeated(self, note: NoteRepeated) -> int:
        """Takes out rows whose id an earlier shard has; the main process calls this before :meth:`finish`.

        A kill at any moment loses nothing: the next run goes on where this one was.

        Args:
            note: Makes the new note of a shard from the one it has and the (id, shard that has it) of the
                rows that are taken out.

        Returns:
            How many rows were taken out.

        Raises:
            StoreError: If a shard is damaged, or the disk is full.
        """
        committed = {} if self.finished else self.committed()
        records = [_without_note(record) for record in committed.values()]
        found: dict[int, list[Repetition]] = {}
        for repetition in repeated_ids(self.path, records):
            found.setdefault(repetition.part, []).append(repetition)
        for part, repeated in sorted(found.items()):
            old = committed[records[part].name].extra
            extra = note(old, [(each.name, records[each.first].name) for each in repeated])
            drop_rows(self.path, self.header, records[part], [each.row for each in repeated], extra)
        return sum(map(len, found.values()))

    def finish(self, names: Iterable[str]) -> EmbeddingStore:
        """Makes a store of the shards; the main process alone calls this, when all processes are done.

        Args:
            names: Every shard of the store; the order does not matter.

        Returns:
            The open store.

        Raises:
            StoreError: If a shard is missing, left over or damaged, an id occurs twice, or a column has types
                that do not go together; the message names it, and nothing is lost.
        """
        records = self._complete(list(names))
        if not self.finished:
            faults = wrong_sizes(self.path, records)
            if faults:
                raise StoreError(f"{faults[0]} ({len(faults)} such files); remove it and run the job again")
            require_unique(self.path, records)
            faults = ColumnTypes().add(self.path / metadata_file(record.name) for record in records)
            if faults:
                raise StoreError(faults[0])
            remove_strays(self.path, self.header.modality, records)
            manifest = Manifest(self.header, tuple(records), self._write_extra())
            write_record(self.path / MANIFEST, manifest.to_dict())
        shutil.rmtree(self.path / IN_PROGRESS, ignore_errors=True)
        self._lock.release()
        return EmbeddingStore.open(self.path)

    def _complete(self, names: list[str]) -> list[ShardRecord]:
        there = self.committed()
        wanted = sorted({shard_name(name) for name in names}, key=lambda name: (shard_key(name), name))
        missing = [name for name in wanted if name not in there]
        if missing:
            raise StoreError(
                f"{self.path} lacks {len(missing)} of {len(wanted)} shards, first {missing[0]!r}; "
                "run the job again to write them"
            )
        surplus = sorted(there.keys() - set(wanted))
        if surplus:
            raise StoreError(
                f"{self.path} holds {len(surplus)} shards that are not this job's, first {surplus[0]!r}; "
                "was it run with other shard settings? choose another directory, or remove that one"
            )
        keys = [shard_key(name) for name in wanted]
        for first, second, key, next_key in zip(wanted, wanted[1:], keys, keys[1:], strict=False):
            if key == next_key:
                raise StoreError(f"the shards {first!r} and {second!r} of {self.path} have the same number")
        return [_without_note(there[name]) for name in wanted]

    def _write_extra(self) -> FileRecord | None:
        records = self.committed().values()
        notes = (json.dumps({"name": r.name, "extra": r.extra}) + "\n" for r in records if r.extra)
        first = next(notes, None)
        return None if first is None else write_lines(self.path / EXTRA, chain([first], notes))

    def _refuse_foreign_files(self) -> None:
        for folder in (*FOLDERS.values(), METADATA):
            found = next(iter(shard_files(self.path, folder).values()), None)
            if found is not None:
                raise StoreError(
                    f"{self.path} already holds {folder}/{found.name}, which no such job has left there; "
                    "choose another directory"
                )


def _without_note(record: ShardRecord) -> ShardRecord:
    """A record without what may be long."""
    return replace(record, extra={})
