"""Vectors on disk with their ids and their space.

Looking for damage: every file of a store against the manifest that vouches for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from xbt.errors import DataError, SpaceMismatchError, StoreError
from xbt.files import (
    FileRecord,
    checksum,
    make_directory,
    open_regular,
    refuse_irregular,
    remove_leftovers,
    write_record,
)
from xbt.space import EmbeddingSpace
from xbt.store.clip_retrieval import scan_folder
from xbt.store.layout import (
    EXTRA,
    FOLDERS,
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
    read_manifest,
    shard_key,
    store_path,
    vectors_file,
)
from xbt.store.lock import WriterLock
from xbt.store.metadata import ColumnTypes, KnownIds, MetadataColumns, choose_id_column, read_columns
from xbt.store.rows import AGAIN, NpyRows, inspect_npy
from xbt.store.shards import Metadata, as_ids, as_table, remove_strays, write_shard
from xbt.vectors import Vectors

_ROWS_AT_ONCE = 16_384


def find_faults(
    path: str | Path, modality: str | None = None, space: EmbeddingSpace | None = None
) -> list[str]:
    """Everything that is wrong with a store, even one too damaged to be opened.

    Args:
        path: The directory.
        modality: As in ``EmbeddingStore.open``.
        space: Likewise; the space of a clip-retrieval folder.

    Returns:
        A sentence for each fault, which names the file and says what to do; empty if the store is sound.
    """
    directory = store_path(path)
    try:
        if has_manifest(directory):
            manifest = read_manifest(directory / MANIFEST)
        else:
            manifest = scan_folder(directory, modality, space)
    except (StoreError, SpaceMismatchError) as error:
        return [str(error)]
    faults = wrong_contents(directory, manifest)
    if manifest.extra is not None:
        faults.append(wrong_file(directory / EXTRA, manifest.extra, "the writers' notes"))
    return [fault for fault in faults if fault]


def refuse_wrong_sizes(path: Path, manifest: Manifest) -> None:
    """Refuses a store with files that are missing, cut or too long.

    Raises:
        StoreError: If there is one; the message names the first.
    """
    faults = wrong_sizes(path, manifest.shards)
    if faults:
        more = f" ({len(faults)} files are wrong: see xbt.store.find_faults)" if len(faults) > 1 else ""
        raise StoreError(f"{faults[0]}{more}")


def wrong_sizes(path: Path, shards: Iterable[ShardRecord]) -> list[str]:
    """Files that are missing, cut or too long, a sentence each; only sizes are looked at."""
    files = ((shard, name, file) for shard in shards for name, file in shard.files.items())
    faults = (_wrong_size(path / name, file, f"shard {shard.name!r}") for shard, name, file in files)
    return [fault for fault in faults if fault]


def wrong_contents(path: Path, manifest: Manifest) -> list[str]:
    """Everything that is wrong with the shards' files, a sentence each; every byte is read.

    Args:
        path: The store's directory.
        manifest: What the files should be.

    Returns:
        The faults; a flipped bit is found where checksums are known.
    """
    faults: list[str] = []
    types = ColumnTypes()
    for shard in manifest.shards:
        for name, file in shard.files.items():
            fault = wrong_file(path / name, file, f"shard {shard.name!r}")
            dtype = manifest.header.numpy_dtype if file.sha256 else None
            faults.append(fault or _wrong_rows(path / name, shard, manifest.header, dtype))
            if not faults[-1] and name.startswith(f"{METADATA}/"):
                faults += types.add([path / name])
    return [fault for fault in faults if fault]


def wrong_file(path: Path, file: FileRecord, of: str) -> str:
    """What is wrong with a file's size or bytes, or an empty string."""
    fault = _wrong_size(path, file, of)
    if fault or not file.sha256:
        return fault
    try:
        found = checksum(path)
    except OSError as error:
        return f"{path} of {of} cannot be read ({error.strerror}): {AGAIN}"
    return "" if found == file.sha256 else f"{path} of {of} has other bytes than were written: {AGAIN}"


def _wrong_size(path: Path, file: FileRecord, of: str) -> str:
    try:
        size = path.stat().st_size
        refuse_irregular(path, path.parent if path.name == EXTRA else path.parent.parent)
    except OSError:
        return f"{path} of {of} is missing: {AGAIN}"
    except StoreError as error:
        return str(error)
    return "" if size == file.bytes else f"{path} of {of} has {size} bytes instead of {file.bytes}: {AGAIN}"


