"""The items of a collection of Qdrant: added, uploaded, removed and backfilled."""

from __future__ import annotations

from collections.abc import Sequence

from xbt.errors import DataError
from xbt.serve import qdrant_collection as collections
from xbt.serve import qdrant_points as points
from xbt.serve.checks import checked_rows, payloads
from xbt.serve.items import Items, Source, portions
from xbt.serve.qdrant_place import QdrantPlace
from xbt.space import EmbeddingSpace
from xbt.store.shards import Metadata
from xbt.vectors import Vectors


class QdrantItems(QdrantPlace):
    """What is written to a :class:`~xbt.serve.QdrantGallery`; see there."""

    def add(
        self,
        vectors: Vectors,
        ids: Sequence[str],
        space: EmbeddingSpace | None = None,
        metadata: Metadata | None = None,
    ) -> None:
        """Adds items with their vectors ``old``.

        Args:
            vectors: (n, dim) vectors.
            ids: n strings, unique and not yet in the collection.
            space: The space the vectors live in.
            metadata: Columns of n values each, as for a store; they become the payload.

        Raises:
            DataError: If a value is NaN, or an id is there already.
            SpaceMismatchError: If the space or the dimension is another.
            StoreError: If ids or metadata do not fit, or Qdrant refuses.
        """
        rows = checked_rows(vectors, "the vectors to add", self._space_of("old"), space)
        listed = payloads(ids, metadata, len(rows), f"the collection {self.collection!r}")
        known = points.present(self.client, self.collection, ids)
        if known:
            name = next(item for item in ids if item in known)
            raise DataError(
                f"the id {name!r} is already in {self.collection!r}; remove it first, or use another"
            )
        points.insert(self.client, self.collection, rows, listed)

    def upload(self, source: Source) -> int:
        """Adds the items of a store or gallery that are not there yet, so that it can be run again.

        Of a gallery that is being backfilled, the items of the second part get a vector ``new``: alone if
        they are not there yet, otherwise beside their old one, so that a later upload brings the collection
        to where the backfill has come to. Items that are gone from the source stay, and so do the vectors of
        those that were replaced there: :meth:`remove` them first.

        Args:
            source: An ``EmbeddingStore`` or a ``Gallery``. One whose old part is dropped gives vectors
                ``new`` if that is their space here.

        Returns:
            How many items were added, or given their vector ``new``.

        Raises:
            ConfigError: If the source is something else.
            SpaceMismatchError: If the source's space is another, or there is no part ``new`` for its second.
            StoreError: If the source is empty or cannot be read, or Qdrant refuses.
        """
        there = portions(source)
        names = collections.PARTS
        if len(there) == 1 and self._is_new(there[0].space):
            names = names[1:]
        added = 0
        for name, portion in zip(names, there, strict=False):
            for items in portion.batches():
                added += self._upload(items, name, portion.space)
        return added

    def _upload(self, items: Items, name: collections.Part, space: EmbeddingSpace | None) -> int:
        rows = checked_rows(items.vectors, "the vectors to upload", self._space_of(name), space)
        where = self.client, self.collection
        known = points.present(*where, items.ids)
        fresh = [row for row, item in enumerate(items.ids) if item not in known]
        if fresh:
            listed = payloads(items.ids, items.metadata, len(rows), "the items to upload")
            points.insert(*where, rows[fresh], [listed[row] for row in fresh], name)
        moved: list[int] = []
        if name == "new" and known:
            done = points.having(*where, sorted(known), name)
            moved = [row for row, item in enumerate(items.ids) if item in known and item not in done]
            points.set_vectors(*where, [items.ids[row] for row in moved], rows[moved], name)
        return len(fresh) + len(moved)

    def _is_new(self, space: EmbeddingSpace | None) -> bool:
        """Whether vectors of a space are those of the second model, and not of the first."""
        if space is None or self.new_space is None:
            return False
        return self.new_space.same_as(space) and not self.space.same_as(space)

    def remove(self, ids: Sequence[str]) -> None:
        """Removes items with all their vectors; those that are not there are no error."""
        points.remove(self.client, self.collection, list(ids))

    def begin_part(self, space: EmbeddingSpace) -> None:
        """Makes room for the vectors ``new`` of another model, where the collection has none.

        Raises:
            SpaceMismatchError: If there are vectors ``new`` of another space.
            StoreError: If Qdrant refuses; see :func:`~xbt.serve.qdrant_collection.add_space`.
        """
        self.reload()
        if self.new_space is not None:
            self.new_space.require(space, "the part to begin")
            return
        collections.add_space(self.client, self.collection, space)
        self.reload()

    def backfill(self, vectors: Vectors, ids: Sequence[str], space: EmbeddingSpace | None = None) -> None:
        """Gives items that are there their vectors of the new model; the old ones stay.

        Args:
            vectors: (n, new_dim) vectors.
            ids: Their items.
            space: The space the vectors live in.

        Raises:
            DataError: If a value is NaN, or an item is not in the collection; then nothing is written.
            SpaceMismatchError: If the space or the dimension is another, or there is no part ``new``.
            StoreError: If the ids do not fit, or Qdrant refuses.
        """
        rows = checked_rows(vectors, "the vectors to backfill", self._space_of("new"), space)
        payloads(ids, None, len(rows), "what is to be backfilled")
        known = points.present(self.client, self.collection, ids)
        for item in ids:
            if item not in known:
                raise DataError(f"there is no item {item!r} in {self.collection!r} to backfill; add it first")
        points.set_vectors(self.client, self.collection, ids, rows, "new")
