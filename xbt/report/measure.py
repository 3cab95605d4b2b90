"""Cells of a method on a part of the sample, the table of results, and queries that it fixes or breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xbt.evaluation import (
    Cell,
    Difference,
    Interval,
    best_positive_ranks,
    bootstrap_interval,
    criterion,
    differences,
    recovered_gain,
)
from xbt.evaluation.cells import keyed
from xbt.index.gallery import Gallery
from xbt.projections.auto.decision import Decision
from xbt.projections.pairs import PairVectors

OLD, UPGRADED, ALONE, NEW = "old/old", "new/old", "new/old (without the old model)", "new/new"

Queries = Mapping[str, Tensor]
"""Query vectors by direction."""


@dataclass(frozen=True)
class Measured:
    """Cells on the part of the sample that was not used for the choice, by name, with their query vectors.

    ``alone`` is the method chosen without the old model at search time, if the first choice needs it. Without
    image queries, cells have no I2T; ``new/new`` needs new image vectors. The method was chosen on
    ``n_chosen`` images.
    """

    decision: Decision
    alone: Decision | None
    pairs: PairVectors
    cells: dict[str, Cell]
    queries: dict[str, Queries]
    n_chosen: int

    @property
    def directions(self) -> tuple[str, ...]:
        """Directions that were measured."""
        return self.pairs.directions

    @property
    def groups(self) -> dict[str, Tensor]:
        """The image of every query; queries of one image are not independent."""
        return {direction: self.pairs.groups(direction) for direction in self.directions}

    @property
    def ks(self) -> tuple[int, ...]:
        """The cut-offs."""
        return tuple(self.cells[OLD].t2i)

    @property
    def upgrades(self) -> list[Cell]:
        """The cells of new queries in the old gallery."""
        return [cell for name, cell in self.cells.items() if name in (UPGRADED, ALONE)]

    def gallery(self, cell: str, direction: str) -> Tensor:
        """Gallery vectors that the queries of a cell search."""
        if cell != NEW:
            return self.pairs.gallery(direction)
        assert self.pairs.new_images is not None
        return self.pairs.new_images if direction == "T2I" else self.pairs.new_texts

    def interval(self, cell: str, direction: str, k: int) -> Interval:
        """R@k of a cell with its 95 % bootstrap interval."""
        hits = (self.cells[cell].ranks[direction] < k).double()
        return bootstrap_interval(hits, self.groups[direction])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form: fractions, with keys such as ``"R@1"``."""
        old = self.cells[OLD]
        new = self.cells.get(NEW)
        return {
            "n_images": len(self.pairs),
            "n_texts": len(self.pairs.image_of_text),
            "n_images_to_choose": self.n_chosen,
            "cells": {name: self._cell(name) for name in self.cells},
            "criterion": {cell.name: _keyed(criterion(cell, old)) for cell in self.upgrades},
            "recovered_gain": {
                cell.name: None if new is None else _keyed(recovered_gain(cell, old, new))
                for cell in self.upgrades
            },
            "difference_to_old_old": {
                cell.name: _keyed(differences(cell, old, self.groups))
                for cell in [*self.upgrades, *([new] if new else [])]
            },
            "decision": self.decision.to_dict(),
            "decision_without_old_model": None if self.alone is None else self.alone.to_dict(),
        }

    def _cell(self, name: str) -> dict[str, Any]:
        cell = self.cells[name]
        return {
            direction: {
                f"R@{k}": {"recall": value, "interval": list(self.interval(name, direction, k)[1:])}
                for k, value in cell.recall(direction).items()
            }
            for direction in self.directions
        }


def measure(
    decision: Decision, alone: Decision | None, pairs: PairVectors, ks: Sequence[int], n_chosen: int
) -> Measured:
    """Measure methods that were chosen on ``n_chosen`` other images; see :class:`Measured`."""
    queries: dict[str, Queries] = {
        OLD: {direction: pairs.queries(direction)[1] for direction in pairs.directions}
    }
    for name, made in ((UPGRADED, decision), (ALONE, alone)):
        if made is not None:
            queries[name] = {
                direction: made.queries(*pairs.queries(direction), direction)
                for direction in pairs.directions
            }
    if pairs.new_images is not None:
        queries[NEW] = {direction: pairs.queries(direction)[0] for direction in pairs.directions}
    result = Measured(decision, alone, pairs, {}, queries, n_chosen)
    for name in queries:
        result.cells[name] = _cell(result, name, ks)
    return result


