"""The main table of an upgrade report, once for the terminal and for the page."""

from __future__ import annotations

from dataclasses import dataclass

from xbt.evaluation import Difference, Interval, criterion, differences, recovered_gain
from xbt.report.upgrade.measuring import ALONE, NEW, OLD, UPGRADED, Measured

HEADS = ("", "old/old", "new/old", "gain", "fixed", "broken", "criterion", "new/new", "recovered")


@dataclass(frozen=True)
class Row:
    """One direction and k.

    Attributes:
        direction: ``"T2I"`` or ``"I2T"``.
        k: The cut-off.
        old: R@k of old/old.
        upgraded: R@k of new/old.
        change: What new/old changes.
        counts: Queries fixed, broken, and all.
        met: Whether the criterion is met.
        new: R@k of new/new, if it is known.
        recovered: Share of re-embedding's gain; ``None`` if it gains nothing or is not known.
        alone: R@k of new/old where the old model does not run, if that was measured.
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
        """The values under :data:`HEADS`, in percent and points."""
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
    """A gain in points with its interval."""
    estimate, low, high = (f"{100 * each:+.1f}" for each in gain)
    return f"{estimate} [{low}, {high}]"


def make_rows(measured: Measured) -> list[Row]:
    """One row per direction and k."""
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
    """A table as lines of text whose columns stand below each other."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
