"""What a backfill says of itself in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xbt.backfilling.curve import NEXT, CurvePoint


@dataclass(frozen=True)
class BackfillResult:
    """How far a backfill has come.

    Attributes:
        items: Items that this run has moved into the new space.
        rejected: Items that could not be embedded, in all runs; they stay in the old space.
        fraction: Share of the gallery's items that are in the new space.
        position: Items of the order that were taken up, in all runs.
        total: Items of the order.
        why: Why the run ended.
        curve: Recall as it was measured, in all runs.
        stopping_position: From which position on a thousand items no longer paid, if that was seen.
    """

    items: int
    rejected: int
    fraction: float
    position: int
    total: int
    why: str
    curve: tuple[CurvePoint, ...]
    stopping_position: int | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; of the curve, which has a file of its own, the last point's recall alone."""
        curve = [{"position": point.position, "mean": point.mean} for point in self.curve[-1:]]
        return {**vars(self), "curve": curve}

    def __str__(self) -> str:
        told = [
            f"backfilled {self.items} items; {self.position} of the order's {self.total} are taken up and "
            f"{self.rejected} rejected; {100 * self.fraction:.1f} % of the gallery is in the new space",
            f"ended because {self.why}",
        ]
        if self.curve:
            last = self.curve[-1]
            low, high = (100 * end for end in last.interval)
            told.append(f"mean of R@1, R@5 and R@10: {100 * last.mean:.1f} % [{low:.1f}, {high:.1f}]")
        if self.stopping_position is not None:
            told.append(
                f"stopping point: from item {self.stopping_position} on, the next {NEXT} or more gained no "
                "more than the standard error of their gain"
            )
        return "\n".join(told)
