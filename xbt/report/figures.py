"""Figures as image files: recall over a backfill, recall bars of the cells, search results side by side."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from xbt.errors import DataError
from xbt.evaluation.cells import DIRECTIONS, RetrievalReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 100
INK, QUIET, RULE, RIGHT = "#1a1a1a", "#6b6b6b", "#d0d0d0", "#15a34a"
LINES = ("#2f6db5", "#e8890c", "#15a34a", "#7d6bb0")
"""Colours of the lines of a curve."""
OLD, UPGRADED, NEW = "#9a9a9a", "#e8890c", "#2f6db5"
"""Colours of the cells old/old, new/old and new/new."""


def draw_backfill_curve(
    fractions: Sequence[float],
    recall: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    stop: float | None = None,
) -> Path:
    """Draw recall over the fraction of a gallery that is backfilled.

    Args:
        fractions: Fractions backfilled, ascending.
        recall: By label ("R@1"), recall between 0 and 1 at each fraction.
        path: File to write, usually ``.png``; its directory is created.
        stop: Fraction after which backfilling brought no further gain; a dashed line marks it.

    Returns:
        The path of the file.

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
    percents = [100 * fraction for fraction in fractions]
    points = [100 * value for values in recall.values() for value in values]
    labels = _apart(
        [100 * values[-1] for values in recall.values()], 0.045 * (max(points) - min(points) or 1)
    )
    for (name, values), label_height, colour in zip(recall.items(), labels, itertools.cycle(LINES)):
        heights = [100 * value for value in values]
        axes.plot(percents, heights, color=colour, marker="o", markersize=4, linewidth=2, label=name)
        axes.annotate(f"{name}: {heights[-1]:.1f}", (percents[-1], label_height), fontsize=12, color=colour,
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
    return _save(figure, path, bbox_inches="tight")


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of the labels at the lines' ends, moved up where two would overlap."""
    placed: dict[int, float] = {}
    for number in sorted(range(len(heights)), key=lambda line: heights[line]):
        lowest = max(placed.values(), default=-math.inf) + gap
        placed[number] = max(heights[number], lowest)
    return [placed[number] for number in range(len(heights))]


def draw_recall_bars(report: RetrievalReport, path: str | os.PathLike[str]) -> Path:
    """Draw R@1 (the smallest k of the report) of every cell, grouped by direction, with printed values.

    A dashed line marks old/old in each group: bars above it meet the criterion.

    Args:
        report: The measured cells.
        path: File to write, usually ``.png``; its directory is created.

    Returns:
        The path of the file.
    """
    from matplotlib.figure import Figure

    k, cells = min(report.ks), report.cells
    figure = Figure(
        figsize=(max(9.0, 1.1 * len(DIRECTIONS) * len(cells) + 2), 5.4), dpi=DPI, facecolor="white"
    )
    axes = figure.add_subplot()
    width = 0.8 / len(cells)
    for position, (cell, colour) in enumerate(zip(cells, _colours(report), strict=True)):
        lefts = np.arange(len(DIRECTIONS)) - 0.4 + (position + 0.5) * width
        heights = [100 * cell.recall(direction)[k] for direction in DIRECTIONS]
        bars = axes.bar(lefts, heights, 0.9 * width, color=colour, label=cell.name, zorder=2)
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
    return _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike[str], **options: Any) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI, **options)
    return target


def _dress(axes: Axes, label: str, n_cells: int) -> None:
    """Label the axes and directions, add the legend, and remove frames and ticks."""
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


