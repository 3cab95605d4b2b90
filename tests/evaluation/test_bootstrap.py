"""Flips and bootstrap intervals against closed forms and scipy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from xbt.errors import ConfigError, DataError
from xbt.evaluation import (
    RetrievalReport,
    bootstrap_interval,
    bootstrap_means,
    compare_ranks,
    differences,
    evaluate_cell,
    format_table,
)
from xbt.evaluation.bootstrap import cautious_interval, means_and_errors


def test_gain_is_fixed_minus_broken():
    old = torch.tensor([0, 3, 0, 7, 1, 0])
    new = torch.tensor([2, 0, 0, 1, 0, 9])
    at_1 = compare_ranks(new, old, 1)
    assert (at_1.fixed, at_1.broken) == (2 / 6, 2 / 6)
    assert at_1.gain.estimate == 0
    at_2 = compare_ranks(new, old, 2)
    assert (at_2.fixed, at_2.broken) == (2 / 6, 2 / 6)
    generator = torch.Generator().manual_seed(1)
    for k in (1, 5, 10):
        old, new = (torch.randint(0, 20, (500,), generator=generator) for _ in range(2))
        found = compare_ranks(new, old, k)
        expected = (new < k).double().mean() - (old < k).double().mean()
        assert found.gain.estimate == pytest.approx(float(expected))
        assert found.fixed - found.broken == pytest.approx(found.gain.estimate)


def test_interval_agrees_with_scipys_bootstrap():
    values = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 0, 1], 400, p=[0.1, 0.7, 0.2]))
    ours = bootstrap_interval(values, samples=20_000)
    theirs = stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.003)
    assert ours.high == pytest.approx(theirs.high, abs=0.003)
    assert ours.estimate == pytest.approx(float(values.mean()))


def test_queries_of_one_image_are_drawn_together():
    """Five copies of every query say no more than one: the interval must not shrink by the root of five."""
    values = torch.from_numpy(np.random.default_rng(2).choice([0.0, 1.0], 200))
    groups = torch.arange(200).repeat_interleave(5)
    spread = bootstrap_means(values, samples=4000).std()
    copies = values.repeat_interleave(5)
    assert bootstrap_means(copies, groups, 4000).std() == pytest.approx(spread, rel=0.05)
    assert bootstrap_means(copies, None, 4000).std() == pytest.approx(spread / 5**0.5, rel=0.05)


def test_unequal_groups_weigh_by_their_queries():
    values = torch.tensor([1.0, 0, 0, 0])
    means = bootstrap_means(values, torch.tensor([7, 3, 3, 3]), 4000)
    assert set(np.unique(means)) == {0.0, 0.25, 1.0}
    assert np.isclose((means == 0.25).mean(), 0.5, atol=0.03)


def test_coverage():
    rng, covered = np.random.default_rng(3), 0
    for trial in range(200):
        values = torch.from_numpy((rng.random(300) < 0.3).astype(float))
        interval = bootstrap_interval(values, confidence=0.9, samples=500, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.85 <= covered / 200 <= 0.95


def test_standard_error_agrees_with_scipy():
    values = torch.rand(80, 3, dtype=torch.float64)
    mean, error = means_and_errors(values, torch.arange(80))
    np.testing.assert_allclose(mean, values.mean(dim=0))
    np.testing.assert_allclose(error, stats.sem(values.numpy()))
    together, wider = means_and_errors(
        values.repeat_interleave(5, dim=0), torch.arange(80).repeat_interleave(5)
    )
    np.testing.assert_allclose(together, mean)
    np.testing.assert_allclose(wider, error)


def test_the_cautious_interval_is_wider_where_there_are_few_groups():
    values = torch.from_numpy(np.random.default_rng(5).choice([-1.0, 0, 1], 4000, p=[0.1, 0.7, 0.2]))
    for count, least, most in ((20, 1.05, 1.4), (300, 1.0, 1.1), (4000, 1.0, 1.05)):
        rows = values[:count]
        plain, found = bootstrap_interval(rows, confidence=0.9), cautious_interval(rows, confidence=0.9)
        assert found.estimate == plain.estimate
        assert found.low <= plain.low
        assert found.high >= plain.high
        assert least <= (found.high - found.low) / (plain.high - plain.low) <= most
        theirs = stats.ttest_1samp(rows, 0).confidence_interval(0.9)
        assert found.low <= theirs.low + 1e-4
        assert found.high >= theirs.high - 1e-4


def test_of_one_group_nothing_is_known():
    assert cautious_interval(torch.tensor([1.0, 0, 1, 1]), torch.zeros(4)) == (0.75, -1, 1)


def test_seed_fixes_the_interval():
    values = torch.rand(50)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(0)}, "one value per query"),
        ({"values": torch.tensor([0.0, float("nan")])}, "value 1 of the bootstrap"),
        ({"groups": torch.zeros(3)}, "3 groups for 2 queries"),
        ({"samples": 0}, "samples is 0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
    ],
)
def test_unusable_input_is_refused(change, message):
    with pytest.raises((DataError, ConfigError), match=message):
        bootstrap_interval(**{"values": torch.tensor([0.0, 1.0]), **change})


def test_ranks_of_other_queries_are_refused():
    with pytest.raises(DataError, match="3 new ranks and 2 old ones"):
        compare_ranks(torch.zeros(3), torch.zeros(2), 1)


def three_images_of_two_texts():
    """Old queries miss every text of image 2 at k=1; new ones repair that and break image 0's first text."""
    gallery, owners = torch.eye(3), torch.tensor([0, 0, 1, 1, 2, 2])
    old, new = gallery[owners].clone(), gallery[owners].clone()
    old[4:] = gallery[0] + 0.5 * gallery[2]
    new[0] = gallery[1]
    t2i = [[int(owner)] for owner in owners]
    i2t = [[0, 1], [2, 3], [4, 5]]
    texts = gallery[owners]
    cells = [
        evaluate_cell(name, queries, gallery, texts, gallery, t2i, i2t, (1, 2))
        for name, queries in (("old/old", old), ("new/old", new))
    ]
    return RetrievalReport(cells, {"T2I": owners, "I2T": torch.arange(3)})


def test_a_report_says_what_was_fixed_and_broken():
    report = three_images_of_two_texts()
    change = report.differences["new/old"]["T2I"]
    assert (change[1].fixed, change[1].broken) == (2 / 6, 1 / 6)
    assert (change[2].fixed, change[2].broken) == (0.0, 1 / 6)
    assert change[1].gain.estimate == pytest.approx(1 / 6)
    assert change[1].gain.low <= 0 <= change[1].gain.high
    assert all(each.gain == (0, 0, 0) for each in report.differences["new/old"]["I2T"].values())
    written = report.to_dict()["difference_to_old_old"]["new/old"]["T2I"]["R@1"]
    assert written["fixed"] == 2 / 6
    assert json.dumps(written)
    shown = format_table(report)
    assert "change to old/old (new/old): T2I +16.7 [" in shown
    assert "at R@1 (fixed 33.3, broken 16.7)" in shown


def test_cells_without_ranks_have_no_differences():
    report = three_images_of_two_texts()
    bare = [replace(cell, ranks={}) for cell in report.cells]
    assert RetrievalReport(bare).differences == {}
    assert "change to" not in format_table(RetrievalReport(bare))
    with pytest.raises(DataError, match="'new/old' has no ranks"):
        differences(bare[1], bare[0])
