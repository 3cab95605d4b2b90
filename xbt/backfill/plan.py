"""The plan of a backfill: the order of its items, kept on disk, and the rest of it in chunks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.backfill.config import BackfillConfig
from xbt.backfill.fastfill import fastfill_order
from xbt.backfill.orders import distance_to_mean_order, oldest_first, query_log_order, random_order
from xbt.backfill.queries import Models, Support
from xbt.backfill.records import read_order, write_order
from xbt.backfill.rehearsal import fit_rehearsed_order
from xbt.data import read_captions
from xbt.index.calibration import fit_merge
from xbt.index.mixed import Merge
from xbt.index.protocol import VectorIndex
from xbt.index.target import read_vectors

KINDS = ("affine", "isotonic", "rank", "raw")
"""Kinds of merge; of equally good ones the first is taken."""

T = TypeVar("T")
Queries = tuple[Tensor, Tensor]
"""The same queries in the old space and in the new one."""


@dataclass(frozen=True)
class Chunk:
    """Items that are written to the index at once.

    Attributes:
        ids: Items of a stretch of the order that are still to be done, most urgent first.
        end: Position in the order after the stretch.
    """

    ids: list[str]
    end: int


def kept_plan(path: Path, pending: Sequence[str]) -> list[str] | None:
    """Read an earlier run's order, and append the items that were added to the index since.

    Args:
        path: File of the order.
        pending: Items that are in the old space.

    Returns:
        Ids, most urgent first; ``None`` if no order has been drawn yet.

    Raises:
        StoreError: If the file is damaged, or cannot be written.
    """
    kept = read_order(path)
    if kept is None:
        return None
    seen = set(kept[0])
    added = [name for name in pending if name not in seen]
    if added:
        write_order(path, kept[0] + added, kept[1])
    return kept[0] + added


def draw_plan(
    path: Path,
    config: BackfillConfig,
    index: VectorIndex,
    old: str,
    pending: Sequence[str],
    models: Models,
    support: Support | None,
    merge: Merge,
) -> list[str]:
    """Order the items of an index, and write the order to disk.

    Args:
        path: File of the order.
        config: The rule, and its settings.
        index: The index.
        old: Name of its old vector.
        pending: Items to order.
        models: Encoders of queries, for a query log.
        support: Pairs to learn from.
        merge: How both sides are merged.

    Raises:
        XbtError: If there is too little to learn from, or the file cannot be written.
    """
    log = None if config.query_log is None else models.queries(read_captions(config.query_log))
    rows: list[int] = []
    if pending:
        rows = draw_order(config, read_vectors(index, pending, old), support, log, merge).tolist()
    ids = [pending[row] for row in rows]
    write_order(path, ids, {"order": config.order, "seed": config.seed})
    return ids


def cut(order: Sequence[str], pending: Collection[str], config: BackfillConfig) -> tuple[int, list[Chunk]]:
    """Cut the rest of an order into chunks, whose ends do not depend on where an earlier run stopped.

    Args:
        order: Ids, most urgent first.
        pending: Those that are still to be done.
        config: Size of the chunks, and number of items wanted in all.

    Returns:
        The position before which everything is done, and the chunks after it.
    """
    done = next((place for place, name in enumerate(order) if name in pending), len(order))
    position, limit = done, min(len(order), config.max_items or len(order))
    chunks = []
    while done < limit:
        steps = config.commit_every, config.evaluate_every
        end = min(limit, *((done // step + 1) * step for step in steps))
        chunks.append(Chunk([name for name in order[done:end] if name in pending], end))
        done = end
    return position, chunks


def draw_order(
    config: BackfillConfig,
    items: NDArray[np.float32],
    support: Support | None,
    log: Queries | None,
    merge: Merge,
) -> Tensor:
    """Order items by the config's rule.

    Args:
        config: The rule, and its settings; it has checked that everything the rule needs is there.
        items: (m, old_dim) the items' old vectors, in the order in which they were added.
        support: Pairs to learn from.
        log: Queries as users ask them.
        merge: How both sides are merged.

    Returns:
        (m,) int64 permutation, most urgent first.

    Raises:
        XbtError: If there are too few pairs to learn from.
    """
    if len(items) < 2:
        return torch.arange(len(items))
    rules: dict[str, Callable[[], Tensor]] = {
        "random": lambda: random_order(len(items), config.seed),
        "oldest": lambda: oldest_first(np.arange(len(items), dtype=np.float64)),
        "query_log": lambda: query_log_order(_given(log)[0], items),
        "distance_to_mean": lambda: distance_to_mean_order(items, clusters=config.clusters, seed=config.seed),
        "fastfill": lambda: _fastfill(items, _given(support), config.seed),
        "rehearsed": lambda: _rehearsed(items, _given(support), log, merge, config.seed),
    }
    return rules[config.order]()


def fit_support_merge(support: Support, seed: int, kinds: Sequence[str] = KINDS) -> Merge:
    """Fit a merge to the support, of the kind with the best recall among these."""
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


def _given(value: T | None) -> T:
    assert value is not None  # the config has checked it
    return value


def _fastfill(items: NDArray[np.float32], support: Support, seed: int) -> Tensor:
    return fastfill_order(
        items,
        support.old_items,
        support.new_items,
        support.new_queries,
        support.item_of_query,
        seed=seed,
    )


def _rehearsed(
    items: NDArray[np.float32], support: Support, log: Queries | None, merge: Merge, seed: int
) -> Tensor:
    if merge.by_rank:  # a rehearsal compares scores
        merge = fit_support_merge(support, seed, ("affine",))
    old_sample, new_sample = log or (support.old_queries, support.new_queries)
    learned = fit_rehearsed_order(
        support.old_queries,
        support.new_queries,
        support.old_items,
        support.new_items,
        support.positives,
        merge,
        sample_old=old_sample,
        sample_new=new_sample,
        seed=seed,
    )
    return learned.order(items)
