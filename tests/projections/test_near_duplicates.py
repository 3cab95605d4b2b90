"""What is the same in all but name is found, and what merely points the same way is not."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.projections import PairVectors
from xbt.projections.near_duplicates import TextFinder, clusters_of


@pytest.fixture(autouse=True)
def unheard():
    """No warning where none is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pairs_of(n=100, seed=0, cone=0.0, texts=2):
    """Random pairs; with ``cone`` all vectors of a model point nearly the same way."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count, dim):
        return torch.randn(count, dim, generator=generator) + cone * dim**0.5 * torch.eye(dim)[0]

    return PairVectors(
        rows(n * texts, 24),
        rows(n * texts, 16),
        rows(n, 16),
        torch.arange(n).repeat_interleave(texts),
        rows(n, 24),
    )


def jittered(rows, size=0.05):
    return normalize(rows + size * torch.randn(rows.shape) / rows.shape[1] ** 0.5, dim=1)


def twice(pairs, size=0.05):
    """Every photo twice, with one half of its captions each."""
    n, half = len(pairs), torch.arange(len(pairs.image_of_text)) % 2
    return PairVectors(
        pairs.new_texts,
        pairs.old_texts,
        torch.cat([pairs.old_images, jittered(pairs.old_images, size)]),
        pairs.image_of_text + n * half,
        torch.cat([pairs.new_images, jittered(pairs.new_images, size)]),
    )


@pytest.mark.parametrize("cone", [0.0, 20.0])
def test_an_ordinary_gallery_has_none(cone):
    """Also not where all cosines exceed 0.99, as those of a barely trained CLIP do."""
    pairs = pairs_of(cone=cone)
    if cone:
        assert float((pairs.old_images @ pairs.old_images.T).min()) > 0.99
    assert np.array_equal(clusters_of(pairs, 5), np.arange(100))


@pytest.mark.parametrize("name", WORLDS)
def test_worlds_of_vectors_have_none(name):
    made = make_vector_world(*WORLDS[name], n_corpus=1, n_support=300, n_test=1)
    assert np.array_equal(clusters_of(PairVectors(**made.support), 5), np.arange(300))


@pytest.mark.parametrize("cone", [0.0, 20.0])
def test_photos_that_are_there_twice_are_one(cone):
    torch.manual_seed(0)
    pairs = twice(pairs_of(cone=cone), 0.05 / max(1.0, cone))
    assert np.array_equal(clusters_of(pairs, 5), np.tile(np.arange(100), 2))


def test_both_models_must_agree():
    torch.manual_seed(0)
    pairs = twice(pairs_of())
    other = replace(pairs, new_images=torch.randn(200, 24))
    assert np.array_equal(clusters_of(other, 5), np.arange(200))
    old_alone = replace(pairs, new_images=None)
    assert np.array_equal(clusters_of(old_alone, 5), np.tile(np.arange(100), 2))


def test_an_equal_text_joins_its_images():
    pairs = pairs_of()
    new, old = pairs.new_texts.clone(), pairs.old_texts.clone()
    new[[20, 90]], old[[20, 90]] = new[[3, 21]], old[[3, 21]]  # images 10, 45 and, in turn, 1, 10
    new[7], old[7] = new[6], old[6]  # two captions of one image
    new[50] = new[60]  # under one model alone
    clusters = clusters_of(replace(pairs, new_texts=new, old_texts=old), 5)
    expected = np.arange(100)
    expected[[10, 45]] = 1
    assert np.array_equal(clusters, expected)


def test_a_chain_that_swallows_everything_is_cut():
    """Vectors on a circle, each near its neighbours: only exact copies remain together."""
    angles = torch.linspace(0, 2 * torch.pi, 201)[:200]
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    circle[150] = circle[20]
    pairs = PairVectors(torch.randn(200, 8), torch.randn(200, 2), circle, torch.arange(200))
    with pytest.warns(UserWarning, match="200 images of the pairs .* 5 folds .* only exact copies are kept"):
        clusters = clusters_of(pairs, 5)
    expected = np.arange(200)
    expected[150] = 20
    assert np.array_equal(clusters, expected)


def test_texts_that_chain_are_left_out_before_images_are():
    torch.manual_seed(0)
    pairs = twice(pairs_of())
    same = torch.zeros(200, 1)
    texts = replace(pairs, new_texts=same + torch.eye(24)[0], old_texts=same + torch.eye(16)[0])
    with pytest.warns(UserWarning, match="only near-duplicate images are kept together"):
        clusters = clusters_of(texts, 5)
    assert np.array_equal(clusters, np.tile(np.arange(100), 2))


def test_of_more_images_than_can_be_compared_exact_copies_are_found(monkeypatch):
    torch.manual_seed(0)
    pairs = twice(pairs_of())
    old, new = pairs.old_images.clone(), pairs.new_images.clone()
    old[100:110], new[100:110] = old[:10], new[:10]
    monkeypatch.setattr("xbt.projections.near_duplicates.MAX_COMPARED", 199)
    clusters = clusters_of(replace(pairs, old_images=old, new_images=new), 5)
    expected = np.arange(200)
    expected[100:110] = np.arange(10)
    assert np.array_equal(clusters, expected)


def test_images_are_compared_in_blocks(monkeypatch):
    torch.manual_seed(0)
    pairs = twice(pairs_of())
    monkeypatch.setattr("xbt.projections.near_duplicates._BLOCK_ROWS", 7)
    assert np.array_equal(clusters_of(pairs, 5), np.tile(np.arange(100), 2))


@pytest.mark.parametrize("cone", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_known_texts_are_found_in_any_precision(dtype, cone):
    pairs = pairs_of(cone=cone)
    finder = TextFinder(pairs.new_texts, pairs.old_texts)
    others = pairs_of(seed=1, cone=cone)
    rows = [
        torch.cat([2 * known[10:60], other])
        for known, other in ((pairs.new_texts, others.new_texts), (pairs.old_texts, others.old_texts))
    ]
    found = finder.known(*(side.to(dtype) for side in rows))
    assert bool(found[:50].all())
    assert not bool(found[50:].any())


def test_a_text_is_known_by_both_models_or_not_at_all():
    pairs = pairs_of()
    finder = TextFinder(pairs.new_texts, pairs.old_texts)
    assert not bool(finder.known(pairs.new_texts, pairs.old_texts.flip(0)).any())
    assert not bool(finder.known(pairs.new_texts[:, :5], pairs.old_texts).any()), "of another model"
    assert finder.known(pairs.new_texts[:0], pairs.old_texts[:0]).shape == (0,)


def test_constant_vectors_are_one_text():
    new, old = torch.ones(3000, 8), torch.ones(3000, 4)
    finder = TextFinder(new, old)
    assert bool(finder.known(new, old).all())
    links = finder.links()
    assert len(np.unique(links)) == 3000
