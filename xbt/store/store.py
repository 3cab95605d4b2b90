"""Embedding store: vectors on disk with ids, metadata and their space, and checks for damage.

A folder that clip-retrieval wrote has the same layout without a manifest, and opens as a store too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from xbt.errors import DataError, SpaceMismatchError, StoreError
from xbt.files import FileRecord, make_directory, open_regular, remove_leftovers, write_record
from xbt.space import EmbeddingSpace
from xbt.store import layout
from xbt.store.layout import Header, Manifest, ShardRecord
from xbt.store.lock import WriterLock
from xbt.store.metadata import (
    ColumnTypes,
    KnownIds,
    MetadataColumns,
    choose_id_column,
    inspect_parquet,
    read_columns,
)
from xbt.store.rows import NpyFile, NpyRows, inspect_npy
from xbt.store.shards import Metadata, as_ids, as_table, remove_strays, write_shard
from xbt.vectors import Vectors

_ROWS_PER_READ = 16_384


def find_faults(
    path: str | Path, modality: str | None = None, space: EmbeddingSpace | None = None
) -> list[str]:
    """Find all faults of a store, even if it cannot be opened.

    Args:
        path: The directory.
        modality: See :meth:`EmbeddingStore.open`.
        space: The space of a clip-retrieval folder.

    Returns:
        A sentence for each fault, with the file and the fix; empty if there are none.
    """
    directory = layout.store_path(path)
    try:
        if layout.has_manifest(directory):
            manifest = layout.read_manifest(directory / layout.MANIFEST)
        else:
            manifest = _scan_folder(directory, modality, space)
    except (StoreError, SpaceMismatchError) as error:
        return [str(error)]
    faults = _shard_faults(directory, manifest)
    if manifest.extra is not None:
        faults.append(layout.file_fault(directory / layout.EXTRA, manifest.extra, "the writers' notes"))
    return [fault for fault in faults if fault]


def _refuse_wrong_sizes(path: Path, manifest: Manifest) -> None:
    """Refuse a store with files that are missing, cut or too long; the message names the first."""
    faults = layout.wrong_sizes(path, manifest.shards)
    if faults:
        more = f" ({len(faults)} files are wrong: see xbt.store.find_faults)" if len(faults) > 1 else ""
        raise StoreError(f"{faults[0]}{more}")


def _shard_faults(path: Path, manifest: Manifest) -> list[str]:
    """A sentence for each fault in the files of shards; reads every byte, and compares known checksums."""
    faults: list[str] = []
    types = ColumnTypes()
    for shard in manifest.shards:
        for name, file in shard.files.items():
            fault = layout.file_fault(path / name, file, f"shard {shard.name!r}")
            dtype = manifest.header.numpy_dtype if file.sha256 else None
            faults.append(fault or _content_fault(path / name, shard, manifest.header, dtype))
            if not faults[-1] and name.startswith(f"{layout.METADATA}/"):
                faults += types.add([path / name])
    return [fault for fault in faults if fault]


def _content_fault(path: Path, shard: ShardRecord, header: Header, dtype: np.dtype[Any] | None) -> str:
    """Describe a fault in a file's content, such as NaN, which a checksum does not show; empty if none."""
    try:
        if path.parent.name == layout.METADATA:
            read_columns(path, None, rows=shard.count)
            return ""
        rows = NpyRows([path], [shard.count], header.dim, dtype, header.unit)
        rows.memory_maps()  # checks the header, also of a shard without rows
        for start in range(0, shard.count, _ROWS_PER_READ):
            rows.slice(start, min(start + _ROWS_PER_READ, shard.count))
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
        files = [self.path / layout.vectors_file(modality, shard.name) for shard in shards]
        # A clip-retrieval folder records no dtype; the scan has checked that its shards agree.
        dtype = manifest.header.numpy_dtype if layout.has_manifest(self.path) else None
        self._rows = NpyRows(files, counts, self.dim, dtype, manifest.header.unit)
        metadata = [self.path / layout.metadata_file(shard.name) for shard in shards]
        with_metadata = bool(shards) and layout.metadata_file(shards[0].name) in shards[0].files
        self._columns = MetadataColumns(metadata, counts) if with_metadata else None
        vars(self).pop("ids", None)
        vars(self).pop("_id_column", None)

    @classmethod
    def create(
        cls, path: str | Path, *, modality: str, space: EmbeddingSpace, dtype: str = "float16"
    ) -> Self:
        """Create an empty store.

        Args:
            path: Its directory, which must not hold a store yet.
            modality: ``"image"`` or ``"text"``.
            space: The space of the vectors.
            dtype: ``"float16"`` or ``"float32"``, on disk.

        Returns:
            The store, open.

        Raises:
            StoreError: If the path holds vectors already, is a file or cannot be written, or modality or
                dtype are unknown.
        """
        directory = layout.store_path(path)
        manifest = Manifest(Header(modality, space, dtype, space.dim), ())
        for name in (layout.MANIFEST, layout.IN_PROGRESS, *layout.FOLDERS.values(), layout.METADATA):
            if (directory / name).exists():
                raise StoreError(
                    f"{directory} already holds {name}; open that store, or choose another directory"
                )
        make_directory(directory)
        with WriterLock(directory):
            write_record(directory / layout.MANIFEST, manifest.to_dict())
        return cls(directory, manifest)

    @classmethod
    def open(cls, path: str | Path, modality: str | None = None, space: EmbeddingSpace | None = None) -> Self:
        """Open a store, or a folder written by clip-retrieval.

        Args:
            path: The directory.
            modality: ``"image"`` or ``"text"``; needed only for a clip-retrieval folder that has both.
            space: The space of the vectors. A clip-retrieval folder takes it over, because it records none;
                a store must have this space.

        Returns:
            The store.

        Raises:
            StoreError: If there is no store, it is not finished, or a file is missing, cut or too long.
            SpaceMismatchError: If the vectors belong to another space.
        """
        directory = layout.store_path(path)
        if not directory.is_dir():
            raise StoreError(f"there is no store at {directory}; check the path")
        if not layout.has_manifest(directory):
            return cls(directory, _scan_folder(directory, modality, space))
        manifest = layout.read_manifest(directory / layout.MANIFEST)
        if modality not in (None, manifest.header.modality):
            raise StoreError(
                f"{directory} is a store of {manifest.header.modality} vectors, not of {modality!r}"
            )
        if space is not None and manifest.header.space is not None:
            space.require(manifest.header.space, f"the vectors of {directory}")
        _refuse_wrong_sizes(directory, manifest)
        return cls(directory, manifest)

    @property
    def modality(self) -> str:
        """``"image"`` or ``"text"``."""
        return self._manifest.header.modality

    @property
    def space(self) -> EmbeddingSpace | None:
        """The space of the vectors; ``None`` in a clip-retrieval folder opened without one."""
        return self._manifest.header.space

    @property
    def dtype(self) -> str:
        """``"float16"`` or ``"float32"``, on disk; reads always return float32."""
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
                or a row does not have length 1 in a space of unit rows (``normalisation="unit"``); the
                message names the file and the first such row. See :data:`xbt.vectors.UNIT_TOLERANCE`.
        """
        start, stop = self._range(start, stop)
        return self._rows.slice(start, stop)

    def rows(self, indices: ArrayLike) -> NDArray[np.float32]:
        """Rows by number, in the given order; a number may occur several times.

        Args:
            indices: (n,) row numbers from 0.

        Returns:
            (n, dim) float32.

        Raises:
            StoreError: If there is no row of a number; see also :meth:`read`.
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
        """All rows in order, as (size, dim) float32 arrays; the last may be shorter.

        Raises:
            StoreError: If the size is below 1; during iteration see :meth:`read`.
        """
        if not isinstance(size, int) or size < 1:
            raise StoreError(f"the size of a batch is at least 1, got {size}")
        return (self.read(start, min(start + size, len(self))) for start in range(0, len(self), size))

    def memory_maps(self) -> list[NDArray[np.floating]]:
        """Memory maps of all shards: (n, dim) rows in the dtype on disk, read-only and unchecked.

        Pages are read on access and count as memory of the process until the system takes them back.
        :meth:`rows` and :meth:`batches` do not have that cost.

        Raises:
            StoreError: If a file is damaged.
        """
        return self._rows.memory_maps()

    @cached_property
    def ids(self) -> list[str]:
        """Ids of all rows, cached after the first access; :meth:`read_ids` reads only a range."""
        return self.read_ids()

    def read_ids(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Ids of the rows ``start`` … ``stop − 1``.

        They come from the column ``id``. A clip-retrieval folder without unique ids there uses
        ``image_path`` if it is unique, and otherwise ``row-0``, ``row-1``, ….

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
        return [] if self._columns is None else [name for name in self._columns.names() if name != layout.ID]

    def metadata(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> pa.Table:
        """Metadata of the rows ``start`` … ``stop − 1``.

        Args:
            columns: Names of columns; ``None`` takes all but the ids.
            start: First row.
            stop: The row after the last; ``None`` is the end.

        Returns:
            A table with one line per row; null where a shard has no such column.

        Raises:
            StoreError: If no shard has a column, its types are incompatible, or the range is not within the
                store.
        """
        start, stop = self._range(start, stop)
        existing = self.columns
        selected = existing if columns is None else list(columns)
        for name in selected:
            if name not in existing and not (name == layout.ID and self._columns is not None):
                listed = ", ".join(existing) or "none"
                raise StoreError(f"{self.path} has no column {name!r}; it has {listed}")
        if self._columns is None or start == stop:
            return pa.table({name: pa.nulls(0) for name in selected})
        return self._columns.read(selected, start, stop).select(selected)

    def extra(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Notes of the writers about shards, as (name of the shard, note).

        Raises:
            StoreError: If the file is damaged; the message names the line.
        """
        if self._manifest.extra is not None:
            path = self.path / layout.EXTRA
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
        """Add rows at the end as one new shard; append many rows at a time.

        The rows are durable when this returns. A kill before that leaves the store unchanged.

        Args:
            vectors: (n, dim) float vectors, n at least 1.
            ids: n new strings.
            metadata: Columns of n values each beside the ids.
            space: The space of the vectors, checked against that of the store.

        Returns:
            The new shard's record.

        Raises:
            DataError: If there are no rows, or a value is NaN, infinite or too large for the dtype.
            SpaceMismatchError: If dimension or space differ.
            StoreError: If an id exists already, ids or metadata do not fit (a column has one type over the
                whole store), another process is writing, the disk is full, or the folder has no manifest.
        """
        if not layout.has_manifest(self.path):
            raise StoreError(
                f"{self.path} has no manifest and is read-only; copy its batches into a new store and append "
                "there"
            )
        if space is not None and self.space is not None:
            self.space.require(space, f"the vectors to be appended to {self.path}")
        if len(vectors) == 0:
            raise DataError(f"there are 0 rows to append to {self.path}; give at least one")
        with WriterLock(self.path):
            self.reload()  # another process may have appended
            folders = (layout.FOLDERS[self.modality], layout.METADATA)
            remove_leftovers(self.path, *(self.path / name for name in folders))
            remove_strays(self.path, self.modality, self.shards)
            ids = as_ids(ids, str(self.path))
            self._known.refuse(ids, self.shards)
            name = str(max((layout.shard_key(s.name)[0] for s in self.shards), default=-1) + 1).zfill(6)
            where = f"shard {name!r} of {self.path}"
            table = as_table(ids, metadata, len(vectors), where)
            # A column of the wrong type could never be removed.
            self._types.add(self.path / layout.metadata_file(shard.name) for shard in self.shards)
            self._types.require(table, where)
            record = write_shard(
                self.path, self._manifest.header, name, vectors, ids, table.drop([layout.ID])
            )
            grown = Manifest(self._manifest.header, (*self.shards, record), self._manifest.extra)
            write_record(self.path / layout.MANIFEST, grown.to_dict())
        self._adopt(grown)
        return record

    def reload(self) -> None:
        """Load rows that were appended after the store was opened.

        Raises:
            StoreError: See :meth:`open`.
        """
        if layout.has_manifest(self.path):
            manifest = layout.read_manifest(self.path / layout.MANIFEST)
            _refuse_wrong_sizes(self.path, manifest)
            self._adopt(manifest)

    def verify(self) -> None:
        """Read every byte and compare it with the recorded checksums.

        A clip-retrieval folder has no checksums; only its sizes, row counts and values are checked.

        Raises:
            StoreError: If there is a fault; the message names every file and the fix.
        """
        faults = find_faults(self.path, self.modality, self.space)
        if faults:
            raise StoreError(f"{self.path} has {len(faults)} faults: {'; '.join(faults)}")

    @cached_property
    def _id_column(self) -> str | None:
        if self._columns is None or layout.has_manifest(self.path):
            return None if self._columns is None else layout.ID
        return choose_id_column(self._columns, [shard.count for shard in self.shards])

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        end = len(self) if stop is None else stop
        if not 0 <= start <= end <= len(self):
            raise StoreError(f"{self.path} has {len(self)} rows; {start} to {end} is not a range of them")
        return start, end

    def __repr__(self) -> str:
        space = self.space or "no known space"
        return f"EmbeddingStore('{self.path}', {len(self)} {self.modality} vectors of {space})"


def _note(line: bytes, where: str) -> tuple[str, dict[str, Any]]:
    try:
        note = json.loads(line.decode("utf-8"))
        name, extra = note["name"], note["extra"]
        if not layout.is_shard_name(name) or not isinstance(extra, dict):
            raise ValueError("it is not the note of a shard")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(f"{where} is damaged ({error!r:.100}); copy the file again") from error
    return name, extra


def _scan_folder(path: Path, modality: str | None, space: EmbeddingSpace | None) -> Manifest:
    """Build the manifest, without checksums, of a folder that clip-retrieval wrote."""
    if (path / layout.IN_PROGRESS / layout.HEADER).is_file():
        names = [record.name for record in (path / layout.IN_PROGRESS).glob("*.json")]
        count = sum(name != layout.HEADER and name[0] != "." for name in names)
        raise StoreError(
            f"{path} is not finished: it has {count} shards; run the job that writes it again to continue"
        )
    modality = _choose_modality(path, modality)
    vectors = _npy_files(path, modality)
    metadata = layout.shard_files(path, layout.METADATA)
    for name in sorted(metadata.keys() ^ vectors.keys() if metadata else (), key=layout.shard_key):
        if name in vectors:
            raise StoreError(
                f"{path} lacks {layout.metadata_file(name)}, which other shards have; copy it again"
            )
        raise StoreError(
            f"{metadata[name]} belongs to no shard: there is no {layout.vectors_file(modality, name)} beside "
            "it; copy that file again, or remove this one"
        )
    shards = [_shard(path, name, npy, metadata.get(name)) for name, npy in vectors.items()]
    first = next(iter(vectors.values()))
    for name, npy in vectors.items():
        if npy.dim != first.dim:
            raise StoreError(
                f"shard {name!r} of {path} has dimension {npy.dim}, but the first has {first.dim}; they come "
                "from different models: keep them in different folders"
            )
        if npy.dtype != first.dtype:
            raise StoreError(
                f"shard {name!r} of {path} holds values of type {npy.dtype.str}, but the first has "
                f"{first.dtype.str}; copy both again, or save all shards with one type"
            )
    if space is not None and first.dim != space.dim:
        raise SpaceMismatchError(
            f"the vectors of {path} have dimension {first.dim}, but those of {space} have {space.dim}; name "
            "the space of the model that made them"
        )
    return Manifest(Header(modality, space, first.dtype.name, first.dim), tuple(shards))


def _choose_modality(path: Path, modality: str | None) -> str:
    present = [
        name for name, folder in layout.FOLDERS.items() if any((path / folder).glob(f"{folder}_*.npy"))
    ]
    if not present:
        raise StoreError(
            f"{path} holds no store: there is neither a manifest.json nor img_emb/img_emb_*.npy or "
            "text_emb/text_emb_*.npy; check the path"
        )
    if modality is None and len(present) > 1:
        raise StoreError(f"{path} holds image and text vectors; choose with modality='image' or 'text'")
    if modality is not None and modality not in present:
        raise StoreError(
            f"{path} holds {present[0]} vectors, not {modality!r}; leave modality out or name another path"
        )
    return modality or present[0]


def _npy_files(path: Path, modality: str) -> dict[str, NpyFile]:
    folder = layout.FOLDERS[modality]
    names = sorted(layout.shard_files(path, folder), key=layout.shard_key)
    layout.require_distinct(names, path)
    if not names:
        raise StoreError(f"{path / folder} holds no {folder}_<number>.npy; check the path")
    numbers = [layout.shard_key(name)[0] for name in names]
    if all("_" not in name for name in names) and numbers != list(range(len(names))):
        missing = next(expected for expected, number in enumerate(numbers) if expected != number)
        raise StoreError(
            f"shard {missing} of {path} is missing, but there is {folder}_{names[-1]}.npy; copy it again, or "
            "number the files from 0 without a gap"
        )
    return {name: inspect_npy(path / folder / f"{folder}_{name}.npy") for name in names}


def _shard(path: Path, name: str, npy: NpyFile, metadata: Path | None) -> ShardRecord:
    files = {npy.path.relative_to(path).as_posix(): FileRecord(npy.status[1], "")}
    if metadata is not None:
        rows, _ = inspect_parquet(metadata)
        if rows != npy.count:
            raise StoreError(
                f"shard {name!r} of {path} has {npy.count} vectors but {rows} rows of metadata; copy both "
                "files again"
            )
        files[layout.metadata_file(name)] = FileRecord(metadata.stat().st_size, "")
    return ShardRecord(name, npy.count, files)
