"""Choosing by recall, and judging the choice by queries that had no say in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.evaluation import bootstrap_interval, hits_at
from xbt.evaluation.bootstrap import cautious_interval
from xbt.projections import PairVectors
from xbt.projections.auto.selection import (
    CandidateRanks,
    Selection,
    best_by_texts,
    choose,
    out_of_fold_ranks,
    run_gain_test,
)
from xbt.projections.near_duplicates import fold_of_clusters

KS = (1, 5)
QUERIES = 400


def ranks(hits_at_1, seed=0, exact=True):
    """Ranks of which a share hits at 1, a tenth more at 5; or hits with that probability."""
    rng = np.random.default_rng(seed)
    draws = (rng.permutation(QUERIES) + 0.5) / QUERIES if exact else rng.random(QUERIES)
    return torch.from_numpy(np.where(draws < hits_at_1, 0, np.where(draws < hits_at_1 + 0.1, 3, 9)))


def contender(name, **settings):
    return CandidateRanks(name, {"T2I": settings})


GROUPS = {"T2I": torch.arange(QUERIES) // 2}
FOLD_OF = fold_of_clusters(np.arange(QUERIES // 2), 5, 0)
OLD = {"T2I": ranks(0.3)}


def test_the_highest_mean_wins_and_ties_go_to_the_first():
    same = ranks(0.6, 1)
    contenders = [contender("a", x=ranks(0.4, 2)), contender("b", y=same, z=same), contender("c", z=same)]
    assert choose(contenders, OLD, KS, GROUPS) == Selection("b", {"T2I": "y"})


def test_a_high_mean_that_loses_at_one_k_is_not_eligible():
    """It gains more at 5 than it loses at 1."""
    hits = np.random.default_rng(3).random(QUERIES)
    trade = torch.from_numpy(np.where(hits < 0.2, 0, np.where(hits < 0.95, 3, 9)))
    both = ranks(0.4, 4)
    assert choose([contender("a", trade=trade, both=both)], OLD, KS, GROUPS).settings["T2I"] == "both"
    assert choose([contender("a", trade=trade)], OLD, KS, GROUPS).settings["T2I"] == "trade"


def test_only_the_rows_that_count_are_looked_at():
    good = torch.where(torch.arange(QUERIES) < 100, 0, 9)
    contenders = [contender("a", x=ranks(0.35, 5)), contender("b", x=good)]
    first = {"T2I": torch.arange(QUERIES) < 100}
    assert choose(contenders, OLD, KS, GROUPS, first).candidate == "b"
    rest = {"T2I": ~first["T2I"]}
    assert choose(contenders, OLD, KS, GROUPS, rest).candidate == "a"


def test_honest_ranks_do_not_flatter_chance():
    """Many contenders without any gain: the best looks better than the old one, the honest ranks do not."""
    noise = [contender(f"n{seed}", x=ranks(0.3, 100 + seed, False)) for seed in range(60)]
    best = choose(noise, OLD, KS, GROUPS)
    flattering = next(each for each in noise if each.name == best.candidate).ranks["T2I"]["x"]
    honest = out_of_fold_ranks(noise, OLD, KS, GROUPS, FOLD_OF)["T2I"]
    shares = [float((each < 1).double().mean()) for each in (flattering, honest)]
    assert shares[0] > 0.34
    assert shares[1] < 0.33
    assert not run_gain_test("T2I", honest, OLD["T2I"], KS, GROUPS["T2I"]).met
    assert run_gain_test("T2I", flattering, OLD["T2I"], KS, GROUPS["T2I"]).met, "which is what nesting is for"


def test_honest_ranks_are_those_of_the_other_folds_choice():
    """Fold by fold by hand."""
    contenders = [contender("a", x=ranks(0.45, 6)), contender("b", x=ranks(0.45, 7), y=ranks(0.45, 8))]
    fold_of_group = fold_of_clusters(np.arange(QUERIES // 2), 4, 9)
    found = out_of_fold_ranks(contenders, OLD, KS, GROUPS, fold_of_group)["T2I"]
    fold_of = torch.from_numpy(fold_of_group)[GROUPS["T2I"]]
    for fold in range(4):
        own = fold_of == fold
        choice = choose(contenders, OLD, KS, GROUPS, {"T2I": ~own})
        source = next(each for each in contenders if each.name == choice.candidate)
        assert torch.equal(found[own], source.ranks["T2I"][choice.settings["T2I"]][own])


def test_folds_hold_whole_groups_of_even_sizes():
    folds = fold_of_clusters(np.arange(103), 5, 0)
    assert sorted(np.bincount(folds)) == [20, 20, 21, 21, 21]
    assert not np.array_equal(folds, fold_of_clusters(np.arange(103), 5, 1))


def test_without_duplicates_folds_are_those_of_the_pairs():
    rows = torch.nn.functional.normalize(torch.randn(23, 4), dim=1)
    pairs = PairVectors(rows, rows, rows, torch.arange(23))
    folds = fold_of_clusters(np.arange(23), 5, 7)
    for fold, (_, held) in enumerate(pairs.folds(5, 7)):
        assert torch.equal(pairs.subset(np.flatnonzero(folds == fold)).old_images, held.old_images)


def test_folds_hold_whole_clusters():
    clusters = np.arange(100)
    clusters[50:] = clusters[:50]
    clusters[:5] = clusters[50:55] = 0
    folds = fold_of_clusters(clusters, 5, 0)
    assert np.array_equal(folds, folds[clusters])
    assert sorted(np.bincount(folds[np.unique(clusters)])) == [9, 9, 9, 9, 10]


def test_a_clear_gain_is_met_and_says_so():
    found = run_gain_test("T2I", ranks(0.5, 1), OLD["T2I"], KS, GROUPS["T2I"])
    assert found.met
    assert "with 95 % confidence" in found.why
    assert found.pooled.low > 0
    assert found.recall[1] - found.old_recall[1] == pytest.approx(found.differences[1].gain.estimate)


def test_no_gain_is_not_met():
    found = run_gain_test("T2I", ranks(0.31, 1), OLD["T2I"], KS, GROUPS["T2I"])
    assert not found.met
    assert "does not exclude a loss" in found.why


def test_a_gain_on_average_with_a_loss_at_one_k_is_not_met():
    hits = np.random.default_rng(3).random(QUERIES)
    trade = torch.from_numpy(np.where(hits < 0.2, 0, np.where(hits < 0.95, 3, 9)))
    found = run_gain_test("T2I", trade, OLD["T2I"], KS, GROUPS["T2I"])
    assert found.pooled.low > 0
    assert not found.met
    assert "a loss at R@1" in found.why


def perhaps_losing_at_1(seed, queries=300):
    """New ranks that truly lose a point at R@1 and gain at R@5 and R@10, beside the old ones."""
    rng = np.random.default_rng(seed)
    old = np.where(rng.random(queries) < 0.3, 0, np.where(rng.random(queries) < 0.35, 3, 50))
    new, flip = old.copy(), rng.random(queries)
    new[(old == 0) & (flip < 0.06 / 0.3)] = 3
    new[(old == 3) & (flip < 0.05 / 0.245)] = 0
    new[(old == 50) & (rng.random(queries) < 0.12)] = 3
    return torch.from_numpy(new), torch.from_numpy(old)


def test_every_k_is_asked_for_on_request():
    """A true loss of one point at R@1 beside gains passes on average, mostly, and hardly ever at every k."""
    met, why = {False: 0, True: 0}, []
    for seed in range(12):
        new, old = perhaps_losing_at_1(seed)
        for every_k in met:
            found = run_gain_test("T2I", new, old, (1, 5, 10), torch.arange(300), every_k=every_k)
            met[every_k] += found.met
            why.append(found.why)
    assert met[False] >= 6, "which is why docstrings promise nothing of a single k"
    assert met[True] == 0
    assert any("but that does not exclude a loss at R@1" in each for each in why)
    gains = run_gain_test("T2I", ranks(0.5, 1), OLD["T2I"], KS, GROUPS["T2I"], every_k=True)
    assert gains.met
    assert all(each.gain.low > 0 for each in gains.differences.values())


def without_gain(seed, images, texts):
    """Ranks of two queries of the same quality that differ in half of the cases."""
    rng = np.random.default_rng(seed)
    shape = images * texts
    old, other = (torch.from_numpy(np.exp(rng.normal(2.0, 1.6, shape)).astype(np.int64)) for _ in range(2))
    new = torch.where(torch.from_numpy(rng.random(shape) < 0.5), other, old)
    return new, old, torch.arange(images).repeat_interleave(texts)


def test_error_rate_with_few_images():
    """Few images must not pass for many: 5 % of the trials may say that there is a gain where there is none.

    In 2,000 trials of :func:`without_gain`, of 20 images with 1 and with 5 texts and of 50 with 1, the
    percentile bootstrap said so in 6.0, 6.1 and 5.4 %; what is judged by now in 4.8, 4.8 and 4.8 %.
    """
    met = {bootstrap_interval: 0, cautious_interval: 0}
    for seed in range(500):
        new, old, owner = without_gain(seed, 20, 5)
        change = (hits_at(new, (1, 5, 10)).double() - hits_at(old, (1, 5, 10)).double()).mean(dim=1)
        for interval in met:
            met[interval] += interval(change, owner, 0.9, samples=400).low > 0
    assert met[cautious_interval] < met[bootstrap_interval]
    assert 0.02 < met[cautious_interval] / 500 < 0.06


def test_text_retrieval_keeps_what_is_first_unless_a_gain_is_shown():
    groups = {"T2I": torch.arange(QUERIES), "I2T": torch.arange(QUERIES)}

    def both(name, hits, seed):
        return CandidateRanks(name, {direction: {"x": ranks(hits, seed)} for direction in groups})

    first = both("first", 0.4, 2)
    noise = [both(f"noise {seed}", 0.405, 10 + seed) for seed in range(5)]
    assert best_by_texts([first, *noise], "x", KS, groups).candidate == "first"
    better = both("better", 0.55, 3)
    found = best_by_texts([first, *noise, better, both("again", 0.552, 4)], "x", KS, groups)
    assert found == Selection("better", {"T2I": "x", "I2T": "x"})


@pytest.mark.slow
def test_error_rate_where_nothing_is_gained():
    """Two models of the same quality: at most 5 % of the gain_tests may say otherwise (300 trials)."""
    met = 0
    for seed in range(300):
        old, new = (ranks(0.3, start + seed, False) for start in (1000, 5000))
        met += run_gain_test("T2I", new, old, KS, torch.arange(QUERIES), seed=seed).met
    assert met <= 25
    assert met > 0, "a test that never errs is not one of 95 % confidence"
