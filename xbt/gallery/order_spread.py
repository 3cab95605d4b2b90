"""An order that does not backfill neighbours one after the other."""

from __future__ import annotations

import heapq

import numpy as np
import torch
from torch import Tensor


def spread_out(urgency: Tensor, neighbours: Tensor, weight: float) -> Tensor:
    """Items by urgency less ``weight`` times the share of their neighbours that come before them, greedily.

    Args:
        urgency: (m,) higher is more urgent.
        neighbours: (m, k) int64 rows of every item's neighbours.
        weight: At least 0; 0 sorts by urgency alone. Equal items keep their order.

    Returns:
        (m,) int64 permutation.
    """
    if weight == 0 or neighbours.shape[1] == 0:
        return (-urgency).argsort(stable=True)
    value, near = urgency.double().tolist(), neighbours.numpy()
    loss = weight / near.shape[1]
    # Who counts an item among its neighbours: the rows of the transposed graph.
    members = np.argsort(near.ravel(), kind="stable") // near.shape[1]
    starts = np.concatenate([[0], np.cumsum(np.bincount(near.ravel(), minlength=len(near)))])
    heap = [(-each, row) for row, each in enumerate(value)]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap:
        stale, row = heapq.heappop(heap)
        if -stale > value[row]:
            heapq.heappush(heap, (-value[row], row))  # urgency only falls, so that the top is looked at again
            continue
        chosen.append(row)
        for other in members[starts[row] : starts[row + 1]].tolist():
            value[other] -= loss
    return torch.tensor(chosen)
