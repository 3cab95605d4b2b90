"""Gallery of vectors with string ids, searched and backfilled while it serves."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.errors import ConfigError, DataError, StoreError
from xbt.index.checks import as_ids, as_k, as_queries, as_rows, require_storable
from xbt.index.compaction import compact, drop_part
from xbt.index.create import create_gallery
from xbt.index.faiss_index import EXACT, IndexManager, IndexPlan
from xbt.index.mixed import Merge, merge_hits, next_vector_name, require_same_count
from xbt.index.parts import NEXT, OLD, Part, Parts, PartSummary, require_space
from xbt.index.protocol import Batch, Hits, IndexInfo
from xbt.index.segments import Change, MemorySegment, PartRecord, part_name
from xbt.index.storage import DATABASE, Mark, News, NewSegment, StaleError, Storage
from xbt.index.verify import faults_of
from xbt.index.views import PartView, Views, search_views
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore
from xbt.store.layout import Header
from xbt.vectors import Vectors

if TYPE_CHECKING:
    from xbt.index.cascade import Cascade


class Gallery:
    """Searchable vectors with ids, in memory (:meth:`build`) or on disk (:meth:`create`, :meth:`open`).

    **Processes.** One process at a time writes to a gallery on disk, while any number of processes search it.
    A reader calls :meth:`reload` to see later writes. Writes are atomic, and durable on return, however
    the process ends. Unpickling a gallery on disk opens it again.

    **Threads.** Any number of threads may search while one writes. Every search sees a consistent snapshot.

    **Backfills.** :meth:`begin_part` adds a second part for vectors of the new space, :meth:`backfill` moves
    items there, and :meth:`search_mixed` searches both parts. An item in the new part is masked in the old
    one. In the protocol :class:`~xbt.index.VectorIndex`, each part is a named vector.

    **Indexes.** ``"Flat"`` compares every row: scores and order are exact, equal scores keep the order of the
    gallery, and the vectors are held in memory as float32. Any other FAISS ``index_factory`` string makes an
    index that proposes candidates, whose scores are then computed from the stored vectors. Rows newer than
    the index, and parts too small to train one, are compared exactly.

    Example:
        >>> gallery = Gallery.create("gallery", space=old.space)
        >>> gallery.add(old.encode_images(images), names)
        >>> gallery.search(upgraded.encode_texts(["a dog on a beach"]), k=10, space=upgraded.space).ids[0]
        >>> gallery.begin_part(new.space)
        >>> gallery.backfill(new.encode_images(images[:100]), names[:100])
    """

    # A write holds `_writer` throughout, and `_state` only while the parts change. A search takes immutable
    # views and holds neither.

    def __init__(self, plan: IndexPlan, storage: Storage | None = None) -> None:
        self._storage = storage
        self._parts = Parts(plan, self.path)
        self._mark: Mark | None = None
        self._closed = False
        self._ids: list[str] | None = None
        self._new_locks()
        self._views = self._new_views()
        _OPEN.add(self)

    @classmethod
    def build(
        cls,
        vectors: Vectors,
        ids: Sequence[str],
        space: EmbeddingSpace | None = None,
        index: str = EXACT,
        tuning: str = "",
    ) -> Self:
        """Make a gallery in memory.

        Args:
            vectors: (n, dim) torch tensor or numpy array of any float dtype, stored as float32 without
                normalisation.
            ids: n unique strings.
            space: Space of the vectors, usually ``encoder.space``.
            index: As in :meth:`create`.
            tuning: As in :meth:`create`.

        Raises:
            DataError: If there are no vectors, a value is NaN, or ids are missing, repeated or not strings.
            SpaceMismatchError: If the vectors do not have the dimension of ``space``.
            ConfigError: If FAISS does not know the index.
        """
        rows = as_rows(vectors, "gallery vectors", None if space is None else space.dim)
        names = as_ids(ids, "ids", len(rows))
        gallery = cls(IndexPlan(index, tuning))
        gallery.plan.check(rows.shape[1])
        gallery._begin(PartRecord(OLD, space, rows.shape[1], "image", "float32"))
        gallery._append(gallery._parts.old, rows, names, None)
        return gallery

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
        """Make a gallery on disk, empty or from an existing store.

        Args:
            path: Directory of the gallery, which must be empty or not exist.
            space: Space of the vectors; required unless ``store`` declares it.
            store: A store or a clip-retrieval folder, whose rows become the first rows of the gallery. It is
                read in place and never written to. Rows added to it later are ignored.
            modality: ``"image"`` (the default) or ``"text"``; with a store, that of the store.
            index: FAISS ``index_factory`` string such as ``"Flat"`` (exact), ``"IVF1024,Flat"``,
                ``"HNSW32"`` or ``"IVF4096,PQ64"``. Indexes that need training are trained on the vectors.
            tuning: Search parameters such as ``"nprobe=64"`` or ``"efSearch=128"``. By default an inverted
                file probes √n of its n lists.
            dtype: ``"float16"`` or ``"float32"``, on disk.

        Returns:
            The gallery, open for writing.

        Raises:
            ConfigError: If FAISS does not know the index.
            DataError: If no space is known, or a row of the store has NaN or infinity, or has not length 1
                although its space is normalised.
            StoreError: If the directory is not empty or not writable, or the store cannot be opened.
            SpaceMismatchError: If the store has another space.
        """
        if store is not None:
            if not isinstance(store, EmbeddingStore):
                store = EmbeddingStore.open(store, modality, space)
            elif space is not None and store.space is not None:
                space.require(store.space, f"the vectors of {store.path}")
            space, modality, dim = store.space, store.modality, store.dim
        elif space is None:
            raise DataError(
                f"the gallery {path} needs a space; give space=encoder.space, or a store that has one"
            )
        else:
            dim = space.dim
        plan = IndexPlan(index, tuning)
        plan.check(dim)
        Header(modality or "image", space, dtype, dim)  # refuses other modalities and dtypes
        part = PartRecord(OLD, space, dim, modality or "image", dtype)
        gallery = cls.open(create_gallery(path, plan, part, store))
        gallery._parts.old.trust(space)
        return gallery

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Check for a gallery in a directory, intact or damaged."""
        return (Path(path).expanduser() / DATABASE).is_file()

    @classmethod
    def open(
        cls,
        path: str | Path,
        read_only: bool = False,
        mmap: bool = False,
        stores: Mapping[str, str | Path] | None = None,
    ) -> Self:
        """Open a gallery on disk.

        Args:
            path: Directory of the gallery.
            read_only: Whether to refuse every write through this object.
            mmap: Whether to map an inverted file (``"IVF…"``) from disk instead of reading it into memory.
            stores: New paths of moved stores that the gallery was made of, by their old paths. Not needed for
                a store beside the gallery that was moved together with it.

        Raises:
            StoreError: If there is no gallery, it is damaged, or a store it was made of is gone or has other
                rows.
            ConfigError: If ``mmap`` is set and the index is not an inverted file.
        """
        gallery = cls(IndexPlan(), Storage(Path(path).expanduser(), read_only, mmap, stores))
        gallery.reload()
        if mmap:
            gallery.plan.require_inverted_file(gallery._parts.old.dim)
        return gallery

    def save(self, path: str | Path, dtype: str = "float32", modality: str = "image") -> Self:
        """Copy a gallery of one part to a new gallery on disk.

        Args:
            path: Directory of the new gallery, which must be empty or not exist.
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
        target = type(self).create(path, space=self.parts[0].space, dtype=dtype, modality=modality)
        ids = self.ids
        if ids:
            target.add(self.vectors(ids), ids, metadata=self.metadata(ids))
        return target

    # -- description -----------------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """Directory of the gallery; ``None`` in memory."""
        return None if self._storage is None else self._storage.path

    @property
    def plan(self) -> IndexPlan:
        """Kind of index."""
        return self._parts.plan

    @property
    def parts(self) -> tuple[PartSummary, ...]:
        """Summaries of the parts, oldest first: one, or two during a backfill."""
        with self._state:
            return tuple(part.summary() for part in self._known)

    @property
    def space(self) -> EmbeddingSpace | None:
        """Space of the part that can be searched alone: the old one until every item is backfilled."""
        with self._state:
            return self._known.alone.space

    @property
    def dim(self) -> int:
        """Dimension of the vectors of that part."""
        with self._state:
            return self._known.alone.dim

    @property
    def ids(self) -> list[str]:
        """Every item once: those searched in the old part, then those in the new part."""
        with self._state:
            known = self._known
            if self._ids is None:
                self._ids = [item for part in known for item in part.live_ids()]
            return self._ids

    def ids_of(self, part: str) -> list[str]:
        """List the items searched in one part, in order. For ``"old"``, these are still to be backfilled.

        Raises:
            DataError: If there is no such part.
        """
        with self._state:
            return self._known.part(part).live_ids()

    @property
    def fraction_backfilled(self) -> float:
        """Fraction of the items in the new part: 0 before it is added, 1 once the old part is dropped."""
        with self._state:
            return self._known.fraction_backfilled

    def info(self) -> IndexInfo:
        """See :meth:`VectorIndex.info <xbt.index.VectorIndex.info>`; each part is a named vector."""
        with self._state:
            return self._known.info()

    def __len__(self) -> int:
        with self._state:
            return self._known.count

    def __contains__(self, item: object) -> bool:
        with self._state:
            return isinstance(item, str) and self._known.find(item) is not None

    def __repr__(self) -> str:
        parts = [f"{p.count} items, space={'unknown' if p.space is None else p.space}" for p in self.parts]
        where = "" if self.path is None else f"'{self.path}', "
        return f"Gallery({where}{'; '.join(parts)})"

    # -- reading ---------------------------------------------------------------------------------------

    def vectors(self, ids: Sequence[str], part: str | None = None) -> NDArray[np.float32]:
        """Read stored vectors of items.

        Args:
            ids: Ids of items of the gallery.
            part: Name of the part to read. The old part keeps the old vectors of backfilled items until
                :meth:`compact`. By default all items must be searched in the same part.

        Returns:
            (n, dim) float32, in the requested order.

        Raises:
            DataError: If an item is unknown, or no part is given and the items are in two parts.
            StoreError: If a file is damaged or gone.
        """
        with self._state:
            owner, rows = self._known.rows(as_ids(ids, "ids"), part)
            vectors = owner.rows.gather(rows)
            return vectors.copy() if self._storage is None else vectors  # it may be a view in memory

    def fetch(self, ids: Sequence[str], name: str) -> NDArray[np.float32]:
        """See :meth:`VectorIndex.fetch <xbt.index.VectorIndex.fetch>`."""
        return self.vectors(ids, name)

    def metadata(self, ids: Sequence[str], part: str | None = None) -> pa.Table | None:
        """Read the metadata columns of items; ``None`` if there are none.

        Args:
            ids: As in :meth:`vectors`.
            part: As in :meth:`vectors`.

        Returns:
            A table with one row per item, in the requested order.

        Raises:
            DataError: As :meth:`vectors`.
            StoreError: As :meth:`vectors`.
        """
        names = as_ids(ids, "ids")
        with self._state:
            try:
                owner, rows = self._known.rows(names, part)
                return owner.metadata(rows)
            except StaleError:  # another process has compacted the gallery
                self.reload()
                owner, rows = self._known.rows(names, part)
                return owner.metadata(rows)

    def scan(
        self, *, missing: str | None = None, vectors: str | None = None, batch_size: int = 1024
    ) -> Iterator[Batch]:
        """See :meth:`VectorIndex.scan <xbt.index.VectorIndex.scan>`; scans a snapshot of the rows."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, but must be at least 1")
        with self._state:
            known = self._known
            hidden = set() if missing is None else set(known.part(missing).with_vector())
            wanted = None if vectors is None else set(known.part(vectors).with_vector())
            ids = [item for item in self.ids if item not in hidden and (wanted is None or item in wanted)]
        for start in range(0, len(ids), batch_size):
            some = ids[start : start + batch_size]
            yield Batch(some, None if vectors is None else self.fetch(some, vectors))

    def search(
        self,
        queries: Vectors,
        k: int = 10,
        space: EmbeddingSpace | None = None,
        part: str | None = None,
        *,
        using: str | None = None,
        without: str | None = None,
        filter: Any = None,
        rerank: Cascade | None = None,
        new_queries: Vectors | None = None,
    ) -> Hits:
        """Find the k items with the largest inner product for every query.

        Args:
            queries: (n_queries, dim) query vectors, or one of shape (dim,).
            k: Items per query, from 1 to the size of the gallery. There are always k results, unless
                ``using`` is given.
            space: Space of the queries. Pass it, since queries of another model give meaningless scores.
            part: Search only the items of this part. Required while items are in two parts; see
                :meth:`search_mixed` to search both.
            using: Search all vectors of this part, including the old vectors of backfilled items; see
                :meth:`VectorIndex.search <xbt.index.VectorIndex.search>`.
            without: With ``using``: exclude items with a vector in this part.
            filter: Must be ``None``, since a gallery does not support filters.
            rerank: Let the new model order the first results; see :func:`~xbt.index.cascaded_search`.
            new_queries: The same queries under the new model, with ``rerank``.

        Raises:
            DataError: If k is out of range, there are no queries, a value is NaN, or items are in two parts.
            SpaceMismatchError: If the space or the dimension is not the gallery's.
            StoreError: If a file that has to be read is damaged or gone.
            ConfigError: If a filter is given.
        """
        if filter is not None:
            raise ConfigError(
                "a gallery does not support filters; leave filter out, and filter the results yourself"
            )
        if rerank is not None:
            one = {"part": part, "using": using, "without": without}
            return rerank.search(self, queries, new_queries, k, old_space=space, **one)
        if using is not None:
            views = self._views.of_vectors(using, without)
            self._require_space(views[0], space, "the query vectors")
            return search_views(views, as_queries(queries, "query vectors", views[0].dim), as_k(k))
        view = self._views.alone(part)
        k = as_k(k, view.count)
        self._require_space(view, space, "the query vectors")
        return view.hits(as_queries(queries, "query vectors", view.dim), k)

    def search_mixed(
        self,
        old_queries: Vectors,
        new_queries: Vectors,
        k: int,
        merge: Merge,
        old_space: EmbeddingSpace | None = None,
        new_space: EmbeddingSpace | None = None,
    ) -> Hits:
        """Search both parts, each with queries of its own space, and merge the results.

        Args:
            old_queries: (n, old_dim) queries in the space of the old part.
            new_queries: (n, new_dim) the same queries in the space of the new part.
            k: Items per query, from 1 to the size of the gallery.
            merge: Merge rule, which puts the scores of both parts on one scale, or interleaves them by rank.
            old_space: Space of the old queries.
            new_space: Space of the new queries.

        Returns:
            Merged hits with the scores of the merge. If one part is empty, exactly the hits of the other one.
            A gallery of one part uses the old queries, or the new ones if the part was added by
            :meth:`begin_part` and :meth:`compact` has dropped the old one.

        Raises:
            DataError: If k is out of range, a value is NaN, or the numbers of old and new queries differ.
            SpaceMismatchError: If the queries of a part have another space or dimension.
            StoreError: If a required file is damaged or gone.
        """
        views = self._views.all()
        require_same_count(old_queries, new_queries)
        k = as_k(k, sum(view.count for view in views))
        asked = [(old_queries, old_space, "old"), (new_queries, new_space, "new")]
        if len(views) == 1 and views[0].name != OLD:
            asked = asked[1:]
        found = []
        for view, (queries, space, name) in zip(views, asked, strict=False):
            self._require_space(view, space, f"the {name} query vectors")
            rows = as_queries(queries, f"{name} query vectors", view.dim)
            found.append(view.hits(rows, min(k, view.count)))
        sizes = [view.count for view in views]
        if 0 in sizes or len(views) == 1:
            return found[0 if sizes[0] else 1]
        return merge_hits(merge, found[0], found[1], k, (sizes[0], sizes[1]))

    def prepare(self) -> None:
        """Prepare the first search: read the rows, and make or update the index.

        Raises:
            StoreError: If a required file is damaged or gone.
        """
        self._views.all(wait=True)

    def prepare_index(self) -> None:
        """Make or update an approximate index; do nothing for ``"Flat"``.

        A writer calls this from time to time for readers that map the index. Without an index, they read all
        rows for every search.

        Raises:
            StoreError: If a required file is damaged or gone.
        """
        if not self.plan.exact:
            self.prepare()

    def reload(self) -> None:
        """Load the writes of other processes; do nothing in memory.

        Raises:
            StoreError: If the gallery is gone or damaged.
        """
        if self._storage is None:
            return
        with self._state:
            self._closed = False
            mark, self._mark = self._mark, None  # never use partly updated parts
            self._take(self._storage.read(mark))

    def verify(self) -> list[str]:
        """Read every byte and compare it with the recorded checksums.

        Returns:
            One sentence per fault, with the file and a fix; empty if the gallery is intact.
        """
        with self._state:
            return faults_of(self._storage, self._known)

    def close(self) -> None:
        """Release the vectors in memory and the mapped files."""
        with self._state:
            self._parts, self._mark = Parts(self.plan, self.path), None
            self._views.made, self._ids, self._closed = None, None, True

    # -- writing ---------------------------------------------------------------------------------------

    def add(
        self, vectors: Vectors, ids: Sequence[str], space: EmbeddingSpace | None = None, metadata: Any = None
    ) -> None:
        """Add items. On an error the gallery is unchanged. Large batches are faster.

        Args:
            vectors: (n, dim) vectors, stored without normalisation.
            ids: n unique strings that are not in the gallery. To replace an item, remove it first.
            space: Space of the vectors, which selects the part; required if there are two.
            metadata: Mapping or ``pyarrow.Table`` of columns with n values each.

        Raises:
            DataError: If there are no vectors, a value is NaN, a vector is too short for float16, or ids are
                repeated or already in the gallery.
            SpaceMismatchError: If the space or dimension differs from that of the gallery.
            StoreError: If another process is writing, the disk is full, or the metadata cannot be stored.
        """
        with self.writing():
            known = self._known
            part = known.of_space(space, "the vectors to add")
            rows, names = as_rows(vectors, "vectors to add", part.dim), as_ids(ids, "ids", len(vectors))
            known.refuse_known(names)
            self._append(part, rows, names, metadata)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove items from every part; :meth:`compact` frees their space.

        Args:
            ids: Ids of items of the gallery. Either all are removed or none.

        Raises:
            DataError: If an id is not in the gallery, or is repeated.
            StoreError: If another process is writing, or the disk is full.
        """
        names = as_ids(ids, "ids")
        with self.writing():
            changes = self._known.removal(names)
            if self._storage is None:
                self._mask(changes)
            elif changes:
                known = self._known_mark()
                self._take_own(self._storage.log(known, changes), known)

    def begin_part(
        self,
        space: EmbeddingSpace,
        name: str | None = None,
        dtype: str | None = None,
        modality: str | None = None,
    ) -> None:
        """Add a second part for the vectors of the new model, to start a backfill.

        Args:
            space: The new space.
            name: Name of the part; by default ``"new"``, in later backfills ``"new2"``, ``"new3"`` …
            dtype: ``"float16"`` or ``"float32"``, on disk; by default that of the old part.
            modality: ``"image"`` or ``"text"``; by default that of the old part.

        Raises:
            DataError: If there are two parts already, the name is taken, or the space is the old one.
            ConfigError: If the index of the gallery cannot be made for the new dimension.
            StoreError: If another process is writing, or the disk is full.
        """
        if name is not None:
            part_name(name)
        with self.writing():
            old = self._known.old.record
            name = next_vector_name(old.name) if name is None else name
            self._known.check_next(space, name)
            kinds = modality or old.modality, dtype or old.dtype
            Header(kinds[0], space, kinds[1], space.dim)  # refuses other modalities and dtypes
            self._begin(PartRecord(name, space, space.dim, *kinds))
            self._parts.newest.trust(space)

    def add_vector(self, name: str, space: EmbeddingSpace) -> None:
        """See :meth:`VectorIndex.add_vector <xbt.index.VectorIndex.add_vector>`; adds a part."""
        with self.writing():
            if name in [part.name for part in self._known]:
                self._known.part(name).require_space(space, f"the vector {name!r} to add")
            else:
                self.begin_part(space, name)

    def backfill(
        self, vectors: Vectors, ids: Sequence[str], space: EmbeddingSpace | None = None, metadata: Any = None
    ) -> None:
        """Move items of the old part to the new part, with vectors of the new model.

        Args:
            vectors: (n, new_dim) vectors of the new model.
            ids: Ids of n items searched in the old part.
            space: Space of the vectors, for a check.
            metadata: Metadata columns; by default the items keep theirs.

        Raises:
            DataError: If there is no second part, or an item is not in the old part.
            SpaceMismatchError: If the space or dimension differs from that of the new part.
            StoreError: If another process is writing, or the disk is full.
        """
        with self.writing():
            old, new = self._known.old, self._known.newest
            if new is old:
                raise DataError("the gallery has no new part to backfill; call begin_part(space) first")
            new.require_space(space, "the vectors to backfill")
            rows, names = as_rows(vectors, "vectors to backfill", new.dim), as_ids(ids, "ids", len(vectors))
            moved = self._known.backfilling(names)
            columns = old.metadata(moved) if metadata is None else metadata
            self._append(new, rows, names, columns, old.as_changes(moved.tolist(), moved=True))

    def upsert(self, ids: Sequence[str], vectors: Vectors, name: str) -> None:
        """See :meth:`VectorIndex.upsert <xbt.index.VectorIndex.upsert>`; backfills where the part is new."""
        with self.writing():
            part = self._known.part(name)
            rows, names = as_rows(vectors, "vectors to write", part.dim), as_ids(ids, "ids", len(vectors))
            columns, changes = self._known.upserting(names, part)
            self._append(part, rows, names, columns, changes)

    def drop_vector(self, name: str) -> None:
        """Drop a part: roll a backfill back, or delete a completely backfilled old part.

        Args:
            name: Name of the part.

        Raises:
            DataError: If there is no such part, it is the only one, or some items have no other vector.
            StoreError: If another process is writing, or the disk is full.
        """
        with self.writing(), self._views.indexing:
            self._go_on_with(drop_part(self._known, name, self._storage))

    def compact(self) -> None:
        """Rewrite the gallery in few large files without removed and moved rows.

        This drops an old part whose items are all backfilled. :meth:`search_mixed` then uses only the new
        queries, and another part can be added. Open readers keep their rows until they call :meth:`reload`.
        If the process is killed, the gallery is either unchanged or compacted.

        Raises:
            StoreError: If another process is writing, or the disk is full. The gallery is then unchanged.
        """
        # The lock of the indexes keeps the sweep from deleting a half-written index of another thread.
        with self.writing(), self._views.indexing:
            self._go_on_with(compact(self._known, self._storage))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock over many writes. Without this, every write takes the lock itself.

        Raises:
            StoreError: If another process is writing (the message names it), or the gallery was opened
                read-only.

        Example:
            >>> with gallery.writing():
            ...     for vectors, ids in batches:
            ...         gallery.backfill(vectors, ids)
        """
        with self._writer:
            storage = self._storage
            if storage is None or storage.writing:
                yield
                return
            storage.begin_writing()
            try:
                self.reload()  # another process may have written since
                yield
            finally:
                storage.end_writing()

    # -- state -----------------------------------------------------------------------------------------

    def _begin(self, record: PartRecord) -> None:
        if self._storage is None:
            with self._state:
                self._parts.add(self._made_part(record))
                self._views.made = self._ids = None
        else:
            self._storage.add_part(record)
            self.reload()

    def _append(
        self,
        part: Part,
        rows: NDArray[np.float32],
        ids: list[str],
        metadata: Any,
        changes: Sequence[Change] = (),
    ) -> None:
        """Commit rows as a new segment of a part, with changes of other segments."""
        columns = None if metadata is None else part.checked_columns(ids, metadata)
        if self._storage is not None:
            require_storable(rows, ids, part.record.dtype)
            if part.space is None:
                raise StoreError(
                    f"the part {part.name!r} of {self.path} is read-only, since the space of its vectors is "
                    "unknown; make the gallery with space="
                )
            known = self._known_mark()
            new = NewSegment(part.record, ids, (rows,), columns)
            self._take_own(self._storage.append(known, new, changes), known)
            return
        with self._state:
            number = 1 + max((each.number for own in self._parts for each in own.segments), default=0)
            part.grow([MemorySegment(number, rows.copy(), columns)], ids)
            self._mask([replace(each, segment=number) if each.segment == NEXT else each for each in changes])

    def _go_on_with(self, parts: Parts | None) -> None:
        """Replace the parts, unless there was nothing to do."""
        if self._storage is not None:
            if parts is not None:
                self.reload()
            self._storage.sweep()
        elif parts is not None:
            with self._state:
                self._parts = parts
                self._views.made = self._ids = None

    def _known_mark(self) -> Mark:
        with self._state:
            _ = self._known
            assert self._mark is not None
            return self._mark

    def _take_own(self, news: News, known: Mark) -> None:
        """Apply the updates of an own write that was based on a mark."""
        with self._state:
            if self._mark is not known:  # another thread has read the updates already
                self.reload()
            else:
                self._mark = None
                self._take(news)

    def _take(self, news: News) -> None:
        """Apply updates to the parts. The caller holds the lock."""
        if news.plan is not None and news.whole:
            self._parts = Parts(news.plan, self.path)
        for record in news.parts[len(self._parts) :] if news.parts else ():
            self._parts.add(self._made_part(record))
        self._parts.grow(news.segments)
        self._mask(news.changes)
        self._mark = news.mark

    def _mask(self, changes: Sequence[Change]) -> None:
        with self._state:
            if changes:
                self._parts.mask(changes)
            self._views.made = self._ids = None

    def _made_part(self, record: PartRecord) -> Part:
        storage, plan = self._storage, self.plan

        def manager() -> IndexManager:
            return IndexManager(record.dim, plan, None if storage is None else storage.cache(record, plan))

        return Part(record, manager)

    @property
    def _known(self) -> Parts:
        if self._closed:
            raise DataError(f"the gallery {self.path or 'in memory'} is closed; open it again")
        if self._storage is not None and self._mark is None:
            self.reload()
        return self._parts

    def _require_space(self, view: PartView, space: EmbeddingSpace | None, what: str) -> None:
        if space is not None and space not in view.trusted:
            require_space(view, space, what)

    # -- processes and threads -------------------------------------------------------------------------

    def _new_locks(self) -> None:
        self._writer, self._state = threading.RLock(), threading.RLock()

    def _new_views(self) -> Views:
        owner = weakref.proxy(self)  # an unreferenced gallery then frees its vectors at once
        return Views(self._state, lambda: owner._known)

    def _after_fork(self) -> None:
        """Replace the locks in a forked child, since other threads of the parent may have held them."""
        if self._storage is not None and not self._state.acquire(blocking=False):
            self._mark = None  # that thread was changing the parts, so read them again
        self._new_locks()
        self._views = self._new_views()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._storage is not None:
            return _reopened, (type(self), self._storage.path, *self._storage.options)
        with self._state:
            rows = [(part, np.flatnonzero(~part.masked)) for part in self._known]
            parts = [
                (part.record, [part.ids[row] for row in own], part.rows.gather(own), part.metadata(own))
                for part, own in rows
            ]
            return _rebuilt, (type(self), self.plan, parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reopened(cls: type[Gallery], *options: Any) -> Gallery:
    return cls.open(*options)


def _rebuilt(cls: type[Gallery], plan: IndexPlan, parts: Sequence[tuple[Any, ...]]) -> Gallery:
    gallery = cls(plan)
    for record, ids, rows, columns in parts:
        gallery._begin(record)
        if ids:
            gallery._append(gallery._parts.newest, rows, ids, columns)
    return gallery


_OPEN: weakref.WeakSet[Gallery] = weakref.WeakSet()


def _after_fork() -> None:
    for gallery in list(_OPEN):
        gallery._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
