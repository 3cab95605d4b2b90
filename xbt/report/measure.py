"""Choice of a method on one part of the sample, its cells on the other part, and the table of results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
from xbt.evaluation.cells import DIRECTIONS
from xbt.projections.auto.candidates import NEW_ALONE
from xbt.projections.auto.choose import choose_projection
from xbt.projections.auto.decision import Decision
from xbt.projections.auto.selection import MIN_IMAGES, GainTest
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.fitting import fit_projection
from xbt.projections.pairs import PairVectors
from xbt.report.config import UpgradeReportConfig
from xbt.report.sample import Sample

_TAKEN = "procrustes"


class Untried(Decision):
    """A method that was not compared with others, because the sample is too small.

    ``n_texts`` is the number of texts that it was fitted to.
    """

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form: that of a decision, with ``"none"`` as evidence."""
        return {**super().to_dict(), "evidence": "none"}

    def __str__(self) -> str:
        combinations = (f"{name}: {self.ensemble.combination(name)}" for name in DIRECTIONS)
        return "\n".join(
            [
                f"{self.name} was taken without a choice: {self.n_images} images are too small a sample to "
                f"choose by, for fewer than {MIN_IMAGES} cannot show a gain",
                f"fitted to {self.n_texts:,} texts",
                *combinations,
            ]
        )


def choose_method(chosen: Sample, config: UpgradeReportConfig, use_old: bool) -> Decision:
    """Choose a method on one part of the sample.

    With fewer than :data:`~xbt.projections.auto.choose.MIN_IMAGES` images, Procrustes is fitted to the corpus
    (or else to the texts of this part), and its query is mixed in equal parts with the old one. Without
    ``use_old``, only the new query is used at search time.
    """
    new, old = chosen.corpus or (None, None)
    if len(chosen) >= MIN_IMAGES:
        return choose_projection(
            new,
            old,
            pairs=chosen.pairs,
            thorough=config.thorough,
            use_old=use_old,
            ks=config.ks,
            confidence=config.confidence,
            seed=config.seed,
            new_space=chosen.new.space,
            old_space=chosen.old.space,
        )
    if new is None or old is None:
        new, old = chosen.pairs.new_texts, chosen.pairs.old_texts
    spaces = chosen.new.space, chosen.old.space
    projection = fit_projection(new, old, _TAKEN, new_space=spaces[0], old_space=spaces[1])
    ensemble = QueryEnsemble.midpoint(projection.old_dim, projection.old_space)
    if not use_old:
        ensemble = QueryEnsemble(
            projection.old_dim, dict.fromkeys(DIRECTIONS, NEW_ALONE), old_space=projection.old_space
        )
    return Untried(
        projection,
        ensemble,
        _TAKEN,
        "own captions",
        {name: GainTest.unknown(name, "the sample is too small to choose by") for name in DIRECTIONS},
        (),
        len(chosen),
        len(new),  # type: ignore[arg-type]  # a sample's corpus is never a stream
        config.confidence,
        0,
    )


OLD, UPGRADED, ALONE, NEW = "old/old", "new/old", "new/old (without the old model)", "new/new"

Queries = Mapping[str, Tensor]
"""Query vectors by direction."""


@dataclass(frozen=True)
class Measured:
    """Cells on the part of the sample that was not used for the choice.

    Attributes:
        decision: The method, chosen on the other part.
        alone: The method chosen without the old model at search time; ``None`` if the first choice does not
            need the old model.
        pairs: Pairs of the measuring part.
        cells: Cells by name; without image queries they have no I2T. ``new/new`` needs new image vectors.
        queries: Query vectors by cell and direction.
        n_chosen: Number of images that chose the method.
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
                cell.name: {
                    direction: {f"R@{k}": change.to_dict() for k, change in changes.items()}
                    for direction, changes in differences(cell, old, self.groups).items()
                    if changes
                }
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


def measure(chosen: Sample, measured: Sample, config: UpgradeReportConfig) -> Measured:
    """Choose a method on one part of the sample and measure it on the other; see :func:`choose_method`."""
    decision = choose_method(chosen, config, config.use_old)
    alone = None
    if len(chosen) >= MIN_IMAGES and any(decision.ensemble.needs_old(d) and decision.deployed(d)
                                         for d in measured.pairs.directions):  # fmt: skip
        alone = choose_method(chosen, config, use_old=False)
    pairs = measured.pairs
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
    result = Measured(decision, alone, pairs, {}, queries, len(chosen))
    for name in queries:
        result.cells[name] = _cell(result, name, config.ks)
    return result


def _cell(measured: Measured, name: str, ks: list[int]) -> Cell:
    pairs = measured.pairs
    ranks = {
        direction: best_positive_ranks(queries, measured.gallery(name, direction), pairs.positives(direction))
        for direction, queries in measured.queries[name].items()
    }
    recall = {
        direction: {k: int((rank < k).sum()) / len(rank) for k in ks} for direction, rank in ranks.items()
    }
    n_images, n_texts = len(pairs), len(pairs.image_of_text)
    return Cell(name, recall["T2I"], recall.get("I2T", {}), n_images, n_texts, ranks)


def _keyed(by_direction: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[str, Any]]:
    return {
        direction: {f"R@{k}": value for k, value in values.items()}
        for direction, values in by_direction.items()
        if values
    }


HEADS = ("", "old/old", "new/old", "gain", "fixed", "broken", "criterion", "new/new", "recovered")


@dataclass(frozen=True)
class Row:
    """Row of the main table: one direction and k.

    Attributes:
        direction: ``"T2I"`` or ``"I2T"``.
        k: The cut-off.
        old: R@k of old/old.
        upgraded: R@k of new/old.
        change: Difference of new/old to old/old.
        counts: Number of queries fixed, broken, and in total.
        met: Whether the criterion is met.
        new: R@k of new/new, if known.
        recovered: Share of the gain of re-embedding; ``None`` if that gain is not positive or not known.
        alone: R@k of new/old without the old model at search time, if measured.
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
