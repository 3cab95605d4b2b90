"""The built-in scenes: captioned images of coloured shapes on a 3 x 3 grid, without a download.

A digest of a scene's description decides its split. So no test scene can be trained on, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from xbt.data.pairs import ImageTextPairs
from xbt.data.scene_drawing import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    downsample,
    draw_shape,
    supersampled_background,
)
from xbt.errors import ConfigError

SPLITS = ("train", "val", "test")
_COLOURS = tuple(COLOURS)
_SIZES = tuple(RADII)
# Number of objects, drawn uniformly. One object teaches the words; two or three give many distinct scenes.
_COUNTS = (1, 2, 2, 2, 2, 3, 3, 3, 3, 3)


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape in one cell of the grid."""

    shape: str
    """One of ``scene_drawing.SHAPES``."""
    colour: str
    """A key of ``scene_drawing.COLOURS``."""
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
    """One of ``scene_drawing.BACKGROUNDS``."""

    @property
    def key(self) -> str:
        """Canonical one-line description; two scenes are equal if and only if their keys are."""
        objects = [f"{thing.size} {thing.colour} {thing.shape} {thing.cell}" for thing in self.objects]
        return "; ".join([self.background, *objects])

    def draw(self, size: int = 32) -> Image.Image:
        """Draw the scene, antialiased.

        Args:
            size: Side in pixels.

        Returns:
            An RGB image.
        """
        canvas = supersampled_background(self.background, size)
        pen = ImageDraw.Draw(canvas)
        cell_side = canvas.width / 3
        for thing in self.objects:
            centre = ((thing.cell % 3 + 0.5) * cell_side, (thing.cell // 3 + 0.5) * cell_side)
            draw_shape(pen, thing.shape, centre, RADII[thing.size] * cell_side, thing.colour)
        return downsample(canvas)

    def describe(self, rng: random.Random) -> str:
        """Describe the scene in one of many wordings; a caption may leave something out but is never wrong.

        Args:
            rng: Chooses the words.

        Returns:
            A lower-case English caption of at most about 40 words.
        """
        return word_scene(self.objects, self.background, rng)

    def captions(self, count: int, rng: random.Random) -> list[str]:
        """Describe the scene several times, with distinct captions as far as the wordings allow.

        Args:
            count: Number of captions.
            rng: Chooses the words.

        Returns:
            ``count`` captions.
        """
        captions: list[str] = []
        for _ in range(count):
            caption = self.describe(rng)
            for _ in range(20):
                if caption not in captions:
                    break
                caption = self.describe(rng)
            captions.append(caption)
        return captions


class ArrayImages(Sequence[Image.Image]):
    """Images of one size in one array, converted to PIL on access."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        """Keep the array.

        Args:
            pixels: (n, height, width, 3) uint8.
        """
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> ArrayImages: ...
    def __getitem__(self, index: int | slice) -> Image.Image | ArrayImages:
        if isinstance(index, slice):
            return ArrayImages(self.pixels[index])
        return Image.fromarray(self.pixels[index])


def scene_split(scene: Scene) -> str:
    """Return the split of a scene: ``train`` (80 %), ``val`` (10 %) or ``test`` (10 %)."""
    share = hashlib.sha256(scene.key.encode()).digest()[0] / 256
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def iterate_scenes(n: int, seed: int = 0, split: str = "train") -> Iterator[Scene]:
    """Yield distinct random scenes; a call with a smaller n yields the first of them.

    Args:
        n: Number of scenes.
        seed: Chooses the scenes within the split.
        split: ``train``, ``val`` or ``test``.

    Yields:
        Scenes, all different.

    Raises:
        ConfigError: If ``n`` is below 1 or there is no such split.
    """
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
    # Use only rng.random(): Python guarantees its sequence across versions, and no other method's.
    def pick(options: Sequence[str]) -> str:
        return options[int(rng.random() * len(options))]

    count = _COUNTS[int(rng.random() * len(_COUNTS))]
    free = list(range(9))
    cells = sorted(free.pop(int(rng.random() * len(free))) for _ in range(count))
    objects = tuple(SceneObject(pick(SHAPES), pick(_COLOURS), pick(_SIZES), cell) for cell in cells)
    return Scene(objects, pick(BACKGROUNDS))


T = TypeVar("T")

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
class _Details:
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


def word_scene(objects: Sequence[SceneObject], background: str, rng: random.Random) -> str:
    """Write one caption of a scene.

    Args:
        objects: The objects; each is mentioned with its colour and shape.
        background: Name of the background.
        rng: Chooses the details, the order and the words. Only ``rng.random()`` is used, because
            Python guarantees its sequence across versions.

    Returns:
        A lower-case English caption.
    """
    details = _pick(rng, _DETAILS)
    order = sorted(objects, key=lambda _: rng.random())
    relation = _relation(order) if details.place else None
    if relation is not None and rng.random() < 0.3:
        first, second = (_name(thing, details, rng) for thing in order)
        body = f"{first} {relation} {second}"
    else:
        place_first = details.place and rng.random() < 0.2
        body = _enumerate([_locate(thing, details, place_first, rng) for thing in order])
        if place_first:
            return body if not details.background else f"on {_ground(background, rng)}, {body}"
    if not details.background:
        return _pick(rng, _OPENINGS) + body
    ground = _ground(background, rng)
    if rng.random() < 0.25:
        return f"on {ground}, {body}"
    return _pick(rng, _OPENINGS) + body + _pick(rng, (" on ", ", on ", " over ")) + ground


def _pick(rng: random.Random, options: Sequence[T]) -> T:
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
