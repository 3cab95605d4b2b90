"""The nearest other rows of every row: exact for a small index, by an inverted file for a large one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from xbt.projections.hubness import nearest

NEIGHBOURS = 20
EXACT_ITEMS = 50_000
"""Largest number of items for which all pairs are compared; beyond, that would take days."""
PROBED_LISTS = 16
_LISTS_PER_ROOT = 4
_TRAINING_ROWS_PER_LIST = 64
_TRAINING_ROUNDS = 10
_ROWS_AT_ONCE = 16_384


def nearest_items(
    items: Tensor, count: int = NEIGHBOURS, exact_items: int = EXACT_ITEMS
) -> tuple[Tensor, Tensor]:
    """Find every item's nearest other items, by cosine about the mean.

    Exact for up to ``exact_items``, O(m²). Beyond that by FAISS's inverted file of 4·√m lists, of which the
    16 nearest are searched: O(m^1.5), and a few of the neighbours are missed.

    Args:
        items: (m, dim), m at least 2.
        count: How many neighbours; all others if there are fewer.
        exact_items: Largest number of items for which all pairs are compared.

    Returns:
        (m, count) cosines, descending, and (m, count) int64 rows. An item with fewer neighbours in the lists
        that were searched fills the remaining places with itself.
    """
    centred = normalize(items - items.mean(dim=0), dim=1)
    count = min(count, len(items) - 1)
    if len(items) <= exact_items:
        own = torch.arange(len(items))
        return nearest(centred, centred, count, own, own)
    return _approximate(np.ascontiguousarray(centred.numpy(), dtype=np.float32), count)


def _approximate(centred: NDArray[np.float32], count: int) -> tuple[Tensor, Tensor]:
    index = _inverted_file(centred)
    cosines, rows = [], []
    for start in range(0, len(centred), _ROWS_AT_ONCE):
        part = centred[start : start + _ROWS_AT_ONCE]
        values, found = index.search(part, count + 1)
        own = np.arange(start, start + len(part))[:, None]
        # The item itself goes to the end, as missing entries do; another item may be its equal.
        values[(found == own) | (found < 0)] = -np.inf
        places = np.argsort(-values, axis=1, kind="stable")[:, :count]
        values, found = np.take_along_axis(values, places, 1), np.take_along_axis(found, places, 1)
        missing = np.isneginf(values)
        least = np.where(missing, np.inf, values).min(axis=1, keepdims=True)
        cosines.append(torch.from_numpy(np.where(missing, np.where(np.isinf(least), 0, least), values)))
        rows.append(torch.from_numpy(np.where(missing, own, found)))
    return torch.cat(cosines).float(), torch.cat(rows)


def _inverted_file(centred: NDArray[np.float32]) -> Any:
    import faiss

    count, dim = centred.shape
    lists = round(_LISTS_PER_ROOT * math.sqrt(count))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.spherical = _TRAINING_ROUNDS, True
    index.cp.max_points_per_centroid = _TRAINING_ROWS_PER_LIST
    index.cp.min_points_per_centroid = 1  # an even sample is enough; don't warn about small indexes
    step = max(1, count // (_TRAINING_ROWS_PER_LIST * lists))
    index.train(np.ascontiguousarray(centred[::step]))
    index.add(centred)
    index.nprobe = min(PROBED_LISTS, lists)
    return index
