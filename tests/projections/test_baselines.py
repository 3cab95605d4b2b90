"""Baselines: the vectors as they are, and moved by the difference of the means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError
from xbt.projections import PairVectors, fit_identity, fit_mean_shift, fit_projection


@pytest.mark.parametrize(("new_dim", "old_dim"), [(6, 4), (4, 6), (5, 5), (1, 3), (3, 1)])
def test_cuts_or_fills_up(new_dim, old_dim):
    new = torch.randn(9, new_dim)
    out = fit_identity(new, torch.randn(9, old_dim))(new)
    if new_dim >= old_dim:
        wanted = normalize(new[:, :old_dim], dim=1)
    else:
        wanted = normalize(torch.cat([new, torch.zeros(9, old_dim - new_dim)], dim=1), dim=1)
    torch.testing.assert_close(out, wanted)


def test_checks_the_vectors_all_the_same():
    new, old = torch.randn(9, 4), torch.randn(9, 3)
    assert fit_identity(new, old).foldable
    with pytest.raises(DataError, match="9 new and 8 old"):
        fit_identity(new, old[:-1])
    old[5] = float("nan")
    with pytest.raises(DataError, match="first in row 5"):
        fit_identity(new, old)
    with pytest.raises(ConfigError, match="'identity' has no option 'scale'; it has none"):
        fit_projection(new, new, "identity", scale=True)


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
