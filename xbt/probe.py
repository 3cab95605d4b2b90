"""The probe of every space: sixteen fixed texts and four drawn images.

A probe must react to whatever makes two models' vectors incomparable. The texts differ in length, subject
and punctuation. The images are chosen against resampling: two zone plates hold every spatial frequency, one
larger and one smaller than any CLIP's input; the others show squashing in the place of cropping, and swapped
colours or normalisation.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

PROBE_VERSION = 2
"""Raised whenever a probe text or image changes; probes of different versions cannot be compared."""

PROBE_TEXTS = (
    "a photo of a dog",
    "a red circle",
    "two children playing football in a park",
    "the Eiffel Tower at night",
    "a bowl of noodle soup with an egg",
    "a diagram of a neural network",
    "rain",
    "a close-up of a bee on a yellow flower, out of focus background",
    "an old man reading a newspaper on a bench",
    "small blue square to the left of a large green triangle",
    "a street sign that says STOP",
    "satellite image of farmland",
    "people waiting for a train",
    "a black and white drawing of a sailing ship in a storm",
    "nothing but sky",
    "3 apples, 2 pears & a knife",
)
"""The sixteen fixed texts of a probe."""


def draw_probe_images() -> list[Image.Image]:
    """Draws the four fixed images: a large and a small zone plate, a disc off the middle, coloured dots.

    Returns:
        Four RGB images of 600×600, 48×48, 96×64 and 400×260 pixels, the same on every machine.
    """
    disc = Image.new("RGB", (96, 64), (30, 120, 60))
    ImageDraw.Draw(disc).ellipse((16, 8, 64, 56), fill=(240, 200, 30))
    return [_zone_plate(600), _zone_plate(48), disc, _dots(400, 260)]


def _zone_plate(size: int) -> Image.Image:
    """Rings that become finer outwards, at another rate in each colour: resampling changes all of them."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    squared = (x - 0.3 * size) ** 2 + (y - 0.4 * size) ** 2
    planes = [127.5 + 127.5 * np.cos(np.pi * rate * squared / (2.2 * size)) for rate in (1.0, 1.3, 0.8)]
    return Image.fromarray(np.rint(np.stack(planes, axis=-1)).astype(np.uint8))


def _dots(width: int, height: int) -> Image.Image:
    """Every pixel another colour, from Knuth's multiplicative hash of its number."""
    numbers = np.arange(1, 3 * width * height + 1, dtype=np.uint64)
    values = (numbers * np.uint64(2654435761) >> np.uint64(13)) & np.uint64(255)
    return Image.fromarray(values.astype(np.uint8).reshape(height, width, 3))
