"""What several searches find, side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from xbt.errors import DataError
from xbt.report.page import Page
from xbt.report.style import QUIET

# The comparison's measures, in pixels.
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
    """Draws what several searches find for the same text queries, one row per query.

    Args:
        queries: The texts, each written in full at the left of its row.
        columns: By heading ("old/old", "new/old", "new/new"), for every query its images, best first. Small
            images are enlarged without smoothing.
        path: File to write, usually ``.png``; its directory is made. The picture is at most 1,640 pixels
            wide.
        correct: For the same headings, queries and places, whether the image answers the query; those that do
            get a green frame.
        title: A line above everything.

    Returns:
        The path that was written.

    Raises:
        DataError: If there is nothing to draw, or a column or ``correct`` does not fit the queries.
    """
    per_block = _check_columns(queries, columns, correct)
    room = WIDTH - 2 * MARGIN - TEXT_WIDTH - len(columns) * BLOCK_GAP
    thumb = room // len(columns) // per_block - THUMB_GAP
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
        for left, (name, found) in zip(lefts, columns.items(), strict=True):
            for place, image in enumerate(found[row]):
                good = correct is not None and bool(correct[name][row][place])
                page.image(left + place * (thumb + THUMB_GAP), top, image, thumb, good)
        top = max(bottom, top + thumb) + ROW_GAP
    return page.save(path, top - ROW_GAP + MARGIN)


def _check_columns(
    queries: Sequence[str],
    columns: Mapping[str, Sequence[Sequence[Image.Image]]],
    correct: Mapping[str, Sequence[Sequence[bool]]] | None,
) -> int:
    """Checks that everything fits together and returns the largest number of images in a row of a column."""
    if isinstance(queries, str) or len(queries) == 0:
        raise DataError(f"queries is {queries!r}; give a list of at least one text")
    if not columns:
        raise DataError("columns is empty; give at least one heading with its images")
    for name, found in columns.items():
        if len(found) != len(queries):
            raise DataError(
                f"the column {name!r} has {len(found)} rows for {len(queries)} queries; give one each"
            )
        if correct is None:
            continue
        marks = correct.get(name)
        if marks is None or [len(row) for row in marks] != [len(row) for row in found]:
            raise DataError(
                f"correct[{name!r}] does not have one value per image of that column; give one each"
            )
    most = max(len(row) for found in columns.values() for row in found)
    if most == 0:
        raise DataError("no column has an image; search with k of at least 1")
    return most
