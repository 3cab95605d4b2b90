"""Exact retrieval metrics, independent of any search index.

The R@k of the CLIP literature is a hit rate: a query counts 1 when at least one of its positives is among the
first k, else 0. CLIP_benchmark reports it as ``*_retrieval_recall@k`` and torchmetrics calls it
``RetrievalHitRate``; "recall" in torchmetrics is another, smaller number as soon as a query has several
positives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError, SpaceMismatchError
from xbt.vectors import Vectors, as_vectors

SCORE_BYTES = 64 * 2**20
"""Upper bound on the scores held at once when no chunk size is given (one query's row is the least)."""
_BLOCK_ROWS = 4096


class Positives(NamedTuple):
    """The right answers of every query, as the two arrays of a CSR matrix.

    Attributes:
        starts: (n_queries + 1,) int64; query i owns ``rows[starts[i]:starts[i + 1]]``, at least one.
        rows: Gallery rows, int64, sorted and without repetition within a query.
    """

    starts: NDArray[np.int64]
    rows: NDArray[np.int64]


def recall_at_k(
    queries: Vectors,
    gallery: Vectors,
    positives: Sequence[Sequence[int]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
    """Share of the queries that have a positive among their first k gallery rows (CLIP-style R@k).

    Args:
        queries: (n_queries, dim) vectors; see :func:`best_positive_ranks`.
        gallery: (n_gallery, dim) vectors.
        positives: For every query the gallery rows that answer it.
        ks: Cut-offs, each at least 1. A k beyond the size of the gallery gives 1.0.

    Returns:
        ``{k: fraction in [0, 1]}`` in the order of ``ks``.

    Raises:
        DataError: As :func:`best_positive_ranks`, or if ``ks`` is empty or holds anything but integers >= 1.
        SpaceMismatchError: If the dimensions differ.
    """
    checked = check_ks(ks)
    ranks = best_positive_ranks(queries, gallery, positives)
    return {k: int((ranks < k).sum()) / len(ranks) for k in checked}


def best_positive_ranks(
    queries: Vectors,
    gallery: Vectors,
    positives: Sequence[Sequence[int]],
    chunk_size: int | None = None,
) -> Tensor:
    """Counts, for every query, the wrong gallery rows that score at least as high as its best positive.

    Scores are inner products of the rows as given: nothing is normalised here. Ties count against us, so a
    model that gives every item the same vector gets the worst rank and not the best. Scores are float32
    (float64 when either input is), never lower, whatever torch's autocast or matmul precision is set to.

    Args:
        queries: (n_queries, dim) torch tensor or numpy array of any float dtype.
        gallery: (n_gallery, dim) likewise.
        positives: For every query the gallery rows that answer it; at least one, repetitions are harmless.
        chunk_size: Queries scored at a time; by default as many as keep the scores within 64 MiB.

    Returns:
        (n_queries,) int64 ranks from 0 (best) to the number of the query's wrong rows.

    Raises:
        DataError: If queries or gallery are empty or hold NaN, if values are so large that scores overflow,
            if a query has no positive or one outside the gallery, or if ``chunk_size`` is no integer >= 1.
        SpaceMismatchError: If the dimensions differ.
    """
    left, right = _as_pair(queries, gallery)
    answers = check_positives(positives, len(left), len(right))
    columns, column_of_row = distinct_rows(right)
    copies = np.bincount(column_of_row) - 1  # further gallery rows that each column stands for
    repeated = np.flatnonzero(copies)
    if chunk_size is None:
        chunk_size = max(1, SCORE_BYTES // (right.itemsize * len(right)))
    elif not _is_count(chunk_size):
        raise DataError(
            f"chunk_size is {chunk_size!r}; give an integer of at least 1, or None for the default"
        )

    # One block for all chunks: a new one would be filled while the last one is still held.
    block = np.empty((min(chunk_size, len(left)), len(columns)), dtype=left.dtype)
    ranks = np.empty(len(left), dtype=np.int64)
    for start in range(0, len(left), chunk_size):
        stop = min(start + chunk_size, len(left))
        scores = np.matmul(left[start:stop], columns.T, out=block[: stop - start])
        bounds = answers.starts[start : stop + 1]
        owners = np.repeat(np.arange(stop - start), np.diff(bounds))
        own_scores = scores[owners, column_of_row[answers.rows[bounds[0] : bounds[-1]]]]
        segments = bounds[:-1] - bounds[0]
        best = np.maximum.reduceat(own_scores, segments)
        as_high = scores >= best[:, None]
        right_ones = np.add.reduceat((own_scores == best[owners]).astype(np.int64), segments)
        further = as_high[:, repeated] @ copies[repeated]
        ranks[start:stop] = np.count_nonzero(as_high, axis=1) + further - right_ones
    return torch.from_numpy(ranks)


def check_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """Returns the cut-offs as plain integers.

    Raises:
        DataError: If there are none, or one is not an integer of at least 1.
    """
    if isinstance(ks, str) or not isinstance(ks, Iterable):
        raise DataError(f"ks is {ks!r:.40}; give a list of cut-offs, such as (1, 5, 10)")
    ks = list(ks)
    for k in ks:
        if not _is_count(k) or k >= 2**63:
            raise DataError(f"ks holds {k!r:.40}; every k must be an integer of at least 1 and below 2**63")
    if len(ks) == 0:
        raise DataError("ks is empty; give at least one cut-off, such as (1, 5, 10)")
    return tuple(int(k) for k in ks)


def check_positives(
    positives: Sequence[Sequence[int]], n_queries: int, n_gallery: int, name: str = "positives"
) -> Positives:
    """Turns lists of right answers into CSR arrays.

    Args:
        positives: For every query the gallery rows that answer it.
        n_queries: How many queries there are.
        n_gallery: How many gallery rows there are.
        name: What to call the lists in an error.

    Raises:
        DataError: If there is not one list per query, a list is empty, or an entry is not a row of the
            gallery; the message names the first such query.
    """
    if not isinstance(positives, Sequence | np.ndarray | Tensor) or isinstance(positives, str):
        raise DataError(f"{name} is a {type(positives).__name__}; give one list of gallery rows per query")
    if len(positives) != n_queries:
        raise DataError(
            f"{name} has {len(positives)} entries for {n_queries} queries; give one list per query"
        )
    if n_queries == 0:
        raise DataError(f"{name} is empty: there are no queries; give at least one")
    try:
        parts = [np.asarray(part) for part in positives]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} holds what is no list of gallery rows ({error}); give such lists") from error
    for i, part in enumerate(parts):
        if part.ndim != 1:
            raise DataError(f"{name}[{i}] is {positives[i]!r}; give a list of gallery rows, such as [0]")
        if part.size == 0:
            raise DataError(f"query {i} has no positive: {name}[{i}] is empty; leave that query out")
        if part.dtype.kind not in "iu":
            raise DataError(f"{name}[{i}] holds {part.dtype} values; gallery rows are integers")
    rows = np.concatenate(parts).astype(np.int64)
    owners = np.repeat(np.arange(n_queries), [part.size for part in parts])
    outside = np.flatnonzero((rows < 0) | (rows >= n_gallery))
    if outside.size:
        first = outside[0]
        raise DataError(
            f"{name}[{owners[first]}] names gallery row {rows[first]}, but the gallery's rows are 0 to "
            f"{n_gallery - 1}; use rows of this gallery"
        )
    keys = np.unique(owners * n_gallery + rows)
    counts = np.bincount(keys // n_gallery, minlength=n_queries)
    return Positives(np.concatenate([[0], np.cumsum(counts)]), keys % n_gallery)


def _as_pair(queries: Vectors, gallery: Vectors) -> tuple[NDArray[Any], NDArray[Any]]:
    """Checks both sides and brings them to one dtype, float32 or float64."""
    left, right = as_vectors(queries, "queries"), as_vectors(gallery, "gallery")
    if left.shape[1] != right.shape[1]:
        raise SpaceMismatchError(
            f"queries have dimension {left.shape[1]} but the gallery has {right.shape[1]}; "
            "they were made by different models: embed or project the queries into the gallery's space"
        )
    dtype = torch.promote_types(left.dtype, right.dtype)
    # Cauchy and Schwarz bound every partial sum by the norms. An overflowing score could turn into NaN, which
    # compares false with everything and would pass for a perfect rank.
    norms = [_longest(side) for side in (left, right)]
    if norms[0] * norms[1] >= torch.finfo(dtype).max:
        raise DataError(
            f"scores overflow {dtype}: the longest query has norm {norms[0]:.3g} and the longest gallery row "
            f"{norms[1]:.3g}; normalise the vectors"
        )
    # numpy from here on: a torch matmul would follow the caller's autocast and float32 matmul precision.
    return left.to(dtype).contiguous().numpy(), right.to(dtype).contiguous().numpy()


def _longest(rows: Tensor) -> float:
    """The greatest norm of a row, in double precision, block by block: no second copy of the rows."""
    starts = range(0, len(rows), _BLOCK_ROWS)
    return max(float(rows[start : start + _BLOCK_ROWS].double().norm(dim=1).max()) for start in starts)


def distinct_rows(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Returns the distinct rows in the order of their first occurrence, and for every row which it is.

    BLAS may round the same inner product differently in different columns (its kernels treat the edge of a
    block apart), so that equal gallery rows would not tie. Scoring every distinct row once makes them tie.
    Where no row occurs twice, what comes back is ``rows`` itself and not a copy.
    """
    hashes = np.fromiter((hash(_row_bytes(row)) for row in rows), np.int64, len(rows))
    _, where, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    first = np.arange(len(rows))
    first_of: dict[bytes, int] = {}
    # Rows with different hashes differ; only the others are compared byte by byte.
    for row in np.flatnonzero(counts[where] > 1).tolist():
        first[row] = first_of.setdefault(_row_bytes(rows[row]), row)
    kept, column_of_row = np.unique(first, return_inverse=True)
    return (rows if len(kept) == len(rows) else rows[kept]), column_of_row.astype(np.int64)


def _row_bytes(row: NDArray[Any]) -> bytes:
    return (row + 0).tobytes()  # -0.0 becomes 0.0: equal rows, equal bytes


def _is_count(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)
