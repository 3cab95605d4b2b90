"""What tests of compatible encoders have in common."""

from __future__ import annotations

from xbt.data import make_scenes
from xbt.encoders import load_encoder
from xbt.projections import fit_projection

TEXTS = [f"a {size} {colour} {shape}" for size in ("big", "small") for colour in ("red", "blue", "green")
         for shape in ("circle", "star", "square")]  # fmt: skip
IMAGES = make_scenes(5).images


def parts(specs, backend):
    """New encoder, projection, old encoder."""
    new, old = load_encoder(specs[backend]), load_encoder(specs["old"])
    projection = fit_projection(
        new.encode_texts(TEXTS), old.encode_texts(TEXTS), new_space=new.space, old_space=old.space
    )
    return new, projection, old
