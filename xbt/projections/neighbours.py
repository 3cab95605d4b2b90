"""Exact highest inner products of rows with other rows, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

_SCORE_BYTES = 16 * 2**20
_BLOCK = 32_768
_GROUP = 8


def nearest(
    rows: Tensor, others: Tensor, k: int, own: Tensor | None = None, owners: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k highest inner products of every row with other rows.

    Args:
        rows: (m, d) rows.
        others: (n, d) the rows to search.
        k: How many; n if there are fewer.
        own: (m,) or (m, e) int64 owners of the rows, -1 for none.
        owners: (n,) int64 owners of the others; those of an owner of the row count as -∞.

    Returns:
        (m, k) values, highest first, and (m, k) int64 positions.
    """
    kept = min(k, len(others))
    block = max(1, _SCORE_BYTES // (rows.element_size() * min(len(others), _BLOCK)))
    values = rows.new_empty(len(rows), kept)
    positions = torch.empty(len(rows), kept, dtype=torch.int64, device=rows.device)
    mine = None if own is None or owners is None else own.reshape(len(rows), -1)
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        best_values, best = rows.new_empty(len(rows[part]), 0), positions.new_empty(len(rows[part]), 0)
        for first in range(0, len(others), _BLOCK):
            scores = rows[part] @ others[first : first + _BLOCK].T
            if mine is not None and owners is not None:
                scores.masked_fill_(owned(mine[part], owners[first : first + _BLOCK]), -torch.inf)
            found_values, found = highest(scores, kept)
            both = torch.cat([best_values, found_values], dim=1), torch.cat([best, found + first], dim=1)
            best_values, order = both[0].topk(min(kept, both[0].shape[1]), dim=1)
            best = both[1].gather(1, order)
        values[part], positions[part] = best_values, best
    return values, positions


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and positions of the k highest entries of every row, highest first; k is cut to the columns.

    They lie in the k groups of columns with the highest maxima, which is faster to find in long rows than by
    :meth:`torch.Tensor.topk`.
    """
    rows, columns = scores.shape
    groups = columns // _GROUP
    if groups <= 16 * k:
        found = scores.topk(min(k, columns), dim=1)
        return found.values, found.indices
    # Group g holds the columns g, g + groups, g + 2 · groups, …; the rest of the columns is looked at as is.
    cut = groups * _GROUP
    best = scores[:, :cut].reshape(rows, _GROUP, groups).amax(dim=1).topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(0, cut, groups, device=scores.device)
    rest = torch.arange(cut, columns, device=scores.device).expand(rows, -1)
    places = torch.cat([(best[:, :, None] + offsets).reshape(rows, -1), rest], dim=1)
    found = scores.gather(1, places).topk(k, dim=1)
    return found.values, places.gather(1, found.indices)


def owned(own: Tensor, owners: Tensor) -> Tensor:
    """(m, n) booleans: which of n others with these owners a row with (m, e) owners owns; -1 owns nothing."""
    found = torch.zeros(len(own), len(owners), dtype=torch.bool, device=own.device)
    for column in own.T:
        found |= (column[:, None] == owners) & (column[:, None] >= 0)
    return found
