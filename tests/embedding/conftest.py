"""A tiny model and a folder of images for the embedding job."""

from __future__ import annotations

import pytest
import tiny
from pictures import SCENES

from xbt.encoders import load_encoder


@pytest.fixture(scope="session")
def spec(tmp_path_factory):
    return tiny.tiny_open_clip(tmp_path_factory.mktemp("model"), context_length=77)


@pytest.fixture(scope="session")
def encoder(spec):
    return load_encoder(spec)


@pytest.fixture
def folder(tmp_path):
    """47 images in folders."""
    for number in range(47):
        path = tmp_path / "photos" / f"{number // 10}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        SCENES.image(number).save(path)
    return tmp_path / "photos"
