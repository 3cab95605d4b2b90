"""A collection of Qdrant as an index: filled, searched, backfilled, and served behind an alias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from xbt.errors import ConfigError, DataError
from xbt.index import qdrant_client
from xbt.index.checks import as_ids, as_k, as_queries, as_rows
from xbt.index.items import Items, Source, portions
from xbt.index.mixed import Merge, next_vector_name, search_mixed
from xbt.index.protocol import EXACT_SCORES, FILTER, METADATA, Batch, Hits, IndexInfo, VectorInfo
from xbt.index.segments import part_name
from xbt.space import EmbeddingSpace
from xbt.store.shards import Metadata, as_table
from xbt.vectors import Vectors

if TYPE_CHECKING:  # searching with vectors needs no models
    from xbt.encoders import DualEncoder
    from xbt.index.cascade import Cascade

OLD = "old"
"""Name of the first vector."""


class QdrantIndex:
    """Items in a collection of Qdrant, under the named vector ``old`` and, once backfilled, ``new``.

    It implements :class:`~xbt.index.VectorIndex`. The collection's metadata keep the spaces of its vectors,
    and vectors of another space are refused. A point's id is derived from its item's (UUID version 5), so
    that writing an item again finds its point. The payload holds the item's id under ``id``, and the metadata
    beside it. An index stays with the collection that it opened: call :meth:`reload` to follow an alias that
    was switched.

    Args:
        client: The ``QdrantClient``.
        name: A collection or alias that exists; see :meth:`open`.

    Attributes:
        client: The client, for everything else that Qdrant offers.
        collection: The collection's own name, also where it was opened by an alias.

    Example:
        >>> index = QdrantIndex.create("http://localhost:6333", "photos-b32", space=store.space)
        >>> index.upload(store)
        >>> index.search(upgraded.encode_texts(["a dog"]), k=10, space=upgraded.space).ids[0]
    """

    def __init__(self, client: Any, name: str) -> None:
        self.client = client
        self._name = name
        self.reload()

    @classmethod
    def create(
        cls,
        location: Any,
        collection: str,
        *,
        space: EmbeddingSpace,
        new_space: EmbeddingSpace | None = None,
        distance: str = "dot",
        vector_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Make an empty collection.

        Args:
            location: The URL of a server, ``":memory:"``, a folder for Qdrant's local mode, or a client.
            collection: Its name, which must be free.
            space: The space of the vectors ``old``.
            new_space: The space of the vectors ``new``, where it is known already; see :meth:`add_vector`.
            distance: ``"dot"``, the inner product as in :class:`~xbt.index.Gallery`, or ``"cosine"``, which
                is the same for unit rows.
            vector_options: Further arguments of Qdrant's ``VectorParams``, such as ``on_disk``.
            **options: Further arguments of ``QdrantClient``, such as ``api_key``.

        Raises:
            ConfigError: If qdrant-client is not installed, or the distance is unknown.
            StoreError: If the name is taken, or Qdrant cannot be reached or refuses.
        """
        client = qdrant_client.connect(location, options)
        spaces = {OLD: space} if new_space is None else {OLD: space, next_vector_name(OLD): new_space}
        qdrant_client.make_collection(client, collection, spaces, distance, vector_options or {})
        return cls(client, collection)

    @classmethod
    def open(cls, location: Any, collection: str, **options: Any) -> Self:
        """Open a collection by its name or an alias; see :meth:`create`.

        Raises:
            ConfigError: If qdrant-client is not installed.
            StoreError: If there is no such collection, it does not name its spaces, or Qdrant cannot be
                reached.
        """
        return cls(qdrant_client.connect(location, options), collection)

    def reload(self) -> None:
        """Follow the alias again by which it was opened, and read the spaces again."""
        self.collection = qdrant_client.resolve(self.client, self._name)
        self._spaces, self._metric = qdrant_client.read_collection(self.client, self.collection)

    def switch(self, alias: str) -> str | None:
        """Let an alias name this collection, in one step with taking it from another.

        Clients that open the alias from then on get this collection. Indexes that are open keep the former
        one until :meth:`reload`, with the spaces that their queries were made for.

        Args:
            alias: The name, which must not be a collection's own.

        Returns:
            The collection that it named before, or ``None``.

        Raises:
            StoreError: If Qdrant refuses.
        """
        return qdrant_client.point_alias(self.client, alias, self.collection)

    def close(self) -> None:
        """Close the connection, or release the folder so that another process may open it."""
        self.client.close()

    # -- reading ---------------------------------------------------------------------------------------

    @property
    def space(self) -> EmbeddingSpace:
        """The space of the first vector, ``old`` until it is dropped."""
        return next(iter(self._spaces.values()))

    @property
    def new_space(self) -> EmbeddingSpace | None:
        """The space of the second vector, if there is one."""
        return next(iter([*self._spaces.values()][1:]), None)

    @property
    def fraction_backfilled(self) -> float:
        """Share of the items that have the second vector; 0 for an empty collection."""
        names = [*self._spaces][1:]
        backfilled = qdrant_client.count(self.client, self.collection, names[0]) if names else 0
        return backfilled / max(len(self), 1)

    def __len__(self) -> int:
        return qdrant_client.count(self.client, self.collection)

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, str):
            return False
        return bool(qdrant_client.present(self.client, self.collection, as_ids([item], "the item")))

    def info(self) -> IndexInfo:
        """See :meth:`VectorIndex.info <xbt.index.VectorIndex.info>`."""
        vectors = {
            name: VectorInfo(space.dim, space, qdrant_client.count(self.client, self.collection, name))
            for name, space in self._spaces.items()
        }
        exact = {EXACT_SCORES} if self._metric == "dot" else set()
        return IndexInfo(
            self.space.dim, self._metric, len(self), vectors, frozenset({FILTER, METADATA} | exact)
        )

    def scan(
        self, *, missing: str | None = None, vectors: str | None = None, batch_size: int = 1024
    ) -> Iterator[Batch]:
        """See :meth:`VectorIndex.scan <xbt.index.VectorIndex.scan>`; in the order of the points' ids."""
        for name in filter(None, (missing, vectors)):
            self._space_of(name)
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, but must be at least 1")
        for ids, rows in qdrant_client.scroll(self.client, self.collection, vectors, missing, batch_size):
            yield Batch(ids, rows)

    def fetch(self, ids: Sequence[str], name: str) -> NDArray[np.float32]:
        """See :meth:`VectorIndex.fetch <xbt.index.VectorIndex.fetch>`; unit rows with the metric cosine."""
        dim = self._space_of(name).dim
        return qdrant_client.fetch(self.client, self.collection, as_ids(ids, "ids"), name, dim)

    # -- searching -------------------------------------------------------------------------------------

    def search(
        self,
        queries: Vectors,
        k: int = 10,
        space: EmbeddingSpace | None = None,
        *,
        using: str | None = None,
        without: str | None = None,
        filter: Any = None,
        exact: bool = False,
        rerank: Cascade | None = None,
        new_queries: Vectors | None = None,
    ) -> Hits:
        """Find the k items with the highest score for every query.

        Args:
            queries: (n, dim) query vectors, or one of shape (dim,).
            k: Items per query; fewer are returned where there are fewer.
            space: The space of the queries. Pass it: queries of another model give scores that mean nothing.
            using: Name of the vector searched; ``"new"`` for the items that are backfilled. By default the
                first one.
            without: Leave out the items that have a vector of this name.
            filter: A ``Filter`` of Qdrant that items must meet.
            exact: Whether a server compares with every item instead of using its approximate index. Qdrant's
                local mode always does.
            rerank: Let the new model order the first results; see :func:`~xbt.index.cascaded_search`.
            new_queries: The same queries under the new model, with ``rerank``.

        Returns:
            Ids and scores; equal scores are in Qdrant's order.

        Raises:
            DataError: If k is below 1, a name is unknown, or a value is NaN.
            ConfigError: If the filter is no ``Filter``.
            SpaceMismatchError: If the space or the dimension is another; the message names both.
            StoreError: If Qdrant cannot be reached or refuses.
        """
        if rerank is not None:
            more = {"using": using, "without": without, "filter": filter, "exact": exact}
            return rerank.search(self, queries, new_queries, k, old_space=space, **more)
        name = next(iter(self._spaces)) if using is None else using
        if without is not None:
            self._space_of(without)
        what = f"the query vectors for {name!r}"
        rows = as_queries(queries, what, self._required(name, space, what).dim)
        where = qdrant_client.condition(without=without, also=filter)
        return qdrant_client.nearest(self.client, self.collection, rows, as_k(k), name, where, exact)

    def search_texts(
        self,
        encoder: DualEncoder,
        texts: Sequence[str],
        k: int = 10,
        *,
        using: str | None = None,
        filter: Any = None,
        exact: bool = False,
    ) -> Hits:
        """Encode texts and search; the encoder's space is checked before anything is encoded.

        Args:
            encoder: The old encoder or a compatible one for ``"old"``, the new one for ``"new"``.
            texts: n texts.
            k: Items per text.
            using: See :meth:`search`, as for the rest.
            filter: See there.
            exact: See there.

        Raises:
            DataError, SpaceMismatchError, StoreError: As :meth:`search`.
        """
        name = next(iter(self._spaces)) if using is None else using
        self._required(name, encoder.space, f"the encoder of queries for {name!r}")
        return self.search(encoder.encode_texts(list(texts)), as_k(k), using=name, filter=filter, exact=exact)

    def search_mixed(
        self,
        old_queries: Vectors,
        new_queries: Vectors,
        k: int,
        merge: Merge,
        old_space: EmbeddingSpace | None = None,
        new_space: EmbeddingSpace | None = None,
        *,
        filter: Any = None,
        exact: bool = False,
    ) -> Hits:
        """Search the backfilled items with the new queries, the other items with the old ones, and merge.

        Args:
            old_queries: (n, dim) queries in the old space: of the old model or a compatible encoder.
            new_queries: (n, new_dim) the same queries under the new model.
            k: Items per query.
            merge: How the two lists become one; see :func:`~xbt.index.fit_merge`.
            old_space: The space of the old queries.
            new_space: The space of the new queries.
            filter: See :meth:`search`.
            exact: See there.

        Returns:
            Ids and scores; see :func:`~xbt.index.search_mixed`.

        Raises:
            DataError, SpaceMismatchError, StoreError: As :func:`~xbt.index.search_mixed`.
        """
        return search_mixed(
            self, old_queries, new_queries, k, merge, old_space, new_space, filter=filter, exact=exact
        )

    # -- writing ---------------------------------------------------------------------------------------

    def add(
        self,
        vectors: Vectors,
        ids: Sequence[str],
        space: EmbeddingSpace | None = None,
        metadata: Metadata | None = None,
    ) -> None:
        """Add items with their first vectors.

        Args:
            vectors: (n, dim) vectors.
            ids: n strings, unique and not yet in the collection.
            space: The space of the vectors.
            metadata: Columns of n values each, as for a store; they become the payload.

        Raises:
            DataError: If a value is NaN, or an id is there already.
            SpaceMismatchError: If the space or the dimension is another.
            StoreError: If ids or metadata do not fit, or Qdrant refuses.
        """
        name = next(iter(self._spaces))
        rows = as_rows(vectors, "the vectors to add", self._required(name, space, "the vectors to add").dim)
        items = as_ids(ids, "ids", len(rows))
        payloads = _payloads(items, metadata, f"the collection {self.collection!r}")
        there = qdrant_client.present(self.client, self.collection, items)
        if there:
            item = next(item for item in items if item in there)
            raise DataError(
                f"the id {item!r} is already in {self.collection!r}; remove it first, or use another"
            )
        qdrant_client.insert(self.client, self.collection, rows, payloads, name)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove items with all their vectors; those that are not there are no error."""
        qdrant_client.remove(self.client, self.collection, as_ids(ids, "ids"))

    def add_vector(self, name: str, space: EmbeddingSpace) -> None:
        """See :meth:`VectorIndex.add_vector <xbt.index.VectorIndex.add_vector>`.

        Raises:
            SpaceMismatchError: If there are vectors of this name of another space.
            StoreError: If Qdrant refuses: only servers from version 1.18 on can add a vector to a collection.
        """
        part_name(name)
        self.reload()
        if name in self._spaces:
            self._spaces[name].require(space, f"the vector {name!r} to add")
            return
        qdrant_client.add_vector(self.client, self.collection, name, {**self._spaces, name: space})
        self.reload()

    def begin_part(self, space: EmbeddingSpace) -> None:
        """Declare the vectors of another model, under the next free name, unless they are there.

        Raises:
            SpaceMismatchError, StoreError: As :meth:`add_vector`.
        """
        self.reload()
        first, *rest = self._spaces
        self.add_vector(rest[0] if rest else next_vector_name(first), space)

    def upsert(self, ids: Sequence[str], vectors: Vectors, name: str) -> None:
        """See :meth:`VectorIndex.upsert <xbt.index.VectorIndex.upsert>`."""
        rows = as_rows(vectors, f"the vectors {name!r} to write", self._space_of(name).dim)
        items = as_ids(ids, "ids", len(rows))
        there = qdrant_client.present(self.client, self.collection, items)
        for item in items:
            if item not in there:
                raise DataError(f"there is no item {item!r} in {self.collection!r}; add it first")
        qdrant_client.set_vectors(self.client, self.collection, items, rows, name)

    def backfill(self, vectors: Vectors, ids: Sequence[str], space: EmbeddingSpace | None = None) -> None:
        """Give existing items their vectors of the new model; the old ones stay.

        Args:
            vectors: (n, new_dim) vectors.
            ids: Their items.
            space: The space of the vectors.

        Raises:
            DataError: If a value is NaN, an item is not in the collection, or there are no new vectors yet;
                nothing is written then.
            SpaceMismatchError: If the space or the dimension is another.
            StoreError: If the ids do not fit, or Qdrant refuses.
        """
        first, *rest = self._spaces
        name = rest[0] if rest else next_vector_name(first)
        self._required(name, space, "the vectors to backfill")
        self.upsert(ids, vectors, name)

    def drop_vector(self, name: str) -> None:
        """See :meth:`VectorIndex.drop_vector <xbt.index.VectorIndex.drop_vector>`.

        Raises:
            DataError: If there is no such name, it is the only one, or items have no other vector.
            StoreError: If Qdrant refuses: only servers from version 1.18 on can drop a vector.
        """
        self.reload()
        self._space_of(name)
        others = {other: space for other, space in self._spaces.items() if other != name}
        if not others:
            raise DataError(f"the collection {self.collection!r} has no vectors but {name!r}; keep them")
        left = qdrant_client.count(self.client, self.collection, name, next(iter(others)))
        if left:
            raise DataError(
                f"{left} items of {self.collection!r} have no vector but {name!r}; backfill or remove them "
                "first"
            )
        qdrant_client.drop_vector(self.client, self.collection, name, others)
        self.reload()

    def upload(self, source: Source) -> int:
        """Add the items of a store or gallery that are not there yet; it can be run again.

        Items of a gallery's second part get a second vector: alone if they are not there yet, otherwise
        beside the first one. A later upload therefore brings the collection to the state of the backfill.
        Items that are gone from the source stay, and so do the vectors of items that were replaced there:
        :meth:`remove` them first.

        Args:
            source: An ``EmbeddingStore`` or a ``Gallery``. A gallery whose old part was dropped gives second
                vectors if they are of that space.

        Returns:
            Number of items that were added, or got their second vector.

        Raises:
            ConfigError: If the source is something else.
            DataError: If the source has a second part, and there are no second vectors.
            SpaceMismatchError: If the source's space is another.
            StoreError: If the source is empty or cannot be read, or Qdrant refuses.
        """
        there = portions(source)
        names = [*self._spaces, next_vector_name(OLD)][:2]
        if len(there) == 1 and self._is_second(there[0].space):
            names = names[1:]
        added = 0
        for name, portion in zip(names, there, strict=False):
            for items in portion.batches():
                added += self._upload(items, name, portion.space)
        return added

    def _upload(self, items: Items, name: str, space: EmbeddingSpace | None) -> int:
        what = "the vectors to upload"
        rows = as_rows(items.vectors, what, self._required(name, space, what).dim)
        there = qdrant_client.present(self.client, self.collection, items.ids)
        fresh = [row for row, item in enumerate(items.ids) if item not in there]
        if fresh:
            payloads = _payloads(items.ids, items.metadata, "the items to upload")
            qdrant_client.insert(
                self.client, self.collection, rows[fresh], [payloads[row] for row in fresh], name
            )
        late: list[int] = []
        if name != next(iter(self._spaces)) and there:
            done = qdrant_client.present(self.client, self.collection, sorted(there), name)
            late = [row for row, item in enumerate(items.ids) if item in there and item not in done]
            qdrant_client.set_vectors(
                self.client, self.collection, [items.ids[row] for row in late], rows[late], name
            )
        return len(fresh) + len(late)

    def _is_second(self, space: EmbeddingSpace | None) -> bool:
        """Check if vectors of a space are those of the second model, and not of the first."""
        if space is None or self.new_space is None:
            return False
        return self.new_space.same_as(space) and not self.space.same_as(space)

    def _space_of(self, name: str) -> EmbeddingSpace:
        if name not in self._spaces:
            raise DataError(
                f"the collection {self.collection!r} has no vectors {name!r}, only "
                f"{', '.join(map(repr, self._spaces))}; call add_vector with the model's space first"
            )
        return self._spaces[name]

    def _required(self, name: str, space: EmbeddingSpace | None, what: str) -> EmbeddingSpace:
        """The space of a named vector, after checking that other vectors are of it."""
        needed = self._space_of(name)
        if space is not None:
            needed.require(space, what)
        return needed


def _payloads(ids: Sequence[str], metadata: Metadata | None, where: str) -> list[dict[str, Any]]:
    """One dict an item: its id under ``id``, and its values of the metadata's columns."""
    listed: list[dict[str, Any]] = as_table(ids, metadata, len(ids), where).to_pylist()
    return listed
