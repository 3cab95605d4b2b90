"""Exact retrieval metrics, independent of any search index.

The R@k of the CLIP literature is a hit rate: a query counts 1 when at least one of its positives is among the
first k, else 0. CLIP_benchmark reports it as ``*_retrieval_recall@k`` and torchmetrics calls it
``RetrievalHitRate``. "Recall" in torchmetrics is another, smaller number if a query has several positives.
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
"""Default maximum size of a block of scores; a block has at least one query."""
_BLOCK_ROWS = 4096


class Positives(NamedTuple):
    """Positives of every query, as the two arrays of a CSR matrix.

    Attributes:
        starts: (n_queries + 1,) int64; query i has ``rows[starts[i]:starts[i + 1]]``, at least one.
        rows: Gallery rows, int64, sorted and without repetition within a query.
    """

    starts: NDArray[np.int64]
    rows: NDArray[np.int64]


def recall_at_k(
    queries: Vectors, gallery: Vectors, positives: Sequence[Sequence[int]], ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Share of the queries that have a positive among their first k gallery rows (CLIP-style R@k).

    Args:
        queries: (n_queries, dim) vectors; see :func:`best_positive_ranks`.
        gallery: (n_gallery, dim) vectors.
        positives: The relevant gallery rows of every query.
        ks: Cut-offs, each at least 1. A k beyond the size of the gallery gives 1.0.

    Returns:
        ``{k: fraction in [0, 1]}`` in the order of ``ks``.

    Raises:
        DataError: See :func:`best_positive_ranks`; also if ``ks`` is empty or not integers >= 1.
        SpaceMismatchError: If the dimensions differ.
    """
    checked = check_ks(ks)
    ranks = best_positive_ranks(queries, gallery, positives)
    return {k: int((ranks < k).sum()) / len(ranks) for k in checked}


