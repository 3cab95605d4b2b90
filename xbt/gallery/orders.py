"""In what order to backfill a gallery: permutations of its items, most urgent first.

An order knows the old vectors of all items. Of new vectors it knows those of a sample of pairs at most, since
an item's new vector is what backfilling makes. The two that learn from pairs are in modules of their own,
:mod:`~xbt.gallery.order_fastfill` and :mod:`~xbt.gallery.order_rehearsal`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.vectors import Vectors, as_vectors

SCORES_AT_ONCE = 2**24
"""Scores held at once while queries are compared with a gallery."""


def random_order(count: int, seed: int = 0) -> Tensor:
    """Items in random order: what every other order has to beat.

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
    """Items by when they were added, the longest there first.

    Args:
        added: A time or running number per item; equal ones keep the gallery's order.

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
    """Items by how often they are among the first k of a log's queries, the most frequent first.

    What users see most is what they notice first; whether it is what gains most is another question. Equal
    counts keep the gallery's order.

    Args:
        queries: (n, old_dim) the log's queries in the old space.
        gallery: (m, old_dim) the items' old vectors.
        k: How many items of each query count.

    Raises:
        ConfigError: If k is below 1.
        DataError, SpaceMismatchError: If the vectors cannot be used or do not fit each other.
    """
    if k < 1:
        raise ConfigError(f"k is {k}, but at least the first item must count")
    rows, items = as_vectors(queries, "queries of the log").float(), as_vectors(gallery, "gallery").float()
    require_same_dim(rows, items)
    counts = torch.zeros(len(items), dtype=torch.int64)
    step = max(1, SCORES_AT_ONCE // len(items))
    for start in range(0, len(rows), step):
        found = (rows[start : start + step] @ items.T).topk(min(k, len(items)), dim=1).indices
        counts += torch.bincount(found.flatten(), minlength=len(items))
    return (-counts).argsort(stable=True)


def distance_to_mean_order(
    gallery: Vectors, labels: Sequence[int] | Tensor | None = None, clusters: int = 20, seed: int = 0
) -> Tensor:
    """Items by their distance to the mean of their class or cluster, the farthest first.

    The order of λ-orthogonality (Ricci et al., NeurIPS 2025, arXiv 2509.16664), which knows classes. Without
    them k-means makes clusters; ``clusters=1`` takes the distance to the mean of all.

    Args:
        gallery: (m, dim) the items' old vectors.
        labels: (m,) the class of every item, if there are classes.
        clusters: How many clusters to make, at most m.
        seed: Fixes where k-means starts.

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
    """(m,) cluster of every item: Lloyd's algorithm from centres drawn as k-means++ draws them."""
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
    """Refuses queries that do not fit a gallery.

    Raises:
        SpaceMismatchError: If the dimensions differ.
    """
    if queries.shape[1] != gallery.shape[1]:
        raise SpaceMismatchError(
            f"queries have dimension {queries.shape[1]} but the gallery has {gallery.shape[1]}; "
            "project the queries into the old space"
        )
