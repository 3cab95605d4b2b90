from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from galleries import brute_force, make_space, names, unit

from xbt.errors import DataError, SpaceMismatchError
from xbt.index import Gallery, exact_search


@pytest.fixture
def gallery():
    return Gallery.build(unit(50, 16), names(50), make_space())


@pytest.mark.parametrize("n_queries", [1, 5, 64])
@pytest.mark.parametrize("k", [1, 10, 497, 500])
def test_agrees_with_brute_force(n_queries, k):
    vectors, queries, ids = unit(500, 33), unit(n_queries, 33, seed=1), names(500)
    result = Gallery.build(vectors, ids).search(queries, k=k)
    expected_ids, expected_scores = brute_force(vectors, ids, queries, k)
    assert result.ids == expected_ids
    assert result.scores.shape == (n_queries, k)
    assert result.scores.dtype == np.float32
    np.testing.assert_allclose(result.scores, expected_scores, atol=1e-6)


def test_scores_are_inner_products_as_given():
    gallery = Gallery.build(np.array([[1.0, 0.0], [5.0, 5.0]]), ["short", "long"])
    result = gallery.search(np.array([[1.0, 0.0]], np.float16), k=2)
    assert result.ids == [["long", "short"]]
    assert result.scores.tolist() == [[5.0, 1.0]]


def test_a_single_query_vector(gallery):
    query = unit(1, 16, seed=5)
    alone = gallery.search(query[0], k=3)
    assert alone.ids == gallery.search(query, k=3).ids
    assert gallery.search(query[0].numpy(), k=3).ids == alone.ids


def test_a_query_gives_the_same_alone_and_in_a_batch():
    gallery = Gallery.build(unit(3000, 65), names(3000))
    queries = unit(100, 65, seed=2)
    together = gallery.search(queries, k=20)
    for i in (0, 37, 99):
        alone = gallery.search(queries[i], k=20)
        assert alone.ids[0] == together.ids[i]
        assert np.array_equal(alone.scores[0], together.scores[i])


@pytest.mark.parametrize("n_queries", [1, 40])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_equal_vectors_stand_in_the_order_of_the_gallery(n_queries, k):
    # More copies than k and the spare candidates together, between other vectors, for both kernels of FAISS.
    vectors = unit(1000, 65).numpy()
    copies = np.sort(np.random.default_rng(0).permutation(1000)[:60])
    vectors[copies] = vectors[copies[0]]
    queries = np.repeat(vectors[copies[:1]], n_queries, axis=0)
    ids = names(1000)
    result = Gallery.build(vectors, ids).search(queries, k=k)
    assert result.ids == [[ids[i] for i in copies[:k]]] * n_queries
    assert len(set(result.scores.ravel().tolist())) == 1


@pytest.mark.parametrize("n_queries", [1, 40])
@pytest.mark.parametrize(("better", "k"), [(3, 4), (12, 17), (20, 25)])
def test_better_items_that_come_late_do_not_disturb_the_order_of_equal_ones(n_queries, better, k):
    # FAISS lets a better item push out the earliest of the equal ones it holds.
    vectors = np.random.default_rng(0).standard_normal((1000, 8)).astype(np.float32)
    vectors[:, 0] = 0
    copies = np.arange(100, 900, 10)
    vectors[copies] = np.eye(8)[0]
    vectors[-better:] = 2 * np.eye(8)[0]
    ids = names(1000)
    queries = np.repeat(np.eye(8)[:1], n_queries, axis=0)
    result = Gallery.build(vectors, ids).search(queries, k=k)
    assert result.ids == [ids[-better:] + [ids[i] for i in copies[: k - better]]] * n_queries


def test_a_gallery_of_one_vector_repeated():
    gallery = Gallery.build(np.repeat(unit(1, 64).numpy(), 100, axis=0), names(100))
    assert gallery.search(unit(3, 64, seed=1), k=4).ids == [names(4)] * 3
    assert gallery.search(unit(3, 64, seed=1), k=100).ids == [names(100)] * 3


def test_candidates_are_scored_in_bounded_parts(gallery, monkeypatch):
    queries = unit(7, 16, seed=3)
    whole = gallery.search(queries, k=5)
    monkeypatch.setattr(exact_search, "SCRATCH_BYTES", 1)
    parts = gallery.search(queries, k=5)
    assert parts.ids == whole.ids
    assert np.array_equal(parts.scores, whole.scores)


def test_add(gallery):
    more = unit(20, 16, seed=9)
    gallery.add(more, names(20, start=50), make_space())
    assert len(gallery) == 70
    assert gallery.ids == names(70)
    vectors = torch.cat([unit(50, 16), more])
    queries = unit(4, 16, seed=1)
    assert gallery.search(queries, k=10).ids == brute_force(vectors, names(70), queries, 10)[0]


