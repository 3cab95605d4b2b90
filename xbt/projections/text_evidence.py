"""Texts in place of image–text pairs, for choosing a projection where there are no pairs.

They tell one projection from another. Of the gain over the old query, with images on one side, they say
nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from xbt.errors import DataError
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import Source, random_access
from xbt.vectors import Vectors

MAX_GROUPS = 1000
"""Most groups, or most texts without groups, that are held out of the fit."""


def pairs_of_groups(
    new: Source, old: Source, groups: NDArray[np.integer], seed: int = 0
) -> tuple[PairVectors, tuple[Vectors, Vectors]]:
    """Holds out groups of texts that say the same: the first of a group takes the place of an image.

    Args:
        new: Vectors of the new model, in memory or in a store.
        old: Vectors of the old model for the same texts.
        groups: (n,) integers; rows with the same one say the same.
        seed: Draws the groups where there are more than :data:`MAX_GROUPS`, or more than a fifth of all.

    Returns:
        The held-out texts as pairs, and the new and old vectors of all other rows.

    Raises:
        ConfigError: If the vectors are a stream.
        DataError: If there is not one group number per row, or no group has two texts.
    """
    rows = random_access(new, old)
    if groups.shape != (len(rows),):
        raise DataError(f"text_groups has the shape {groups.shape} for {len(rows)} rows; give one per row")
    order = np.argsort(groups, kind="stable")
    names, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    several = np.flatnonzero(counts > 1)
    if len(several) == 0:
        raise DataError("no two rows of text_groups are the same; give one number to texts that say the same")
    chosen = _drawn(several, min(MAX_GROUPS, max(1, len(names) // 5)), seed)
    first = order[starts[chosen]]
    rest = [order[starts[group] + 1 : starts[group] + counts[group]] for group in chosen]
    others = np.concatenate(rest)
    new_first, old_first = rows.take(first)
    new_rest, old_rest = rows.take(others)
    owner = torch.from_numpy(np.repeat(np.arange(len(chosen)), [len(each) for each in rest]))
    held = np.concatenate([first, others])
    return (
        PairVectors(new_rest, old_rest, old_first, owner, new_first),
        rows.take(np.setdiff1d(np.arange(len(rows)), held)),
    )


def own_captions(new: Source, old: Source, seed: int = 0) -> tuple[PairVectors, tuple[Vectors, Vectors]]:
    """Holds out texts that are to be found by their own old vector: each is its own answer.

    Args:
        new: Vectors of the new model, in memory or in a store.
        old: Vectors of the old model for the same texts.
        seed: Draws the texts: a fifth, at most :data:`MAX_GROUPS`.

    Returns:
        The held-out texts as pairs, and the new and old vectors of all other rows.

    Raises:
        ConfigError: If the vectors are a stream.
    """
    rows = random_access(new, old)
    held = _drawn(np.arange(len(rows)), min(MAX_GROUPS, max(1, len(rows) // 5)), seed)
    new_held, old_held = rows.take(held)
    owner = torch.arange(len(held))
    return (
        PairVectors(new_held, old_held, old_held, owner, new_held),
        rows.take(np.setdiff1d(np.arange(len(rows)), held)),
    )


def _drawn(items: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    if len(items) <= count:
        return items
    return np.sort(np.random.default_rng(seed).choice(items, count, replace=False))
