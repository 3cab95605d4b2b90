"""A collection of Qdrant as an index: filled, searched, backfilled, and served behind an alias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from xbt.errors import ConfigError, DataError
from xbt.index import qdrant_client
from xbt.index.items import Items, Source, portions
from xbt.index.mixed import Merge, next_vector_name, search_mixed
from xbt.index.protocol import EXACT_SCORES, FILTER, METADATA, Batch, Hits, IndexInfo, VectorInfo
from xbt.index.segments import part_name
from xbt.space import EmbeddingSpace
from xbt.store.shards import Metadata, as_table
from xbt.vectors import Vectors, as_ids, as_k, as_queries, as_rows

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

    Every method raises :class:`~xbt.errors.StoreError` if Qdrant cannot be reached or refuses, ``DataError``
    if a name or id is unknown, an id is there already, a value is NaN or k is below 1, and
    ``SpaceMismatchError`` if vectors are of another space or dimension.

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
        """
        client = qdrant_client.connect(location, options)
        spaces = {OLD: space} if new_space is None else {OLD: space, next_vector_name(OLD): new_space}
        qdrant_client.make_collection(client, collection, spaces, distance, vector_options or {})
        return cls(client, collection)

    @classmethod
    def open(cls, location: Any, collection: str, **options: Any) -> Self:
        """Open a collection by its name or an alias; location and options are those of :meth:`create`.

        Raises:
            ConfigError: If qdrant-client is not installed.
            StoreError: If there is no such collection, or it does not name its spaces.
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

        Returns:
            The collection that it named before, or ``None``.
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
        return self.info().fraction_backfilled

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
        """Find the k items with the highest score for every query; equal scores are in Qdrant's order.

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
        """Encode texts and search as :meth:`search`; the encoder's space is checked before it encodes.

        The encoder is the old or a compatible one for ``"old"``, and the new one for ``"new"``.
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
        """Search both sides and merge; see :func:`~xbt.index.search_mixed` and :meth:`search`."""
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
        """See :meth:`VectorIndex.add_vector <xbt.index.VectorIndex.add_vector>`; needs server 1.18."""
        part_name(name)
        self.reload()
        if name in self._spaces:
            self._spaces[name].require(space, f"the vector {name!r} to add")
            return
        qdrant_client.add_vector(self.client, self.collection, name, {**self._spaces, name: space})
        self.reload()

    def begin_part(self, space: EmbeddingSpace) -> None:
        """Declare the vectors of another model, under the next free name, unless they are there."""
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
        """Give existing items (n, new_dim) vectors of the new model; all are written or none."""
        first, *rest = self._spaces
        name = rest[0] if rest else next_vector_name(first)
        self._required(name, space, "the vectors to backfill")
        self.upsert(ids, vectors, name)

    def drop_vector(self, name: str) -> None:
        """See :meth:`VectorIndex.drop_vector <xbt.index.VectorIndex.drop_vector>`; needs server 1.18."""
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
        :meth:`remove` them first. The part of a gallery whose old part was dropped gives second vectors if
        they are of that space.

        Returns:
            Number of items that were added, or got their second vector.
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
