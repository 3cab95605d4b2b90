"""Settling the order of candidates: each pair's score by itself, and equal scores in the gallery's order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Gather = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Row numbers → (n, dim) float32 vectors."""

SPARE = 8
"""Candidates fetched beyond k, so that the exact order among near-ties can be settled."""
SCRATCH_BYTES = 2**20
"""Bound on the products held while candidates are scored again; they stay within a core's cache."""
NOBODY = -1
"""Stands where an index found fewer candidates than it was asked for."""


def settle(
    queries: NDArray[np.float32], candidates: NDArray[np.int64], k: int, gather: Gather
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores candidates pair by pair and keeps the first k of each query.

    FAISS alone neither gives equal vectors equal scores (its batched kernels round by position) nor keeps
    ties in order. A pair's score here depends on that pair alone: products of float32 numbers are exact in
    float64, are added up there, and the sum is rounded once. A query gives the same alone and in a batch.

    Args:
        queries: (n, dim).
        candidates: (n, c) row numbers, c at least k; :data:`NOBODY` where there is none.
        k: How many to keep.
        gather: Gives the rows' vectors.

    Returns:
        (n, k) scores, descending, and the (n, k) row numbers they belong to; equal scores stand in the order
        of their row numbers. A missing candidate scores −∞.
    """
    scores = np.full(candidates.shape, -np.inf, np.float32)
    flat, step = scores.reshape(-1), max(1, SCRATCH_BYTES // (8 * queries.shape[1]))
    there = np.flatnonzero(candidates.reshape(-1) != NOBODY)
    rows, owners = candidates.reshape(-1)[there], there // candidates.shape[1]
    vectors = gather(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        products = np.multiply(vectors[part], queries.take(owners[part], axis=0), dtype=np.float64)
        flat[there[part]] = products.sum(axis=1)
    order = np.lexsort((candidates, -scores))[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(candidates, order, axis=1)


def rounding(queries: NDArray[np.float32], longest: float) -> NDArray[np.float32]:
    """(n,) how far apart two float32 scores of a query must be for their order to be beyond doubt.

    Args:
        queries: (n, dim).
        longest: Length of the longest gallery vector.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", queries, queries))
    unit = 2 * np.finfo(np.float32).eps * np.sqrt(queries.shape[1])
    margin: NDArray[np.float32] = (unit * longest * lengths).astype(np.float32)
    return margin
