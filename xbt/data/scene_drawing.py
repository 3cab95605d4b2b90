"""Drawing of the built-in scenes: eight colours, six shapes and six backgrounds, drawn with Pillow."""

from __future__ import annotations

import math
from functools import cache, lru_cache

from PIL import Image, ImageDraw

COLOURS = {
    "red": (215, 25, 30),
    "orange": (255, 135, 0),
    "yellow": (250, 230, 40),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "purple": (135, 30, 175),
    "pink": (255, 140, 200),
    "brown": (120, 65, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
BACKGROUNDS = ("white", "grey", "black", "striped", "checkered", "shaded")
# Half the extent of an object as a fraction of its cell's side; below 0.5, so that neighbours never touch.
RADII = {"small": 0.29, "big": 0.47}
# Shapes are drawn this many times larger and averaged down, because Pillow's drawing does not antialias.
_SUPERSAMPLING = 4


def draw_shape(
    canvas: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, colour: str
) -> None:
    """Draw one of ``SHAPES``, filled with one of ``COLOURS``.

    ``centre`` is (x, y), and ``radius`` is half the shape's extent, both in the canvas's pixels.
    """
    x, y = centre
    fill = COLOURS[colour]
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    canvas.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _outline(shape)], fill=fill)


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape in the square from -1 to 1, y pointing down."""
    if shape == "square":
        return ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88))
    if shape == "triangle":
        return ((0.0, -1.0), (1.0, 0.88), (-1.0, 0.88))
    if shape == "star":
        turns = [math.pi * i / 5 for i in range(10)]
        reach = [1.05 if i % 2 == 0 else 0.42 for i in range(10)]
        return tuple((r * math.sin(t), -r * math.cos(t)) for r, t in zip(reach, turns, strict=True))
    if shape == "cross":
        half = 0.36
        right = ((half, -1.0), (half, -half), (1.0, -half), (1.0, half), (half, half), (half, 1.0))
        return right + tuple((-x, y) for x, y in reversed(right))
    # The heart: the classical curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t.
    points = []
    for i in range(32):
        t = 2 * math.pi * i / 32
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3, -(y + 2.5) / 14.5))
    return tuple(points)


@lru_cache(maxsize=32)
def background(name: str, size: int) -> Image.Image:
    """Draw one of ``BACKGROUNDS``; the RGB image is cached and shared, so copy it before drawing on it."""
    plain = {"white": 255, "grey": 128, "black": 0}
    if name in plain:
        return Image.new("RGB", (size, size), (plain[name],) * 3)
    if name == "shaded":
        ramp = Image.linear_gradient("L").resize((size, size), Image.Resampling.BILINEAR)
        return Image.merge("RGB", (ramp, ramp, ramp))
    image = Image.new("RGB", (size, size), (235, 235, 235))
    pen = ImageDraw.Draw(image)
    step = size / 8
    for row in range(8):
        for column in range(8):
            if (row + (column if name == "checkered" else 0)) % 2:
                box = (column * step, row * step, (column + 1) * step - 1, (row + 1) * step - 1)
                pen.rectangle(box, fill=(165, 165, 165))
    return image


def supersampled_background(name: str, size: int) -> Image.Image:
    """Return a new canvas for a scene of ``size`` pixels, enlarged by the supersampling factor."""
    return background(name, size * _SUPERSAMPLING).copy()


def downsample(canvas: Image.Image) -> Image.Image:
    """Average a supersampled canvas down to the size of the scene."""
    return canvas.reduce(_SUPERSAMPLING)
