from __future__ import annotations

import json
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from xbt.backbones import ImagePreprocessing
from xbt.errors import ConfigError
from xbt.space import draw_probe_images

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
def test_evaluation_is_torchvisions_usual_chain(interpolation, crop_fraction):
    how = ImagePreprocessing(64, interpolation=interpolation, crop_fraction=crop_fraction)
    chain = transforms.Compose(
        [
            transforms.Resize(round(64 / crop_fraction), transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize(how.mean, how.std),
        ]
    )
    for image in draw_probe_images():
        pixels = how.evaluation()(image)
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, chain(image), atol=1e-6, rtol=1e-5)
        assert torch.equal(how.evaluation()(image), pixels)


def test_squash_ignores_the_sides_ratio():
    image = draw_probe_images()[3]
    pixels = ImagePreprocessing(32, resize_mode="squash", interpolation="bicubic", **PLAIN).evaluation()(
        image
    )
    expected = image.resize((32, 32), Image.Resampling.BICUBIC)
    torch.testing.assert_close(pixels, pixels_of(expected))


def test_image_of_the_right_size_is_left_as_it_is():
    image = draw_probe_images()[1]
    how = ImagePreprocessing(48, **PLAIN)
    torch.testing.assert_close(how.evaluation()(image), pixels_of(image))


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop_flip", "resized_crop_flip"])
def test_training_depends_on_the_seed_alone(augmentation):
    how = ImagePreprocessing(32, augmentation=augmentation)
    transform, image = how.training(), draw_probe_images()[3]
    first = [transform(image, (7, 0, position)) for position in range(12)]
    torch.manual_seed(99)
    np.random.seed(99)
    copy = pickle.loads(pickle.dumps(transform))
    again = [copy(image, np.random.default_rng((7, 0, position))) for position in range(12)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(each.shape == (3, 32, 32) for each in first)
    distinct = len({each.numpy().tobytes() for each in first})
    assert distinct == {"none": 1, "flip": 2, "crop_flip": 12, "resized_crop_flip": 12}[augmentation]
    if augmentation == "none":
        assert torch.equal(first[0], how.evaluation()(image))


def test_random_state_outside_is_not_moved():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    ImagePreprocessing(32, augmentation="resized_crop_flip").training()(draw_probe_images()[0], 3)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_flip_mirrors_half_of_the_images():
    image = draw_probe_images()[1]
    transform = ImagePreprocessing(48, augmentation="flip", **PLAIN).training()
    straight, flips = ImagePreprocessing(48, **PLAIN).evaluation()(image), 0
    for seed in range(400):
        pixels = transform(image, seed)
        flipped = not torch.equal(pixels, straight)
        assert torch.equal(pixels, straight.flip(2) if flipped else straight)
        flips += flipped
    assert 160 < flips < 240


def test_crop_shifts_by_an_eighth_at_most():
    image = Image.new("RGB", (32, 32), "white")
    image.putpixel((16, 16), (255, 0, 0))
    transform = ImagePreprocessing(32, augmentation="crop_flip", **PLAIN).training()
    seen = set()
    for seed in range(800):
        pixels = transform(image, seed)
        dot = (pixels[0] == 1) & (pixels[1] == 0)
        y, x = (int(each) for each in torch.nonzero(dot)[0])
        seen.add((y - 16, x - 16))
    # Mirrored, column 16 becomes column 15.
    assert {y for y, _ in seen} == set(range(-4, 5))
    assert {x for _, x in seen} == set(range(-5, 5))


def test_resized_crops_cover_what_inceptions_do():
    # A ramp: left and right end of the crop can be read off the pixels.
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    transform = ImagePreprocessing(
        64, augmentation="resized_crop_flip", interpolation="nearest", **PLAIN
    ).training()
    widths = []
    for seed in range(300):
        row = 255 * transform(Image.fromarray(ramp), seed)[0, 32]
        widths.append(float(row.max() - row.min()))
    assert min(widths) < 100 < 200 < max(widths)
    # Images so thin that no crop fits get their middle.
    thin = transform(Image.new("RGB", (3, 290), "red"), 0)
    assert thin.shape == (3, 64, 64)


def test_json_and_back():
    how = ImagePreprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", "squash", 0.9, "crop_flip")
    assert ImagePreprocessing(**json.loads(json.dumps(asdict(how)))) == how
    assert json.loads(json.dumps(how.describe()))["size"] == [32, 32]
    assert "augmentation" not in how.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"crop_fraction": 0.0}, "crop_fraction is 0.0"),
        ({"crop_fraction": 1.1}, "crop_fraction is 1.1"),
        ({"mean": (0.5, 0.5)}, "must be three numbers each"),
        ({"std": (0.5, 0.0, 0.5)}, "those of std above 0"),
        ({"interpolation": "lanczos"}, "interpolation 'lanczos' is not known; choose one of nearest"),
        ({"resize_mode": "stretch"}, "resize_mode 'stretch' is not known"),
        ({"augmentation": "mixup"}, "augmentation 'mixup' is not known"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        ImagePreprocessing(**options)