def _wrong_rows(path: Path, shard: ShardRecord, header: Header, dtype: np.dtype[Any] | None) -> str:
    """Finds what is wrong with a file's content; NaN too, which a checksum knows nothing of."""
    where = f"{path} of shard {shard.name!r}"
    try:
        if path.parent.name == METADATA:
            count = read_columns(path, None, rows=shard.count).num_rows
        else:
            npy = inspect_npy(path)
            count = npy.count
            if npy.dim != header.dim:
                return (
                    f"{path} of shard {shard.name!r} has dimension {npy.dim} instead of {header.dim}: {AGAIN}"
                )
        if count != shard.count:
            return f"{where} has {count} rows instead of {shard.count}: {AGAIN}"
        if path.parent.name != METADATA:
            rows = NpyRows([path], [count], header.dim, dtype, header.unit)
            for start in range(0, count, _ROWS_AT_ONCE):
                rows.slice(start, min(start + _ROWS_AT_ONCE, count))
    except StoreError as error:
        return str(error)
    return ""


class EmbeddingStore:
    """Vectors of images or texts on disk, in shards, with the ids of their rows and the space they live in.

    Made by :meth:`create` and :meth:`append`, or by many processes with
    :class:`~xbt.store.StoreBuilder`; opened by :meth:`open`, as are clip-retrieval's folders. Rows are never
    changed and never removed: whoever has opened a store keeps what it saw, and :meth:`reload` shows what has
    been appended since. Reading takes the memory of what is returned, however large the store is.

    Attributes:
        path: The directory.

    Example:
        >>> store = xbt.EmbeddingStore.create("gallery", modality="image", space=encoder.space)
        >>> store.append(encoder.encode_images(paths), ids=paths)
        >>> for vectors in xbt.EmbeddingStore.open("gallery").batches(4096): ...
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._known, self._types = KnownIds(path), ColumnTypes()
        self._adopt(manifest)

    def _adopt(self, manifest: Manifest) -> None:
        self._manifest = manifest
        shards, modality = manifest.shards, manifest.header.modality
        counts = [shard.count for shard in shards]
        files = [self.path / vectors_file(modality, shard.name) for shard in shards]
        # Nobody says what the values of a foreign folder are; when it was opened its shards agreed.
        dtype = manifest.header.numpy_dtype if has_manifest(self.path) else None
        self._rows = NpyRows(files, counts, self.dim, dtype, manifest.header.unit)
        metadata = [self.path / metadata_file(shard.name) for shard in shards]
        with_metadata = bool(shards) and metadata_file(shards[0].name) in shards[0].files
        self._columns = MetadataColumns(metadata, counts) if with_metadata else None
        vars(self).pop("ids", None)
        vars(self).pop("_id_column", None)

    @classmethod
    def create(
        cls, path: str | Path, *, modality: str, space: EmbeddingSpace, dtype: str = "float16"
    ) -> Self:
        """Makes an empty store.

        Args:
            path: Its directory, which must not hold a store yet.
            modality: ``"image"`` or ``"text"``.
            space: The space of the vectors.
            dtype: ``"float16"`` or ``"float32"``, on disk.

        Returns:
            The store, open.

        Raises:
            StoreError: If the path holds vectors already, is a file or cannot be written, or a value is not
                known.
        """
        directory = store_path(path)
        manifest = Manifest(Header(modality, space, dtype, space.dim), ())
        for name in (MANIFEST, IN_PROGRESS, *FOLDERS.values(), METADATA):
            if (directory / name).exists():
                raise StoreError(
                    f"{directory} already holds {name}; open that store, or choose another directory"
                )
        make_directory(directory)
        with WriterLock(directory):
            write_record(directory / MANIFEST, manifest.to_dict())
        return cls(directory, manifest)

    @classmethod
    def open(cls, path: str | Path, modality: str | None = None, space: EmbeddingSpace | None = None) -> Self:
        """Opens a store, or a folder that clip-retrieval wrote.

        Args:
            path: The directory.
            modality: ``"image"`` or ``"text"``; needed only for a clip-retrieval folder that holds both.
            space: The space of the vectors: what a clip-retrieval folder does not say, and what a store of
                ours is checked against.

        Returns:
            The store.

        Raises:
            StoreError: If there is no store, it is not finished, or a file is missing, cut or too long.
            SpaceMismatchError: If the vectors are of another space.
        """
        directory = store_path(path)
        if not directory.is_dir():
            raise StoreError(f"there is no store at {directory}; check the path")
        if not has_manifest(directory):
            return cls(directory, scan_folder(directory, modality, space))
        manifest = read_manifest(directory / MANIFEST)
        if modality not in (None, manifest.header.modality):
            raise StoreError(
                f"{directory} is a store of {manifest.header.modality} vectors, not of {modality!r}"
            )
        if space is not None and manifest.header.space is not None:
            space.require(manifest.header.space, f"the vectors of {directory}")
        refuse_wrong_sizes(directory, manifest)
        return cls(directory, manifest)

    @property
    def modality(self) -> str:
        """``"image"`` or ``"text"``."""
        return self._manifest.header.modality

    @property
    def space(self) -> EmbeddingSpace | None:
        """The space of the vectors; ``None`` in a clip-retrieval folder of which nobody said it."""
        return self._manifest.header.space

    @property
    def dtype(self) -> str:
        """``"float16"`` or ``"float32"``, on disk; what is read is always float32."""
        return self._manifest.header.dtype

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self._manifest.header.dim

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """The shards in order."""
        return self._manifest.shards

    def __len__(self) -> int:
        return self._manifest.count

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows ``start`` … ``stop − 1`` as (n, dim) float32.

        Raises:
            StoreError: If the range is not within the store, a file is damaged, a value is NaN or infinite,
                or a row is not of length 1 although the space says so (``normalisation`` is ``"unit"``); the
                message names the file and the first such row. See :data:`xbt.vectors.UNIT_TOLERANCE`.
        """
        start, stop = self._range(start, stop)
        return self._rows.slice(start, stop)

    def rows(self, indices: ArrayLike) -> NDArray[np.float32]:
        """Rows by number, in the order asked for; a number may occur several times.

        Args:
            indices: (n,) row numbers from 0.

        Returns:
            (n, dim) float32.

        Raises:
            StoreError: If a number is not that of a row; otherwise as :meth:`read`.
        """
        numbers = np.asarray(indices)
        if numbers.size == 0:
            return np.zeros((0, self.dim), np.float32)
        if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
            raise StoreError(
                f"row numbers must be a list of integers, got shape {numbers.shape} of {numbers.dtype}"
            )
        outside = (numbers < 0) | (numbers >= len(self))
        if outside.any():
            raise StoreError(
                f"{self.path} has rows 0 to {len(self) - 1}, there is no row {numbers[outside][0]}"
            )
        return self._rows.take(numbers.astype(np.int64))

    def batches(self, size: int) -> Iterator[NDArray[np.float32]]:
        """All rows in order, as (size, dim) float32 arrays of which the last may be shorter.

        Raises:
            StoreError: If the size is below 1, or as :meth:`read` while the batches are taken.
        """
        if not isinstance(size, int) or size < 1:
            raise StoreError(f"the size of a batch is at least 1, got {size}")
        return (self.read(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def memory_maps(self) -> list[NDArray[np.floating]]:
        """Every shard's (n, dim) rows as they are on disk, mapped read-only and not checked.

        Nothing is read before it is touched; what is touched counts as the process's memory until the system
        takes it back. :meth:`rows` and :meth:`batches` do not have that cost.

        Raises:
            StoreError: If a file is damaged.
        """
        return self._rows.memory_maps()

    @cached_property
    def ids(self) -> list[str]:
        """The ids of all rows, kept in memory once asked for; :meth:`read_ids` reads only some."""
        return self.read_ids()

    def read_ids(self, start: int = 0, stop: int | None = None) -> list[str]:
        """The ids of the rows ``start`` … ``stop − 1``.

        They are the column ``id``; in a clip-retrieval folder that column or else ``image_path``, if it is
        there and unique, and otherwise ``row-0``, ``row-1``, ….

        Raises:
            StoreError: If the range is not within the store, or a file is damaged.
        """
        start, stop = self._range(start, stop)
        if self._id_column is None or self._columns is None:
            return [f"row-{row}" for row in range(start, stop)]
        if start == stop:
            return []
        return [str(value) for value in self._columns.read_strings(self._id_column, start, stop)]

    @property
    def columns(self) -> list[str]:
        """Names of the metadata columns beside the ids."""
        return [] if self._columns is None else [name for name in self._columns.names() if name != ID]

    def metadata(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> pa.Table:
        """Metadata of the rows ``start`` … ``stop − 1``.

        Args:
            columns: Names of columns; ``None`` takes all but the ids.
            start: First row.
            stop: The row after the last; ``None`` is the end.

        Returns:
            A table with one row a row; null where a shard has no such column.

        Raises:
            StoreError: If no shard has a column, its types do not go together, or the range is not within the
                store.
        """
        start, stop = self._range(start, stop)
        there = self.columns
        wanted = there if columns is None else list(columns)
        for name in wanted:
            if name not in there and not (name == ID and self._columns is not None):
                raise StoreError(f"{self.path} has no column {name!r}; it has {', '.join(there) or 'none'}")
        if self._columns is None or start == stop:
            return pa.table({name: pa.nulls(0) for name in wanted})
        return self._columns.read(wanted, start, stop).select(wanted)

    def extra(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Notes that the writers made beside shards, as (name of the shard, note).

        Raises:
            StoreError: If the file is damaged; the message names the line.
        """
        if self._manifest.extra is not None:
            path = self.path / EXTRA
            try:
                with open_regular(path, self.path) as file:
                    for number, line in enumerate(file, 1):
                        yield _note(line, f"line {number} of {path}")
            except OSError as error:
                raise StoreError(f"{path} cannot be read ({error.strerror}); copy it again") from error

    def append(
        self,
        vectors: Vectors,
        ids: Sequence[str],
        metadata: Metadata | None = None,
        space: EmbeddingSpace | None = None,
    ) -> ShardRecord:
        """Adds rows at the end, as one shard: append many at a time.

        The rows are in the store once this returns; a kill before leaves it as it was.

        Args:
            vectors: (n, dim) float vectors, n at least 1.
            ids: n strings that the store does not have yet.
            metadata: Columns of n values each beside the ids.
            space: The space of the vectors, to be checked.

        Returns:
            The new shard's record.

        Raises:
            DataError: If there are no rows, or a value is NaN, infinite or too large for the dtype.
            SpaceMismatchError: If dimension or space are another.
            StoreError: If an id is known already, ids or metadata do not fit (one column has one type over
                the whole store), another process is writing, the disk is full, or the folder has no manifest.
        """
        if not has_manifest(self.path):
            raise StoreError(
                f"{self.path} has no manifest, it is only read; copy its batches into a new store and "
                "append there"
            )
        if space is not None and self.space is not None:
            self.space.require(space, f"the vectors to be appended to {self.path}")
        if len(vectors) == 0:
            raise DataError(
                f"what is to be appended to {self.path} is empty: it has 0 rows; give at least one"
            )
        with WriterLock(self.path):
            self.reload()  # another writer may have been here since
            self._remove_leftovers()
            ids = as_ids(ids, str(self.path))
            self._known.refuse(ids, self.shards)
            name = str(max((shard_key(s.name)[0] for s in self.shards), default=-1) + 1).zfill(6)
            where = f"shard {name!r} of {self.path}"
            table = as_table(ids, metadata, len(vectors), where)
            # A column of the wrong type could never be removed again.
            self._types.add(self.path / metadata_file(shard.name) for shard in self.shards)
            self._types.require(table, where)
            record = write_shard(self.path, self._manifest.header, name, vectors, ids, table.drop([ID]))
            grown = Manifest(self._manifest.header, (*self.shards, record), self._manifest.extra)
            write_record(self.path / MANIFEST, grown.to_dict())
        self._adopt(grown)
        return record

    def reload(self) -> None:
        """Sees what has been appended since the store was opened.

        Raises:
            StoreError: As :meth:`open`.
        """
        if has_manifest(self.path):
            manifest = read_manifest(self.path / MANIFEST)
            refuse_wrong_sizes(self.path, manifest)
            self._adopt(manifest)

    def verify(self) -> None:
        """Reads every byte and compares it with what was written.

        A folder of clip-retrieval has no checksums; there, sizes and row counts are compared.

        Raises:
            StoreError: If anything is wrong; the message names every file and what to do.
        """
        faults = find_faults(self.path, self.modality, self.space)
        if faults:
            raise StoreError(f"{self.path} has {len(faults)} faults: {'; '.join(faults)}")

    @cached_property
    def _id_column(self) -> str | None:
        if self._columns is None or has_manifest(self.path):
            return None if self._columns is None else ID
        return choose_id_column(self._columns, [shard.count for shard in self.shards])

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        end = len(self) if stop is None else stop
        if not 0 <= start <= end <= len(self):
            raise StoreError(f"{self.path} has {len(self)} rows; {start} to {end} is not a range of them")
        return start, end

    def _remove_leftovers(self) -> None:
        remove_leftovers(self.path, *(self.path / name for name in (FOLDERS[self.modality], METADATA)))
        remove_strays(self.path, self.modality, self.shards)

    def __repr__(self) -> str:
        space = self.space or "no known space"
        return f"EmbeddingStore('{self.path}', {len(self)} {self.modality} vectors of {space})"


def _note(line: bytes, where: str) -> tuple[str, dict[str, Any]]:
    try:
        note = json.loads(line.decode("utf-8"))
        name, extra = note["name"], note["extra"]
        if not is_shard_name(name) or not isinstance(extra, dict):
            raise ValueError("it is not the note of a shard")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(f"{where} is damaged ({error!r:.100}); copy the file again") from error
    return name, extra
