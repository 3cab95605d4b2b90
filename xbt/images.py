"""Reading images, and the few drawn ones that every space is probed with."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image, ImageDraw

from xbt.errors import ImageError

ImageSource = Image.Image | str | os.PathLike[str] | bytes


def load_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Decodes one image completely and converts it to RGB.

    Args:
        source: A PIL image, a path, or the bytes of an encoded image.
        name: What to call it in an error; a path names itself.

    Returns:
        An RGB image whose pixels are loaded, so that a truncated file fails here and not later.

    Raises:
        ImageError: If the file is missing, empty, truncated, not an image, or implausibly large.
    """
    if isinstance(source, Image.Image):
        label = name or "given as a PIL image"
    elif isinstance(source, bytes):
        label = name or f"given as {len(source)} bytes"
    else:
        label = name or os.fspath(source)
    try:
        if isinstance(source, Image.Image):
            return source.convert("RGB")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as opened:
            return opened.convert("RGB")
    except FileNotFoundError as error:
        raise ImageError(f"image {label} does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {label} cannot be decoded: {error}") from error


def draw_probe_images(size: int = 64) -> list[Image.Image]:
    """Draws the four fixed images a space is probed with: flat, stripes, a disc and a diagonal gradient.

    Their edges and gradients react to resizing and normalisation, so that two preprocessings which differ
    enough to matter give different vectors.

    Args:
        size: Side in pixels.

    Returns:
        Four RGB images, the same bytes on every machine.
    """
    flat = Image.new("RGB", (size, size), (200, 60, 40))
    stripes = Image.new("RGB", (size, size), (250, 250, 250))
    pen = ImageDraw.Draw(stripes)
    for x in range(0, size, 7):
        pen.rectangle((x, 0, x + 2, size - 1), fill=(20, 40, 160))
    disc = Image.new("RGB", (size + size // 2, size), (30, 120, 60))
    ImageDraw.Draw(disc).ellipse((size // 4, size // 8, size, size - size // 8), fill=(240, 200, 30))
    ramp = Image.linear_gradient("L").resize((size, size), Image.Resampling.NEAREST)
    gradient = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_90), ramp.rotate(180)))
    return [flat, stripes, disc, gradient]
