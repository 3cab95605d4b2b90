"""Scores on the old scale, against direct counts of results and matches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.errors import ConfigError, DataError
from xbt.projections import ScoreScale, fit_score_scale


def world(seed=0, n=400):
    """Scores of n queries and n items under an old model and a better one on another scale."""
    rng = np.random.default_rng(seed)
    matches = np.eye(n, dtype=bool)
    old = rng.normal(0.2, 0.03, (n, n)) + 0.12 * matches
    new = 3 * (rng.normal(0.1, 0.03, (n, n)) + 0.16 * matches)
    return old, new, matches


def precision(scores, threshold, matches):
    return matches[scores >= threshold].mean()


def test_precision_at_old_thresholds_is_kept_on_fresh_queries():
    scale = fit_score_scale(*world(0, 1000))
    old, new, matches = world(1, 1000)
    for threshold in (0.29, 0.31, 0.33):
        before = precision(old, threshold, matches)
        assert 0.3 < before < 1
        assert precision(scale(new), threshold, matches) == pytest.approx(before, abs=0.03)
        assert precision(new, threshold, matches) < before - 0.2
        assert precision(new, scale.new_threshold(threshold), matches) == pytest.approx(before, abs=0.03)


def test_checks_say_what_was_measured():
    old, new, matches = world()
    scale = fit_score_scale(old, torch.from_numpy(new), matches, groups=np.arange(400) // 2)
    assert [check.level for check in scale.checks] == [0.5, 0.8, 0.95]
    for check in scale.checks:
        assert check.old_precision == pytest.approx(precision(old, check.threshold, matches))
        assert check.old_precision >= check.level
        assert check.old_results == (old >= check.threshold).sum()
        assert check.unscaled_precision == pytest.approx(precision(new, check.threshold, matches))
        assert check.new_results > check.old_results  # the new model is better
    assert scale.error == max(abs(check.new_precision - check.old_precision) for check in scale.checks)
    assert scale.error < 0.03
    assert "50 % precision" in str(scale.checks[0])


def test_no_rank_changes():
    scale = fit_score_scale(*world())
    scores = np.linspace(-5, 5, 10_001)
    assert (np.diff(scale(scores)) > 0).all()
    assert scale(np.array([[0.3, -np.inf]])).shape == (1, 2)
    assert scale(np.array(-np.inf)) == -np.inf
    assert scale.new_threshold(float(scale(0.37))) == pytest.approx(0.37, abs=1e-6)


def test_equal_models_keep_their_scores():
    old, _, matches = world()
    scale = fit_score_scale(old, old, matches)
    high = np.sort(old, axis=None)[-400:]
    np.testing.assert_allclose(scale(high), high, atol=0.01)


def test_without_matches_the_number_of_results_is_kept():
    old, new, _ = world()
    scale = fit_score_scale(old, new, None)
    assert scale.checks == ()
    assert scale.error is None
    for threshold in (0.2, 0.25, 0.3):
        count = (old >= threshold).sum()
        assert (scale(new) >= threshold).sum() == pytest.approx(count, rel=0.05)


def test_a_scale_survives_json():
    scale = fit_score_scale(*world())
    assert ScoreScale.from_dict(scale.to_dict()) == scale
    with pytest.raises(ConfigError, match="a score scale cannot be made from this: KeyError"):
        ScoreScale.from_dict({"new_scores": [0, 1]})
    with pytest.raises(ConfigError, match="strictly increasing"):
        ScoreScale.from_dict({"new_scores": [0, 1], "old_scores": [1, 1], "checks": []})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda old, new, matches: (old[:, 1:], new, matches), DataError, r"one shape .* got \(400, 399\)"),
        (lambda old, new, matches: (old, new * np.nan, matches), DataError, "new scores of query 0 are NaN"),
        (lambda old, new, matches: (old * 0, new, matches), DataError, "all 160000 old scores are equal"),
        (lambda old, new, matches: (old, new, matches & False), DataError, "no item matches any query"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        fit_score_scale(*change(*world()))


def test_folds_and_groups_are_checked():
    with pytest.raises(ConfigError, match="folds is 5, but must lie between 2 and the 4 groups"):
        fit_score_scale(*world(), groups=np.arange(400) % 4)
    with pytest.raises(DataError, match=r"groups has the shape \(3,\) for 400 queries"):
        fit_score_scale(*world(), groups=[0, 1, 2])
