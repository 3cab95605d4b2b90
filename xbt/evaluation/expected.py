"""Published numbers beside one's own: does this evaluation reproduce them?"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xbt.errors import ConfigError, DataError
from xbt.evaluation.cells import DIRECTIONS, RetrievalReport
from xbt.evaluation.protocols import Protocol

_KEY = re.compile(r"R@([1-9]\d*)")
_CELL = re.compile(r"(old/old|new/old|new/new)( \(.+\))?")


@dataclass
class Expectation:
    """What one cell should come out as.

    Raises:
        ConfigError: If a key, value or name makes no sense.
    """

    cell: str
    """Which cell: old/old, new/old, new/new, or with a label: new/old (Procrustes)."""
    source: str
    """Where the values were published."""
    T2I: dict[str, float] = field(default_factory=dict)
    """Text queries against the image gallery, in percent: {R@1: 30.44, R@5: 55.94}."""
    I2T: dict[str, float] = field(default_factory=dict)
    """Image queries against the text gallery, likewise."""
    tolerance: float = 0.2
    """By how many points a value may differ: library versions and mixed precision move published ones by
    0.2."""
    old: list[str] = field(default_factory=list)
    """Names under which the old model is known; with any other one the values are passed over. Empty: any."""
    new: list[str] = field(default_factory=list)
    """The same for the new model."""

    def __post_init__(self) -> None:
        """Checks the names and values."""
        if not _CELL.fullmatch(self.cell):
            raise ConfigError(
                f"expected names the cell {self.cell!r}; write old/old, new/old or new/new, perhaps with a "
                "label: new/old (Procrustes)"
            )
        if not self.source.strip():
            raise ConfigError(
                f"the values expected of {self.cell} have no source; say where they were published"
            )
        if not self.tolerance >= 0:
            raise ConfigError(
                f"the tolerance for {self.cell} is {self.tolerance}; give points of at least 0, such as 0.2"
            )
        if not self.T2I and not self.I2T:
            raise ConfigError(f"nothing is expected of {self.cell}; give T2I or I2T, such as {{R@1: 30.44}}")
        for direction in DIRECTIONS:
            for key, value in self.values(direction).items():
                if not _KEY.fullmatch(key) or not 0 <= value <= 100:
                    raise ConfigError(
                        f"expected of {self.cell}, {direction}: {key!r}: {value} cannot be; write "
                        "percentages under keys such as R@1"
                    )

    def values(self, direction: str) -> dict[str, float]:
        """The percentages of ``"T2I"`` or ``"I2T"``, by keys such as ``"R@1"``."""
        return self.T2I if direction == "T2I" else self.I2T

    def applies(self, old: str, new: str) -> bool:
        """Whether these models are the ones that the values were published for."""
        return (not self.old or old in self.old) and (not self.new or new in self.new)


@dataclass(frozen=True)
class Comparison:
    """One published value and what was measured, in percent.

    Attributes:
        cell: The cell.
        direction: ``"T2I"`` or ``"I2T"``.
        k: The cut-off.
        expected: As published.
        measured: As measured.
        tolerance: By how many points they may differ.
        source: Where the value was published.
    """

    cell: str
    direction: str
    k: int
    expected: float
    measured: float
    tolerance: float
    source: str

    @property
    def difference(self) -> float:
        """Points measured above the expected value."""
        return self.measured - self.expected

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the tolerance."""
        return abs(self.difference) <= self.tolerance + 1e-9  # 30.64 - 30.44 is a little more than 0.2

    def __str__(self) -> str:
        verdict = "agrees" if self.agrees else "DISAGREES"
        return f"expected {self.expected:.2f}, got {self.measured:.2f} ({self.difference:+.2f}, {verdict})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "cell": self.cell,
            "direction": self.direction,
            "k": self.k,
            "expected": self.expected,
            "measured": self.measured,
            "difference": self.difference,
            "tolerance": self.tolerance,
            "agrees": self.agrees,
            "source": self.source,
        }


