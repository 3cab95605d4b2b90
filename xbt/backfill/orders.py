"""Backfill orders: permutations of an index's items, most urgent first.

An order knows the old vectors of all items. It knows new vectors of a sample of pairs at most, since the new
vectors are what a backfill computes. Two orders that learn from pairs have modules of their own,
:mod:`~xbt.backfill.fastfill` and :mod:`~xbt.backfill.rehearsal`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.vectors import Vectors, as_vectors

SCORES_AT_ONCE = 2**24
"""Scores held at once while queries are compared with items."""


def random_order(count: int, seed: int = 0) -> Tensor:
    """Order items at random: the baseline of every other order.

    Args:
        count: How many items there are.
        seed: Fixes the order.

    Raises:
        ConfigError: If there are no items.
    """
    if count < 1:
        raise ConfigError(f"there are {count} items to order; give at least 1")
    return torch.from_numpy(np.random.default_rng(seed).permutation(count))


def oldest_first(added: Sequence[float] | NDArray[np.floating] | Tensor) -> Tensor:
    """Order items by the time they were added, the oldest first.

    Args:
        added: A time or running number per item; equal ones keep their order.

    Raises:
        DataError: If there are none, or one is NaN.
    """
    times = torch.as_tensor(np.asarray(added, dtype=np.float64))
    if times.ndim != 1 or len(times) == 0 or bool(times.isnan().any()):
        raise DataError(
            f"oldest_first needs one time per item and no NaN, got the shape {tuple(times.shape)}"
        )
    return times.argsort(stable=True)


def query_log_order(queries: Vectors, gallery: Vectors, k: int = 10) -> Tensor:
    """Order items by how often they are among the first k results of a log's queries, frequent ones first.

    What users see most they notice first; it need not be what gains most. Equal counts keep their order.

    Args:
        queries: (n, old_dim) the log's queries in the old space.
        gallery: (m, old_dim) the items' old vectors.
        k: How many items of each query count.

    Raises:
        ConfigError: If k is below 1.
        DataError, SpaceMismatchError: If the vectors cannot be used or do not fit each other.
    """
    if k < 1:
        raise ConfigError(f"k is {k}, but must be at least 1")
    rows, items = as_vectors(queries, "queries of the log").float(), as_vectors(gallery, "gallery").float()
    require_same_dim(rows, items)
    counts = torch.zeros(len(items), dtype=torch.int64)
    step = max(1, SCORES_AT_ONCE // len(items))
    for start in range(0, len(rows), step):
        first = (rows[start : start + step] @ items.T).topk(min(k, len(items)), dim=1).indices
        counts += torch.bincount(first.flatten(), minlength=len(items))
    return (-counts).argsort(stable=True)


def distance_to_mean_order(
    gallery: Vectors, labels: Sequence[int] | Tensor | None = None, clusters: int = 20, seed: int = 0
) -> Tensor:
    """Order items by their distance to the mean of their class or cluster, the farthest first.

    The order of λ-orthogonality (Ricci et al., NeurIPS 2025, arXiv 2509.16664), which needs classes.
    Without them k-means makes clusters; ``clusters=1`` takes the distance to the mean of all.

    Args:
        gallery: (m, dim) the items' old vectors.
        labels: (m,) class of every item, if there are classes.
        clusters: Number of clusters, at most m.
        seed: Seeds k-means.

    Raises:
        ConfigError: If ``clusters`` is below 1.
        DataError: If the vectors cannot be used, or there is not one label per item.
    """
    items = as_vectors(gallery, "gallery").double()
    if clusters < 1:
        raise ConfigError(f"clusters is {clusters}, but there must be at least 1")
    if labels is None:
        owner = _k_means(items, min(clusters, len(items)), seed)
    else:
        owner = torch.unique(torch.as_tensor(labels), return_inverse=True)[1]
        if owner.shape != (len(items),):
            raise DataError(f"there are {len(owner)} labels for {len(items)} items; give one each")
    distances = (items - _means(items, owner)[owner]).norm(dim=1)
    order: Tensor = (-distances).argsort(stable=True)
    return order


def _means(items: Tensor, owner: Tensor) -> Tensor:
    count = int(owner.max()) + 1
    sums = torch.zeros(count, items.shape[1], dtype=items.dtype).index_add_(0, owner, items)
    means: Tensor = sums / torch.bincount(owner, minlength=count).clamp_min(1)[:, None]
    return means


def _k_means(items: Tensor, clusters: int, seed: int, rounds: int = 25) -> Tensor:
    """(m,) cluster of every item: Lloyd's algorithm from k-means++ centres."""
    if clusters == 1:
        return torch.zeros(len(items), dtype=torch.int64)
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(items)))]
    nearest = (items - items[chosen[0]]).square().sum(dim=1)
    for _ in range(1, clusters):
        weights = nearest.numpy()
        total = float(weights.sum())
        if total == 0:
            break  # fewer different items than clusters
        chosen.append(int(rng.choice(len(items), p=weights / total)))
        nearest = torch.minimum(nearest, (items - items[chosen[-1]]).square().sum(dim=1))
    centres = items[chosen]
    owner = torch.full((len(items),), -1, dtype=torch.int64)
    for _ in range(rounds):
        closest = torch.cat(
            [torch.cdist(items[at : at + 8192], centres).argmin(dim=1) for at in range(0, len(items), 8192)]
        )
        if torch.equal(closest, owner):
            break
        owner = closest
        means = _means(items, owner)
        filled = torch.bincount(owner, minlength=len(centres)) > 0
        centres[: len(means)][filled[: len(means)]] = means[filled[: len(means)]]
    return owner


def require_same_dim(queries: Tensor, gallery: Tensor) -> None:
    """Refuse queries whose dimension is not that of the items."""
    if queries.shape[1] != gallery.shape[1]:
        raise SpaceMismatchError(
            f"queries have dimension {queries.shape[1]} but the items have {gallery.shape[1]}; "
            "project the queries into the old space"
        )


def spread_out(urgency: Tensor, neighbours: Tensor, weight: float) -> Tensor:
    """Order items by urgency minus ``weight`` times the share of their neighbours that come earlier.

    The order is made greedily. Neighbours are therefore not backfilled one after the other.

    Args:
        urgency: (m,) higher is more urgent.
        neighbours: (m, k) int64 rows of every item's neighbours.
        weight: At least 0; 0 sorts by urgency alone. Equal items keep their order.
    """
    if weight == 0 or neighbours.shape[1] == 0:
        return (-urgency).argsort(stable=True)
    value, near = urgency.double().tolist(), neighbours.numpy()
    loss = weight / near.shape[1]
    # Rows of the transposed graph: which items have this one among their neighbours.
    members = np.argsort(near.ravel(), kind="stable") // near.shape[1]
    starts = np.concatenate([[0], np.cumsum(np.bincount(near.ravel(), minlength=len(near)))])
    heap = [(-urgent, row) for row, urgent in enumerate(value)]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap:
        stale, row = heapq.heappop(heap)
        if -stale > value[row]:
            heapq.heappush(heap, (-value[row], row))  # urgency only falls: check the top again
            continue
        chosen.append(row)
        for other in members[starts[row] : starts[row + 1]].tolist():
            value[other] -= loss
    return torch.tensor(chosen)
