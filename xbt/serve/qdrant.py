"""A collection of Qdrant that is filled, searched and backfilled like a gallery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from xbt.gallery import SearchResult
from xbt.gallery.merge import Merge
from xbt.serve import qdrant_points as points
from xbt.serve.checks import as_result, check_k, checked_rows, same_count
from xbt.serve.qdrant_collection import Part
from xbt.serve.qdrant_items import QdrantItems
from xbt.serve.qdrant_mixed import merge_found
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors

if TYPE_CHECKING:  # whoever searches with vectors needs no models
    from xbt.encoders import DualEncoder


class QdrantGallery(QdrantItems):
    """Items in a collection of Qdrant, under the named vector ``old`` and, once backfilled, ``new``.

    The collection's metadata hold the spaces of both, and vectors of another space are refused. A point's id
    is derived from its item's (UUID version 5), so that writing an item again finds its point; the payload
    holds the item's id under ``id`` and the metadata beside it. Searching goes as in
    :class:`~xbt.gallery.Gallery`.

    It keeps the collection that it opened: an alias that is switched elsewhere is followed by :meth:`reload`.

    Attributes:
        client: The ``QdrantClient``, for whatever is not here, such as filters.
        collection: The collection's own name, also where it was opened by an alias.

    Example:
        >>> gallery = QdrantGallery.create("http://localhost:6333", "photos-b32", space=store.space)
        >>> gallery.upload(store)
        >>> gallery.search(upgraded.encode_texts(["a dog"]), k=10, space=upgraded.space).ids[0]
    """

    def search(
        self,
        vectors: Vectors,
        k: int = 10,
        space: EmbeddingSpace | None = None,
        using: Part = "old",
        exact: bool = False,
    ) -> SearchResult:
        """Finds the k items with the highest score for every query.

        Args:
            vectors: (n, dim) query vectors, or one of shape (dim,).
            k: Items per query.
            space: The space the queries live in. Pass it: queries of another model give scores that mean
                nothing.
            using: ``"old"``, or ``"new"`` for the items that are backfilled.
            exact: Whether a server compares with every item, in place of its approximate index. Qdrant's
                local mode always does.

        Returns:
            Ids and scores; equal scores stand in Qdrant's order.

        Raises:
            DataError: If k is out of range or larger than the number of items that have the vector, or a
                value is NaN.
            SpaceMismatchError: If the space or the dimension is another; the message names both.
            StoreError: If Qdrant cannot be reached or refuses.
        """
        check_k(k)
        single = vectors[None] if vectors.ndim == 1 else vectors
        rows = checked_rows(single, f"the query vectors for {using!r}", self._space_of(using), space)
        found = points.nearest(self.client, self.collection, rows, k, using, exact=exact)
        return as_result(found, k, f"items of {self.collection!r} with a vector {using!r}")

    def search_texts(
        self,
        encoder: DualEncoder,
        texts: Sequence[str],
        k: int = 10,
        using: Part = "old",
        exact: bool = False,
    ) -> SearchResult:
        """Encodes texts and searches; the encoder's space is checked before anything is encoded.

        Args:
            encoder: The old encoder or a compatible one for ``"old"``, the new one for ``"new"``.
            texts: n texts.
            k: Items per text.
            using: See :meth:`search`, as for all else.
            exact: See there.

        Raises:
            DataError, SpaceMismatchError, StoreError: As :meth:`search`.
        """
        check_k(k)
        self._space_of(using).require(encoder.space, f"the encoder of queries for {using!r}")
        return self.search(encoder.encode_texts(texts), k, None, using, exact)

    def search_mixed(
        self,
        old_queries: Vectors,
        new_queries: Vectors,
        k: int,
        merge: Merge,
        old_space: EmbeddingSpace | None = None,
        new_space: EmbeddingSpace | None = None,
        exact: bool = False,
    ) -> SearchResult:
        """Searches what is backfilled with the new queries, the rest with the old ones, and merges.

        Args:
            old_queries: (n, dim) queries in the old space: of the old model or a compatible encoder.
            new_queries: (n, new_dim) the same queries under the new model.
            k: Items per query.
            merge: How the two lists become one; see :func:`~xbt.gallery.calibration.fit_merge`.
            old_space: The space of the old queries.
            new_space: The space of the new queries.
            exact: See :meth:`search`.

        Returns:
            Ids and scores as :meth:`~xbt.gallery.Gallery.search_mixed` gives them.

        Raises:
            DataError: As :meth:`search`, or if there are not as many queries of both kinds.
            SpaceMismatchError: As there, or if there is no part ``new``.
            StoreError: As there.
        """
        check_k(k)
        old_rows = checked_rows(old_queries, "the old query vectors", self._space_of("old"), old_space)
        new_rows = checked_rows(new_queries, "the new query vectors", self._space_of("new"), new_space)
        same_count(old_rows, new_rows)
        everything = (self.client, self.collection)
        n_new, n = points.count(*everything, "new"), len(self)
        # In this order an item that is backfilled in between is found twice, and never missed.
        old = points.nearest(*everything, old_rows, k, "old", without="new", exact=exact)
        new = points.nearest(*everything, new_rows, k, "new", exact=exact)
        found = merge_found(old, new, k, merge, (n - n_new, n_new))
        return as_result(found, k, f"items of {self.collection!r}")
