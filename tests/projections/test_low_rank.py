from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.errors import ConfigError
from xbt.projections import fit_low_rank, fit_ridge


def rows(n, dim, seed, offset=0.0):
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
    new, old = rows(n, new_dim, 0, 0.3), rows(n, old_dim, 1, -0.2)
    old[:, :5] += new[:, :5]
    projection = fit_low_rank(new, old, rank=rank, regularisation=amount)
    weight, bias = brute_force(new, old, rank, amount)
    assert np.linalg.matrix_rank(projection.weight.detach().double().numpy(), tol=1e-5) == rank
    np.testing.assert_allclose(projection.weight.detach().numpy(), weight, atol=1e-6)
    np.testing.assert_allclose(projection.bias.detach().numpy(), bias, atol=1e-6)


def test_no_map_of_the_rank_is_better():
    new, old = rows(80, 7, 0), rows(80, 6, 1)
    old += new @ rows(7, 6, 2)
    best = (
        fit_low_rank(new, old, rank=2, regularisation=1.0, intercept=False).weight.detach().double().numpy()
    )

    def loss(weight):
        return ((old - new @ weight.T) ** 2).sum() + (weight**2).sum()

    left, values, right = np.linalg.svd(best)
    for seed in range(30):
        a, b = left[:, :2] * values[:2] + 0.05 * rows(6, 2, seed), right[:2] + 0.05 * rows(2, 7, seed + 100)
        assert loss(a @ b) > loss(best)


def test_full_rank_is_ridge():
    new, old = rows(80, 7, 0), rows(80, 6, 1)
    for rank in (6, 64):
        low, full = fit_low_rank(new, old, rank=rank), fit_ridge(new, old, intercept=True)
        torch.testing.assert_close(low.weight, full.weight)
        torch.testing.assert_close(low.bias, full.bias)
    assert fit_low_rank(new, old, intercept=False).foldable


def test_refusals():
    new, old = rows(30, 6, 0), rows(30, 4, 1)
    with pytest.raises(ConfigError, match="rank must be at least 1, got 0"):
        fit_low_rank(new, old, rank=0)
    with pytest.raises(ConfigError, match="regularisation"):
        fit_low_rank(new, old, regularisation=-1.0)