def best_positive_ranks(
    queries: Vectors, gallery: Vectors, positives: Sequence[Sequence[int]], chunk_size: int | None = None
) -> Tensor:
    """Count, for every query, the other gallery rows that score at least as high as its best positive.

    Scores are inner products of the given rows, without normalisation. Ties are ranked pessimistically, so a
    model with equal vectors for all items gets the worst rank. Scores are float32 (float64 if either input
    is), whatever torch's autocast or matmul precision is.

    Args:
        queries: (n_queries, dim) torch tensor or numpy array of any float dtype.
        gallery: (n_gallery, dim) likewise.
        positives: The relevant gallery rows of every query, at least one; repetitions are allowed.
        chunk_size: Queries per block of scores; by default a block has at most 64 MiB.

    Returns:
        (n_queries,) int64 ranks from 0 (best) to the number of the query's other rows.

    Raises:
        DataError: If queries or gallery are empty or hold NaN, scores would overflow, a query has no positive
            or one outside the gallery, or ``chunk_size`` is not an integer >= 1.
        SpaceMismatchError: If the dimensions differ.
    """
    left, right = _as_pair(queries, gallery)
    answers = check_positives(positives, len(left), len(right))
    columns, column_of_row = distinct_rows(right)
    copies = np.bincount(column_of_row)
    if chunk_size is None:
        chunk_size = max(1, SCORE_BYTES // (right.itemsize * len(right)))
    elif not _is_count(chunk_size):
        raise DataError(
            f"chunk_size is {chunk_size!r}; give an integer of at least 1, or None for the default"
        )

    # All chunks reuse one block: a new one would be filled before the last one is freed.
    block = np.empty((min(chunk_size, len(left)), len(columns)), dtype=left.dtype)
    ranks = np.empty(len(left), dtype=np.int64)
    for start in range(0, len(left), chunk_size):
        stop = min(start + chunk_size, len(left))
        scores = np.matmul(left[start:stop], columns.T, out=block[: stop - start])
        bounds = answers.starts[start : stop + 1]
        block_positives = Positives(bounds - bounds[0], column_of_row[answers.rows[bounds[0] : bounds[-1]]])
        ranks[start:stop] = count_before_best(scores, block_positives, copies=copies)
    return torch.from_numpy(ranks)


def count_before_best(
    scores: NDArray[Any],
    positives: Positives,
    positive_scores: NDArray[Any] | None = None,
    copies: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Count the other columns that score at least as high as the best positive of each query.

    Args:
        scores: (n_queries, m) scores.
        positives: Columns of the positives of each query; a column with several positives is repeated.
        positive_scores: (n_queries, m) scores that the positives have for themselves; by default ``scores``.
        copies: (m,) number of gallery rows that share each column; by default one.

    Returns:
        (n_queries,) int64 ranks from 0, ties ranked pessimistically.
    """
    firsts = positives.starts[:-1]
    owners = np.repeat(np.arange(len(scores)), np.diff(positives.starts))
    own = (scores if positive_scores is None else positive_scores)[owners, positives.rows]
    best = np.maximum.reduceat(own, firsts)
    as_high = scores >= best[:, None]
    right = (scores[owners, positives.rows] >= best[owners]).astype(np.int64)
    ranks: NDArray[np.int64] = np.count_nonzero(as_high, axis=1) - np.add.reduceat(right, firsts)
    if copies is not None:
        repeated = np.flatnonzero(copies > 1)
        ranks += as_high[:, repeated] @ (copies[repeated] - 1)
    return ranks


def check_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """Return the cut-offs as plain integers.

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
    """Convert lists of positives, the relevant gallery rows of every query, to CSR arrays.

    Raises:
        DataError: If there is not one list per query, a list is empty, or an entry is not a row of the
            gallery; the message calls the lists ``name`` and gives the first such query.
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
        raise DataError(f"{name} must be lists of gallery rows ({error}); give one list per query") from error
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


def require_same_counts(
    old_queries: Vectors, new_queries: Vectors, old_gallery: Vectors, new_gallery: Vectors
) -> None:
    """Refuse sides that do not have as many queries and items as each other."""
    for what, old, new in (("queries", old_queries, new_queries), ("items", old_gallery, new_gallery)):
        if len(old) != len(new):
            raise DataError(
                f"there are {len(old)} {what} in the old space and {len(new)} in the new one; "
                "give the same in both"
            )


def _as_pair(queries: Vectors, gallery: Vectors) -> tuple[NDArray[Any], NDArray[Any]]:
    """Check both sides and convert them to a common dtype, float32 or float64."""
    left, right = as_vectors(queries, "queries"), as_vectors(gallery, "gallery")
    if left.shape[1] != right.shape[1]:
        raise SpaceMismatchError(
            f"queries have dimension {left.shape[1]} but the gallery has {right.shape[1]}; "
            "they were made by different models: embed or project the queries into the gallery's space"
        )
    dtype = torch.promote_types(left.dtype, right.dtype)
    # By Cauchy-Schwarz, the norms bound every partial sum. An overflow could become NaN, which compares false
    # with everything and would look like a perfect rank.
    # Computed in blocks to avoid a second copy of the rows in double precision.
    norms = [
        max(float(rows.double().norm(dim=1).max()) for rows in torch.split(side, _BLOCK_ROWS))
        for side in (left, right)
    ]
    if norms[0] * norms[1] >= torch.finfo(dtype).max:
        raise DataError(
            f"scores overflow {dtype}: the longest query has norm {norms[0]:.3g} and the longest gallery row "
            f"{norms[1]:.3g}; normalise the vectors"
        )
    # numpy from here on: a torch matmul would follow the caller's autocast and float32 matmul precision.
    return left.to(dtype).contiguous().numpy(), right.to(dtype).contiguous().numpy()


def distinct_rows(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the distinct rows in order of first occurrence, and the index of each row's distinct row.

    BLAS may round the same inner product differently in different columns: its kernels handle the edge of a
    block separately. Equal gallery rows would then not tie, so each distinct row is scored once. If no
    row occurs twice, the result is ``rows`` itself, not a copy.
    """
    hashes = np.fromiter((hash(_row_bytes(row)) for row in rows), np.int64, len(rows))
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    first = np.arange(len(rows))
    first_of: dict[bytes, int] = {}
    # Rows with different hashes differ. Only rows with equal hashes are compared byte by byte.
    for row in np.flatnonzero(counts[group] > 1).tolist():
        first[row] = first_of.setdefault(_row_bytes(rows[row]), row)
    kept, column_of_row = np.unique(first, return_inverse=True)
    return (rows if len(kept) == len(rows) else rows[kept]), column_of_row.astype(np.int64)


def _row_bytes(row: NDArray[Any]) -> bytes:
    return (row + 0).tobytes()  # -0.0 becomes 0.0: equal rows, equal bytes


def _is_count(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)
