"""Hubness bias: one number a row that keeps hubs of the gallery from being found by everything.

A hub is a row that lies near most queries and so is found by many that it does not answer. With a bank B of
queries (corpus captions for text queries, at least 100 unlabelled images for image queries)

    h(g) = mean of the k highest score(b, g), b ∈ B
    score(q, g) − c · h(g)

With c = ½ it ranks the rows for a query as CSLS does (Conneau et al., "Word Translation Without Parallel
Data", ICLR 2018), whose term of the query is the same for all rows; NNN (Chowdhury et al., "Nearest Neighbor
Normalization Improves Multimodal Retrieval", EMNLP 2024) has c as a number to choose. A bank is scored with
the same steps as the queries. It holds neither the queries nor what belongs to a row: a row whose own
caption is in the bank would be pushed down by the query that it answers. :func:`qb_norm` is a baseline.

Cost: 2 · rows · bank · dim floating-point operations, once per row.

``recipes/benchmarks/gallery_steps.py`` measures it on held-out data, for the old query too; README shows the
table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xbt.errors import ConfigError, SpaceMismatchError

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


def hubness(
    rows: Tensor, bank: Tensor, k: int = 10, own: Tensor | None = None, owners: Tensor | None = None
) -> Tensor:
    """Mean of the k highest scores of every row with a bank of queries.

    Args:
        rows: (m, d) rows as they are scored.
        bank: (b, d) queries as they are scored.
        k: How many count; all of the bank if it has fewer.
        own: (m,) or (m, e) int64 owners of every row, -1 for none.
        owners: (b,) int64 owners of the bank's queries; those that a row owns do not count for it.

    Returns:
        (m,) hubness; 0 for a row that owns the whole bank.
    """
    return _mean_of_finite(nearest(rows, bank, k, own, owners)[0])


def mean_of_highest(scores: Tensor, k: int = 10) -> Tensor:
    """(m,) means of the k highest of (m, b) scores; what is -∞ does not count."""
    return _mean_of_finite(highest(scores, k)[0])


def _mean_of_finite(values: Tensor) -> Tensor:
    counted = torch.isfinite(values)
    return values.masked_fill(~counted, 0.0).sum(dim=1) / counted.sum(dim=1).clamp_min(1)


class HubnessBias(nn.Module):
    """The bias c · h of gallery rows, with the bank it is measured on.

    Args:
        dim: Dimension of rows and queries as they are scored.
        count: Queries of the bank.
        weight: c.
        k: How many of the highest scores count.

    Attributes:
        bank: (count, dim) queries.
        owners: (count,) int64, what each query belongs to, -1 for nothing.

    Raises:
        ConfigError: If a number cannot be used.
    """

    def __init__(self, dim: int, count: int, weight: float = 0.5, k: int = 10) -> None:
        super().__init__()
        if count < 1 or k < 1 or not 0 <= weight < float("inf"):
            raise ConfigError(
                f"the hubness bias was given a bank of {count} queries, k={k} and weight={weight}; bank and "
                "k must be at least 1, and the weight a number of at least 0"
            )
        self.weight, self.k = weight, k
        self.bank: Tensor
        self.owners: Tensor
        self.register_buffer("bank", torch.zeros(count, dim))
        self.register_buffer("owners", torch.full((count,), -1, dtype=torch.int64))

    @classmethod
    def from_bank(
        cls, bank: Tensor, weight: float = 0.5, k: int = 10, owners: Tensor | None = None
    ) -> HubnessBias:
        """Keep a (b, dim) bank and maybe its (b,) owners."""
        made = cls(bank.shape[1], len(bank), weight, k)
        made.bank.copy_(bank.detach())
        if owners is not None:
            made.owners.copy_(owners)
        return made

    def forward(self, rows: Tensor, own: Tensor | None = None) -> Tensor:
        """(m,) numbers to subtract from every score of (m, dim) rows; ``own`` as in :func:`hubness`.

        Raises:
            SpaceMismatchError: If the dimension is not that of the bank.
        """
        if rows.ndim != 2 or rows.shape[1] != self.bank.shape[1]:
            raise SpaceMismatchError(
                f"the bank's queries have dimension {self.bank.shape[1]}, but the rows have the shape "
                f"{tuple(rows.shape)}; give rows as they are scored"
            )
        return self.weight * hubness(rows, self.bank.to(rows.dtype), self.k, own, self.owners)


def qb_norm(scores: Tensor, bank_scores: Tensor, beta: float = 20.0, k: int = 1) -> Tensor:
    """Dynamic inverted softmax of QB-Norm (Bogolin et al., CVPR 2022), a baseline.

    A query whose first row is among the first k of any query of the bank gets exp(β s(q, g)) / Σ_b exp(β
    s(b, g)) in place of its scores; the rows are ranked in the same way by the logarithm of it.

    Args:
        scores: (n, m) scores of the queries.
        bank_scores: (b, m) scores of the bank.
        beta: β, the inverse temperature.
        k: How many rows a query of the bank activates.

    Returns:
        (n, m) scores, comparable within a query only.
    """
    active = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    active[bank_scores.topk(min(k, scores.shape[1]), dim=1).indices.flatten()] = True
    normalised = beta * scores - torch.logsumexp(beta * bank_scores, dim=0)
    return torch.where(active[scores.argmax(dim=1)][:, None], normalised, scores)
