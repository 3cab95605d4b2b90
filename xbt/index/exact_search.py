"""Exact search over rows in memory, with scores that do not depend on the batch.

FAISS proposes candidates, and :func:`rescore` computes each pair's score by itself. Rows lie in blocks that
are never changed, so that a search is never disturbed by a write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Gather = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Row numbers → (n, dim) float32 vectors."""

BLOCK_NUMBERS = 2**27
"""Numbers per block (512 MiB): large enough for few blocks, small enough to copy."""
HOLES = 64
"""Maximum masked rows per block. A block with more is copied without them."""
MOST_FETCHED = 4096
"""Candidates fetched from FAISS to order near-ties, before all scores of a query are computed."""
OVERFETCH = 8
"""Candidates fetched beyond k, so that near-ties can be put in their exact order."""
SCRATCH_BYTES = 2**20
"""Bound on the products held while candidates are rescored; they stay within a core's cache."""
MISSING = -1
"""Padding of row numbers if an index finds too few candidates, as in FAISS."""


def rescore(
    queries: NDArray[np.float32], candidates: NDArray[np.int64], k: int, gather: Gather
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Score candidates pair by pair and keep the first k of each query.

    FAISS alone neither gives equal vectors equal scores (its batched kernels round by position) nor keeps
    ties in order. A pair's score here depends on that pair alone: products of float32 numbers are exact in
    float64, are added up there, and the sum is rounded once. A query gives the same alone and in a batch.

    Returns:
        (n, k) scores, descending, and row numbers of the (n, c) candidates; equal scores are in the order of
        their row numbers. A candidate :data:`MISSING` scores −∞.
    """
    scores = np.full(candidates.shape, -np.inf, np.float32)
    flat, step = scores.reshape(-1), max(1, SCRATCH_BYTES // (8 * queries.shape[1]))
    there = np.flatnonzero(candidates.reshape(-1) != MISSING)
    rows, owners = candidates.reshape(-1)[there], there // candidates.shape[1]
    vectors = gather(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        products = np.multiply(vectors[part], queries.take(owners[part], axis=0), dtype=np.float64)
        flat[there[part]] = products.sum(axis=1)
    order = np.lexsort((candidates, -scores))[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(candidates, order, axis=1)


def rounding(queries: NDArray[np.float32], longest: float) -> NDArray[np.float32]:
    """Bound the error of a float32 score, (n,): scores further apart than this are in a sure order."""
    lengths = np.sqrt(np.einsum("nd,nd->n", queries, queries))
    unit = 2 * np.finfo(np.float32).eps * np.sqrt(queries.shape[1])
    margin: NDArray[np.float32] = (unit * longest * lengths).astype(np.float32)
    return margin


@dataclass(frozen=True)
class Block:
    """Rows searched with one call: (n, dim) vectors, ascending row numbers, and how many are masked."""

    vectors: NDArray[np.float32]
    rows: NDArray[np.int64]
    longest: float
    holes: int = 0

    @classmethod
    def of(cls, vectors: NDArray[np.float32], rows: NDArray[np.int64], holes: int = 0) -> Self:
        """Measure the vectors."""
        squares = np.einsum("nd,nd->n", vectors, vectors)
        return cls(vectors, rows, float(np.sqrt(squares.max(initial=0.0))), holes)


class ExactRows:
    """Immutable set of numbered rows, in blocks of ascending order. Masked rows are not found."""

    def __init__(
        self, dim: int, blocks: tuple[Block, ...] = (), masked: NDArray[np.bool_] | None = None
    ) -> None:
        self.dim, self._blocks = dim, blocks
        self._masked = np.zeros(0, np.bool_) if masked is None else masked
        self._firsts = np.array([block.rows[0] for block in blocks], np.int64)
        self.count = sum(len(block.rows) - block.holes for block in blocks)

    def grown(self, vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> ExactRows:
        """Build the set with additional rows, whose numbers ascend beyond all others and are not masked.

        Small blocks are joined such that each is more than twice as large as the next: that copies a row a
        logarithmic number of times. Vectors that make a block of their own are kept, not copied.
        """
        most = max(1, BLOCK_NUMBERS // self.dim)
        blocks = list(self._blocks)
        for start in range(0, len(rows), most):
            blocks.append(Block.of(vectors[start : start + most], rows[start : start + most]))
            while len(blocks) > 1:
                large, small = blocks[-2:]
                if len(large.rows) > 2 * len(small.rows) or len(large.rows) + len(small.rows) > most:
                    break
                vectors_of_both = np.concatenate([large.vectors, small.vectors])
                rows_of_both = np.concatenate([large.rows, small.rows])
                longest, holes = max(large.longest, small.longest), large.holes + small.holes
                blocks[-2:] = [Block(vectors_of_both, rows_of_both, longest, holes)]
        return ExactRows(self.dim, tuple(blocks), self._masked)

    def masked_by(self, masked: NDArray[np.bool_]) -> ExactRows:
        """Apply a new mask by row number that includes the current one."""
        blocks = []
        for block in self._blocks:
            hidden = masked[block.rows]
            holes = int(hidden.sum())
            if holes > HOLES or holes == len(block.rows):
                block = Block.of(block.vectors[~hidden], block.rows[~hidden])
            elif holes != block.holes:
                block = Block(block.vectors, block.rows, block.longest, holes)
            blocks += [block] if len(block.rows) else []
        return ExactRows(self.dim, tuple(blocks), masked)

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the k best rows by inner product, exactly; equal scores are in the order of the rows."""
        scores, found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        margin = rounding(queries, max(block.longest for block in self._blocks))
        undecided, fetched = np.arange(len(queries)), min(k + OVERFETCH, self.count)
        while len(undecided):
            rough, candidates = self.candidates(queries[undecided], fetched)
            scores[undecided], found[undecided] = rescore(queries[undecided], candidates, k, self.gather)
            if fetched == self.count:
                break
            # There may be more near-ties than candidates: rows beyond them could belong to the first k.
            undecided = undecided[rough[:, -1] >= rough[:, k - 1] - margin[undecided]]
            fetched = min(8 * fetched, self.count)
            if fetched > MOST_FETCHED:
                for row in undecided:
                    near = self._near(queries[row], k, float(margin[row]))
                    scores[row], found[row] = rescore(queries[row][None], near, k, self.gather)
                break
        return scores, found

    def candidates(
        self, queries: NDArray[np.float32], wanted: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find (n, wanted) scores by FAISS, descending up to rounding, and their row numbers."""
        if not wanted:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        found = [self._in_block(block, queries, wanted) for block in self._blocks]
        if len(found) == 1 and not self._blocks[0].holes:
            return found[0]
        rough, rows = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        order = np.argsort(-rough, axis=1, kind="stable")[:, :wanted]
        return np.take_along_axis(rough, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read vectors by row number, in the requested order."""
        if len(self._blocks) == 1:
            return _take(self._blocks[0], rows)
        vectors = np.empty((len(rows), self.dim), np.float32)
        owners = np.searchsorted(self._firsts, rows, side="right") - 1
        for number, block in enumerate(self._blocks):
            own = np.flatnonzero(owners == number)
            if len(own):
                vectors[own] = _take(block, rows[own])
        return vectors

    def _in_block(
        self, block: Block, queries: NDArray[np.float32], wanted: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        import faiss

        fetched = min(wanted + block.holes, len(block.rows))
        rough, positions = faiss.knn(queries, block.vectors, fetched, metric=faiss.METRIC_INNER_PRODUCT)
        rows = block.rows[positions]
        hidden = positions < 0  # FAISS pads with −1, by which numpy would take the last row
        if block.holes:
            hidden |= self._masked[rows]
        if block.holes or hidden.any():
            rough[hidden], rows[hidden] = -np.inf, MISSING
        return rough, rows

    def _near(self, query: NDArray[np.float32], k: int, margin: float) -> NDArray[np.int64]:
        """Find all (1, c) rows that could be among the best k of a query."""
        own = np.concatenate([block.vectors @ query for block in self._blocks])
        rows = np.concatenate([block.rows for block in self._blocks])
        if any(block.holes for block in self._blocks):
            own[self._masked[rows]] = -np.inf
        near: NDArray[np.int64] = rows[own >= np.partition(own, -k)[-k] - margin][None]
        return near


def _take(block: Block, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    first, last = block.rows[0], block.rows[-1]
    without_gaps = last - first == len(block.rows) - 1
    positions = rows - first if without_gaps else np.searchsorted(block.rows, rows)
    return block.vectors.take(positions, axis=0)