def _cell(measured: Measured, name: str, ks: Sequence[int]) -> Cell:
    pairs = measured.pairs
    ranks = {
        direction: best_positive_ranks(queries, measured.gallery(name, direction), pairs.positives(direction))
        for direction, queries in measured.queries[name].items()
    }
    return Cell.of(name, ranks, ks, len(pairs), len(pairs.image_of_text))


def _keyed(by_direction: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[str, Any]]:
    return {direction: values for direction, values in keyed(by_direction).items() if values}


HEADS = ("", "old/old", "new/old", "gain", "fixed", "broken", "criterion", "new/new", "recovered")


@dataclass(frozen=True)
class Row:
    """Row of the main table: one direction and k, with the R@k of the cells, as far as they were measured.

    ``counts`` are the numbers of queries fixed, broken, and in total. ``recovered`` is the share of the gain
    of re-embedding; ``None`` if that gain is not positive or not known.
    """

    direction: str
    k: int
    old: Interval
    upgraded: Interval
    change: Difference
    counts: tuple[int, int, int]
    met: bool
    new: Interval | None
    recovered: float | None
    alone: Interval | None

    def cells(self) -> list[str]:
        """Values for the columns :data:`HEADS`, in percent and points."""
        fixed, broken, _ = self.counts
        return [
            f"{self.direction} R@{self.k}",
            str(self.old),
            str(self.upgraded),
            points(self.change.gain),
            str(fixed),
            str(broken),
            "met" if self.met else "not met",
            "unknown" if self.new is None else str(self.new),
            "–" if self.recovered is None else f"{100 * self.recovered:.0f} %",
        ]


def points(gain: Interval) -> str:
    """Format a gain in points with its interval."""
    estimate, low, high = (f"{100 * value:+.1f}" for value in gain)
    return f"{estimate} [{low}, {high}]"


def make_rows(measured: Measured) -> list[Row]:
    """Build one row per direction and k."""
    old, upgraded, new = measured.cells[OLD], measured.cells[UPGRADED], measured.cells.get(NEW)
    changes, met = differences(upgraded, old, measured.groups), criterion(upgraded, old)
    recovered = None if new is None else recovered_gain(upgraded, old, new)
    rows = []
    for direction in measured.directions:
        count = len(measured.groups[direction])
        for k in measured.ks:
            change = changes[direction][k]
            rows.append(
                Row(
                    direction,
                    k,
                    measured.interval(OLD, direction, k),
                    measured.interval(UPGRADED, direction, k),
                    change,
                    (round(change.fixed * count), round(change.broken * count), count),
                    met[direction][k],
                    None if new is None else measured.interval(NEW, direction, k),
                    None if recovered is None else recovered[direction][k],
                    measured.interval(ALONE, direction, k) if ALONE in measured.cells else None,
                )
            )
    return rows


def aligned(table: list[list[str]]) -> list[str]:
    """Format a table as lines of text with aligned columns."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


TOP = 4
"""Results shown per query and model."""


@dataclass(frozen=True)
class Example:
    """One query whose answer moved: a row of the measuring part of the sample, a text or an image.

    The ranks of its best right result, from 0, are those with the old and the new query; ``before`` and
    ``after`` are the rows of their first results, and ``right`` those that answer it.
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
    """Best and worst changes of a direction, the largest first.

    ``fixed`` queries miss at k with the old model and hit with the new one; ``broken`` ones do the opposite.
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
        Example(direction, row, int(old[row]), int(new[row]), tuple(map(int, first)), tuple(map(int, second)),
                tuple(right[row]))
        for row, first, second in zip(rows, before, after, strict=True)
    ]  # fmt: skip
