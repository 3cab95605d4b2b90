"""Recall while a gallery is backfilled, as lines."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from xbt.errors import DataError
from xbt.report.style import DPI, INK, LINES, QUIET, RULE


def draw_backfill_curve(
    fractions: Sequence[float],
    recall: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    stop: float | None = None,
) -> Path:
    """Draws recall over the fraction of a gallery that is backfilled.

    Args:
        fractions: Fractions backfilled, ascending.
        recall: By label ("R@1"), a fraction at each of them.
        path: File to write, usually ``.png``; its directory is made.
        stop: Fraction from which on backfilling no longer paid; a dashed line marks it.

    Returns:
        The path that was written.

    Raises:
        DataError: If there is nothing to draw, or a line does not fit the fractions.
    """
    from matplotlib.figure import Figure

    if not fractions or not recall:
        raise DataError("there is no curve to draw; give at least one fraction and one line")
    for name, values in recall.items():
        if len(values) != len(fractions):
            raise DataError(
                f"the line {name!r} has {len(values)} points for {len(fractions)} fractions; give one each"
            )
    figure = Figure(figsize=(9, 5.4), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    places = [100 * fraction for fraction in fractions]
    every = [100 * value for values in recall.values() for value in values]
    beside = _apart([100 * values[-1] for values in recall.values()], 0.045 * (max(every) - min(every) or 1))
    for (name, values), place, colour in zip(recall.items(), beside, itertools.cycle(LINES)):
        heights = [100 * value for value in values]
        axes.plot(places, heights, color=colour, marker="o", markersize=4, linewidth=2, label=name)
        axes.annotate(f"{name}: {heights[-1]:.1f}", (places[-1], place), fontsize=12, color=colour,
                      xytext=(8, 0), textcoords="offset points", va="center")  # fmt: skip
    if stop is not None:
        axes.axvline(100 * stop, color=QUIET, linestyle="dashed", linewidth=1.2)
        axes.annotate("no longer pays", (100 * stop, 0.02), xycoords=("data", "axes fraction"), color=QUIET,
                      xytext=(6, 0), textcoords="offset points", fontsize=11)  # fmt: skip
    axes.set_xlabel("items backfilled, in percent", fontsize=13, color=INK, labelpad=10)
    axes.set_ylabel("recall in percent", fontsize=13, color=INK, labelpad=12)
    axes.tick_params(length=0, colors=INK)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI, bbox_inches="tight")
    return target


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels: those of the lines' ends, moved up where two would lie on each other."""
    placed: dict[int, float] = {}
    for number in sorted(range(len(heights)), key=lambda each: heights[each]):
        lowest = max(placed.values(), default=-math.inf) + gap
        placed[number] = max(heights[number], lowest)
    return [placed[number] for number in range(len(heights))]
