"""Spaces, rows and a store with hostile ids, as fixtures for the tests of indexes and exports."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
