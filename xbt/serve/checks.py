"""Checks that everything which serves shares: vectors, ids, k and whether enough was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xbt.errors import DataError
from xbt.gallery import SearchResult
from xbt.space import EmbeddingSpace
from xbt.store.shards import Metadata, as_table
from xbt.vectors import Vectors, as_vectors


def checked_rows(
    vectors: Vectors, name: str, needed: EmbeddingSpace, given: EmbeddingSpace | None
) -> NDArray[np.float32]:
    """Vectors as (n, dim) float32 rows, if they belong to a space.

    Args:
        vectors: The vectors.
        name: What they are, for the error.
        needed: The space they must be of.
        given: The space they are said to be of; without it only the dimension can be checked.

    Raises:
        DataError: If there are none, or a value is NaN or infinite.
        SpaceMismatchError: If the space or the dimension is another.
    """
    if given is not None:
        needed.require(given, name)
    rows: NDArray[np.float32] = as_vectors(vectors, name, needed.dim).float().numpy()
    return rows


def payloads(ids: Sequence[str], metadata: Metadata | None, count: int, where: str) -> list[dict[str, Any]]:
    """One dict an item: its id under ``id``, and its values of the metadata's columns.

    Raises:
        StoreError: If an id is no string or repeated, or a column has another length.
    """
    listed: list[dict[str, Any]] = as_table(ids, metadata, count, where).to_pylist()
    return listed


def check_k(k: int) -> None:
    """Refuses what is no number of items, with a DataError."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise DataError(f"k is {k!r}; give an integer of at least 1")


def same_count(old: NDArray[np.float32], new: NDArray[np.float32]) -> None:
    """Refuses old and new vectors of which there are not as many, with a DataError."""
    if len(old) != len(new):
        raise DataError(
            f"there are {len(old)} old and {len(new)} new query vectors; give both for each query"
        )


def as_result(found: Sequence[tuple[list[str], NDArray[np.float32]]], k: int, what: str) -> SearchResult:
    """The lists that were found as one result.

    Raises:
        DataError: If one is shorter than k; the message says what there are too few of.
    """
    fewest = min(len(ids) for ids, _ in found)
    if fewest < k:
        raise DataError(f"k is {k}, but there are only {fewest} {what}; ask for at most that many")
    return SearchResult([ids for ids, _ in found], np.stack([scores for _, scores in found]))
