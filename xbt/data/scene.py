"""One scene of the built-in world: coloured shapes on a 3 x 3 grid, which can draw and describe itself."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from xbt.data.scene_drawing import RADII, downsample, draw_shape, supersampled_background
from xbt.data.scene_wording import word_scene


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
        """The full description in one canonical line: equal for equal scenes, different for others."""
        told = [f"{thing.size} {thing.colour} {thing.shape} {thing.cell}" for thing in self.objects]
        return "; ".join([self.background, *told])

    def draw(self, size: int = 32) -> Image.Image:
        """Draws the scene, antialiased.

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
        """Says what the scene shows, in one of many wordings; some leave something out, none is false.

        Args:
            rng: Where the choice of words comes from.

        Returns:
            A lower-case English caption of at most about 40 words.
        """
        return word_scene(self.objects, self.background, rng)

    def captions(self, count: int, rng: random.Random) -> list[str]:
        """Describes the scene several times, differently each time as far as wordings last.

        Args:
            count: How many captions.
            rng: Where the choice of words comes from.

        Returns:
            ``count`` captions.
        """
        told: list[str] = []
        for _ in range(count):
            caption = self.describe(rng)
            for _ in range(20):
                if caption not in told:
                    break
                caption = self.describe(rng)
            told.append(caption)
        return told
