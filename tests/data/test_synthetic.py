"""Synthetic classes that overlap but can be separated, and synthetic vectors of two dual encoders."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from xbt.data.synthetic import WORLDS, ModelQuality, make_class_world, make_vector_world
from xbt.errors import ConfigError
from xbt.evaluation import recall_at_k

SAME = {"old": ModelQuality(), "new": ModelQuality()}


def nearest_centre(world):
    """Share of test samples whose nearest class mean is that of their class."""
    n_classes = int(world.train_labels.max()) + 1
    inputs = world.train_inputs.view(n_classes, -1, world.train_inputs.shape[1])
    centres = normalize(inputs.mean(dim=1), dim=1)
    nearest = (normalize(world.test_inputs, dim=1) @ centres.T).argmax(dim=1)
    return (nearest == world.test_labels).float().mean().item()


def test_class_shapes_and_labels():
    world = make_class_world(5, 4, 3, dim=7)
    assert world.train_inputs.shape == (20, 7)
    assert world.test_inputs.shape == (15, 7)
    assert world.train_inputs.dtype == torch.float32
    assert world.train_labels.dtype == torch.int64
    assert torch.equal(torch.bincount(world.train_labels), torch.full((5,), 4))
    assert torch.equal(torch.bincount(world.test_labels), torch.full((5,), 3))
    assert 0.5 < make_class_world().train_inputs.std() < 2


def test_the_seed_fixes_the_classes():
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


def recall(queries, gallery):
    owners = torch.arange(len(gallery)).repeat_interleave(len(queries) // len(gallery))
    return recall_at_k(queries, gallery, [[int(owner)] for owner in owners], (1,))[1]


def test_vector_shapes_unit_rows_and_captions_of_every_image():
    world = make_vector_world(*WORLDS["much better"], n_corpus=30, n_support=4, n_test=6)
    assert world.corpus_new.shape == (30, 64)
    assert world.corpus_old.shape == (30, 48)
    assert world.test["old_texts"].shape == (30, 48)
    assert world.support["new_images"].shape == (4, 64)
    assert torch.equal(torch.bincount(world.test["image_of_text"]), torch.full((6,), 5))
    for rows in (world.corpus_new, world.test["old_images"], world.support["new_texts"]):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_the_seed_fixes_the_vectors_and_the_corpus_is_apart():
    small, large, other = (
        make_vector_world(*WORLDS["no better"], n_corpus=count, n_support=3, n_test=3, seed=seed)
        for count, seed in ((10, 1), (20, 1), (10, 2))
    )
    assert torch.equal(small.test["new_texts"], large.test["new_texts"])
    assert not torch.equal(small.test["new_texts"], other.test["new_texts"])


def test_worlds_differ_as_their_names_say():
    gains = {}
    for name, models in WORLDS.items():
        test = make_vector_world(*models, n_corpus=1, n_support=1, n_test=200).test
        old = recall(test["old_texts"], test["old_images"])
        assert 0.1 < old < 0.6
        gains[name] = recall(test["new_texts"], test["new_images"]) - old
    assert gains["much better"] > gains["little better"] > gains["worse"]
    assert gains["worse"] < -0.05


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (make_class_world, {"n_classes": 0}, "n_classes is 0, but must be at least 1"),
        (make_class_world, {"train_per_class": 0}, "train_per_class is 0"),
        (make_class_world, {"test_per_class": 0}, "test_per_class is 0"),
        (make_class_world, {"dim": 0}, "dim is 0"),
        (make_class_world, {"latent_dim": 0}, "latent_dim is 0"),
        (make_class_world, {"spread": -1.0}, "spread is -1.0"),
        (make_class_world, {"noise": float("nan")}, "noise is nan"),
        (make_vector_world, {**SAME, "n_corpus": 0}, "n_corpus is 0"),
        (make_vector_world, {**SAME, "n_test": 0}, "n_test is 0"),
        (make_vector_world, {**SAME, "new": ModelQuality(reach=65)}, "the new model's reach is 65"),
    ],
)
def test_unusable_worlds_are_refused(make, options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)
