"""A page on which texts and images are placed by the pixel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from xbt.report.style import DPI, INK, RIGHT, RULE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Page:
    """A white page measured in pixels from its top left corner, whose height is known only at the end."""

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
        """Writes text wrapped to a width and returns where it ends."""
        lines = self._wrap(text, width, size, weight)
        step = round(1.35 * size)
        for i, line in enumerate(lines):
            place = {"x": left, "top": top + i * step + size, "s": line}
            style = {"fontsize": size * 72 / DPI, "fontweight": weight, "color": color}
            self._items.append(("text", place | style))
        return top + step * len(lines)

    def line(self, left: int, top: int, width: int) -> None:
        """Draws a horizontal rule."""
        self._items.append(("frame", {"x": left, "top": top, "w": width, "h": 1, "edge": RULE, "line": 1.0}))

    def image(self, left: int, top: int, image: Image.Image, side: int, good: bool) -> None:
        """Fits an image into a square, keeping its shape, and frames it."""
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
        """Puts everything on a page of this height and writes it."""
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
                text.set_parse_math(False)  # a price in dollars is no formula
            else:
                corner = (x, bottom - item["h"])
                pen = item["line"] * 72 / DPI
                box = Rectangle(corner, item["w"], item["h"], fill=False, ec=item["edge"], lw=pen, zorder=2)
                box.set_transform(None)
                self._figure.add_artist(box)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._figure.savefig(target, dpi=DPI)
        return target

    def _wrap(self, text: str, width: int, size: int, weight: str) -> list[str]:
        """Breaks text at spaces, and inside words that are wider than a line."""
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
