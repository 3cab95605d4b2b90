from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes, sqrtm

from xbt.errors import ConfigError, DataError
from xbt.projections import PairVectors, fit_procrustes, fit_whitened_procrustes


def rows(n, dim, seed, offset=0.0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((n, dim)) @ generator.standard_normal((dim, dim)) + offset


def white_rows(n, dim, seed):
    """Rows of mean zero and covariance one, up to rounding."""
    centred = rows(n, dim, seed)
    centred -= centred.mean(0)
    return np.linalg.qr(centred)[0] * np.sqrt(n)


@pytest.mark.parametrize(("new_dim", "old_dim"), [(6, 6), (8, 5), (5, 8)])
@pytest.mark.parametrize("centring", ["none", "joint"])
@pytest.mark.parametrize("shrinkage", [0.01, 0.3])
def test_equals_symmetric_roots(new_dim, old_dim, centring, shrinkage):
    new, old = rows(200, new_dim, 0, 0.5), rows(200, old_dim, 1, -0.3)
    old[:, :4] += new[:, :4]
    projection = fit_whitened_procrustes(new, old, centring=centring, shrinkage=shrinkage)
    means = (new.mean(0), old.mean(0)) if centring == "joint" else (0.0, 0.0)
    n, o = new - means[0], old - means[1]

    def root(x):
        covariance = x.T @ x / 200
        spread = np.trace(covariance) / len(covariance)
        return np.real(sqrtm((1 - shrinkage) * covariance + shrinkage * spread * np.eye(len(covariance))))

    new_root, old_root = root(n), root(o)
    white = np.linalg.inv(new_root) @ n.T @ o @ np.linalg.inv(old_root)
    left, _, right = np.linalg.svd(white, full_matrices=False)
    weight = (np.linalg.inv(new_root) @ left @ right @ old_root).T
    np.testing.assert_allclose(projection.weight.detach().numpy(), weight, rtol=1e-4, atol=1e-5)
    if centring == "joint":
        bias = old.mean(0) - weight @ new.mean(0)
        np.testing.assert_allclose(projection.bias.detach().numpy(), bias, rtol=1e-4, atol=1e-5)
    else:
        assert projection.foldable


def test_equals_procrustes_on_white_vectors():
    new, old = white_rows(300, 8, 0), white_rows(300, 8, 1)
    expected, _ = orthogonal_procrustes(new, old)
    for options in ({}, {"centring": "none"}, {"shrinkage": 1.0}):
        found = fit_whitened_procrustes(new, old, **options).weight.detach().numpy()
        np.testing.assert_allclose(found, expected.T, atol=1e-6)


def test_full_shrinkage_is_procrustes_times_a_length():
    new, old = torch.from_numpy(rows(200, 8, 0)), torch.from_numpy(rows(200, 5, 1))
    found = fit_whitened_procrustes(new, old, centring="none", shrinkage=1.0).weight
    ratio = (old.square().mean() / new.square().mean()).sqrt()
    torch.testing.assert_close(found, ratio.float() * fit_procrustes(new, old).weight, rtol=1e-5, atol=1e-5)


def test_a_hidden_linear_map_with_orthogonal_whitened_part_is_recovered():
    new = rows(400, 6, 0, 1.0)
    hidden = rows(6, 6, 3)
    projection = fit_whitened_procrustes(new, new @ hidden.T + 2.0, shrinkage=1e-9)
    np.testing.assert_allclose(projection.weight.detach().numpy(), hidden, atol=1e-4)


def test_pairs_give_images_an_offset_of_their_own():
    pairs = PairVectors(rows(9, 6, 0), rows(9, 4, 1), rows(9, 4, 2, 3.0), range(9), rows(9, 6, 3, -3.0))
    projection = fit_whitened_procrustes(rows(50, 6, 4), rows(50, 4, 5), pairs=pairs, centring="modality")
    images = projection.project(pairs.new_images, "image").detach()
    torch.testing.assert_close(images.mean(dim=0), pairs.old_images.mean(dim=0))


def test_refusals():
    new, old = rows(5, 8, 0), rows(5, 4, 1)
    for shrinkage in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="shrinkage must be above 0"):
            fit_whitened_procrustes(new, old, shrinkage=shrinkage)
    with pytest.raises(DataError, match=r"shrinkage=1e-300.*greater shrinkage"):
        fit_whitened_procrustes(new, old, shrinkage=1e-300)
