"""A gallery: vectors with string ids that is searched, grown and backfilled while it serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from xbt.errors import DataError
from xbt.gallery.checks import as_ids, as_rows
from xbt.gallery.contents import OLD, Contents
from xbt.gallery.elsewhere import record_of
from xbt.gallery.home import Home
from xbt.gallery.index_plan import EXACT, IndexPlan
from xbt.gallery.layout import PartRecord, SegmentRecord, segment_name
from xbt.gallery.memory_segment import MemorySegment
from xbt.gallery.part import Part
from xbt.gallery.writing import WritableGallery
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore
from xbt.vectors import Vectors


class Gallery(WritableGallery):
    """Vectors with ids and their search, in memory (:meth:`build`) or on disk (:meth:`create`, :meth:`open`).

    **On disk** one process writes at a time, and any number of them search meanwhile; :meth:`reload` shows a
    reader what has been written since. What a write has returned from is never lost, and what it has not is
    there wholly or not at all, however the process ends. **In one process** any number of threads may search
    while one writes; a search sees the gallery as it was at one moment.

    **A backfill**: :meth:`begin_part` opens a second part for vectors of the new space, :meth:`backfill`
    moves items there, and :meth:`search_mixed` searches both. An item in the new part is masked in
    the old one.

    **The index** ``"Flat"`` compares every row: scores and order are exact, equal scores stand in the
    gallery's order, and the vectors are held in memory as float32. Any other string of FAISS's
    ``index_factory`` proposes candidates, whose scores are computed from the stored vectors; rows that are
    newer than the index are compared as well, and so is a part too small to train one.

    Attributes:
        path: Its directory; ``None`` in memory.

    Example:
        >>> gallery = Gallery.create("gallery", space=old.space)
        >>> gallery.add(old.encode_images(images), names)
        >>> gallery.search(upgraded.encode_texts(["a dog on a beach"]), k=10, space=upgraded.space).ids[0]
        >>> gallery.begin_part(new.space)
        >>> gallery.backfill(new.encode_images(images[:100]), names[:100])
    """

    @classmethod
    def build(
        cls,
        vectors: Vectors,
        ids: Sequence[str],
        space: EmbeddingSpace | None = None,
        index: str = EXACT,
        tuning: str = "",
    ) -> Self:
        """Makes a gallery in memory.

        Args:
            vectors: (n, dim) torch tensor or numpy array of any float dtype, kept as float32 as they are:
                nothing is normalised.
            ids: n unique strings.
            space: The space the vectors live in, usually ``encoder.space``.
            index: As in :meth:`create`.
            tuning: As in :meth:`create`.

        Raises:
            DataError: If there are no vectors, a value is NaN, or ids are missing, repeated or no strings.
            SpaceMismatchError: If the vectors do not have the dimension of ``space``.
            ConfigError: If FAISS does not know the index.
        """
        rows = as_rows(vectors, "gallery vectors", None if space is None else space.dim)
        names = as_ids(ids, "ids", len(rows))
        plan = IndexPlan(index, tuning)
        plan.check(rows.shape[1])
        part = Part(OLD, space, rows.shape[1], plan)
        part.segments.append(MemorySegment(segment_name(OLD, 0), part.dim))
        part.segments[0].append(rows, names, None)
        contents = Contents([part])
        contents.refresh()
        return cls(contents)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        space: EmbeddingSpace | None = None,
        store: EmbeddingStore | str | Path | None = None,
        modality: str | None = None,
        index: str = EXACT,
        tuning: str = "",
        dtype: str = "float16",
    ) -> Self:
        """Makes a gallery on disk: an empty one, or one of a store that is there.

        Args:
            path: Its directory, which must be empty or not exist.
            space: The space of the vectors; needed unless ``store`` says it.
            store: A store, or a folder that clip-retrieval wrote, whose rows become the gallery's first ones.
                It is read where it is, and never written to; rows that it gets later on are not seen.
            modality: ``"image"`` (what is assumed) or ``"text"``; that of ``store``, if there is one.
            index: A string of FAISS's ``index_factory``, such as ``"Flat"`` (exact), ``"IVF1024,Flat"``,
                ``"HNSW32"`` or ``"IVF4096,PQ64"``. What has to be trained is trained on the vectors.
            tuning: Search parameters such as ``"nprobe=64"`` or ``"efSearch=128"``. Without it an inverted
                file looks into √n of its n lists.
            dtype: ``"float16"`` or ``"float32"``, on disk.

        Returns:
            The gallery, open for writing.

        Raises:
            ConfigError: If FAISS does not know the index.
            DataError: If no space is known.
            StoreError: If the directory holds anything or cannot be written, or the store cannot be opened.
            SpaceMismatchError: If the store is of another space.
        """
        segments: tuple[SegmentRecord, ...] = ()
        if store is not None:
            if not isinstance(store, EmbeddingStore):
                store = EmbeddingStore.open(store, modality, space)
            elif space is not None and store.space is not None:
                space.require(store.space, f"the vectors of {store.path}")
            space, modality, dim = store.space, store.modality, store.dim
            segments = (record_of(store, len(store), segment_name(OLD, 0), Path(path).expanduser()),)
        elif space is None:
            raise DataError(
                f"the gallery {path} needs a space; give space=encoder.space, or a store that has one"
            )
        else:
            dim = space.dim
        plan = IndexPlan(index, tuning)
        plan.check(dim)
        part = PartRecord(OLD, space, dim, modality or "image", dtype, segments)
        return cls(None, Home.create(path, plan, part))

    @classmethod
    def open(
        cls,
        path: str | Path,
        read_only: bool = False,
        mmap: bool = False,
        stores: Mapping[str, str | Path] | None = None,
    ) -> Self:
        """Opens a gallery on disk.

        Args:
            path: Its directory.
            read_only: Whether to refuse every write through this object.
            mmap: Whether an inverted file (``"IVF…"``) is mapped from disk instead of read into memory.
            stores: Where stores are now that the gallery was made of and that have been moved, by the paths
                they had. Not needed for a store that lies beside the gallery and is moved together with it.

        Raises:
            StoreError: If there is no gallery, it is damaged, or a store that it was made of is gone or has
                other rows.
            ConfigError: If ``mmap`` is asked for and the index is no inverted file.
        """
        home = Home(Path(path).expanduser(), read_only, mmap, stores)
        if mmap:
            home.record.plan.require_inverted_file(home.record.parts[0].dim)
        return cls(None, home)

    def save(self, path: str | Path, dtype: str = "float32", modality: str = "image") -> Self:
        """Writes the items of a gallery of one part into a new gallery on disk; this one stays as it is.

        Args:
            path: Its directory, which must be empty or not exist.
            dtype: ``"float16"`` or ``"float32"``, on disk.
            modality: ``"image"`` or ``"text"``.

        Returns:
            The new gallery, open for writing.

        Raises:
            DataError: If the gallery has two parts or its space is not known.
            StoreError: As :meth:`create`.
        """
        if len(self.parts) > 1:
            raise DataError(
                "a gallery of two parts cannot be saved as one; backfill the rest and call compact() first"
            )
        part = self.parts[0]
        target = type(self).create(path, space=part.space, dtype=dtype, modality=modality)
        ids = self.ids
        if ids:
            target.add(self.vectors(ids), ids, metadata=self.metadata(ids))
        return target

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
