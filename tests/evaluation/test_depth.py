"""Recall of a cascade against its depth, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation import DepthCurve, DepthPoint, Interval, best_positive_ranks, depth_curve


def rows(count, dim, seed, ties=False):
    draw = np.random.default_rng(seed)
    values = draw.integers(-2, 3, (count, dim)) if ties else draw.standard_normal((count, dim))
    return values.astype(np.float32)


def world(ties=False, n=40, m=60):
    draw = np.random.default_rng(9)
    positives = [draw.choice(m, draw.integers(1, 4), replace=False).tolist() for _ in range(n)]
    return rows(n, 4, 1, ties), rows(n, 5, 2, ties), rows(m, 4, 3, ties), rows(m, 5, 4, ties), positives


def rank(old, new, own, depth):
    """The place of the best positive: wrong items come first among equals."""
    first = sorted(range(len(old)), key=lambda row: (-old[row], row in own))
    head = sorted(first[:depth], key=lambda row: (-new[row], row in own))
    return next(place for place, row in enumerate(head + first[depth:]) if row in own)


@pytest.mark.parametrize("ties", [False, True])
def test_recall_at_every_depth_is_that_of_plain_loops(ties):
    old_queries, new_queries, old, new, positives = world(ties)
    depths, ks = [1, 3, 10, 60], (1, 2, 5)
    curve = depth_curve(old_queries, new_queries, old, new, positives, depths=[*depths, 500], ks=ks)
    assert [point.depth for point in curve.points] == depths
    alone = best_positive_ranks(new_queries, new, positives)
    for point in curve.points:
        ranks = np.array([
            rank(old @ old_queries[query], new @ new_queries[query], set(own), point.depth)
            for query, own in enumerate(positives)
        ])  # fmt: skip
        for k in ks:
            assert point.recall[k].estimate == np.mean(ranks < k)
            expected = float((alone < k).double().mean()) - np.mean(ranks < k)
            assert point.loss[k].estimate == pytest.approx(expected, abs=1e-12)
            assert point.loss[k].low <= point.loss[k].estimate <= point.loss[k].high
    assert curve.points[-1].recall == curve.new
    assert curve.points[-1].loss[1] == Interval(0.0, 0.0, 0.0)
    assert curve.points[0].recall[1] == curve.first[1]
    assert curve.size == 60


def test_blocks_of_queries_change_nothing(monkeypatch):
    parts = world()
    whole = depth_curve(*parts, groups=torch.arange(40) // 2)
    monkeypatch.setattr("xbt.evaluation.depth.SCORE_BYTES", 8 * 60 * 7)
    assert depth_curve(*parts, groups=torch.arange(40) // 2) == whole


def curve_of(losses):
    flat = {1: Interval(0.5, 0.4, 0.6)}
    points = tuple(DepthPoint(d, flat, {1: Interval(loss, -1, 1)}) for d, loss in losses.items())
    return DepthCurve(points, flat, flat, 100)


def test_the_recommended_depth_is_the_first_of_all_that_are_enough():
    curve = curve_of({1: 0.1, 5: 0.004, 10: 0.02, 20: 0.005, 50: -0.01})
    assert curve.recommended() == 20
    assert curve.recommended(0.02) == 5
    assert curve_of({1: 0.1}).recommended() is None
    text = str(curve)
    assert "recommended depth: 20" in text
    assert len(text.splitlines()) == 9
    assert curve.to_dict()["recommended"] == 20


def test_wrong_arguments():
    old_queries, new_queries, old, new, positives = world()
    for depths in ([], [0, 5]):
        with pytest.raises(ConfigError, match="depths"):
            depth_curve(old_queries, new_queries, old, new, positives, depths=depths)
    with pytest.raises(DataError, match="40 queries in the old space and 39 in the new"):
        depth_curve(old_queries, new_queries[:39], old, new, positives)
    with pytest.raises(DataError, match="60 items in the old space and 59 in the new"):
        depth_curve(old_queries, new_queries, old, new[:59], positives)
    with pytest.raises(SpaceMismatchError):
        depth_curve(new_queries, new_queries, old, new, positives)
