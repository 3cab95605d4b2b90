"""FastFill's order: the items for which a map from old to new vectors is least certain come first."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from xbt.errors import DataError
from xbt.projections.ridge import fit_ridge
from xbt.vectors import Vectors, as_vectors

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
