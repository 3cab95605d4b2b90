"""Which of a gallery's items comes first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.backfilling.config import BackfillConfig
from xbt.backfilling.queries import Support
from xbt.gallery import Merge
from xbt.gallery.calibration import fit_merge
from xbt.gallery.order_fastfill import fastfill_order
from xbt.gallery.order_rehearsal import fit_rehearsed_order
from xbt.gallery.orders import distance_to_mean_order, oldest_first, query_log_order, random_order

KINDS = ("affine", "isotonic", "rank", "raw")
"""Kinds of merge; of equally good ones the first is taken."""

Queries = tuple[Tensor, Tensor]
"""The same queries in the old space and in the new one."""


def draw_order(
    config: BackfillConfig,
    items: NDArray[np.float32],
    support: Support | None,
    log: Queries | None,
    merge: Merge,
) -> Tensor:
    """Orders items by the config's rule.

    Args:
        config: Which rule, and its settings; it has made sure that what the rule needs is there.
        items: (m, old_dim) the items' old vectors, in the order in which they were added.
        support: Pairs to learn from.
        log: Queries as users ask them.
        merge: How both parts are merged.

    Returns:
        (m,) int64 permutation, most urgent first.

    Raises:
        XbtError: If there are too few pairs to learn from.
    """
    if len(items) < 2:
        return torch.arange(len(items))
    if config.order == "oldest":
        return oldest_first(np.arange(len(items), dtype=np.float64))
    if config.order == "query_log":
        assert log is not None
        return query_log_order(log[0], items)
    if config.order == "distance_to_mean":
        return distance_to_mean_order(items, clusters=config.clusters, seed=config.seed)
    if config.order == "fastfill":
        assert support is not None
        return fastfill_order(
            items,
            support.old_items,
            support.new_items,
            support.new_queries,
            support.item_of_query,
            seed=config.seed,
        )
    if config.order == "rehearsed":
        assert support is not None
        return _rehearsed(
            items, support, log or (support.old_queries, support.new_queries), merge, config.seed
        )
    return random_order(len(items), config.seed)


def fit_support_merge(support: Support, seed: int, kinds: Sequence[str] = KINDS) -> Merge:
    """Fits a merge to the support, of the kind among these that finds most."""
    return fit_merge(
        support.old_queries,
        support.new_queries,
        support.old_items,
        support.new_items,
        support.positives,
        kinds=kinds,
        groups=support.item_of_query,
        seed=seed,
    )


def _rehearsed(
    items: NDArray[np.float32], support: Support, log: Queries | None, merge: Merge, seed: int
) -> Tensor:
    if merge.by_rank:  # a rehearsal compares scores
        merge = fit_support_merge(support, seed, ("affine",))
    asked = log or (support.old_queries, support.new_queries)
    learnt = fit_rehearsed_order(
        support.old_queries,
        support.new_queries,
        support.old_items,
        support.new_items,
        support.positives,
        merge,
        sample_old=asked[0],
        sample_new=asked[1],
        seed=seed,
    )
    return learnt.order(items)
