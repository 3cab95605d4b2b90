"""Two lists of results made one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xbt.gallery.merge import Merge, merge_top
from xbt.gallery.result import SearchResult

Found = tuple[NDArray[np.float32], list[list[str]]]
"""Scores, descending, and ids."""


def merged(merge: Merge, old: Found, new: Found, k: int, sizes: tuple[int, int]) -> SearchResult:
    """Merges what both parts have found.

    Args:
        merge: How.
        old: The old part's first items of every query.
        new: The new part's.
        k: Items to keep, at most as many as there are in both lists.
        sizes: Items of the old part, and of the new one.

    Returns:
        The first k. Scores are those of the merge; where it goes by rank they are 1 / place.
    """
    columns = merge_top(merge, old[0], new[0], k, sizes)
    n_old = old[0].shape[1]
    ids = [
        [mine[c] if c < n_old else other[c - n_old] for c in row]
        for mine, other, row in zip(old[1], new[1], columns.tolist(), strict=True)
    ]
    if merge.by_rank:
        return SearchResult(ids, np.tile(1 / np.arange(1, k + 1, dtype=np.float32), (len(ids), 1)))
    both = np.concatenate([merge.calibrate("old", old[0]), merge.calibrate("new", new[0])], axis=1)
    scores = np.take_along_axis(both, columns, axis=1).astype(np.float32)
    return SearchResult(ids, np.minimum.accumulate(scores, axis=1))
