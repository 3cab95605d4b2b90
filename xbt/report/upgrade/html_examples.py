"""Queries that were mended or broken, as cards with what they found before and after."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from PIL import Image

from xbt.report.upgrade.examples import Example
from xbt.report.upgrade.html_elements import element
from xbt.report.upgrade.result import UpgradeReport

SIDE = 120
"""Pixels of a thumbnail's longer side."""
_TINY = 64


class Cards:
    """Makes cards; keeps the thumbnails it has made.

    Args:
        report: Whose examples they show.
    """

    def __init__(self, report: UpgradeReport) -> None:
        self._report = report
        self._made: dict[int, tuple[str, bool] | None] = {}

    def grid(self, examples: Sequence[Example]) -> Element:
        """A card for each example."""
        return element("div", *(self._card(each) for each in examples), class_="cards")

    def _card(self, example: Example) -> Element:
        moved = f"right answer: place {example.old_rank + 1} before, {example.new_rank + 1} after"
        return element(
            "article",
            self._query(example),
            element("p", moved, class_="small quiet"),
            element("p", "before (old query)", class_="small"),
            self._results(example, example.before),
            element("p", "after (new query)", class_="small"),
            self._results(example, example.after),
            class_="card",
        )

    def _query(self, example: Example) -> Element:
        if example.direction == "T2I":
            return element("p", f"“{self._report.name_query(example)}”", class_="query")
        return element("div", self._picture(example.query), class_="asked")

    def _results(self, example: Example, rows: Sequence[int]) -> Element:
        if example.direction == "I2T":
            return element("ol", *(self._text(example, row) for row in rows))
        return element("ol", *(self._image(row, row in example.right) for row in rows), class_="thumbs")

    def _text(self, example: Example, row: int) -> Element:
        text = self._report.name_answer(example, row)
        if row not in example.right:
            return element("li", text)
        return element("li", element("span", "✓ ", class_="mark"), element("strong", text))

    def _image(self, row: int, right: bool) -> Element:
        picture = self._picture(row)
        if not right:
            return element("li", picture)
        return element("li", picture, element("span", "✓ right", class_="mark"), class_="right")

    def _picture(self, row: int) -> Element:
        """A thumbnail, or where there is no picture the words that stand for it."""
        if row not in self._made:
            found = self._report.shown.shown.picture(row)
            self._made[row] = None if found is None else (thumbnail(found), max(found.size) <= _TINY)
        made = self._made[row]
        if made is None:
            return element("div", self._words(row), class_="words")
        source, tiny = made
        return element("img", src=source, alt=self._words(row), class_="tiny" if tiny else "photo")

    def _words(self, row: int) -> str:
        """What an image shows, as far as a text says so; its id otherwise."""
        shown, owner = self._report.shown.shown, self._report.shown.pairs.image_of_text
        if shown.texts is None:
            return shown.ids[row]
        return shown.texts[int((owner == row).nonzero()[0])]


def thumbnail(image: Image.Image) -> str:
    """A picture as a data URI: small ones losslessly as they are, others as JPEG."""
    file = io.BytesIO()
    if max(image.size) <= _TINY:
        image.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        small = image.copy()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(file, "JPEG", quality=80, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
