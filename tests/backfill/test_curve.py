"""The backfill curve: its ends are the cells, its area FastFill's mean, and where it stops paying."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.backfill.curve import EQUALLY_SPACED, backfill_curve, stopping_point
from xbt.backfill.orders import random_order
from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.errors import ConfigError, DataError
from xbt.evaluation import recall_at_k
from xbt.index.calibration import MixedScores, fit_kind, mixed_ranks
from xbt.index.mixed import AffineMerge, RawMerge


@pytest.fixture(scope="module")
def sample():
    world = make_vector_world(*WORLDS["much better"], n_corpus=1, n_support=1, n_test=80).test
    positives = [[int(row)] for row in world["image_of_text"]]
    return world["old_texts"], world["new_texts"], world["old_images"], world["new_images"], positives


def test_ends_area_and_points(sample):
    scores, order, merge = MixedScores(*sample), random_order(80), AffineMerge(1.2, 0.05)
    curve = backfill_curve(scores, order, merge)
    assert curve.fractions == EQUALLY_SPACED
    for at, queries, items in ((0, sample[0], sample[2]), (-1, sample[1], sample[3])):
        expected = np.mean(list(recall_at_k(queries, items, sample[4]).values()))
        assert curve.recall[at] == pytest.approx(expected, abs=1e-12)
    mask = np.zeros(80, bool)
    mask[order[:28].numpy()] = True
    ranks = mixed_ranks(*sample, mask, merge)
    expected = np.mean([float((ranks < k).double().mean()) for k in (1, 5, 10)])
    assert curve.recall[7] == pytest.approx(expected, abs=1e-12)
    assert curve.area == pytest.approx(np.mean(curve.recall))
    assert curve.hits.shape == (21, 400)
    assert curve.to_dict()["area"] == curve.area


def test_a_better_model_pays_and_a_part_of_noise_does_not(sample):
    scores = MixedScores(*sample)
    merge = fit_kind("affine", scores)
    order = random_order(80)
    groups = torch.tensor([row[0] for row in sample[4]])
    point = stopping_point(scores, order, merge, step=20, groups=groups)
    assert point.items > 0
    # From item 40 on the new vectors are random, and nothing is found by them.
    noisy = sample[3].clone()
    late = order[40:]
    noisy[late] = torch.nn.functional.normalize(torch.randn(40, noisy.shape[1]), dim=1)
    spoilt = stopping_point(MixedScores(*sample[:3], noisy, sample[4]), order, merge, step=20, groups=groups)
    assert spoilt.items <= 40
    assert spoilt.gain <= spoilt.standard_error


def test_the_whole_gallery_if_every_step_pays():
    """The old model separates nothing, the new one everything."""
    eye, same = torch.eye(12), torch.ones(12, 12) / 12**0.5
    scores = MixedScores(same, eye, same, eye, [[row] for row in range(12)])
    point = stopping_point(scores, torch.arange(12), AffineMerge(2.0, 0.0), step=4)
    assert point.items == 12
    assert (point.gain, point.standard_error) == (None, None)


def test_what_is_refused(sample):
    scores = MixedScores(*sample)
    for order in (torch.arange(79), torch.zeros(80, dtype=torch.int64), torch.arange(80).float()):
        with pytest.raises(DataError, match="each of the 80 items once"):
            backfill_curve(scores, order, RawMerge())
    with pytest.raises(ConfigError, match="fractions are"):
        backfill_curve(scores, torch.arange(80), RawMerge(), fractions=[1.5])
    with pytest.raises(ConfigError, match="step is 0"):
        stopping_point(scores, torch.arange(80), RawMerge(), step=0)
