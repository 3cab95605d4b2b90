"""Neighbours from an inverted file, against brute force."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize

from xbt.index.neighbours import nearest_items


def clustered(count, dim, centres, seed):
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, dim, generator=generator)
    which = torch.randint(centres, (count,), generator=generator)
    return normalize(middle[which] + 0.5 * torch.randn(count, dim, generator=generator), dim=1)


def brute_force(items, count):
    centred = (items - items.mean(dim=0)).double().numpy()
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = centred @ centred.T
    np.fill_diagonal(cosines, -2)
    rows = np.argsort(-cosines, axis=1)[:, :count]
    return cosines, rows


def test_a_large_gallery_misses_few_neighbours():
    items = clustered(4000, 24, 60, 0)
    cosines, expected = brute_force(items, 20)
    values, rows = nearest_items(items, 20, exact_items=1000)
    assert values.dtype == torch.float32
    assert rows.dtype == torch.int64
    found = [len(np.intersect1d(mine, theirs)) for mine, theirs in zip(rows.numpy(), expected, strict=True)]
    assert np.mean(found) / 20 > 0.95
    assert not (rows == torch.arange(4000)[:, None]).any()
    np.testing.assert_allclose(values, np.take_along_axis(cosines, rows.numpy(), 1), atol=1e-5)
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert all(len(set(row)) == 20 for row in rows.tolist())
    again = nearest_items(items, 20, exact_items=1000)
    assert torch.equal(rows, again[1])


def test_equal_items_are_neighbours_but_none_is_its_own():
    items = clustered(30, 8, 30, 1).repeat_interleave(40, dim=0)
    values, rows = nearest_items(items, 20, exact_items=1000)
    assert not (rows == torch.arange(1200)[:, None]).any()
    np.testing.assert_allclose(values, 1, atol=1e-5)
    assert torch.equal(rows // 40, torch.arange(1200)[:, None].expand(-1, 20) // 40)


def test_places_that_stay_empty_hold_the_item_itself():
    # Two neighbours each, far from everything else: the lists that are looked into hold no 300.
    generator = torch.Generator().manual_seed(2)
    items = normalize(torch.randn(400, 200, generator=generator), dim=1).repeat_interleave(3, dim=0)
    values, rows = nearest_items(items, 300, exact_items=1000)
    own = rows == torch.arange(1200)[:, None]
    assert own.any(), "the case this test is for"
    assert not own[:, :2].any()
    assert (values[own] <= values[:, :1].expand_as(values)[own]).all()
    assert values.isfinite().all()