class Page:
    """A white page with pixel coordinates from the top left corner; its height is set when it is saved."""

    def __init__(self, width: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width = width
        self._figure: Figure = Figure(figsize=(width / DPI, 1), dpi=DPI, facecolor="white")
        self._renderer = FigureCanvasAgg(self._figure).get_renderer()
        self._items: list[tuple[str, dict[str, Any]]] = []

    def text(
        self, left: int, top: int, text: str, width: int, size: int, weight: str = "normal", color: str = INK
    ) -> int:
        """Write text wrapped to a width; return the y of its end."""
        lines = self._wrap(text, width, size, weight)
        step = round(1.35 * size)
        for i, line in enumerate(lines):
            position = {"x": left, "top": top + i * step + size, "s": line}
            style = {"fontsize": size * 72 / DPI, "fontweight": weight, "color": color}
            self._items.append(("text", position | style))
        return top + step * len(lines)

    def line(self, left: int, top: int, width: int) -> None:
        """Draw a horizontal rule."""
        self._items.append(("frame", {"x": left, "top": top, "w": width, "h": 1, "edge": RULE, "line": 1.0}))

    def image(self, left: int, top: int, image: Image.Image, side: int, good: bool) -> None:
        """Fit an image into a square, keeping its aspect ratio, and frame it."""
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        pixels = np.asarray(image.convert("RGB").resize(size, method))
        x, y = left + (side - size[0]) // 2, top + (side - size[1]) // 2
        self._items.append(("image", {"x": x, "top": y, "pixels": pixels}))
        edge, line, out = (RIGHT, 4.0, 3) if good else (RULE, 1.0, 0)
        box = {"x": x - out, "top": y - out, "w": size[0] + 2 * out, "h": size[1] + 2 * out}
        self._items.append(("frame", box | {"edge": edge, "line": line}))

    def save(self, path: str | os.PathLike[str], height: int) -> Path:
        """Draw everything on a page of this height and write it."""
        from matplotlib.patches import Rectangle

        self._figure.set_size_inches(self.width / DPI, height / DPI)
        for kind, item in self._items:
            x, bottom = item.pop("x"), height - item.pop("top")
            if kind == "image":
                pixels = item["pixels"]
                self._figure.figimage(pixels, x, bottom - pixels.shape[0], origin="upper", zorder=1)
            elif kind == "text":
                text = self._figure.text(
                    x / self.width, bottom / height, item.pop("s"), va="baseline", **item
                )
                text.set_parse_math(False)  # dollar signs are text, not formulas
            else:
                corner = (x, bottom - item["h"])
                pen = item["line"] * 72 / DPI
                box = Rectangle(corner, item["w"], item["h"], fill=False, ec=item["edge"], lw=pen, zorder=2)
                box.set_transform(None)
                self._figure.add_artist(box)
        return _save(self._figure, path)

    def _wrap(self, text: str, width: int, size: int, weight: str) -> list[str]:
        """Break text at spaces, and inside words that are wider than a line."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size * 72 / DPI, weight=weight)

        def fits(line: str) -> bool:
            return bool(self._renderer.get_text_width_height_descent(line, font, ismath=False)[0] <= width)

        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if fits(longer):
                lines[-1] = longer
                continue
            if lines[-1]:
                lines.append("")
            for letter in word:
                if lines[-1] and not fits(lines[-1] + letter):
                    lines.append("")
                lines[-1] += letter
        return lines


# Sizes of the comparison, in pixels.
WIDTH, MARGIN, TEXT_WIDTH = 1640, 28, 270
THUMB_LIMIT, THUMB_GAP, BLOCK_GAP, ROW_GAP = 150, 16, 36, 26
QUERY_SIZE, HEADING_SIZE, SMALL_SIZE, TITLE_SIZE = 15, 17, 12, 21


def draw_search_comparison(
    queries: Sequence[str],
    columns: Mapping[str, Sequence[Sequence[Image.Image]]],
    path: str | os.PathLike[str],
    correct: Mapping[str, Sequence[Sequence[bool]]] | None = None,
    title: str | None = None,
) -> Path:
    """Draw the results of several searches for the same text queries, one row per query.

    Args:
        queries: The texts, each shown in full at the left of its row.
        columns: By heading ("old/old", "new/old", "new/new"), the images for every query, best first. Small
            images are enlarged without smoothing.
        path: File to write, usually ``.png``; its directory is created. The figure is at most 1,640 pixels
            wide.
        correct: In the shape of ``columns``, whether an image answers its query; if so it gets a green frame.
        title: Title line.

    Returns:
        The path of the file.

    Raises:
        DataError: If there is nothing to draw, or a column or ``correct`` does not fit the queries.
    """
    per_block = _check_columns(queries, columns, correct)
    width = WIDTH - 2 * MARGIN - TEXT_WIDTH - len(columns) * BLOCK_GAP
    thumb = width // len(columns) // per_block - THUMB_GAP
    if thumb < 24:
        raise DataError(
            f"{len(columns)} columns of {per_block} images do not fit side by side; show fewer images"
        )
    thumb = min(thumb, THUMB_LIMIT)
    block = per_block * (thumb + THUMB_GAP) - THUMB_GAP
    page = Page(2 * MARGIN + TEXT_WIDTH + len(columns) * (BLOCK_GAP + block))
    lefts = [MARGIN + TEXT_WIDTH + BLOCK_GAP + i * (block + BLOCK_GAP) for i in range(len(columns))]

    top = MARGIN
    if title:
        top = page.text(MARGIN, top, title, page.width - 2 * MARGIN, TITLE_SIZE, weight="bold") + 6
    if correct is not None:
        note = "A green frame marks an image that answers the query."
        top = page.text(MARGIN, top, note, page.width - 2 * MARGIN, SMALL_SIZE, color=QUIET) + 6
    top += 10 if top > MARGIN else 0
    ends = [
        page.text(left, top, name, block, HEADING_SIZE, weight="bold")
        for left, name in zip(lefts, columns, strict=True)
    ]
    page.text(MARGIN, top, "query", TEXT_WIDTH, HEADING_SIZE, weight="bold")
    top = max(ends) + 8
    for left in lefts:
        page.line(left, top, block)
    page.line(MARGIN, top, TEXT_WIDTH)
    top += 16
    for row, query in enumerate(queries):
        bottom = page.text(MARGIN, top, query, TEXT_WIDTH, QUERY_SIZE)
        for left, (name, results) in zip(lefts, columns.items(), strict=True):
            for rank, image in enumerate(results[row]):
                good = correct is not None and bool(correct[name][row][rank])
                page.image(left + rank * (thumb + THUMB_GAP), top, image, thumb, good)
        top = max(bottom, top + thumb) + ROW_GAP
    return page.save(path, top - ROW_GAP + MARGIN)


def _check_columns(
    queries: Sequence[str],
    columns: Mapping[str, Sequence[Sequence[Image.Image]]],
    correct: Mapping[str, Sequence[Sequence[bool]]] | None,
) -> int:
    """Check the shapes; return the largest number of images in a row of a column."""
    if isinstance(queries, str) or len(queries) == 0:
        raise DataError(f"queries is {queries!r}; give a list of at least one text")
    if not columns:
        raise DataError("columns is empty; give at least one heading with its images")
    for name, results in columns.items():
        if len(results) != len(queries):
            raise DataError(
                f"the column {name!r} has {len(results)} rows for {len(queries)} queries; give one each"
            )
        if correct is None:
            continue
        marks = correct.get(name)
        if marks is None or [len(row) for row in marks] != [len(row) for row in results]:
            raise DataError(
                f"correct[{name!r}] does not have one value per image of that column; give one each"
            )
    per_block = max(len(row) for results in columns.values() for row in results)
    if per_block == 0:
        raise DataError("no column has an image; search with k of at least 1")
    return per_block
