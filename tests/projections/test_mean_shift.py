from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.errors import ConfigError
from xbt.projections import PairVectors, fit_mean_shift


def rows(n, dim, seed, offset=0.0):
    return np.random.default_rng(seed).standard_normal((n, dim)) + offset


def test_removes_a_hidden_shift():
    new = rows(40, 6, 0)
    shift = rows(1, 6, 1)
    projection = fit_mean_shift(new, new + shift)
    moved = projection.project(torch.from_numpy(new).float()).detach().numpy()
    np.testing.assert_allclose(moved, new + shift, atol=1e-6)
    assert projection.image_bias is None


@pytest.mark.parametrize(("new_dim", "old_dim"), [(6, 4), (4, 6)])
def test_means_meet_where_dimensions_differ(new_dim, old_dim):
    new, old = rows(40, new_dim, 0, 2.0), rows(40, old_dim, 1, -1.0)
    moved = fit_mean_shift(new, old).project(torch.from_numpy(new).float()).detach().numpy()
    np.testing.assert_allclose(moved.mean(0), old.mean(0), atol=1e-6)
    if new_dim > old_dim:
        np.testing.assert_allclose(moved - moved.mean(0), (new - new.mean(0))[:, :old_dim], atol=1e-6)


def test_images_move_by_their_own_means():
    pairs = PairVectors(rows(5, 6, 0), rows(5, 4, 1), rows(5, 4, 2, 1.0), range(5), rows(5, 6, 3, -1.0))
    new, old = rows(40, 6, 4), rows(40, 4, 5)
    projection = fit_mean_shift(new, old, pairs=pairs)
    images = projection.project(pairs.new_images, "image").detach()
    torch.testing.assert_close(images.mean(dim=0), pairs.old_images.mean(dim=0))
    texts = projection.project(torch.from_numpy(new).float(), "text").detach().numpy()
    np.testing.assert_allclose(texts.mean(0), old.mean(0), atol=1e-6)
    without = PairVectors(pairs.new_texts, pairs.old_texts, pairs.old_images, range(5))
    with pytest.raises(ConfigError, match="no new image vectors"):
        fit_mean_shift(new, old, pairs=without)
