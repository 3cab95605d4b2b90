"""Synthetic vectors of two dual encoders."""

from __future__ import annotations

import pytest
import torch

from xbt.data.synthetic import WORLDS, ModelQuality, make_vector_world
from xbt.errors import ConfigError
from xbt.evaluation import recall_at_k


def recall(queries, gallery):
    owners = torch.arange(len(gallery)).repeat_interleave(len(queries) // len(gallery))
    return recall_at_k(queries, gallery, [[int(owner)] for owner in owners], (1,))[1]


def test_shapes_unit_rows_and_captions_of_every_image():
    world = make_vector_world(*WORLDS["much better"], n_corpus=30, n_support=4, n_test=6)
    assert world.corpus_new.shape == (30, 64)
    assert world.corpus_old.shape == (30, 48)
    assert world.test["old_texts"].shape == (30, 48)
    assert world.support["new_images"].shape == (4, 64)
    assert torch.equal(torch.bincount(world.test["image_of_text"]), torch.full((6,), 5))
    for rows in (world.corpus_new, world.test["old_images"], world.support["new_texts"]):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_seed_fixes_the_world_and_the_corpus_is_apart():
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
    ("options", "message"),
    [
        ({"n_corpus": 0}, "n_corpus is 0"),
        ({"n_test": 0}, "n_test is 0"),
        ({"new": ModelQuality(reach=65)}, "the new model's reach is 65"),
    ],
)
def test_unusable_worlds_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_vector_world(**{"old": ModelQuality(), "new": ModelQuality(), **options})
