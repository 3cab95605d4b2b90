"""The built-in scenes: captioned images of coloured shapes on a 3 x 3 grid, without a download.

A digest of a scene's description decides its split. So no test scene can be trained on, whatever the seeds.
Pillow draws eight colours, six shapes and six backgrounds.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from xbt.data.items import LazyImages
from xbt.data.pairs import ImageTextPairs
from xbt.errors import ConfigError

_T = TypeVar("_T")
SPLITS = ("train", "val", "test")
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
_COLOURS = tuple(COLOURS)
_SIZES = tuple(RADII)
# Number of objects, drawn uniformly. One object teaches the words; two or three give many distinct scenes.
_COUNTS = (1, 2, 2, 2, 2, 3, 3, 3, 3, 3)
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large")}
SHAPE_WORDS = {"circle": ("circle", "disc"), "square": ("square", "box")}
COLOUR_WORDS = {"purple": ("purple", "violet")}
BACKGROUND_WORDS = {"grey": ("grey", "gray"), "checkered": ("checkered", "checked")}
PLACE_WORDS = (
    ("at the top left", "in the upper left", "in the top left corner"),
    ("at the top", "at the top centre"),
    ("at the top right", "in the upper right", "in the top right corner"),
    ("on the left", "at the middle left"),
    ("in the centre", "in the middle"),
    ("on the right", "at the middle right"),
    ("at the bottom left", "in the lower left", "in the bottom left corner"),
    ("at the bottom", "at the bottom centre"),
    ("at the bottom right", "in the lower right", "in the bottom right corner"),
)
_OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ", "there is ", "we see ")


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape in one cell of the grid."""

    shape: str
    """One of ``SHAPES``."""
    colour: str
    """A key of ``COLOURS``."""
    size: str
    """``"small"`` or ``"big"``."""
    cell: int
    """0 to 8, row by row from the top left."""


