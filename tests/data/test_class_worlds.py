"""Synthetic classes: shapes, seeds, and classes that overlap but can be separated."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from xbt.data.synthetic import make_class_world
from xbt.errors import ConfigError


def nearest_centre(world):
    """Share of test samples whose nearest class mean is that of their class."""
    n_classes = int(world.train_labels.max()) + 1
    inputs = world.train_inputs.view(n_classes, -1, world.train_inputs.shape[1])
    centres = normalize(inputs.mean(dim=1), dim=1)
    found = (normalize(world.test_inputs, dim=1) @ centres.T).argmax(dim=1)
    return (found == world.test_labels).float().mean().item()


def test_shapes_and_labels():
    world = make_class_world(5, 4, 3, dim=7)
    assert world.train_inputs.shape == (20, 7)
    assert world.test_inputs.shape == (15, 7)
    assert world.train_inputs.dtype == torch.float32
    assert world.train_labels.dtype == torch.int64
    assert torch.equal(torch.bincount(world.train_labels), torch.full((5,), 4))
    assert torch.equal(torch.bincount(world.test_labels), torch.full((5,), 3))
    assert 0.5 < make_class_world().train_inputs.std() < 2


def test_the_seed_fixes_the_world():
    first, again, other = (make_class_world(3, 4, 5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert torch.equal(first.test_inputs, again.test_inputs)
    assert not torch.equal(first.train_inputs, other.train_inputs)
    assert not torch.equal(first.train_inputs[:5], first.test_inputs[:5])


def test_spread_and_noise_make_it_hard():
    easy, usual, hard = (
        nearest_centre(make_class_world(spread=spread, noise=noise))
        for spread, noise in ((0.0, 0.0), (0.75, 0.5), (3.0, 2.0))
    )
    assert easy == 1
    assert 0.5 < usual < 1
    assert hard < 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_classes": 0}, "n_classes is 0, but must be at least 1"),
        ({"train_per_class": 0}, "train_per_class is 0"),
        ({"test_per_class": 0}, "test_per_class is 0"),
        ({"dim": 0}, "dim is 0"),
        ({"latent_dim": 0}, "latent_dim is 0"),
        ({"spread": -1.0}, "spread is -1.0"),
        ({"noise": float("nan")}, "noise is nan"),
    ],
)
def test_unusable_worlds_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_class_world(**options)