@dataclass
class CheckedReport(RetrievalReport):
    """A report that knows its protocol and what was published for it.

    Attributes:
        protocol: The protocol, if one was asked for.
        comparisons: The published values that were measured.
        unmeasured: What was published for these models and not measured: a cell, ``"new/old"``, or one value
            of a cell, ``"old/old T2I R@7"``.
    """

    protocol: Protocol | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As the report's, with ``"protocol"`` and ``"expected"``."""
        return {
            **super().to_dict(),
            "protocol": self.protocol.to_dict() if self.protocol is not None else None,
            "expected": [each.to_dict() for each in self.comparisons],
            "expected_but_not_measured": self.unmeasured,
        }

    def require_agreement(self) -> None:
        """Checks that every value published for these models was measured and reproduced.

        Raises:
            DataError: If one was not reproduced; the message counts them and gives the first three.
            ConfigError: If one was not measured, or there is none for these models.
        """
        wrong = [each for each in self.comparisons if not each.agrees]
        if wrong:
            listed = "; ".join(f"{each.cell} {each.direction} R@{each.k} {each}" for each in wrong[:3])
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise DataError(
                f"{len(wrong)} of {len(self.comparisons)} published values are not reproduced: "
                f"{listed}{more}; check the models' names, the preprocessing and the data, or raise the "
                "tolerance"
            )
        _require_all_measured(len(self.comparisons), self.unmeasured)


def check_report(
    report: RetrievalReport,
    protocol: Protocol | None,
    expected: Sequence[Expectation],
    old: str,
    new: str,
    names: Mapping[str, str] | None = None,
) -> CheckedReport:
    """Compares a report with published values.

    Args:
        report: What was measured.
        protocol: The protocol it followed, if any.
        expected: The published values; those of other models are passed over.
        old: Specification of the old model.
        new: Specification of the new model.
        names: Cells that have another name in ``expected``: ``{"new/old (Procrustes)": "new/old"}`` where
            there is only one upgrade, whose cell bears no label.
    """
    cells = {cell.name: cell for cell in report.cells}
    applying = [each for each in expected if each.applies(old, new)]
    found, unmeasured = _sorted(applying, cells, report.ks, names or {})
    comparisons = [
        Comparison(name, direction, k, value, 100 * cells[name].recall(direction)[k], each.tolerance,
                   each.source)
        for each, name, direction, k, value in found
    ]  # fmt: skip
    return CheckedReport(report.cells, report.groups, protocol, comparisons, unmeasured)


def require_comparable(
    expected: Sequence[Expectation],
    old: str,
    new: str,
    cells: Collection[str],
    ks: Sequence[int],
    names: Mapping[str, str] | None = None,
) -> None:
    """Checks that all that was published for these models will be measured, before anything is.

    Args:
        expected: The published values.
        old: Specification of the old model.
        new: Specification of the new model.
        cells: Names of the cells that will be measured.
        ks: The cut-offs.
        names: As for :func:`check_report`.

    Raises:
        ConfigError: If something will not be measured, or nothing was published for these models.
    """
    found, unmeasured = _sorted([each for each in expected if each.applies(old, new)], cells, ks, names or {})
    _require_all_measured(len(found), unmeasured)


_Value = tuple[Expectation, str, str, int, float]
"""One published value: by whom, the cell's name, the direction, k and the percentage."""


def _sorted(
    expected: Sequence[Expectation], cells: Collection[str], ks: Sequence[int], names: Mapping[str, str]
) -> tuple[list[_Value], list[str]]:
    """The published values that can be compared, and what cannot, each once."""
    found: list[_Value] = []
    unmeasured: list[str] = []
    for each in expected:
        name = names.get(each.cell, each.cell)
        if name not in cells:
            unmeasured.append(each.cell)
            continue
        for direction in DIRECTIONS:
            for key, value in each.values(direction).items():
                k = int(key.removeprefix("R@"))
                if k in ks:
                    found.append((each, name, direction, k, value))
                else:
                    unmeasured.append(f"{name} {direction} {key}")
    return found, list(dict.fromkeys(unmeasured))


def _require_all_measured(compared: int, unmeasured: Sequence[str]) -> None:
    if unmeasured:
        raise ConfigError(
            f"published values are expected of {', '.join(unmeasured)}, which no cell or k of this "
            "evaluation measures; name the upgrade with --upgraded.LABEL, add the k to --ks, or take them "
            "out of --expected"
        )
    if not compared:
        raise ConfigError(
            "no published value was compared, because --expected has none for these models; give some, with "
            "the models' names under old and new, or leave --fail_on_mismatch out"
        )
