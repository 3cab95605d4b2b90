from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.serve import QdrantGallery
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

DIM, NEW_DIM = 16, 24


def unit_rows(count, dim=DIM, seed=0):
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_space(name, dim, seed):
    return EmbeddingSpace(name, dim, {"image_size": 224}, torch.from_numpy(unit_rows(20, dim, seed)), "main")


@pytest.fixture(scope="session")
def rows():
    """A function (n, dim, seed) → (n, dim) float32 unit rows."""
    return unit_rows


@pytest.fixture(scope="session")
def old_space():
    return make_space("model-old", DIM, 101)


@pytest.fixture(scope="session")
def other_space():
    """Another model's space of the old one's dimension."""
    return make_space("model-other", DIM, 102)


@pytest.fixture(scope="session")
def new_space():
    return make_space("model-new", NEW_DIM, 103)


HOSTILE = [
    "plain", "it's", 'a "quoted" one', "tab\there", "line\nbreak", "carriage\rreturn", "back\\slash", "\\N",
    "\\.", "C:\\photos\\1.jpg", "naïve/Ωμ/写真.jpg", "'; DROP TABLE items; --", "null", "", " spaces ", "{}",
    "\\t", "a,b", "$1", ":name",
]  # fmt: skip
"""Ids that a format may trip over."""


@pytest.fixture
def store(tmp_path, old_space):
    """A store of 60 items in three shards, with hostile ids and metadata."""
    made = EmbeddingStore.create(tmp_path / "store", modality="image", space=old_space, dtype="float32")
    ids = HOSTILE + [f"photo-{number}" for number in range(60 - len(HOSTILE))]
    vectors = unit_rows(60, seed=5)
    for start in range(0, 60, 20):
        part = slice(start, start + 20)
        columns = {
            "caption": [f"the 'caption' of\n{name}" for name in ids[part]],
            "width": list(range(start, start + 20)),
        }
        if start == 40:
            del columns["width"]
        made.append(vectors[part], ids[part], columns)
    return made


def names(count):
    return [f"photos/{number:05d}.jpg" for number in range(count)]


@pytest.fixture
def gallery(rows, old_space):
    """300 items with their vectors ``old``."""
    made = QdrantGallery.create(":memory:", "photos", space=old_space)
    made.add(rows(300, seed=1), names(300), old_space, {"number": list(range(300))})
    return made


@pytest.fixture
def mixed(gallery, rows, new_space):
    """The same, of which every third item is backfilled."""
    gallery.begin_part(new_space)
    gallery.backfill(rows(300, 24, 2)[::3], names(300)[::3], new_space)
    return gallery
