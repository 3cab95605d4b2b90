"""Ridge regression and its low-rank form against scikit-learn and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from xbt.errors import ConfigError, DataError
from xbt.projections import PairStatistics, PairVectors, fit_low_rank, fit_ridge
from xbt.projections.ridge import DEFAULT_REGULARISATION


def rows(n, dim, seed, offset=0.0):
    vectors = np.random.default_rng(seed).standard_normal((n, dim)) + offset
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def assert_like_sklearn(projection, new, old, alpha, intercept, weights=None):
    model = Ridge(alpha=alpha, fit_intercept=intercept, solver="svd" if weights is None else "auto")
    model.fit(new, old, sample_weight=weights)
    coefficients = np.reshape(model.coef_, projection.weight.shape)
    scale = np.abs(coefficients).max()
    np.testing.assert_allclose(projection.weight.detach().numpy(), coefficients, rtol=1e-6, atol=1e-6 * scale)
    if intercept:
        np.testing.assert_allclose(projection.bias.detach().numpy(), model.intercept_, rtol=1e-5, atol=1e-6)
    else:
        assert projection.bias is None


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("alpha", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize(
    ("n", "new_dim", "old_dim"), [(200, 24, 16), (200, 16, 24), (10, 24, 16), (50, 1, 3), (50, 4, 1)]
)
def test_equals_scikit_learn(n, new_dim, old_dim, alpha, intercept):
    new, old = rows(n, new_dim, 0, 0.2), rows(n, old_dim, 1, 0.1)
    projection = fit_ridge(new, old, regularisation=alpha, intercept=intercept)
    assert_like_sklearn(projection, new, old, alpha, intercept)


def test_equals_scikit_learn_without_penalty_and_with_duplicates():
    new, old = rows(200, 24, 0), rows(200, 16, 1)
    assert_like_sklearn(fit_ridge(new, old, regularisation=0.0), new, old, 0.0, False)
    new, old = np.repeat(new[:10], 9, axis=0), np.repeat(old[:10], 9, axis=0)
    assert_like_sklearn(fit_ridge(new, old, regularisation=0.01), new, old, 0.01, False)


def test_default_regularisation_is_relative():
    new, old = rows(300, 12, 0), rows(300, 8, 1)
    assert_like_sklearn(fit_ridge(new, old), new, old, DEFAULT_REGULARISATION * 300 / 12, False)
    longer = fit_ridge(5 * new, 5 * old)
    torch.testing.assert_close(longer.weight, fit_ridge(new, old).weight)


def test_pairs_are_weighted_rows():
    new, old = rows(60, 8, 0), rows(60, 6, 1)
    pairs = PairVectors(rows(20, 8, 2), rows(20, 6, 3), rows(20, 6, 4), range(20), rows(20, 8, 5))
    # (1 − ω)·mean + ω·mean, times the number of texts.
    weights = np.concatenate([np.full(60, 0.6), np.full(20, 0.4 * 60 / 20)])
    all_new = np.concatenate([new, pairs.new_images.numpy()])
    all_old = np.concatenate([old, pairs.old_images.numpy()])
    for intercept in (False, True):
        options = {"regularisation": 2.0, "intercept": intercept}
        projection = fit_ridge(new, old, pairs=pairs, pairs_weight=0.4, **options)
        assert_like_sklearn(projection, all_new, all_old, 2.0, intercept, weights)
        left_out = fit_ridge(new, old, pairs=pairs, pairs_weight=0.0, **options)
        assert torch.equal(left_out.weight, fit_ridge(new, old, **options).weight)


def test_singular_problems_without_penalty_are_refused():
    new, old = rows(10, 24, 0), rows(10, 16, 1)
    for amount in (0.0, 1e-12):
        with pytest.raises(DataError, match=r"regularisation=.*10 vectors of dimension 24.*greater"):
            fit_ridge(new, old, regularisation=amount)
    repeated = np.repeat(rows(5, 24, 0), 20, axis=0)
    with pytest.raises(DataError, match="greater regularisation"):
        fit_ridge(repeated, rows(100, 16, 1), regularisation=0.0)


def test_a_constant_side():
    constant = np.tile(rows(1, 6, 0), (30, 1))
    old = rows(30, 4, 1, 0.5)
    projection = fit_ridge(constant, old, intercept=True)
    np.testing.assert_allclose(projection.weight.detach().numpy(), 0, atol=1e-6)
    np.testing.assert_allclose(projection.bias.detach().numpy(), old.mean(0), atol=1e-6)


def test_refusals():
    new, old = rows(30, 6, 0), rows(30, 4, 1)
    for amount in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="regularisation must be a number of at least 0"):
            fit_ridge(new, old, regularisation=amount)
    with pytest.raises(ConfigError, match="without new_gram"):
        fit_ridge(PairStatistics.of(new, old), None)
    with pytest.raises(ConfigError, match="without new_sum"):
        fit_ridge(PairStatistics.of(new, old, ("cross", "new_gram")), None, intercept=True)


def plain_rows(n, dim, seed, offset=0.0):
    return np.random.default_rng(seed).standard_normal((n, dim)) + offset


def brute_force(new, old, rank, amount):
    """Least squares with the penalty as further rows, its fitted values cut to the rank by an SVD."""
    new_mean, old_mean = new.mean(0), old.mean(0)
    padded_new = np.concatenate([new - new_mean, np.sqrt(amount) * np.eye(new.shape[1])])
    padded_old = np.concatenate([old - old_mean, np.zeros((new.shape[1], old.shape[1]))])
    full = np.linalg.lstsq(padded_new, padded_old, rcond=None)[0]
    right = np.linalg.svd(padded_new @ full, full_matrices=False)[2][:rank]
    weight = (full @ right.T @ right).T
    return weight, old_mean - weight @ new_mean


@pytest.mark.parametrize("amount", [1e-3, 5.0])
@pytest.mark.parametrize(
    ("n", "new_dim", "old_dim", "rank"), [(100, 12, 8, 3), (100, 8, 12, 1), (9, 12, 8, 4)]
)
def test_equals_brute_force(n, new_dim, old_dim, rank, amount):
    new, old = plain_rows(n, new_dim, 0, 0.3), plain_rows(n, old_dim, 1, -0.2)
    old[:, :5] += new[:, :5]
    projection = fit_low_rank(new, old, rank=rank, regularisation=amount)
    weight, bias = brute_force(new, old, rank, amount)
    assert np.linalg.matrix_rank(projection.weight.detach().double().numpy(), tol=1e-5) == rank
    np.testing.assert_allclose(projection.weight.detach().numpy(), weight, atol=1e-6)
    np.testing.assert_allclose(projection.bias.detach().numpy(), bias, atol=1e-6)


def test_no_map_of_the_rank_is_better():
    new, old = plain_rows(80, 7, 0), plain_rows(80, 6, 1)
    old += new @ plain_rows(7, 6, 2)
    best = (
        fit_low_rank(new, old, rank=2, regularisation=1.0, intercept=False).weight.detach().double().numpy()
    )

    def loss(weight):
        return ((old - new @ weight.T) ** 2).sum() + (weight**2).sum()

    left, values, right = np.linalg.svd(best)
    for seed in range(30):
        a, b = (
            left[:, :2] * values[:2] + 0.05 * plain_rows(6, 2, seed),
            right[:2] + 0.05 * plain_rows(2, 7, seed + 100),
        )
        assert loss(a @ b) > loss(best)


def test_full_rank_is_ridge():
    new, old = plain_rows(80, 7, 0), plain_rows(80, 6, 1)
    for rank in (6, 64):
        low, full = fit_low_rank(new, old, rank=rank), fit_ridge(new, old, intercept=True)
        torch.testing.assert_close(low.weight, full.weight)
        torch.testing.assert_close(low.bias, full.bias)
    assert fit_low_rank(new, old, intercept=False).foldable


def test_ranks_that_are_refused():
    new, old = plain_rows(30, 6, 0), plain_rows(30, 4, 1)
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        fit_low_rank(new, old, rank=0)
    with pytest.raises(ConfigError, match="regularisation"):
        fit_low_rank(new, old, regularisation=-1.0)
