"""Measured curves, compared with the exact ones."""

from __future__ import annotations

import numpy as np
import torch
from backfills import COUNT, SCENES, order_of, others, scenes

from xbt.backfill import load_merge, run_backfill
from xbt.backfill.curve import CurvePoint, gain_at, ranks_in, stopping_point, stopping_position
from xbt.index import Hits
from xbt.index.calibration import MixedScores


def point(position, hits):
    return CurvePoint(position, 0.0, {1: 0.0}, 0.0, (0.0, 0.0), 0.0, tuple(hits))


def test_points_are_read_back():
    made = CurvePoint(20, 0.25, {1: 0.5, 5: 0.5, 10: 1.0}, 2 / 3, (0.1, 0.9), 12.5, (3, 1))
    assert made.to_dict()["hits"] == "31"
    assert CurvePoint.from_dict(made.to_dict()) == made


def test_a_gain_is_that_of_a_thousand_items_or_more():
    groups = torch.arange(4)
    points = [point(0, [0, 0, 0, 0]), point(400, [3, 0, 0, 0]), point(1000, [3, 3, 0, 0]),
              point(1400, [3, 3, 3, 0]), point(1450, [3, 3, 3, 3])]  # fmt: skip
    assert [gain_at(points, number, groups) for number in range(2)] == [None, None]
    assert gain_at(points, 2, groups)[:2] == (1000, 0.5)
    assert gain_at(points, 3, groups)[:2] == (1000, 0.5)  # since 400
    assert gain_at(points, 4, groups)[:2] == (1050, 0.75)
    assert stopping_position(points, groups) is None
    flat = [*points, point(2450, [3, 3, 3, 3])]
    assert gain_at(flat, 5, groups).pays is False
    assert stopping_position(flat, groups) == 1450


def test_the_stopping_position_is_the_stopping_point(config, gallery, old, new, old_vectors, new_vectors,
                                                     monkeypatch, tmp_path):  # fmt: skip
    monkeypatch.setattr("xbt.backfill.curve.NEXT", 20)
    result = run_backfill(config(evaluation=scenes(), support=others()))
    queries = old.encode_texts(SCENES.texts), new.encode_texts(SCENES.texts)
    scores = MixedScores(*queries, old_vectors, new_vectors, SCENES.positives_t2i)
    order = torch.tensor([SCENES.ids.index(name) for name in order_of(tmp_path / "out")])
    groups = torch.tensor(SCENES.text_image)
    expected = stopping_point(scores, order, load_merge(gallery), step=20, groups=groups)
    found = COUNT if result.stopping_position is None else result.stopping_position
    assert found == expected.items


def test_ties_count_against_us():
    ids = [["a", "b", "c"], ["a", "b", "c"], ["a", "b", "c"], ["a"]]
    scores = np.array([[3, 2, 1], [2, 2, 1], [2, 2, 1]], dtype=np.float32)
    found = Hits(ids[:3], scores)
    assert ranks_in(found, ["b", "a", "x"]) == [1, 1, 10]
    assert ranks_in(Hits(ids[3:], scores[:1, :1]), ["x"]) == [10]
