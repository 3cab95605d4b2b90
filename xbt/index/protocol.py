"""The protocol that every index speaks, so that search and backfill are written once.

A row of an index has a string id and one vector or more, each under a name and in a space of its own: at
first only the old model's vector, later the new model's besides. :class:`~xbt.index.Gallery` implements the
protocol on the local disk; an adapter implements it on a database.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors

FILTER = "filter"
"""Capability: ``search`` takes a filter in the index's own language."""
EXACT_SCORES = "exact scores"
"""Capability: scores are inner products of the stored vectors, not estimates of them."""
METADATA = "metadata"
"""Capability: rows carry columns beside their vectors."""


@dataclass(frozen=True)
class VectorInfo:
    """One named vector of an index.

    Attributes:
        dim: Dimension.
        space: The space that it lives in; ``None`` where nobody has declared it.
        count: Rows that have it.
    """

    dim: int
    space: EmbeddingSpace | None
    count: int


@dataclass(frozen=True)
class IndexInfo:
    """Description of an index at one moment.

    Attributes:
        dim: Dimension of the first vector, with which the index was filled.
        metric: ``"dot"``, or ``"cosine"`` where the index normalises vectors itself.
        count: Rows, whichever vectors they have.
        vectors: The named vectors, the oldest first.
        capabilities: Names of optional abilities, such as :data:`FILTER`.
    """

    dim: int
    metric: str
    count: int
    vectors: Mapping[str, VectorInfo]
    capabilities: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Batch:
    """Some rows of a scan.

    Attributes:
        ids: Ids of n rows.
        vectors: (n, dim) float32 vectors of the name that was asked for; ``None`` if none was.
    """

    ids: list[str]
    vectors: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Hits:
    """The best rows of every query, best first.

    Attributes:
        ids: For every query the ids of at most k rows, none of them twice.
        scores: (n_queries, k) float32, descending: inner products, or the scores of a merge. Where an index
            found fewer rows for a query than for others, the rest of its line is ``-inf``. A gallery returns
            equal scores in its own order.
    """

    ids: list[list[str]]
    scores: NDArray[np.float32]


@runtime_checkable
class VectorIndex(Protocol):
    """An index of vectors that can be read, searched and backfilled while it serves.

    Every method raises an :class:`~xbt.errors.XbtError` for bad input, and for an index out of reach.
    """

    def info(self) -> IndexInfo:
        """Describe the index as it is now."""
        ...

    def scan(
        self, *, missing: str | None = None, vectors: str | None = None, batch_size: int = 1024
    ) -> Iterator[Batch]:
        """Iterate over the rows, each once, in the order of the index.

        Rows that are written while the scan runs may be included or not.

        Args:
            missing: Only rows without the vector of this name.
            vectors: Also read the vectors of this name; rows without it are left out.
            batch_size: Rows a batch, at most.

        Raises:
            DataError: If there is no vector of such a name.
        """
        ...

    def add_vector(self, name: str, space: EmbeddingSpace) -> None:
        """Declare a further vector, which no row has yet; does nothing if it is there in the same space.

        Raises:
            SpaceMismatchError: If the index has a vector of this name in another space.
        """
        ...

    def upsert(self, ids: Sequence[str], vectors: Vectors, name: str) -> None:
        """Write the vectors of a name for rows of the index; idempotent, and durable when it returns.

        Args:
            ids: Of n rows that are in the index. A row that has such a vector gets the one given.
            vectors: (n, dim) array or tensor of any float dtype.
            name: One of the names in :attr:`IndexInfo.vectors`.

        Raises:
            DataError: If an id or the name is unknown, or a value is NaN; nothing is written then.
            SpaceMismatchError: If the dimension is another.
        """
        ...

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        using: str,
        without: str | None = None,
        filter: Any = None,
    ) -> Hits:
        """Find the k rows with the largest scores for every query.

        Args:
            queries: (n_queries, dim) queries in the space of the vector searched.
            k: Rows a query; fewer are returned where fewer rows qualify.
            using: The vector searched; rows without it do not qualify.
            without: Rows with a vector of this name do not qualify.
            filter: Condition in the language of the index, if it has the capability :data:`FILTER`.

        Raises:
            DataError: If a name is unknown, k is below 1, or a value is NaN.
            SpaceMismatchError: If the dimension is another.
            ConfigError: If the index takes no filter.
        """
        ...

    def fetch(self, ids: Sequence[str], name: str) -> NDArray[np.float32]:
        """Read the vectors of a name, for example to rescore candidates.

        Args:
            ids: Of n rows.
            name: Name of the vector.

        Returns:
            (n, dim) float32, in the order asked for.

        Raises:
            DataError: If a row is not there or has no such vector.
        """
        ...

    def drop_vector(self, name: str) -> None:
        """Delete the vectors of a name from all rows: roll a backfill back.

        Raises:
            DataError: If there is no such name, or it is the only one.
        """
        ...
