"""An approximate index over rows: it proposes some of them, whose scores are then computed anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xbt.gallery.index_plan import IndexPlan, largest_codebook
from xbt.gallery.settling import NOBODY, Gather

TRAINING_ROWS_PER_CENTROID = 256
"""FAISS's k-means takes no more than this many rows per centroid."""
TRAINING_ROWS = 65_536
"""Rows that what is trained otherwise, such as a scalar quantiser, is shown at most."""
ROWS_AT_ONCE = 65_536
"""Rows that are read and added at once."""
MOST_PROPOSED = 16_384
"""Rows that an index is asked for at most, to find enough that are not masked."""


@dataclass(frozen=True)
class ApproximateIndex:
    """An index over some of a part's rows; immutable, so that many threads may search it.

    Attributes:
        index: FAISS's.
        rows: (n,) int64 row numbers of its entries, ascending.
        upto: The row before which the rows end that it was made from; later ones are not in it.
        proposals: Rows to ask for, for each one wanted.
    """

    index: Any
    rows: NDArray[np.int64]
    upto: int
    proposals: int = 1

    def propose(
        self, queries: NDArray[np.float32], wanted: int, masked: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Rows that are likely to be the best.

        Args:
            queries: (n, dim).
            wanted: How many.
            masked: (m,) bool by row number: rows that are not to be found.

        Returns:
            (n, wanted) row numbers, in the index's order; :data:`~xbt.gallery.settling.NOBODY` where it has
            found fewer.
        """
        fetched = min(wanted, len(self.rows))
        while True:
            _, places = self.index.search(queries, fetched)
            rows = np.where(places >= 0, self.rows[places], NOBODY)
            rows[(rows >= 0) & masked[rows]] = NOBODY
            enough = (rows >= 0).sum(axis=1) >= wanted
            # An inverted file that gives less than it is asked for has no more in the lists it looks into.
            if fetched >= min(len(self.rows), MOST_PROPOSED) or (enough | (places[:, -1] < 0)).all():
                break
            fetched = min(4 * fetched, len(self.rows), MOST_PROPOSED)
        order = np.argsort(rows < 0, axis=1, kind="stable")[:, :wanted]
        proposed: NDArray[np.int64] = np.take_along_axis(rows, order, axis=1)
        return proposed


def train(plan: IndexPlan, dim: int, rows: NDArray[np.int64], upto: int, gather: Gather) -> ApproximateIndex:
    """Makes an index of rows, trained on an even sample of them.

    Args:
        plan: Which.
        dim: Dimension of the vectors.
        rows: (n,) row numbers, ascending; at least :meth:`IndexPlan.fewest_rows`.
        upto: See :class:`ApproximateIndex`.
        gather: Gives rows' vectors.

    Returns:
        The index.

    Raises:
        StoreError: If rows cannot be read.
    """
    index = plan.make(dim)
    if not index.is_trained:
        most = max(TRAINING_ROWS, TRAINING_ROWS_PER_CENTROID * largest_codebook(index))
        index.train(gather(rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64)]))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        index.add(gather(rows[start : start + ROWS_AT_ONCE]))
    return ApproximateIndex(index, rows, upto, plan.proposals)
