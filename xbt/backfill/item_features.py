"""Features of an index's items before they are backfilled, from old vectors and sample queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from xbt.backfill.orders import SCORES_AT_ONCE

SHARES = (0.002, 0.02, 0.1)
"""Shares of the gallery that count as found."""
MAPPED_SHARE = 0.02
NEAREST = 10

FOUND = (
    "found among the first 0.2 %",
    "found among the first 2 %",
    "found among the first 10 %",
    "chance to be meant, summed",
    "greatest chance to be meant",
    "chance to be meant when mapped, summed",
    "found among the first 2 % when mapped",
)
"""Seven measures of how often an item is found; the old model is weak where an item is found rarely."""

FEATURES = (
    *FOUND,
    "mean score",
    "greatest score",
    "similarity of the nearest items",
    "distance to the mean",
    "length when mapped",
)


class Slopes(NamedTuple):
    """Slopes of the log-odds of relevance over the scores: with them a softmax gives probabilities."""

    old: float
    new: float


class Search(NamedTuple):
    """Statistics of each of m items over some queries, all (m,).

    Attributes:
        found: For every share, how often the item is among that share of the results.
        summed: Sum over the queries of the item's share in softmax(slope · scores).
        greatest: The greatest of these.
        mean: Mean score.
        highest: Greatest score.
    """

    found: list[Tensor]
    summed: Tensor
    greatest: Tensor
    mean: Tensor
    highest: Tensor


def search_statistics(
    queries: Tensor, items: Tensor, slope: float, shares: tuple[float, ...] = SHARES
) -> Search:
    """Compare queries with all items, some queries at a time.

    Args:
        queries: (n, dim).
        items: (m, dim).
        slope: Slope of the log-odds of relevance.
        shares: Shares of the items that count as found; at least the first item always does.
    """
    count = len(items)
    cuts = [max(1, round(share * count)) for share in shares]
    found = [torch.zeros(count) for _ in cuts]
    summed, greatest, total = torch.zeros(count), torch.zeros(count), torch.zeros(count)
    highest = torch.full((count,), -torch.inf)
    step = max(1, SCORES_AT_ONCE // count)
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ items.T
        first = scores.topk(max(cuts), dim=1).indices
        for counts, cut in zip(found, cuts, strict=True):
            counts += torch.bincount(first[:, :cut].flatten(), minlength=count)
        chances = torch.softmax(slope * scores, dim=1)
        summed += chances.sum(dim=0)
        greatest = torch.maximum(greatest, chances.amax(dim=0))
        total += scores.sum(dim=0)
        highest = torch.maximum(highest, scores.amax(dim=0))
    return Search(found, summed, greatest, total / len(queries), highest)


def item_features(
    items: Tensor,
    mapped: Tensor,
    old_queries: Tensor,
    new_queries: Tensor,
    slopes: Slopes,
    neighbour_cosines: Tensor,
) -> Tensor:
    """Compute features of every item, each as its percentile, so that indexes of any size compare.

    Args:
        items: (m, old_dim) old vectors.
        mapped: (m, new_dim) old vectors under a forward map, not normalised: shorter where less certain.
        old_queries: (n, old_dim) sample queries in the old space.
        new_queries: (n, new_dim) the same in the new space.
        slopes: Slopes of both sides' log-odds.
        neighbour_cosines: (m, k) of :func:`~xbt.index.neighbours.nearest_items`.

    Returns:
        (m, len(FEATURES)) float32, each column of mean 0 and variance 1.
    """
    old = search_statistics(old_queries, items, slopes.old)
    new = search_statistics(new_queries, normalize(mapped, dim=1), slopes.new, (MAPPED_SHARE,))
    columns = (
        *old.found,
        old.summed,
        old.greatest,
        new.summed,
        new.found[0],
        old.mean,
        old.highest,
        neighbour_cosines[:, :NEAREST].mean(dim=1),
        (items - items.mean(dim=0)).norm(dim=1),
        mapped.norm(dim=1),
    )
    return torch.stack([_percentiles(column) for column in columns], dim=1)


def _percentiles(values: Tensor) -> Tensor:
    """Ranks with mean ranks for ties, scaled to mean 0 and variance 1."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return torch.zeros(len(values))
    middle = counts.cumsum(0).double() - (counts.double() + 1) / 2
    ranks = middle[place] / (len(values) - 1) - 0.5
    scaled: Tensor = (ranks * 12**0.5).float()
    return scaled
