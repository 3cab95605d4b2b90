"""Thresholds that an upgrade must reach, for automatic checks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from xbt.errors import ConfigError
from xbt.evaluation import differences, recovered_gain
from xbt.report.upgrade.config import FailUnder
from xbt.report.upgrade.measuring import NEW, OLD, UPGRADED, Measured


@dataclass(frozen=True)
class Threshold:
    """One threshold and what was found.

    Attributes:
        name: Its flag.
        what: What is held against it.
        needed: The least that passes.
        found: What was measured; ``None`` where there is nothing to recover.
        met: Whether it passes.
    """

    name: str
    what: str
    needed: float
    found: float | None
    met: bool

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    def __str__(self) -> str:
        found = "cannot be computed" if self.found is None else f"{self.found:.1f}"
        return f"{'met' if self.met else 'missed'}: {self.name} {self.needed:g}; {self.what} {found}"


def check_thresholds(limits: FailUnder, measured: Measured) -> list[Threshold]:
    """Holds what was measured against the thresholds.

    Args:
        limits: The thresholds.
        measured: The cells.

    Raises:
        ConfigError: If a direction or new/new was not measured.
    """
    old, new_old, k = measured.cells[OLD], measured.cells[UPGRADED], limits.k
    changes = differences(new_old, old, measured.groups)
    found = []
    for direction, needed in limits.directions.items():
        if direction not in measured.directions:
            raise ConfigError(f"--fail_under.{direction} was given, but {direction} was not measured")
        gain = changes[direction][k].gain
        value = 100 * (gain.low if limits.lower_end else gain.estimate)
        end = ", at least" if limits.lower_end else ""
        what = f"gain in points of R@{k}{end}"
        found.append(Threshold(f"fail_under.{direction}", what, needed, value, _reached(value, needed)))
    if limits.recovered_gain is not None:
        if NEW not in measured.cells:
            raise ConfigError("--fail_under.recovered_gain was given, but new/new was not measured")
        shares = recovered_gain(new_old, old, measured.cells[NEW])
        for direction in measured.directions:
            share = shares[direction][k]
            percent = None if share is None else 100 * share
            met = percent is not None and _reached(percent, limits.recovered_gain)
            what = f"{direction}: percent of re-embedding's gain recovered at R@{k}"
            found.append(Threshold("fail_under.recovered_gain", what, limits.recovered_gain, percent, met))
    return found


def _reached(value: float, needed: float) -> bool:
    # 100 · (0.3 − 0.2) is a hair less than 10.
    return value >= needed - 1e-9