@dataclass(frozen=True)
class Scene:
    """One to three objects, in the order of their cells, on a background."""

    objects: tuple[SceneObject, ...]
    """No two in the same cell."""
    background: str
    """One of ``BACKGROUNDS``."""

    @property
    def key(self) -> str:
        """Canonical one-line description; two scenes are equal if and only if their keys are."""
        objects = [f"{thing.size} {thing.colour} {thing.shape} {thing.cell}" for thing in self.objects]
        return "; ".join([self.background, *objects])

    def draw(self, size: int = 32) -> Image.Image:
        """Draw the scene, antialiased, as an RGB image with sides of ``size`` pixels."""
        canvas = _background(self.background, size * _SUPERSAMPLING).copy()
        pen = ImageDraw.Draw(canvas)
        cell_side = canvas.width / 3
        for thing in self.objects:
            x, y = (thing.cell % 3 + 0.5) * cell_side, (thing.cell // 3 + 0.5) * cell_side
            radius, fill = RADII[thing.size] * cell_side, COLOURS[thing.colour]
            if thing.shape == "circle":
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            else:
                corners = [(x + radius * dx, y + radius * dy) for dx, dy in _outline(thing.shape)]
                pen.polygon(corners, fill=fill)
        return canvas.reduce(_SUPERSAMPLING)

    def describe(self, rng: random.Random) -> str:
        """Describe the scene in one of many wordings: at most about 40 lower-case words.

        A caption may leave something out but is never wrong.
        """
        details = _pick(rng, _DETAILS)
        order = sorted(self.objects, key=lambda _: rng.random())
        relation = _relation(order) if details.place else None
        if relation is not None and rng.random() < 0.3:
            first, second = (_name(thing, details, rng) for thing in order)
            body = f"{first} {relation} {second}"
        else:
            place_first = details.place and rng.random() < 0.2
            body = _enumerate([_locate(thing, details, place_first, rng) for thing in order])
            if place_first:
                return body if not details.background else f"on {_ground(self.background, rng)}, {body}"
        if not details.background:
            return _pick(rng, _OPENINGS) + body
        ground = _ground(self.background, rng)
        if rng.random() < 0.25:
            return f"on {ground}, {body}"
        return _pick(rng, _OPENINGS) + body + _pick(rng, (" on ", ", on ", " over ")) + ground

    def captions(self, count: int, rng: random.Random) -> list[str]:
        """Describe the scene ``count`` times, with distinct captions as far as the wordings allow."""
        captions: list[str] = []
        for _ in range(count):
            caption = self.describe(rng)
            for _ in range(20):
                if caption not in captions:
                    break
                caption = self.describe(rng)
            captions.append(caption)
        return captions


class ArrayImages(LazyImages):
    """Images of one size in an (n, height, width, 3) uint8 array, converted to PIL on access."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def source_at(self, row: int) -> Image.Image:
        """One image."""
        return Image.fromarray(self.pixels[row])


def scene_split(scene: Scene) -> str:
    """Return the split of a scene: ``train`` (80 %), ``val`` (10 %) or ``test`` (10 %)."""
    share = hashlib.sha256(scene.key.encode()).digest()[0] / 256
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def iterate_scenes(n: int, seed: int = 0, split: str = "train") -> Iterator[Scene]:
    """Yield n distinct random scenes of a split; a call with a smaller n yields the first of them."""
    if n < 1:
        raise ConfigError(f"the number of scenes is {n}, but must be at least 1")
    if split not in SPLITS:
        raise ConfigError(f"the built-in scenes have no split {split!r}; choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"scenes/{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < n:
        scene = _random_scene(rng)
        # Two blue stars in one scene would make captions ambiguous.
        if len({(thing.colour, thing.shape) for thing in scene.objects}) < len(scene.objects):
            continue
        if scene.key not in seen and scene_split(scene) == split:
            seen.add(scene.key)
            yield scene


def make_scenes(
    n: int, seed: int = 0, split: str = "train", image_size: int = 32, captions_per_scene: int = 5
) -> ImageTextPairs:
    """Draw and describe random scenes: coloured shapes on a 3 x 3 grid.

    The same arguments give the same scenes and captions on every machine.

    Args:
        n: Number of scenes; all are different.
        seed: Chooses the scenes within the split and their captions.
        split: ``train``, ``val`` or ``test``; no scene is in two of them, whatever the seeds.
        image_size: Side in pixels, 16 or more.
        captions_per_scene: Number of captions per scene.

    Returns:
        Pairs whose images are stored in one (n, image_size, image_size, 3) uint8 array.

    Raises:
        ConfigError: If a number is too small or there is no such split.
    """
    if image_size < 16:
        raise ConfigError(f"image_size is {image_size}, but the scenes' shapes need at least 16 pixels")
    if captions_per_scene < 1:
        raise ConfigError(f"captions_per_scene is {captions_per_scene}, but must be at least 1")
    scenes = list(iterate_scenes(n, seed, split))
    pixels = np.empty((n, image_size, image_size, 3), dtype=np.uint8)
    for row, scene in enumerate(scenes):
        pixels[row] = np.asarray(scene.draw(image_size))
    captions = [scene.captions(captions_per_scene, _caption_rng(scene, seed)) for scene in scenes]
    ids = [f"scene-{split}-{seed}-{row:06d}" for row in range(n)]
    return ImageTextPairs(ids, ArrayImages(pixels), captions)


def scene_captions(n: int, seed: int = 0, split: str = "train") -> list[str]:
    """Describe n random scenes once each, without drawing them.

    Args:
        n: Number of captions.
        seed: Chooses the scenes within the split and the words.
        split: ``train``, ``val`` or ``test``.

    Returns:
        The first caption of each scene that :func:`make_scenes` makes from the same arguments.

    Raises:
        ConfigError: If ``n`` is below 1 or there is no such split.
    """
    return [scene.captions(1, _caption_rng(scene, seed))[0] for scene in iterate_scenes(n, seed, split)]


def _caption_rng(scene: Scene, seed: int) -> random.Random:
    return random.Random(f"captions/{seed}/{scene.key}")


def _random_scene(rng: random.Random) -> Scene:
    count = _pick(rng, _COUNTS)
    free = list(range(9))
    cells = sorted(free.pop(int(rng.random() * len(free))) for _ in range(count))
    objects = [
        SceneObject(_pick(rng, SHAPES), _pick(rng, _COLOURS), _pick(rng, _SIZES), cell) for cell in cells
    ]
    return Scene(tuple(objects), _pick(rng, BACKGROUNDS))


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
def _background(name: str, size: int) -> Image.Image:
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


class _Details(NamedTuple):
    """Details that a caption mentions besides the colour and shape of every object."""

    size: bool
    place: bool
    background: bool


# Half of the captions mention everything; the others leave out one detail, rarely two.
_DETAILS = (
    *[_Details(size=True, place=True, background=True)] * 5,
    *[_Details(size=True, place=True, background=False)] * 2,
    _Details(size=False, place=True, background=True),
    _Details(size=True, place=False, background=True),
    _Details(size=False, place=True, background=False),
)


def _pick(rng: random.Random, options: Sequence[_T]) -> _T:
    # Only rng.random() is used: Python guarantees its sequence across versions, and no other method's.
    return options[int(rng.random() * len(options))]


def _name(thing: SceneObject, details: _Details, rng: random.Random) -> str:
    colour = _pick(rng, COLOUR_WORDS.get(thing.colour, (thing.colour,)))
    words = [colour, _pick(rng, SHAPE_WORDS.get(thing.shape, (thing.shape,)))]
    if details.size:
        words.insert(0, _pick(rng, SIZE_WORDS[thing.size]))
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _locate(thing: SceneObject, details: _Details, place_first: bool, rng: random.Random) -> str:
    name = _name(thing, details, rng)
    if not details.place:
        return name
    place = _pick(rng, PLACE_WORDS[thing.cell])
    return f"{place} {name}" if place_first else f"{name} {place}"


def _relation(objects: Sequence[SceneObject]) -> str | None:
    """Relation of the first of two objects to the second; ``None`` unless they share a row or column."""
    if len(objects) != 2:
        return None
    (row, column), (other_row, other_column) = (divmod(thing.cell, 3) for thing in objects)
    if column == other_column:
        return "above" if row < other_row else "below"
    if row == other_row:
        return "to the left of" if column < other_column else "to the right of"
    return None


def _ground(background: str, rng: random.Random) -> str:
    return f"a {_pick(rng, BACKGROUND_WORDS.get(background, (background,)))} background"


def _enumerate(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
