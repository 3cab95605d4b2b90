from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.space import EmbeddingSpace


@pytest.fixture
def space():
    """A space of dimension 8 with a probe of its own."""
    return make_space("model-a", seed=0)


@pytest.fixture
def other_space():
    """Another model's space of the same dimension."""
    return make_space("model-b", seed=1)


@pytest.fixture
def unit_rows():
    """A function (n, seed) → (n, 8) float32 unit rows."""

    def make(n, seed=0, dim=8):
        rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return make


def make_space(name, seed, dim=8):
    generator = torch.Generator().manual_seed(seed)
    probe = torch.nn.functional.normalize(torch.randn(20, dim, generator=generator), dim=1)
    return EmbeddingSpace(name, dim, probe=probe)