def test_build_copies_the_vectors():
    vectors = unit(3, 4)
    gallery = Gallery.build(vectors, names(3))
    before = gallery.search(torch.ones(4), k=3)
    vectors.zero_()
    assert np.array_equal(gallery.search(torch.ones(4), k=3).scores, before.scores)


def test_vectors_that_are_given_out_are_the_users_own(gallery):
    for ids in (names(50), names(3), ["image-0009", "image-0002"]):
        given = gallery.vectors(ids)
        expected = given.copy()
        given[:] = 0
        assert np.array_equal(gallery.vectors(ids), expected)


def test_describes_itself(gallery):
    assert (len(gallery), gallery.dim, gallery.ids[3]) == (50, 16, "image-0003")
    assert repr(gallery) == "Gallery(50 items, space='old' (16-d))"


def test_importing_and_building_leaves_faiss_alone():
    code = (
        "import sys, numpy as np; from xbt.index import Gallery; g = Gallery.build(np.eye(3), list('abc'));"
        "assert 'faiss' not in sys.modules; print(g.search(np.eye(3)[1], k=1).ids)"
    )
    assert run(code) == "[['b']]"


def run(code):
    """Runs Python code in a fresh process from the repository's root."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "3", None])
def test_refuses_bad_k(gallery, k):
    with pytest.raises(DataError, match="integer of at least 1"):
        gallery.search(unit(1, 16), k=k)


def test_refuses_k_beyond_the_gallery(gallery):
    with pytest.raises(DataError, match="k is 51, but the gallery has 50 items"):
        gallery.search(unit(1, 16), k=51)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b"], "2 entries for 3 vectors"),
        (["a", "b", "a"], "'a' twice"),
        (["a", 2, "c"], r"ids\[1\] is 2; ids must be strings"),
        ("abc", "ids is the string 'abc'"),
    ],
)
def test_refuses_bad_ids(ids, message):
    with pytest.raises(DataError, match=message):
        Gallery.build(unit(3, 4), ids)


def test_build_refuses_bad_vectors():
    with pytest.raises(DataError, match="gallery vectors is empty"):
        Gallery.build(torch.empty(0, 4), [])
    with pytest.raises(DataError, match=r"gallery vectors has NaN .* row 1"):
        Gallery.build(torch.tensor([[1.0], [float("nan")]]), ["a", "b"])
    with pytest.raises(DataError, match=r"shape \(n, dim\)"):
        Gallery.build(torch.ones(3), ["a"])
    with pytest.raises(DataError, match="scores would overflow"):
        Gallery.build(np.array([[1e300]]), ["a"])
    with pytest.raises(SpaceMismatchError, match="dimension 4, but 16 is needed"):
        Gallery.build(unit(3, 4), names(3), make_space())


def test_search_refuses_bad_queries(gallery):
    with pytest.raises(SpaceMismatchError, match="query vectors has dimension 8, but 16"):
        gallery.search(unit(1, 8))
    with pytest.raises(DataError, match="query vectors has NaN"):
        gallery.search(torch.full((16,), float("nan")))
    with pytest.raises(DataError, match="query vectors is empty"):
        gallery.search(torch.empty(0, 16))


def test_a_foreign_space_is_refused_and_nothing_is_added(gallery):
    foreign = make_space("new", seed=1)
    with pytest.raises(SpaceMismatchError, match=r"query vectors .*'new'.*'old'"):
        gallery.search(unit(1, 16), space=foreign)
    with pytest.raises(SpaceMismatchError, match=r"vectors to add .*'new'.*'old'"):
        gallery.add(unit(1, 16), ["x"], foreign)
    assert len(gallery) == 50


def test_a_gallery_of_unknown_space_still_checks_the_dimension():
    gallery = Gallery.build(unit(3, 4), names(3))
    gallery.search(unit(1, 4), k=1, space=make_space(dim=4))
    with pytest.raises(SpaceMismatchError, match="gallery has dimension 4"):
        gallery.search(unit(1, 16), k=1, space=make_space())


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [
        (unit(2, 16), ["x", "image-0007"], "'image-0007' is already in the gallery"),
        (unit(2, 16), ["x", "x"], "'x' twice"),
        (unit(2, 8), ["x", "y"], "dimension 8, but 16"),
        (torch.full((1, 16), float("inf")), ["x"], "NaN or infinite"),
    ],
)
def test_a_refused_add_leaves_the_gallery_as_it_was(gallery, vectors, ids, message):
    with pytest.raises((DataError, SpaceMismatchError), match=message):
        gallery.add(vectors, ids)
    assert len(gallery) == len(gallery.ids) == 50
    assert gallery.search(unit(1, 16), k=50).scores.shape == (1, 50)
