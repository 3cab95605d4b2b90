"""A collection of Qdrant: made, opened, told apart by its spaces, and named by an alias."""

from __future__ import annotations

from typing import Any, Self

from xbt.errors import SpaceMismatchError
from xbt.serve import qdrant_collection as collections
from xbt.serve import qdrant_points as points
from xbt.serve.qdrant_collection import Part
from xbt.serve.qdrant_connection import connect
from xbt.space import EmbeddingSpace


class QdrantPlace:
    """Where a :class:`~xbt.serve.QdrantGallery` keeps its items, and whose they are; see there.

    Args:
        client: The ``QdrantClient``.
        name: A collection or alias that is there; see :meth:`open`.

    Attributes:
        client: The client, for whatever is not here, such as filters.
        collection: The collection's own name, also where it was opened by an alias.
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
        """Makes an empty collection.

        Args:
            location: The URL of a server, ``":memory:"``, a folder for Qdrant's local mode, or a client.
            collection: Its name, which must be free.
            space: The space of the vectors ``old``.
            new_space: The space of the vectors ``new``, where it is known already; see :meth:`begin_part`.
            distance: ``"dot"``, the inner product as in :class:`~xbt.gallery.Gallery`, or ``"cosine"``, which
                is the same for unit rows.
            vector_options: Further arguments of Qdrant's ``VectorParams``, such as ``on_disk``.
            **options: Further arguments of ``QdrantClient``, such as ``api_key``.

        Raises:
            ConfigError: If qdrant-client is not installed, or the distance is not known.
            StoreError: If the name is taken, or Qdrant cannot be reached or refuses.
        """
        client = connect(location, options)
        spaces: dict[Part, EmbeddingSpace] = {"old": space}
        if new_space is not None:
            spaces["new"] = new_space
        collections.make_collection(client, collection, spaces, distance, vector_options or {})
        return cls(client, collection)

    @classmethod
    def open(cls, location: Any, collection: str, **options: Any) -> Self:
        """Opens a collection by its name or an alias; see :meth:`create`.

        Raises:
            ConfigError: If qdrant-client is not installed.
            StoreError: If there is no such collection, it does not say its spaces, or Qdrant cannot be
                reached.
        """
        return cls(connect(location, options), collection)

    def reload(self) -> None:
        """Follows the alias again by which it was opened, and reads the spaces anew."""
        self.collection = collections.resolve(self.client, self._name)
        self._spaces = collections.read_spaces(self.client, self.collection)

    @property
    def space(self) -> EmbeddingSpace:
        """The space of the vectors ``old``, in which queries are asked by default."""
        return self._spaces["old"]

    @property
    def new_space(self) -> EmbeddingSpace | None:
        """The space of the vectors ``new``, if there is one."""
        return self._spaces.get("new")

    @property
    def fraction_backfilled(self) -> float:
        """Share of the items that have a vector ``new``; 0 for an empty collection."""
        backfilled = points.count(self.client, self.collection, "new") if self.new_space else 0
        return backfilled / max(len(self), 1)

    def switch(self, alias: str) -> str | None:
        """Lets an alias name this collection, in one step with taking it from another.

        Whoever opens the alias from then on gets this collection; who has opened it before keeps the former
        one until :meth:`reload`, with the spaces that its queries were made for.

        Args:
            alias: The name, which must not be a collection's own.

        Returns:
            The collection that it named before, or ``None``.

        Raises:
            StoreError: If Qdrant refuses.
        """
        return collections.point_alias(self.client, alias, self.collection)

    def close(self) -> None:
        """Lets go of the server, or of the folder so that another process may open it."""
        self.client.close()

    def __len__(self) -> int:
        return points.count(self.client, self.collection)

    def __contains__(self, item: object) -> bool:
        return isinstance(item, str) and bool(points.present(self.client, self.collection, [item]))

    def _space_of(self, part: Part) -> EmbeddingSpace:
        if part not in self._spaces:
            raise SpaceMismatchError(
                f"the collection {self.collection!r} has no vectors {part!r}, only "
                f"{', '.join(map(repr, self._spaces))}; call begin_part with the new model's space first"
            )
        return self._spaces[part]
