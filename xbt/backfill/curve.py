"""Recall while an index is backfilled in some order: the curve, its area, and its stopping point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xbt.errors import ConfigError, DataError
from xbt.evaluation import bootstrap_means
from xbt.evaluation.retrieval import check_ks
from xbt.index.mixed import Merge
from xbt.index.ranks import MixedScores

EQUALLY_SPACED = tuple(number / 20 for number in range(21))
"""0 %, 5 %, ..., 100 % backfilled."""


@dataclass(frozen=True)
class BackfillCurve:
    """Recall over the fraction that is backfilled.

    Attributes:
        fractions: Fractions of the items.
        recall: The mean of R@k over the cut-offs at each of them.
        hits: (n_fractions, n_queries) float64: for every query the share of the cut-offs that it meets.
    """

    fractions: tuple[float, ...]
    recall: tuple[float, ...]
    hits: Tensor = field(repr=False, compare=False)

    @property
    def area(self) -> float:
        """Mean recall over the fractions; over equally spaced ones it is FastFill's area under the curve."""
        return float(np.mean(self.recall))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"fractions": list(self.fractions), "recall": list(self.recall), "area": self.area}


@dataclass(frozen=True)
class StoppingPoint:
    """The part of an index that is worth backfilling.

    Attributes:
        items: Number of the most urgent items that pay; all of them if every step pays.
        gain: Recall that the next step would add; ``None`` if there is no next step.
        standard_error: The bootstrap's standard error of that gain.
    """

    items: int
    gain: float | None
    standard_error: float | None


def backfill_curve(
    scores: MixedScores,
    order: Tensor,
    merge: Merge,
    *,
    fractions: Sequence[float] = EQUALLY_SPACED,
    ks: Sequence[int] = (1, 5, 10),
) -> BackfillCurve:
    """Measure recall while the items are backfilled in an order.

    The area under the curve over equally spaced fractions is the measure of FastFill (Jaeckle et al.,
    "FastFill: Efficient Compatible Model Update", ICLR 2023).

    Args:
        scores: Queries and items under both models.
        order: (m,) int64 permutation of the items, most urgent first.
        merge: How the scores of both sides are compared.
        fractions: Where to measure, each from 0 to 1, rounded to whole items.
        ks: Cut-offs, over which R@k is averaged.

    Raises:
        ConfigError: If there are no fractions or one is out of range.
        DataError: If the order is no permutation of the items.
    """
    if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
        raise ConfigError(f"fractions are {list(fractions)}, but must lie from 0 to 1, such as 0.5")
    count = len(check_order(order, scores.old.shape[1]))
    hits = torch.stack(
        [hits_after(scores, order, round(fraction * count), merge, ks) for fraction in fractions]
    )
    return BackfillCurve(tuple(fractions), tuple(hits.mean(dim=1).tolist()), hits)


def stopping_point(
    scores: MixedScores,
    order: Tensor,
    merge: Merge,
    *,
    step: int = 1000,
    ks: Sequence[int] = (1, 5, 10),
    groups: Tensor | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> StoppingPoint:
    """Find where the next items no longer pay: their gain is below its own bootstrap standard error.

    Args:
        scores: Queries and items under both models.
        order: (m,) int64 permutation of the items, most urgent first.
        merge: How the scores of both sides are compared.
        step: Number of items in a step.
        ks: Cut-offs, over which R@k is averaged.
        groups: (n,) integers; queries of one group are drawn together.
        samples: Bootstrap samples.
        seed: Seeds them.

    Raises:
        ConfigError: If ``step`` is below 1.
        DataError: If the order is no permutation of the items.
    """
    if step < 1:
        raise ConfigError(f"step is {step}, but must be at least 1")
    count = len(check_order(order, scores.old.shape[1]))
    before = hits_after(scores, order, 0, merge, ks)
    for done in range(0, count, step):
        after = hits_after(scores, order, min(done + step, count), merge, ks)
        change = after - before
        error = float(bootstrap_means(change, groups, samples, seed).std())
        gain = float(change.mean())
        if gain <= error:
            return StoppingPoint(done, gain, error)
        before = after
    return StoppingPoint(count, None, None)


def hits_after(scores: MixedScores, order: Tensor, done: int, merge: Merge, ks: Sequence[int]) -> Tensor:
    """Share of the cut-offs that each query meets with the first ``done`` items backfilled: (n,) float64."""
    cut_offs = torch.tensor(check_ks(ks))
    mask = np.zeros(scores.old.shape[1], dtype=bool)
    mask[order[:done].numpy()] = True
    return (scores.ranks(mask, merge)[:, None] < cut_offs).double().mean(dim=1)


def check_order(order: Tensor, count: int) -> Tensor:
    """Return an order after checking that it names every item once."""
    integral = not order.is_floating_point() and order.ndim == 1 and len(order) == count
    if not integral or not torch.equal(order.sort().values.long(), torch.arange(count)):
        raise DataError(
            f"an order must name each of the {count} items once, got the shape {tuple(order.shape)}"
        )
    return order
