"""The method chosen on one part of the sample, and what it reaches on the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xbt.evaluation import (
    Cell,
    Interval,
    best_positive_ranks,
    bootstrap_interval,
    criterion,
    differences,
    recovered_gain,
)
from xbt.projections import Decision, PairVectors
from xbt.projections.auto.choose import MIN_IMAGES
from xbt.report.upgrade.choosing import choose_method
from xbt.report.upgrade.config import UpgradeReportConfig
from xbt.report.upgrade.sample import Sample

OLD, UPGRADED, ALONE, NEW = "old/old", "new/old", "new/old (without the old model)", "new/new"

Queries = Mapping[str, Tensor]
"""Query vectors by direction."""


@dataclass(frozen=True)
class Measured:
    """What the cells reach on the part of the sample that had no say in the choice.

    Attributes:
        decision: What was chosen, on the other part.
        alone: The same where the old model may not run at search time; ``None`` if the choice does not need
            it anyway.
        pairs: The pairs that measure.
        cells: By name; one without image queries has no I2T. ``new/new`` is there if its vectors are.
        queries: By cell, direction by direction, the query vectors.
        n_chosen: Images by which the method was chosen.
    """

    decision: Decision
    alone: Decision | None
    pairs: PairVectors
    cells: dict[str, Cell]
    queries: dict[str, Queries]
    n_chosen: int

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions that were measured."""
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
        """What the queries of a cell are searched in."""
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
                    direction: {f"R@{k}": each.to_dict() for k, each in found.items()}
                    for direction, found in differences(cell, old, self.groups).items()
                    if found
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
    """Chooses by one part of the sample and measures the other.

    Args:
        chosen: The part that chooses. With too few images to choose by, the mean of the old query and that of
            Procrustes is taken without being compared with anything.
        measured: The other part.
        config: Cut-offs, confidence and what may be used.

    Raises:
        DataError: If the vectors cannot be used.
    """
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
    found = Measured(decision, alone, pairs, {}, queries, len(chosen))
    for name in queries:
        found.cells[name] = _cell(found, name, config.ks)
    return found


def _cell(found: Measured, name: str, ks: list[int]) -> Cell:
    pairs = found.pairs
    ranks = {
        direction: best_positive_ranks(queries, found.gallery(name, direction), pairs.positives(direction))
        for direction, queries in found.queries[name].items()
    }
    recall = {
        direction: {k: int((each < k).sum()) / len(each) for k in ks} for direction, each in ranks.items()
    }
    n_images, n_texts = len(pairs), len(pairs.image_of_text)
    return Cell(name, recall["T2I"], recall.get("I2T", {}), n_images, n_texts, ranks)


def _keyed(by_direction: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[str, Any]]:
    return {
        direction: {f"R@{k}": value for k, value in values.items()}
        for direction, values in by_direction.items()
        if values
    }
