"""Protocol of all indexes, shared by search and backfill.

A row of an index has a string id and one or more named vectors, each in its own space: first only the vector
of the old model, later also the vector of the new model. :class:`~xbt.index.Gallery` implements the protocol
on the local disk. Adapters implement it for databases.
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
"""Capability: ``search`` accepts a filter in the query language of the index."""
EXACT_SCORES = "exact scores"
"""Capability: scores are exact inner products of the stored vectors, not estimates."""
METADATA = "metadata"
"""Capability: rows carry columns beside their vectors."""


@dataclass(frozen=True)
class VectorInfo:
    """One named vector of an index.

    Attributes:
        dim: Dimension.
        space: Space of the vector; ``None`` if undeclared.
        count: Number of rows with this vector.
    """

    dim: int
    space: EmbeddingSpace | None
    count: int


@dataclass(frozen=True)
class IndexInfo:
    """Description of an index at one moment.

    Attributes:
        dim: Dimension of the first vector of the index.
        metric: ``"dot"``, or ``"cosine"`` if the index normalises vectors itself.
        count: Number of rows, with any of the vectors.
        vectors: Named vectors, oldest first.
        capabilities: Names of optional features, such as :data:`FILTER`.
    """

    dim: int
    metric: str
    count: int
    vectors: Mapping[str, VectorInfo]
    capabilities: frozenset[str] = field(default_factory=frozenset)

    @property
    def fraction_backfilled(self) -> float:
        """Share of the rows that have the second vector; 0 if there is no second one."""
        filled = [vector.count for vector in self.vectors.values()][1:2]
        return sum(filled) / max(self.count, 1)


@dataclass(frozen=True)
class Batch:
    """Batch of rows from a scan.

    Attributes:
        ids: Ids of n rows.
        vectors: (n, dim) float32 vectors of the requested name; ``None`` if none was requested.
    """

    ids: list[str]
    vectors: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Hits:
    """Best rows of every query, best first.

    Attributes:
        ids: Unique ids of at most k rows for each query.
        scores: (n_queries, k) float32, descending: inner products, or the scores of a merge. Queries with
            fewer results than others are padded with ``-inf``. A gallery returns equal scores in its own
            order.
    """

    ids: list[list[str]]
    scores: NDArray[np.float32]


@runtime_checkable
class VectorIndex(Protocol):
    """Vector index that supports reads, searches and backfills while it serves.

    Every method raises an :class:`~xbt.errors.XbtError` for invalid input or an unreachable index.
    """

    def info(self) -> IndexInfo:
        """Describe the current state of the index."""
        ...

    def scan(
        self, *, missing: str | None = None, vectors: str | None = None, batch_size: int = 1024
    ) -> Iterator[Batch]:
        """Iterate once over the rows in the order of the index.

        Rows written during the scan may or may not be included.

        Args:
            missing: Include only rows without the vector of this name.
            vectors: Also read the vectors of this name, and skip rows without it.
            batch_size: Maximum rows per batch.

        Raises:
            DataError: If there is no vector of this name.
        """
        ...

    def add_vector(self, name: str, space: EmbeddingSpace) -> None:
        """Declare a new named vector. Do nothing if it already exists in the same space.

        Raises:
            SpaceMismatchError: If the index has a vector of this name in another space.
        """
        ...

    def upsert(self, ids: Sequence[str], vectors: Vectors, name: str) -> None:
        """Write vectors of one name for existing rows. The write is idempotent, and durable on return.

        Args:
            ids: Ids of n rows of the index. An existing vector of this name is replaced.
            vectors: (n, dim) array or tensor of any float dtype.
            name: One of the names in :attr:`IndexInfo.vectors`.

        Raises:
            DataError: If an id or the name is unknown, or a value is NaN. Nothing is written then.
            SpaceMismatchError: If the dimension is wrong.
        """
        ...

    def search(
        self, queries: Vectors, k: int, *, using: str, without: str | None = None, filter: Any = None
    ) -> Hits:
        """Find the k rows with the largest scores for every query.

        Args:
            queries: (n_queries, dim) queries in the space of the searched vector.
            k: Rows per query. Fewer are returned if fewer rows qualify.
            using: Name of the searched vector. Rows without it do not qualify.
            without: Rows with a vector of this name do not qualify.
            filter: Condition in the query language of the index, if it has the capability :data:`FILTER`.

        Raises:
            DataError: If a name is unknown, k is below 1, or a value is NaN.
            SpaceMismatchError: If the dimension is wrong.
            ConfigError: If the index does not support filters.
        """
        ...

    def fetch(self, ids: Sequence[str], name: str) -> NDArray[np.float32]:
        """Read vectors of one name, for example to rescore candidates.

        Args:
            ids: Ids of n rows.
            name: Name of the vector.

        Returns:
            (n, dim) float32, in the requested order.

        Raises:
            DataError: If a row does not exist or has no such vector.
        """
        ...

    def drop_vector(self, name: str) -> None:
        """Delete the vectors of one name from all rows, to roll a backfill back.

        Raises:
            DataError: If the name is unknown, or is the only one.
        """
        ...
