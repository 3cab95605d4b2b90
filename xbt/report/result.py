"""The upgrade report as numbers (JSON) and as text for a terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from xbt.config import config_to_dict
from xbt.report.config import UpgradeReportConfig
from xbt.report.cost import Cost
from xbt.report.curve import ExpectedCurve
from xbt.report.measure import HEADS, Example, Flips, Measured, Row, aligned, make_rows
from xbt.report.sample import Sample
from xbt.report.verdict import Threshold, Verdict
from xbt.version import __version__

SCHEMA, SCHEMA_VERSION = "xbt.upgrade_report", 1


@dataclass(frozen=True)
class UpgradeReport:
    """Verdict on an upgrade, with all measurements behind it.

    Attributes:
        config: The settings.
        sample: The whole sample.
        shown: The part of the sample that measures.
        measured: Method and cells.
        verdict: The answer.
        thresholds: Results of the thresholds in ``fail_under``.
        flips: Queries fixed and broken, by direction.
        cost: Time and bytes.
        curve: Recall while the gallery is backfilled, if it could be measured.
        limits: Limits of the measurement, a sentence each.
    """

    config: UpgradeReportConfig
    sample: Sample
    shown: Sample
    measured: Measured
    verdict: Verdict
    thresholds: list[Threshold]
    flips: dict[str, Flips]
    cost: Cost
    curve: ExpectedCurve | None
    limits: list[str]
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", make_rows(self.measured))

    @property
    def passed(self) -> bool:
        """``True`` if the answer is to upgrade and every threshold is met."""
        return self.verdict.answer in ("yes", "ensemble") and all(limit.met for limit in self.thresholds)

    @property
    def method(self) -> list[str]:
        """Lines that describe the method for queries to the old gallery, and the reason for it."""
        return str(self.measured.decision).split("\n\n")[0].splitlines()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form with fractions, not percents; ``schema_version`` increases with changes."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "xbt_version": __version__,
            "passed": self.passed,
            "verdict": asdict(self.verdict),
            "thresholds": [asdict(threshold) for threshold in self.thresholds],
            "old": self._side("old"),
            "new": self._side("new"),
            "sample": {
                "available": self.sample.available,
                "n_images": len(self.sample),
                "skipped_images": [{"id": name, "reason": reason} for name, reason in self.sample.skipped],
            },
            "measured": self.measured.to_dict(),
            "flips": {direction: self._flips(direction) for direction in self.flips},
            "cost": self.cost.to_dict(),
            "backfill_curve": None if self.curve is None else self.curve.to_dict(),
            "limits": self.limits,
            "config": config_to_dict(self.config),
        }

    def format(self) -> str:
        """Format the report for a terminal, without a newline at the end."""
        lines = [self.verdict.sentence, *map(str, self.thresholds), ""]
        lines += aligned([list(HEADS), *(row.cells() for row in self.rows)])
        lines += [
            "",
            f"R@k in percent over {len(self.shown):,} images and {len(self.shown.pairs.image_of_text):,} "
            "texts that were not used for the choice, with 95 % intervals; fixed and broken are queries",
            "",
            *self.method,
            "",
            "Limits:",
            *(f"- {limit}" for limit in self.limits),
        ]
        return "\n".join(lines)

    def _side(self, name: str) -> dict[str, Any]:
        side = self.sample.old if name == "old" else self.sample.new
        space = None if side.space is None else {"model": side.space.model, "revision": side.space.revision}
        return {"name": side.name, "dim": side.dim, "space": space}

    def _flips(self, direction: str) -> dict[str, Any]:
        flips = self.flips[direction]
        counts = {
            f"R@{row.k}": dict(zip(("fixed", "broken", "queries"), row.counts, strict=True))
            for row in self.rows
            if row.direction == direction
        }
        fixed, broken = (list(map(self._named, examples)) for examples in (flips.fixed, flips.broken))
        return {"counts": counts, "k": flips.k, "fixed": fixed, "broken": broken}

    def _named(self, example: Example) -> dict[str, Any]:
        """Example with ids and texts instead of rows."""
        rows = {"before": example.before, "after": example.after, "right": example.right}
        ranks = {"old_rank": example.old_rank, "new_rank": example.new_rank}
        answers = {key: [self.name_answer(example, row) for row in named] for key, named in rows.items()}
        return {"query": self.name_query(example), **ranks, **answers}

    def name_query(self, example: Example) -> str:
        """Text of the query, or id of its image."""
        return self._name(example.query, text=example.direction == "T2I")

    def name_answer(self, example: Example, row: int) -> str:
        """Id of a result image, or the result text."""
        return self._name(row, text=example.direction == "I2T")

    def _name(self, row: int, text: bool) -> str:
        shown = self.shown.shown
        if not text:
            return shown.ids[row]
        return shown.text(row, int(self.shown.pairs.image_of_text[row]))
