"""Merges: their contract, their calibration against scikit-learn, and ranks against brute force."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation import best_positive_ranks, recall_at_k
from xbt.index.calibration import (
    MixedScores,
    compare_merges,
    fit_kind,
    fit_merge,
    isotonic_curve,
    logistic_fit,
    mixed_ranks,
)
from xbt.index.mixed import (
    AffineMerge,
    IsotonicMerge,
    RankMerge,
    RawMerge,
    merge_from_dict,
    merge_hits,
    merge_top,
)
from xbt.index.protocol import Hits

MERGES = [
    RawMerge(),
    RankMerge(),
    AffineMerge(2.5, -0.25),
    IsotonicMerge((-0.5, 0.25, 0.5), (0.0, 0.125, 0.75), (0.0, 0.75), (0.25, 0.5)),
]


def unit_rows(n, dim, seed):
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def sample():
    """Queries and items under both models: old queries, new queries, old items, new items, positives."""
    world = make_vector_world(*WORLDS["much better"], n_corpus=1, n_support=1, n_test=60).test
    positives = [[int(row)] for row in world["image_of_text"]]
    return world["old_texts"], world["new_texts"], world["old_images"], world["new_images"], positives


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.kind)
def test_is_strictly_increasing_and_survives_json(merge):
    assert merge_from_dict(json.loads(json.dumps(merge.to_dict()))) == merge
    scores = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    scores = np.unique(np.concatenate([scores, np.nextafter(scores, np.float32(2))]))
    scores = scores[np.append(True, np.diff(scores) >= 1e-9)]
    for part in ("old", "new"):
        assert (np.diff(merge.calibrate(part, scores)) > 0).all()
        assert merge.calibrate(part, scores.reshape(-1, 1)).shape == (len(scores), 1)
    with pytest.raises(ConfigError, match="no side 'newest'"):
        merge.calibrate("newest", scores)


def test_the_values_of_every_merge():
    scores = np.array([0.0, 0.5], np.float32)
    assert AffineMerge(2, 1).calibrate("old", scores).tolist() == [0, 0.5]
    assert AffineMerge(2, 1).calibrate("new", scores).tolist() == [1, 2]
    expected = np.interp(scores, [-0.5, 0.25, 0.5], [0, 0.125, 0.75])
    np.testing.assert_allclose(MERGES[3].calibrate("old", scores), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AffineMerge(0.0, 1.0), "finite scale above 0"),
        (lambda: AffineMerge(1.0, float("nan")), "finite shift"),
        (lambda: IsotonicMerge((), (), (0.0,), (0.0,)), "old curve of an isotonic merge"),
        (lambda: IsotonicMerge((0.0,), (0.0,), (0.0, 1.0), (1.0, 0.5)), "new curve of an isotonic merge"),
        (lambda: merge_from_dict({"kind": "best"}), "'best' is not known; there is raw, rank, affine"),
        (lambda: merge_from_dict({"kind": "affine", "scale": 1.0}), r"has the keys \['scale', 'shift'\]"),
        (lambda: merge_from_dict({"kind": "affine", "scale": "a", "shift": 0}), "cannot be read"),
    ],
)
def test_what_is_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def sorted_scores(n, k, seed):
    return -np.sort(-np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32), axis=1)


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.kind)
@pytest.mark.parametrize(("n_old", "n_new"), [(7, 4), (0, 5), (5, 0), (1, 1)])
def test_merged_lists_keep_each_parts_order_and_are_sorted(merge, n_old, n_new):
    old, new = sorted_scores(6, n_old, 1), sorted_scores(6, n_new, 2)
    columns = merge_top(merge, old, new, n_old + n_new, (70, 40))
    for row in range(6):
        assert sorted(columns[row]) == list(range(n_old + n_new))
        assert [c for c in columns[row] if c < n_old] == list(range(n_old))
        assert [c for c in columns[row] if c >= n_old] == list(range(n_old, n_old + n_new))
    if not merge.by_rank and n_old and n_new:
        both = np.concatenate([merge.calibrate("old", old), merge.calibrate("new", new)], axis=1)
        assert (np.diff(np.take_along_axis(both, columns, axis=1), axis=1) <= 0).all()
    np.testing.assert_array_equal(merge_top(merge, old, new, 1, (70, 40)), columns[:, :1])


def test_ranks_are_interleaved_by_the_parts_sizes():
    old, new = sorted_scores(1, 6, 0), sorted_scores(1, 6, 1)
    assert merge_top(RankMerge(), old, new, 6, (50, 50)).tolist() == [[6, 0, 7, 1, 8, 2]]
    assert merge_top(RankMerge(), old, new, 6, (90, 30)).tolist() == [[0, 6, 1, 2, 3, 7]]


def test_equal_scores_put_the_new_part_first():
    same = np.array([[1.0, 1.0]], np.float32)
    assert merge_top(RawMerge(), same, same, 4, (2, 2)).tolist() == [[2, 3, 0, 1]]


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.kind)
@pytest.mark.parametrize("share", [0.0, 0.03, 0.4, 1.0])
def test_mixed_ranks_are_places_in_the_merged_list(sample, merge, share):
    old_queries, new_queries, old_items, new_items, positives = sample
    positives = [[*row, (row[0] * 7 + 3) % 60] for row in positives]
    mask = np.random.default_rng(3).random(60) < share
    ranks = mixed_ranks(old_queries, new_queries, old_items, new_items, positives, mask, merge)
    olds, news = np.flatnonzero(~mask), np.flatnonzero(mask)
    for query in range(len(positives)):
        # An oracle that merges the two sorted lists, and counts the wrong items before the first right one.
        lists, scores = [], []
        for rows, q, items in ((olds, old_queries, old_items), (news, new_queries, new_items)):
            found = (items.numpy()[rows] @ q.numpy()[query]).astype(np.float32)
            order = np.argsort(-found, kind="stable")
            lists.append(rows[order])
            scores.append(found[order][None])
        columns = merge_top(merge, *scores, 60, (len(olds), len(news)))[0]
        ids = np.concatenate(lists)[columns]
        right = np.isin(ids, positives[query])
        assert int(ranks[query]) == int(np.argmax(right)), query


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.kind)
def test_the_ends_equal_the_cells(sample, merge):
    old_queries, new_queries, old_items, new_items, positives = sample
    scores = MixedScores(*sample)
    for mask, queries, items in (
        (np.zeros(60, bool), old_queries, old_items),
        (np.ones(60, bool), new_queries, new_items),
    ):
        expected = best_positive_ranks(queries, items, positives)
        assert torch.equal(mixed_ranks(*sample, mask, merge), expected)
        ranks = scores.ranks(mask, merge)
        recall = recall_at_k(queries, items, positives)
        assert {k: float((ranks < k).double().mean()) for k in recall} == recall


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.kind)
def test_ties_count_against_us(merge):
    ones = np.ones((6, 4), np.float32) / 2
    mask = np.array([True, True, True, False, False, False])
    ranks = mixed_ranks(ones[:2], ones[:2], ones, ones, [[0], [5]], mask, merge)
    # Each item is last of its own part; how the two parts compare is the merge's affair.
    assert (ranks >= 2).all()
    if merge.kind in ("raw", "rank"):
        assert ranks[1] == 5


def test_queries_are_taken_in_pieces(sample, monkeypatch):
    mask = np.arange(60) % 3 == 0
    whole = mixed_ranks(*sample, mask, AffineMerge(1.5, 0.1))
    monkeypatch.setattr("xbt.index.calibration.QUERIES_AT_ONCE", 60 * 7)
    assert torch.equal(mixed_ranks(*sample, mask, AffineMerge(1.5, 0.1)), whole)


def test_what_mixed_ranks_refuses(sample):
    old_queries, new_queries, old_items, new_items, positives = sample
    mask = np.zeros(60, bool)
    with pytest.raises(DataError, match="one boolean per item, 60"):
        mixed_ranks(*sample, np.zeros(60), RawMerge())
    with pytest.raises(DataError, match="300 queries in the old space and 299 in the new one"):
        mixed_ranks(old_queries, new_queries[1:], old_items, new_items, positives, mask, RawMerge())
    with pytest.raises(DataError, match="60 items in the old space and 59 in the new one"):
        mixed_ranks(old_queries, new_queries, old_items, new_items[1:], positives, mask, RawMerge())
    with pytest.raises(SpaceMismatchError, match="old queries have dimension 64"):
        MixedScores(new_queries, new_queries, old_items, new_items, positives)


def answers(n, seed):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(n).astype(np.float32).round(2)
    return scores, rng.random(n) < 1 / (1 + np.exp(-(3 * scores - 2)))


@pytest.mark.parametrize("seed", range(4))
def test_isotonic_curve_equals_scikit_learn(seed):
    scores, relevant = answers(3000, seed)
    knots, values = isotonic_curve(scores, relevant)
    model = IsotonicRegression(out_of_bounds="clip").fit(scores.astype(np.float64), relevant.astype(float))
    where = np.linspace(-4, 4, 1001)
    np.testing.assert_allclose(np.interp(where, knots, values), model.predict(where), atol=1e-9)
    assert (np.diff(knots) > 0).all()
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_logistic_fit_equals_scikit_learn(seed):
    scores, relevant = answers(4000, seed)
    model = LogisticRegression(C=1e6, tol=1e-10, max_iter=1000).fit(scores[:, None] * 0.1 + 5, relevant)
    slope, offset = logistic_fit(scores * 0.1 + 5, relevant)
    assert slope == pytest.approx(model.coef_[0, 0], rel=1e-3)
    assert offset == pytest.approx(model.intercept_[0], rel=1e-3)


def test_separated_scores_have_a_finite_slope():
    slope, offset = logistic_fit(np.array([0.1, 0.2, 0.8, 0.9], np.float32), np.array([0, 0, 1, 1], bool))
    assert np.isfinite([slope, offset]).all()
    assert slope > 0


def test_affine_puts_a_rescaled_part_back_on_the_scale(sample):
    """The new part is the old one at another scale: the merge that is fitted undoes it."""
    old_queries, _, old_items, _, positives = sample
    stretched = torch.cat([0.4 * old_items, torch.full((60, 1), 0.3)], dim=1)
    queries = torch.cat([old_queries, torch.ones(len(old_queries), 1)], dim=1)
    merge = fit_merge(old_queries, queries, old_items, stretched, positives, kinds=["affine"])
    assert merge.scale == pytest.approx(2.5, rel=1e-3)
    assert merge.shift == pytest.approx(-0.75, rel=1e-2)


def test_the_kind_is_chosen_on_held_out_queries(sample):
    old_queries, new_queries, old_items, new_items, positives = sample
    # New scores are shifted down by so much that raw scores never find a backfilled item.
    low_items = torch.cat([0.1 * new_items, torch.full((60, 1), -0.8)], dim=1)
    low_queries = torch.cat([new_queries, torch.ones(len(new_queries), 1)], dim=1)
    shifted = (old_queries, low_queries, old_items, low_items, positives)
    found = compare_merges(MixedScores(*shifted))
    assert found["affine"] > found["rank"] > 0
    assert found["affine"] > found["raw"] + 0.1
    merge = fit_merge(*shifted)
    assert merge.kind == max(found, key=found.get)
    assert merge == fit_merge(*shifted), "the same sample gives the same merge"


def test_what_fitting_refuses(sample):
    with pytest.raises(ConfigError, match="kinds of merge are raw, rank"):
        fit_merge(*sample, kinds=["best"])
    with pytest.raises(DataError, match=r"about 60 items, but .* takes at least 61; give more pairs"):
        fit_merge(*sample, folds=61)
    with pytest.raises(ConfigError, match="folds is 1, but must be at least 2"):
        fit_merge(*sample, folds=1)
    with pytest.raises(ConfigError, match="fractions are"):
        fit_merge(*sample, fractions=[0.0])
    with pytest.raises(DataError, match="7 groups for 300 queries"):
        fit_merge(*sample, groups=torch.arange(7))
    with pytest.raises(ConfigError, match="'best' is not known"):
        fit_kind("best", MixedScores(*sample))
    everything = MixedScores(*sample[:4], [list(range(60))] * 300)
    with pytest.raises(DataError, match="every item answers every query"):
        fit_kind("affine", everything)


def hits_of(*lines):
    """Results of several queries, each given as ids by scores."""
    width = max(map(len, lines))
    scores = np.full((len(lines), width), -np.inf, np.float32)
    for row, line in enumerate(lines):
        scores[row, : len(line)] = list(line.values())
    return Hits([list(line) for line in lines], scores)


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.kind)
def test_results_of_unequal_length_are_merged_query_by_query(merge):
    old = [{"a": 0.9, "b": 0.5, "c": 0.1}, {"a": 0.3}, {}, {"d": 0.25, "a": 0.2}]
    new = [{"x": 0.7}, {"x": 0.7, "y": 0.4}, {"z": 0.1}, {}]
    together = merge_hits(merge, hits_of(*old), hits_of(*new), 3, (50, 20))
    assert [len(ids) for ids in together.ids] == [3, 3, 1, 2]
    assert together.scores.shape == (4, 3)
    for row in range(4):
        alone = merge_hits(merge, hits_of(old[row]), hits_of(new[row]), 3, (50, 20))
        assert together.ids[row] == alone.ids[0]
        np.testing.assert_array_equal(together.scores[row, : len(alone.ids[0])], alone.scores[0])
    assert together.ids[2:] == [["z"], ["d", "a"]]
    np.testing.assert_allclose(together.scores[3, :2], [0.25, 0.2])  # one side alone: its own scores
    assert np.isneginf(together.scores[2, 1:]).all()


def test_a_row_of_both_sides_counts_as_new():
    old, new = hits_of({"a": 0.9, "b": 0.5}, {"c": 0.9}), hits_of({"b": 0.6, "a": 0.1}, {"d": 0.2})
    found = merge_hits(RawMerge(), old, new, 4, (2, 2))
    assert found.ids == [["b", "a"], ["c", "d"]]
    np.testing.assert_allclose(found.scores, [[0.6, 0.1], [0.9, 0.2]])
    assert merge_hits(RawMerge(), hits_of({}), hits_of({}), 4, (2, 2)).ids == [[]]
