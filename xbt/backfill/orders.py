"""Backfill orders: permutations of an index's items, most urgent first.

An order knows the old vectors of all items. It knows new vectors of a sample of pairs at most, since the new
vectors are what a backfill computes. The order that is rehearsed on pairs is in
:mod:`~xbt.backfill.rehearsal`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections.ridge import fit_ridge
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

    The order is made greedily. Neighbours are therefore not backfilled one after the other. A weight of 0
    sorts by the (m,) urgency alone. Equal items keep their order. ``neighbours`` are (m, k) int64 rows.
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


FOLDS = 5
_HELD_OUT = 5


def fastfill_order(
    gallery: Vectors,
    old_items: Vectors,
    new_items: Vectors,
    new_queries: Vectors | None = None,
    item_of_query: Tensor | None = None,
    *,
    hidden_dim: int = 64,
    steps: int = 300,
    lr: float = 1e-3,
    temperature: float = 0.05,
    seed: int = 0,
) -> Tensor:
    """Order items by the predicted uncertainty s of their forward map h, the most uncertain first.

    FastFill (Jaeckle et al., "FastFill: Efficient Compatible Model Update", ICLR 2023) trains h with a head
    that predicts s from the old vector, on

        ½ · e^{−s} · ℓ + ½ · s,      ℓ = mean_d (h(o) − z_new)² + cross-entropy

    whose optimum is e^s = ℓ. Two things differ here. There are no classes, so the cross-entropy is that of
    finding the item's own queries among those of all other items, by the new model. And h is the ridge map,
    with ℓ measured on items that it was not fitted to: on few pairs the training error says nothing.

    Args:
        gallery: (m, old_dim) old vectors of the items to order.
        old_items: (n, old_dim) old vectors of the sample.
        new_items: (n, new_dim) new vectors of the sample.
        new_queries: (q, new_dim) queries for the sample's items; without them ℓ is the squared error alone.
        item_of_query: (q,) int64 the sample's item that each of them asks for.
        hidden_dim: Width of the head.
        steps: Training steps; the best head on held-out items is kept.
        lr: Learning rate of AdamW.
        temperature: Temperature of the cross-entropy.
        seed: Seeds folds and head.

    Returns:
        (m,) int64 permutation.

    Raises:
        DataError: If the sample has fewer than 10 items, or vectors cannot be used or do not fit each other.
        SpaceMismatchError: If gallery and sample differ in dimension.
    """
    old = as_vectors(old_items, "old vectors of the sample").float()
    new = as_vectors(new_items, "new vectors of the sample").float()
    items = as_vectors(gallery, "gallery", old.shape[1]).float()
    if len(old) != len(new) or len(old) < 2 * _HELD_OUT:
        raise DataError(
            f"fastfill_order needs old and new vectors of the same {2 * _HELD_OUT} items or more, got "
            f"{len(old)} and {len(new)}"
        )
    mapped = out_of_fold(old, new, FOLDS, seed)
    losses = (mapped - new).square().mean(dim=1)
    if new_queries is not None and item_of_query is not None:
        queries = as_vectors(new_queries, "queries", new.shape[1]).float()
        losses = losses + _search_losses(mapped, queries, item_of_query, temperature)
    head = _fit_head(old, losses, hidden_dim, steps, lr, seed)
    with torch.no_grad():
        uncertainty: Tensor = head(items)
    order: Tensor = (-uncertainty).argsort(stable=True)
    return order


def out_of_fold(old: Tensor, new: Tensor, folds: int, seed: int) -> Tensor:
    """Map each item by a ridge map with an offset that was fitted to the other folds: (n, new_dim)."""
    fold_of = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed)) % folds
    mapped = torch.empty_like(new)
    with torch.no_grad():
        for fold in range(folds):
            held = fold_of == fold
            mapped[held] = fit_ridge(old[~held], new[~held], intercept=True).project(old[held])
    return mapped


def _search_losses(mapped: Tensor, queries: Tensor, item_of_query: Tensor, temperature: float) -> Tensor:
    """(n,) mean cross-entropy of an item's queries, each beside every item."""
    logits = queries @ normalize(mapped, dim=1).T / temperature
    losses = cross_entropy(logits, item_of_query, reduction="none")
    sums = torch.zeros(len(mapped)).index_add_(0, item_of_query, losses)
    means: Tensor = sums / torch.bincount(item_of_query, minlength=len(mapped)).clamp_min(1)
    return means


def _fit_head(old: Tensor, losses: Tensor, hidden_dim: int, steps: int, lr: float, seed: int) -> nn.Module:
    """Fit s(o) by FastFill's loss, starting from the best constant, s = log mean ℓ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inside, out = nn.Linear(old.shape[1], hidden_dim), nn.Linear(hidden_dim, 1)
        shuffled = torch.randperm(len(old))
    head = nn.Sequential(inside, nn.GELU(), out, nn.Flatten(0))
    with torch.no_grad():
        out.weight.zero_()
        out.bias.fill_(float(losses.mean().clamp_min(1e-12).log()))
    held, chosen = shuffled[: len(old) // _HELD_OUT], shuffled[len(old) // _HELD_OUT :]

    def objective(rows: Tensor) -> Tensor:
        s = head(old[rows])
        mean: Tensor = (0.5 * torch.exp(-s) * losses[rows] + 0.5 * s).mean()
        return mean

    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    best, kept = float("inf"), head.state_dict()
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            objective(chosen).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            score = float(objective(held))
        if score < best:
            best, kept = score, {name: weight.clone() for name, weight in head.state_dict().items()}
    head.load_state_dict(kept)
    return head.eval()
