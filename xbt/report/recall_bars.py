"""Recall of an upgrade's cells, as bars."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xbt.evaluation.cells import DIRECTIONS, RetrievalReport
from xbt.report.style import DPI, INK, NEW, OLD, QUIET, RULE, UPGRADED

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_recall_bars(report: RetrievalReport, path: str | os.PathLike[str]) -> Path:
    """Draws R@1 (the smallest k of the report) of every cell, grouped by direction, with the values printed.

    A dashed line carries the height of old/old across its group: what stands above it meets the criterion.

    Args:
        report: What was measured.
        path: File to write, usually ``.png``; its directory is made.

    Returns:
        The path that was written.
    """
    from matplotlib.figure import Figure

    k, cells = min(report.ks), report.cells
    figure = Figure(
        figsize=(max(9.0, 1.1 * len(DIRECTIONS) * len(cells) + 2), 5.4), dpi=DPI, facecolor="white"
    )
    axes = figure.add_subplot()
    width = 0.8 / len(cells)
    for position, (cell, colour) in enumerate(zip(cells, _colours(report), strict=True)):
        places = np.arange(len(DIRECTIONS)) - 0.4 + (position + 0.5) * width
        heights = [100 * cell.recall(direction)[k] for direction in DIRECTIONS]
        bars = axes.bar(places, heights, 0.9 * width, color=colour, label=cell.name, zorder=2)
        labels = axes.bar_label(
            bars, [f"{height:.1f}" for height in heights], padding=4, fontsize=12, zorder=4
        )
        for label in labels:
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    for group, direction in enumerate(DIRECTIONS):
        level = 100 * report.cell("old/old").recall(direction)[k]
        axes.hlines(
            level, group - 0.42, group + 0.42, colors=QUIET, linestyles="dashed", linewidth=1.2, zorder=3
        )
    highest = max(100 * cell.recall(direction)[k] for cell in cells for direction in DIRECTIONS)
    axes.set_ylim(0, max(1.0, 1.09 * highest))
    _dress(axes, f"R@{k} in percent", len(cells))
    figure.set_layout_engine("constrained", w_pad=0.2, h_pad=0.15)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI)
    return target


def _dress(axes: Axes, label: str, n_cells: int) -> None:
    """Names the axes and directions, lists the cells above, and takes away what only decorates."""
    axes.set_ylabel(label, fontsize=13, color=INK, labelpad=12)
    names = {"T2I": "T2I: text query, image gallery", "I2T": "I2T: image query, text gallery"}
    axes.set_xticks(range(len(DIRECTIONS)), [names[direction] for direction in DIRECTIONS], fontsize=13)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis="y", color=RULE, linewidth=0.6, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=min(n_cells, 4),
        frameon=False,
        fontsize=12,
        title="query model / gallery model (dashed: old/old)",
    )


def _colours(report: RetrievalReport) -> list[str]:
    """Grey for the old model, oranges for upgrades, blue for a re-embedded gallery."""
    oranges = [UPGRADED, "#b85c00", "#f4b860", "#8a4300"]
    upgrades = [cell.name for cell in report.upgrades]
    fixed = {"old/old": OLD, "new/new": NEW}
    return [
        oranges[upgrades.index(cell.name) % len(oranges)]
        if cell.name in upgrades
        else fixed.get(cell.name, "#7d6bb0")
        for cell in report.cells
    ]
