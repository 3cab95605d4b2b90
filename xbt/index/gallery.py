"""Gallery of vectors with string ids, searched and backfilled while it serves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xbt.errors import ConfigError, DataError
from xbt.index.faiss_index import EXACT, IndexPlan
from xbt.index.maintenance import compact, create_gallery, drop_part, faults_of
from xbt.index.mixed import Merge, merge_hits, next_vector_name, require_same_count
from xbt.index.parts import OLD, PartSummary
from xbt.index.protocol import Batch, Hits, IndexInfo
from xbt.index.segments import PartRecord, part_name
from xbt.index.state import State
from xbt.index.storage import DATABASE, StaleError, Storage
from xbt.index.views import search_views
from xbt.space import EmbeddingSpace
from xbt.store.layout import Header
from xbt.store.store import EmbeddingStore
from xbt.vectors import Vectors, as_ids, as_k, as_queries, as_rows

if TYPE_CHECKING:
    from xbt.index.cascade import Cascade


class Gallery:
    """Searchable vectors with ids, in memory (:meth:`build`) or on disk (:meth:`create`, :meth:`open`).

    **Processes.** One process at a time writes to a gallery on disk, while any number of processes search it.
    A reader calls :meth:`reload` to see later writes. Writes are atomic, and durable on return, however
    the process ends. Unpickling a gallery on disk opens it again.

    **Errors.** A read raises :class:`~xbt.errors.StoreError` if a file is damaged or gone. A write also does
    if another process is writing, the gallery is read-only, or the disk is full. An error changes nothing.

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

    def __init__(self, plan: IndexPlan, storage: Storage | None = None) -> None:
        self._state = State(plan, storage)

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
        part = gallery._state.add_part(PartRecord(OLD, space, rows.shape[1], "image", "float32"))
        gallery._state.append(part, rows, names, None)
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
        directory, space = create_gallery(path, space, store, modality, IndexPlan(index, tuning), dtype)
        gallery = cls.open(directory)
        with gallery._state.reading() as parts:
            parts.old.trust(space)
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
            gallery.plan.require_inverted_file(gallery.parts[0].dim)
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
        return self._state.path

    @property
    def plan(self) -> IndexPlan:
        """Kind of index."""
        return self._state.plan

    @property
    def parts(self) -> tuple[PartSummary, ...]:
        """Summaries of the parts, oldest first: one, or two during a backfill."""
        with self._state.reading() as parts:
            return tuple(part.summary() for part in parts)

    @property
    def space(self) -> EmbeddingSpace | None:
        """Space of the part that can be searched alone: the old one until every item is backfilled."""
        with self._state.reading() as parts:
            return parts.alone.space

    @property
    def dim(self) -> int:
        """Dimension of the vectors of that part."""
        with self._state.reading() as parts:
            return parts.alone.dim

    @property
    def ids(self) -> list[str]:
        """Every item once: those searched in the old part, then those in the new part."""
        return self._state.ids()

    def ids_of(self, part: str) -> list[str]:
        """List the items searched in one part, in order. For ``"old"``, these are still to be backfilled.

        Raises:
            DataError: If there is no such part.
        """
        with self._state.reading() as parts:
            return parts.part(part).live_ids()

    @property
    def fraction_backfilled(self) -> float:
        """Fraction of the items in the new part: 0 before it is added, 1 once the old part is dropped."""
        with self._state.reading() as parts:
            return parts.fraction_backfilled

    def info(self) -> IndexInfo:
        """See :meth:`VectorIndex.info <xbt.index.VectorIndex.info>`; each part is a named vector."""
        with self._state.reading() as parts:
            return parts.info()

    def __len__(self) -> int:
        with self._state.reading() as parts:
            return parts.count

    def __contains__(self, item: object) -> bool:
        with self._state.reading() as parts:
            return isinstance(item, str) and parts.find(item) is not None

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
        """
        with self._state.reading() as parts:
            owner, rows = parts.rows(as_ids(ids, "ids"), part)
            vectors = owner.rows.gather(rows)
            return vectors.copy() if self.path is None else vectors  # it may be a view in memory

    def fetch(self, ids: Sequence[str], name: str) -> NDArray[np.float32]:
        """See :meth:`VectorIndex.fetch <xbt.index.VectorIndex.fetch>`."""
        return self.vectors(ids, name)

    def metadata(self, ids: Sequence[str], part: str | None = None) -> pa.Table | None:
        """Read the metadata columns of items in the requested order; ``None`` if there are none.

        Arguments and errors are those of :meth:`vectors`.
        """
        names = as_ids(ids, "ids")
        with self._state.lock:
            owner, rows = self._state.parts.rows(names, part)
            try:
                return owner.metadata(rows)
            except StaleError:  # another process has compacted the gallery
                self.reload()
                owner, rows = self._state.parts.rows(names, part)
                return owner.metadata(rows)

    def scan(
        self, *, missing: str | None = None, vectors: str | None = None, batch_size: int = 1024
    ) -> Iterator[Batch]:
        """See :meth:`VectorIndex.scan <xbt.index.VectorIndex.scan>`; scans a snapshot of the rows."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, but must be at least 1")
        with self._state.reading() as parts:
            hidden = set() if missing is None else set(parts.part(missing).with_vector())
            wanted = None if vectors is None else set(parts.part(vectors).with_vector())
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
            views = self._state.views_of(using, without)
            views[0].require_space(space, "the query vectors")
            return search_views(views, as_queries(queries, "query vectors", views[0].dim), as_k(k))
        view = self._state.view(part)
        k = as_k(k, view.count)
        view.require_space(space, "the query vectors")
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
        """
        views = self._state.views()
        require_same_count(old_queries, new_queries)
        k = as_k(k, sum(view.count for view in views))
        asked = [(old_queries, old_space, "old"), (new_queries, new_space, "new")]
        if len(views) == 1 and views[0].name != OLD:
            asked = asked[1:]
        hits = []
        for view, (queries, space, name) in zip(views, asked, strict=False):
            view.require_space(space, f"the {name} query vectors")
            rows = as_queries(queries, f"{name} query vectors", view.dim)
            hits.append(view.hits(rows, min(k, view.count)))
        sizes = [view.count for view in views]
        if 0 in sizes or len(views) == 1:
            return hits[0 if sizes[0] else 1]
        return merge_hits(merge, hits[0], hits[1], k, (sizes[0], sizes[1]))

    def prepare(self) -> None:
        """Prepare the first search: read the rows, and make or update the index."""
        self._state.views(wait=True)

    def prepare_index(self) -> None:
        """Make or update an approximate index; do nothing for ``"Flat"``.

        A writer calls this from time to time for readers that map the index. Without an index, they read all
        rows for every search.
        """
        if not self.plan.exact:
            self.prepare()

    def reload(self) -> None:
        """Load the writes of other processes; do nothing in memory."""
        self._state.reload()

    def verify(self) -> list[str]:
        """Read every byte and compare it with the recorded checksums.

        Returns:
            One sentence per fault, with the file and a fix; empty if the gallery is intact.
        """
        with self._state.reading() as parts:
            return faults_of(self._state.storage, parts)

    def close(self) -> None:
        """Release the vectors in memory and the mapped files."""
        self._state.close()

    # -- writing ---------------------------------------------------------------------------------------

    def add(
        self, vectors: Vectors, ids: Sequence[str], space: EmbeddingSpace | None = None, metadata: Any = None
    ) -> None:
        """Add items. Large batches are faster.

        Args:
            vectors: (n, dim) vectors, stored without normalisation.
            ids: n unique strings that are not in the gallery. To replace an item, remove it first.
            space: Space of the vectors, which selects the part; required if there are two.
            metadata: Mapping or ``pyarrow.Table`` of columns with n values each.

        Raises:
            DataError: If there are no vectors, a value is NaN, a vector is too short for float16, or ids are
                repeated or already in the gallery.
            SpaceMismatchError: If the space or dimension differs from that of the gallery.
        """
        with self._state.writing() as parts:
            part = parts.of_space(space, "the vectors to add")
            rows, names = as_rows(vectors, "vectors to add", part.dim), as_ids(ids, "ids", len(vectors))
            parts.refuse_known(names)
            self._state.append(part, rows, names, metadata)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove items from every part; :meth:`compact` frees their space.

        Args:
            ids: Ids of items of the gallery. Either all are removed or none.

        Raises:
            DataError: If an id is not in the gallery, or is repeated.
        """
        names = as_ids(ids, "ids")
        with self._state.writing() as parts:
            self._state.change(parts.removal(names))

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
        """
        if name is not None:
            part_name(name)
        with self._state.writing() as parts:
            old = parts.old.record
            name = next_vector_name(old.name) if name is None else name
            parts.check_next(space, name)
            kinds = modality or old.modality, dtype or old.dtype
            Header(kinds[0], space, kinds[1], space.dim)  # refuses other modalities and dtypes
            self._state.add_part(PartRecord(name, space, space.dim, *kinds))

    def add_vector(self, name: str, space: EmbeddingSpace) -> None:
        """See :meth:`VectorIndex.add_vector <xbt.index.VectorIndex.add_vector>`; adds a part."""
        with self._state.writing() as parts:
            if name in [part.name for part in parts]:
                parts.part(name).require_space(space, f"the vector {name!r} to add")
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
        """
        with self._state.writing() as parts:
            old, new = parts.old, parts.newest
            if new is old:
                raise DataError("the gallery has no new part to backfill; call begin_part(space) first")
            new.require_space(space, "the vectors to backfill")
            rows, names = as_rows(vectors, "vectors to backfill", new.dim), as_ids(ids, "ids", len(vectors))
            moved = parts.backfilling(names)
            columns = old.metadata(moved) if metadata is None else metadata
            self._state.append(new, rows, names, columns, old.as_changes(moved.tolist(), moved=True))

    def upsert(self, ids: Sequence[str], vectors: Vectors, name: str) -> None:
        """See :meth:`VectorIndex.upsert <xbt.index.VectorIndex.upsert>`; backfills where the part is new."""
        with self._state.writing() as parts:
            part = parts.part(name)
            rows, names = as_rows(vectors, "vectors to write", part.dim), as_ids(ids, "ids", len(vectors))
            columns, changes = parts.upserting(names, part)
            self._state.append(part, rows, names, columns, changes)

    def drop_vector(self, name: str) -> None:
        """Drop a part: roll a backfill back, or delete a completely backfilled old part.

        Args:
            name: Name of the part.

        Raises:
            DataError: If there is no such part, it is the only one, or some items have no other vector.
        """
        with self._state.writing() as parts, self._state.indexing:
            self._state.swap(drop_part(parts, name, self._state.storage))

    def compact(self) -> None:
        """Rewrite the gallery in few large files without removed and moved rows.

        This drops an old part whose items are all backfilled. :meth:`search_mixed` then uses only the new
        queries, and another part can be added. Open readers keep their rows until they call :meth:`reload`.
        """
        # The lock of the indexes keeps the sweep from deleting a half-written index of another thread.
        with self._state.writing() as parts, self._state.indexing:
            self._state.swap(compact(parts, self._state.storage))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock over many writes. Without this, every write takes the lock itself.

        Example:
            >>> with gallery.writing():
            ...     for vectors, ids in batches:
            ...         gallery.backfill(vectors, ids)
        """
        with self._state.writing():
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
