"""Queries that an upgrade fixes or breaks, with their results before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xbt.index.gallery import Gallery
from xbt.report.measure import OLD, UPGRADED, Measured

TOP = 4
"""Results shown per query and model."""


@dataclass(frozen=True)
class Example:
    """One query whose answer moved.

    Attributes:
        direction: ``"T2I"`` or ``"I2T"``.
        query: Row of the text, or of the image, in the measuring part of the sample.
        old_rank: Rank of the best right result with the old query, from 0.
        new_rank: Rank of the best right result with the new query, from 0.
        before: Rows of the first results of the old query.
        after: Rows of the first results of the new query.
        right: Rows that answer the query.
    """

    direction: str
    query: int
    old_rank: int
    new_rank: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    right: tuple[int, ...]


@dataclass(frozen=True)
class Flips:
    """Best and worst changes of a direction.

    Attributes:
        k: The k at which a query counts as fixed or broken.
        fixed: Queries that miss at k with the old model and hit with the new one, largest change first.
        broken: Queries that hit with the old model and miss with the new one, largest change first.
    """

    k: int
    fixed: list[Example]
    broken: list[Example]


def find_flips(measured: Measured, count: int) -> dict[str, Flips]:
    """Find ``count`` best and worst changes per direction, at most one query an image, by exact search."""
    flips = {}
    k = min(measured.ks)
    for direction in measured.directions:
        old, new = (measured.cells[name].ranks[direction].numpy() for name in (OLD, UPGRADED))
        groups = measured.groups[direction].numpy()
        fixed = _spread(np.flatnonzero((old >= k) & (new < k)), new - old, groups, count)
        broken = _spread(np.flatnonzero((old < k) & (new >= k)), old - new, groups, count)
        examples = _examples(measured, direction, [*fixed, *broken])
        flips[direction] = Flips(k, examples[: len(fixed)], examples[len(fixed) :])
    return flips


def _spread(
    rows: np.ndarray[Any, Any], change: np.ndarray[Any, Any], groups: np.ndarray[Any, Any], count: int
) -> list[int]:
    """The rows with the lowest change, each of another image."""
    chosen: dict[int, int] = {}
    for row in rows[np.argsort(change[rows], kind="stable")]:
        chosen.setdefault(int(groups[row]), int(row))
    return list(chosen.values())[:count]


def _examples(measured: Measured, direction: str, rows: list[int]) -> list[Example]:
    if not rows:
        return []
    gallery = measured.gallery(OLD, direction)
    index = Gallery.build(gallery, [str(row) for row in range(len(gallery))])
    asked = torch.tensor(rows)
    before, after = (
        index.search(measured.queries[name][direction][asked], min(TOP, len(gallery))).ids
        for name in (OLD, UPGRADED)
    )
    old, new = (measured.cells[name].ranks[direction] for name in (OLD, UPGRADED))
    right = measured.pairs.positives(direction)
    return [
        Example(
            direction,
            row,
            int(old[row]),
            int(new[row]),
            tuple(map(int, first)),
            tuple(map(int, second)),
            tuple(right[row]),
        )
        for row, first, second in zip(rows, before, after, strict=True)
    ]
