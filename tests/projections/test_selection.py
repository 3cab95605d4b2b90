"""Choosing by recall, and judging the choice by queries that had no say in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.projections.selection import Choice, Contender, choose, fold_of_groups, honest_ranks, judge

KS = (1, 5)
QUERIES = 400


def ranks(hits_at_1, seed=0, exact=True):
    """Ranks of which a share hits at 1, a tenth more at 5; or hits with that probability."""
    rng = np.random.default_rng(seed)
    draws = (rng.permutation(QUERIES) + 0.5) / QUERIES if exact else rng.random(QUERIES)
    return torch.from_numpy(np.where(draws < hits_at_1, 0, np.where(draws < hits_at_1 + 0.1, 3, 9)))


def contender(name, **settings):
    return Contender(name, {"T2I": settings})


GROUPS = {"T2I": torch.arange(QUERIES) // 2}
OLD = {"T2I": ranks(0.3)}


def test_the_highest_mean_wins_and_ties_go_to_the_first():
    same = ranks(0.6, 1)
    contenders = [contender("a", x=ranks(0.4, 2)), contender("b", y=same, z=same), contender("c", z=same)]
    assert choose(contenders, OLD, KS, GROUPS) == Choice("b", {"T2I": "y"})


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
    assert choose(contenders, OLD, KS, GROUPS, first).contender == "b"
    rest = {"T2I": ~first["T2I"]}
    assert choose(contenders, OLD, KS, GROUPS, rest).contender == "a"


def test_honest_ranks_do_not_flatter_chance():
    """Many contenders without any gain: the best looks better than the old one, the honest ranks do not."""
    noise = [contender(f"n{seed}", x=ranks(0.3, 100 + seed, False)) for seed in range(60)]
    best = choose(noise, OLD, KS, GROUPS)
    flattering = next(each for each in noise if each.name == best.contender).ranks["T2I"]["x"]
    honest = honest_ranks(noise, OLD, KS, GROUPS)["T2I"]
    shares = [float((each < 1).double().mean()) for each in (flattering, honest)]
    assert shares[0] > 0.34
    assert shares[1] < 0.33
    assert not judge("T2I", honest, OLD["T2I"], KS, GROUPS["T2I"]).met
    assert judge("T2I", flattering, OLD["T2I"], KS, GROUPS["T2I"]).met, "which is what nesting is for"


def test_honest_ranks_are_those_of_the_other_folds_choice():
    """Fold by fold by hand."""
    contenders = [contender("a", x=ranks(0.45, 6)), contender("b", x=ranks(0.45, 7), y=ranks(0.45, 8))]
    found = honest_ranks(contenders, OLD, KS, GROUPS, folds=4, seed=9)["T2I"]
    fold_of = torch.from_numpy(fold_of_groups(QUERIES // 2, 4, 9))[GROUPS["T2I"]]
    for fold in range(4):
        own = fold_of == fold
        choice = choose(contenders, OLD, KS, GROUPS, {"T2I": ~own})
        source = next(each for each in contenders if each.name == choice.contender)
        assert torch.equal(found[own], source.ranks["T2I"][choice.settings["T2I"]][own])


def test_folds_hold_whole_groups_of_even_sizes():
    folds = fold_of_groups(103, 5, 0)
    assert sorted(np.bincount(folds)) == [20, 20, 21, 21, 21]
    assert not np.array_equal(folds, fold_of_groups(103, 5, 1))


def test_a_clear_gain_is_met_and_says_so():
    found = judge("T2I", ranks(0.5, 1), OLD["T2I"], KS, GROUPS["T2I"])
    assert found.met
    assert "with 95 % confidence" in found.why
    assert found.pooled.low > 0
    assert found.recall[1] - found.old_recall[1] == pytest.approx(found.differences[1].gain.estimate)


def test_no_gain_is_not_met():
    found = judge("T2I", ranks(0.31, 1), OLD["T2I"], KS, GROUPS["T2I"])
    assert not found.met
    assert "does not exclude a loss" in found.why


def test_a_gain_on_average_with_a_loss_at_one_k_is_not_met():
    hits = np.random.default_rng(3).random(QUERIES)
    trade = torch.from_numpy(np.where(hits < 0.2, 0, np.where(hits < 0.95, 3, 9)))
    found = judge("T2I", trade, OLD["T2I"], KS, GROUPS["T2I"])
    assert found.pooled.low > 0
    assert not found.met
    assert "a loss at R@1" in found.why


def test_error_rate_where_nothing_is_gained():
    """Two models of the same quality: at most 5 % of the judgements may say otherwise (300 trials)."""
    met = 0
    for seed in range(300):
        old, new = (ranks(0.3, start + seed, False) for start in (1000, 5000))
        met += judge("T2I", new, old, KS, torch.arange(QUERIES), seed=seed).met
    assert met <= 25
    assert met > 0, "a test that never errs is not one of 95 % confidence"
