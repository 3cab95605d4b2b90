"""A world of vectors, pictures that go with it, and a report on both."""

from __future__ import annotations

import pytest
from upgrade_worlds import config_of, write_pictures, write_world

from xbt.data import PairSource
from xbt.report import write_upgrade_report


@pytest.fixture(scope="session")
def better(tmp_path_factory):
    """An .npz file of a world whose new model is much better."""
    return write_world(tmp_path_factory.mktemp("world") / "better.npz")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A split file whose captions are hostile."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def made(better, pictures, tmp_path_factory):
    """A report with everything, and its directory."""
    out = tmp_path_factory.mktemp("report") / "out"
    config = config_of(better, out, pairs=PairSource(pictures, split="val"), examples=3)
    return write_upgrade_report(config), out
