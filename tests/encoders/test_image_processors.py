"""Image processors of transformers: declared steps are applied, and their images fit the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from xbt.encoders import load_encoder
from xbt.errors import EncoderError

SIZE, EDGE = {"height": 32, "width": 32}, {"shortest_edge": 32}


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "clip": tiny.tiny_transformers_clip(folder / "clip", layers=1),
        "siglip": tiny.tiny_siglip(folder / "siglip", layers=1),
    }


def with_processor(spec, **config):
    kind = "Siglip" if "siglip" in spec else "CLIP"
    file = Path(spec.removeprefix("transformers:")) / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": f"{kind}ImageProcessor", **config}))
    return spec


WRONG = {
    "another size": ("clip", {"size": EDGE, "crop_size": {"height": 40, "width": 40}}, "40 x 40"),
    "a crop that is no square": ("clip", {"size": EDGE, "crop_size": SIZE | {"width": 24}}, "24 x 32"),
    "no crop": ("clip", {"size": {"shortest_edge": 32}, "do_center_crop": False}, "38 x 32"),
    "no resizing": ("siglip", {"size": SIZE, "do_resize": False}, "48 x 40"),
    "squashed to another size": ("siglip", {"size": {"height": 16, "width": 16}}, "16 x 16"),
    "squashed to no square": ("siglip", {"size": {"height": 32, "width": 48}}, "48 x 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_images_that_the_model_does_not_take_are_refused(name, specs):
    kind, config, size = WRONG[name]
    with pytest.raises(EncoderError, match=rf"makes {size} pixels .* takes 32 x 32"):
        load_encoder(with_processor(specs[kind], **config))


APPLIED = {
    "all steps": {},
    "no normalisation": {"do_normalize": False},
    "no rescaling": {"do_rescale": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "another factor": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.5, 1.0, 2.0]},
}


@pytest.mark.parametrize("name", APPLIED)
def test_declared_pixels_are_those_that_are_made(name, specs):
    size = {"size": {"shortest_edge": 32}, "crop_size": SIZE}
    encoder = load_encoder(with_processor(specs["clip"], **size, **APPLIED[name]))
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean, std = (np.array(encoder.preprocessing[key]) for key in ("mean", "std"))
    expected = torch.from_numpy(((values / 255 - mean) / std).transpose(2, 0, 1))
    pixels = encoder.preprocess(Image.fromarray(values))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.double(), expected, rtol=1e-5, atol=1e-5)


def test_declared_resizing_is_applied(specs):
    crop = {"crop_size": SIZE}
    larger = load_encoder(with_processor(specs["clip"], size={"shortest_edge": 40}, **crop))
    equal = load_encoder(with_processor(specs["clip"], size={"shortest_edge": 32}, **crop))
    cropped = load_encoder(with_processor(specs["clip"], do_resize=False, **crop))
    assert larger.preprocessing["resize_to"] == [40, 40]
    assert "resize_to" not in equal.preprocessing
    assert (cropped.preprocessing["resize_mode"], cropped.preprocessing["interpolation"]) == ("none", None)
    assert larger.preprocess(Image.new("RGB", (99, 50))).shape == (3, 32, 32)
    assert "resize_to [32, 32] and [40, 40]" in equal.space.compare(larger.space).reason


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_std", [0, 1, 1]), ("image_mean", [0.5]), ("resample", 77), ("size", "large"), ("crop_size", 7)],
)
def test_values_that_cannot_be_used_are_refused(key, value, specs):
    with pytest.raises(EncoderError, match=r"preprocessor_config\.json|pixels"):
        load_encoder(with_processor(specs["clip"], **({"size": EDGE, "crop_size": SIZE} | {key: value})))


def test_batches_of_unequal_images_are_an_error_of_ours(specs, monkeypatch):
    encoder = load_encoder(with_processor(specs["clip"], size={"shortest_edge": 32}, crop_size=SIZE))
    monkeypatch.setattr(encoder, "image_transform", lambda image: torch.zeros(3, image.height, image.width))
    with pytest.raises(EncoderError, match="images of different sizes, 20 x 10 and 9 x 12 pixels"):
        encoder.encode_images([Image.new("RGB", (20, 10)), Image.new("RGB", (9, 12))])
