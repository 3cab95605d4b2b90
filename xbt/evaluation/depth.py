"""Recall of a cascade against its depth: how many candidates the new model has to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError
from xbt.evaluation.bootstrap import Interval, bootstrap_interval, hits_at
from xbt.evaluation.retrieval import (
    SCORE_BYTES,
    Positives,
    best_positive_ranks,
    check_ks,
    check_positives,
    distinct_rows,
    require_same_counts,
)
from xbt.vectors import Vectors, as_vectors

DEPTHS = (1, 2, 3, 5, 10, 20, 50, 100, 200)
TOLERANCE = 0.005
"""Loss of R@k against the new model alone that a recommended depth may have: half a point."""


@dataclass(frozen=True)
class DepthPoint:
    """Recall of a cascade at one depth.

    Attributes:
        depth: Candidates of each query that the new model scores.
        recall: R@k by k, with its interval.
        loss: R@k of the new model alone minus that of the cascade, with its paired interval.
    """

    depth: int
    recall: dict[int, Interval]
    loss: dict[int, Interval]


@dataclass(frozen=True)
class DepthCurve:
    """Recall of a cascade against its depth; print it for a table.

    Attributes:
        points: The curve, by rising depth.
        first: R@k of the first stage alone.
        new: R@k of the new model alone, new/new.
        size: Rows of the gallery that it was measured on.
    """

    points: tuple[DepthPoint, ...]
    first: dict[int, Interval]
    new: dict[int, Interval]
    size: int

    def recommended(self, tolerance: float = TOLERANCE) -> int | None:
        """Find the smallest depth from which on no R@k is further below new/new than the tolerance.

        Args:
            tolerance: Largest loss, as a fraction.

        Returns:
            The depth; ``None`` if none of those measured is enough.
        """
        enough = None
        for point in reversed(self.points):
            if any(loss.estimate > tolerance + 1e-12 for loss in point.loss.values()):
                break
            enough = point.depth
        return enough

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""

        def plain(values: dict[int, Interval]) -> dict[str, list[float]]:
            return {f"R@{k}": list(interval) for k, interval in values.items()}

        points = [
            {"depth": each.depth, "recall": plain(each.recall), "loss": plain(each.loss)}
            for each in self.points
        ]
        ends = {"first": plain(self.first), "new": plain(self.new)}
        return {"size": self.size, **ends, "points": points, "recommended": self.recommended()}

    def __str__(self) -> str:
        ks = list(self.new)
        rows = [("first stage", self.first), *((str(each.depth), each.recall) for each in self.points)]
        rows.append(("new/new", self.new))
        lines = [f"{'depth':<12}" + "".join(f"{f'R@{k}':>20}" for k in ks)]
        lines += [f"{name:<12}" + "".join(f"{recall[k]!s:>20}" for k in ks) for name, recall in rows]
        return "\n".join([*lines, f"recommended depth: {self.recommended()}"])


def depth_curve(
    old_queries: Vectors,
    new_queries: Vectors,
    old_gallery: Vectors,
    new_gallery: Vectors,
    positives: Sequence[Sequence[int]],
    *,
    depths: Sequence[int] = DEPTHS,
    ks: Sequence[int] = (1, 5, 10),
    groups: Tensor | None = None,
    seed: int = 0,
) -> DepthCurve:
    """Measure recall of a cascade at several depths, exactly, from the vectors of both models.

    The first stage ranks all items by the old vectors, and the new model orders its first K, as
    :func:`~xbt.index.cascaded_search` does where no row is backfilled. Ties count against us. The depth that
    a gallery needs grows with it: measure on as many items as the index has, or multiply the depth by their
    ratio.

    Args:
        old_queries: (n, old_dim) queries of the first stage: of the old model, projected, or mixed.
        new_queries: (n, new_dim) the same under the new model.
        old_gallery: (m, old_dim) items under the old model.
        new_gallery: (m, new_dim) the same under the new model.
        positives: For every query the items that answer it.
        depths: Depths to measure; those beyond m count as m.
        ks: Cut-offs.
        groups: (n,) integers; queries of a group are drawn together for the intervals.
        seed: Seed of the intervals.

    Raises:
        ConfigError: If a depth is below 1, or there are none.
        DataError, SpaceMismatchError: If vectors or positives cannot be used, or both sides do not have the
            same queries and items.
    """
    if not depths or min(depths) < 1:
        raise ConfigError(f"depths is {list(depths)}; give depths of at least 1, such as {DEPTHS}")
    cutoffs = check_ks(ks)
    require_same_counts(old_queries, new_queries, old_gallery, new_gallery)
    alone = best_positive_ranks(new_queries, new_gallery, positives)
    first = best_positive_ranks(old_queries, old_gallery, positives)
    tried = sorted({min(depth, len(old_gallery)) for depth in depths})
    answers = check_positives(positives, len(old_queries), len(old_gallery))
    sides = [
        (as_vectors(queries, "queries").float().numpy(), as_vectors(gallery, "gallery").float().numpy())
        for queries, gallery in ((old_queries, old_gallery), (new_queries, new_gallery))
    ]
    ranks = _ranks_at(sides[0], sides[1], answers, tried, first)

    def measured(values: Tensor) -> dict[int, Interval]:
        return {
            k: bootstrap_interval(values[:, column].double(), groups, seed=seed)
            for column, k in enumerate(cutoffs)
        }

    new_hits = hits_at(alone, cutoffs)
    points = []
    for depth, own in zip(tried, ranks, strict=True):
        hits = hits_at(torch.from_numpy(own), cutoffs)
        points.append(DepthPoint(depth, measured(hits), measured(new_hits.double() - hits.double())))
    return DepthCurve(tuple(points), measured(hits_at(first, cutoffs)), measured(new_hits), len(old_gallery))


_Side = tuple[NDArray[np.float32], NDArray[np.float32]]


def _ranks_at(
    old: _Side, new: _Side, answers: Positives, depths: Sequence[int], first: Tensor
) -> NDArray[np.int64]:
    """(len(depths), n) ranks of the best positives in a cascade, ties against us."""
    (old_rows, old_column), (new_rows, new_column) = distinct_rows(old[1]), distinct_rows(new[1])
    ranks = np.empty((len(depths), len(first)), np.int64)
    step = max(1, SCORE_BYTES // (8 * len(old[1])))
    for start in range(0, len(first), step):
        part = slice(start, start + step)
        scores = (old[0][part] @ old_rows.T)[:, old_column]
        positive = np.zeros(scores.shape, np.bool_)
        bounds = answers.starts[start : start + len(scores) + 1]
        owners = np.repeat(np.arange(len(scores)), np.diff(bounds))
        positive[owners, answers.rows[bounds[0] : bounds[-1]]] = True
        # Of equal scores the wrong items come first.
        order = np.lexsort((positive, -scores), axis=1)[:, : depths[-1]]
        right = np.take_along_axis(positive, order, axis=1)
        found = np.take_along_axis((new[0][part] @ new_rows.T)[:, new_column], order, axis=1)
        for number, depth in enumerate(depths):
            best = np.where(right[:, :depth], found[:, :depth], -np.inf).max(axis=1)
            before = (found[:, :depth] >= best[:, None]) & ~right[:, :depth]
            ranks[number, part] = np.where(np.isfinite(best), before.sum(axis=1), first[part].numpy())
    return ranks
