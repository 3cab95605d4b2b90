from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from xbt.errors import DataError, SpaceMismatchError
from xbt.evaluation import best_positive_ranks, recall_at_k
from xbt.evaluation import retrieval as module


def brute_force_ranks(queries, gallery, positives):
    """The definition, written with loops and exactly rounded sums."""
    ranks = []
    for query, right in zip(np.asarray(queries, np.float64), positives, strict=True):
        scores = [float((query * row).sum()) for row in np.asarray(gallery, np.float64)]
        best = max(scores[j] for j in right)
        ranks.append(sum(1 for j, score in enumerate(scores) if j not in right and score >= best))
    return ranks


def make_data(n_images=60, dim=24, seed=0):
    """Images with 1 to 20 captions each, in random order."""
    rng = random.Random(seed)
    owners = [image for image in range(n_images) for _ in range(rng.randint(1, 20))]
    rng.shuffle(owners)
    noise = np.random.default_rng(seed)
    images = noise.standard_normal((n_images, dim))
    texts = images[owners] + 3.0 * noise.standard_normal((len(owners), dim))
    t2i = [[owner] for owner in owners]
    i2t = [[j for j, owner in enumerate(owners) if owner == image] for image in range(n_images)]
    return torch.from_numpy(texts).float(), torch.from_numpy(images).float(), t2i, i2t


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module", params=["t2i", "i2t"])
def problem(request, data):
    texts, images, t2i, i2t = data
    return (texts, images, t2i) if request.param == "t2i" else (images, texts, i2t)


def test_agrees_with_brute_force(problem):
    queries, gallery, positives = problem
    expected = brute_force_ranks(queries, gallery, positives)
    ranks = best_positive_ranks(queries, gallery, positives)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == expected
    assert len(set(expected)) > 10  # the data is neither solved nor hopeless
    recall = recall_at_k(queries, gallery, positives, ks=(10, 1, 3))
    assert list(recall) == [10, 1, 3]
    for k, value in recall.items():
        assert value == sum(rank < k for rank in expected) / len(expected)


@pytest.mark.parametrize(
    ("n_queries", "n_gallery", "dim"), [(1, 2, 64), (1, 7, 513), (5, 31, 127), (40, 101, 384)]
)
def test_all_ties_give_the_worst_rank(n_queries, n_gallery, dim):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((n_queries, dim)).astype(np.float32)
    gallery = np.repeat(rng.standard_normal((1, dim)).astype(np.float32), n_gallery, axis=0)
    for position in (0, n_gallery - 1):
        ranks = best_positive_ranks(queries, gallery, [[position]] * n_queries)
        assert ranks.tolist() == [n_gallery - 1] * n_queries
    assert recall_at_k(queries, gallery, [[0]] * n_queries, ks=[1, n_gallery]) == {1: 0.0, n_gallery: 1.0}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_copy_of_the_positive_ties_wherever_it_is(dtype):
    # A plain matmul rounds some of these columns differently, so that the copy would fall behind by an ulp.
    rng = np.random.default_rng(3)
    for n_queries, n_gallery, dim in [(1, 13, 64), (3, 5, 16), (17, 131, 127), (33, 1001, 64)]:
        gallery = rng.standard_normal((n_gallery, dim)).astype(dtype)
        gallery[-1] = gallery[0]
        queries = np.repeat(gallery[:1], n_queries, axis=0) * dtype(0.3)
        for row in (0, n_gallery - 1):
            ranks = best_positive_ranks(queries, gallery, [[row]] * n_queries)
            expected = brute_force_ranks(queries[:1], gallery, [[row]]) * n_queries
            assert ranks.tolist() == expected
            assert expected[0] >= 1


def test_copies_that_are_positives_too_do_not_count_against_the_query():
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    query = torch.tensor([[1.0, 0.0]])
    assert best_positive_ranks(query, gallery, [[0, 1, 3]]).tolist() == [0]
    assert best_positive_ranks(query, gallery, [[0, 3]]).tolist() == [1]
    assert best_positive_ranks(query, gallery, [[0, 2]]).tolist() == [2]
    assert best_positive_ranks(query, gallery, [[2]]).tolist() == [3]
    assert best_positive_ranks(query, gallery, [[3, 3, 0, 3]]).tolist() == [1]


def test_negative_zero_equals_zero():
    # Every row has its own pattern of zeros: all are equal, no two have the same bytes, and they stand in
    # columns that a matmul rounds apart.
    rng = np.random.default_rng(0)
    for n_queries, n_gallery, dim in [(1, 7, 513), (1, 13, 64), (3, 5, 16), (17, 31, 127), (33, 101, 384)]:
        gallery = np.repeat(rng.standard_normal((1, dim)).astype(np.float32), n_gallery, axis=0)
        gallery[:, :7] = 0.0
        for i in range(n_gallery):
            gallery[i, :7][[bool(i >> bit & 1) for bit in range(7)]] = -0.0
        queries = rng.standard_normal((n_queries, dim)).astype(np.float32)
        for row in (0, n_gallery - 1):
            ranks = best_positive_ranks(queries, gallery, [[row]] * n_queries)
            assert ranks.tolist() == [n_gallery - 1] * n_queries


@pytest.mark.parametrize("hashed", [hash, lambda row: hash(row) % 5, lambda row: 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distinct_rows_do_not_depend_on_luck_with_hashes(hashed, dtype, monkeypatch):
    monkeypatch.setattr(module, "hash", hashed, raising=False)
    rows = np.random.default_rng(0).standard_normal((50, 3)).astype(dtype)
    rows[[4, 20, 49]], rows[7], rows[30] = rows[9], 0.0, -0.0
    distinct, which = module.distinct_rows(rows)
    assert len(distinct) == 46
    np.testing.assert_array_equal(distinct[which], rows)
    assert len(np.unique(distinct, axis=0)) == 46
    assert which.dtype == np.int64
    first = sorted(set(range(50)) - {9, 20, 30, 49})
    np.testing.assert_array_equal(distinct, rows[first])
    alone, each = module.distinct_rows(distinct)
    assert alone is distinct  # no copy where nothing occurs twice
    assert each.tolist() == list(range(46))


def test_vectors_need_not_lie_in_order(problem):
    queries, gallery, positives = problem
    turned = queries.T.contiguous().T, gallery.T.contiguous().T
    assert torch.equal(
        best_positive_ranks(*turned, positives), best_positive_ranks(queries, gallery, positives)
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 10**6])
def test_chunked_equals_unchunked(problem, chunk_size):
    queries, gallery, positives = problem
    whole = best_positive_ranks(queries, gallery, positives)
    assert torch.equal(best_positive_ranks(queries, gallery, positives, chunk_size=chunk_size), whole)


def test_default_chunks_are_bounded(problem, monkeypatch):
    queries, gallery, positives = problem
    whole = best_positive_ranks(queries, gallery, positives)
    monkeypatch.setattr(module, "SCORE_BYTES", 4 * len(gallery) * 3)
    assert torch.equal(best_positive_ranks(queries, gallery, positives), whole)
    monkeypatch.setattr(module, "SCORE_BYTES", 1)
    assert torch.equal(best_positive_ranks(queries, gallery, positives), whole)


def test_chunked_equals_unchunked_with_repeated_rows(data):
    texts, images, t2i, _ = data
    gallery = torch.cat([images, images[:20], images[:5]])
    whole = best_positive_ranks(texts, gallery, t2i)
    assert whole.tolist() == brute_force_ranks(texts, gallery, t2i)
    assert torch.equal(best_positive_ranks(texts, gallery, t2i, chunk_size=11), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype(problem, dtype):
    queries, gallery, positives = problem
    queries, gallery = queries.to(dtype), gallery.to(dtype)
    expected = brute_force_ranks(queries.double(), gallery.double(), positives)
    assert best_positive_ranks(queries, gallery, positives).tolist() == expected
    if dtype != torch.bfloat16:
        assert best_positive_ranks(queries.numpy(), gallery.numpy(), positives).tolist() == expected


def test_double_precision_is_kept():
    gallery = np.array([[1.0], [1.0 + 1e-12]])
    assert best_positive_ranks(np.ones((1, 1)), gallery, [[1]]).tolist() == [0]
    assert best_positive_ranks(np.ones((1, 1), np.float32), gallery, [[1]]).tolist() == [0]
    assert best_positive_ranks(np.ones((1, 1)), gallery.astype(np.float32), [[1]]).tolist() == [1]


def test_autocast_does_not_lower_the_precision(problem):
    queries, gallery, positives = problem
    expected = best_positive_ranks(queries, gallery, positives)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(best_positive_ranks(queries, gallery, positives), expected)


def test_scores_are_not_normalised():
    gallery = torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    assert best_positive_ranks(torch.tensor([[1.0, 0.0]]), gallery, [[0]]).tolist() == [1]


def test_positives_may_be_arrays_tensors_or_tuples(problem):
    queries, gallery, positives = problem
    expected = best_positive_ranks(queries, gallery, positives)
    for form in (np.array, torch.tensor, tuple):
        assert torch.equal(best_positive_ranks(queries, gallery, [form(p) for p in positives]), expected)
    paired = torch.arange(len(gallery))[:, None]
    assert best_positive_ranks(gallery, gallery, paired).tolist() == brute_force_ranks(
        gallery, gallery, paired.tolist()
    )


GALLERY = torch.eye(4)
QUERIES = torch.eye(4)[:2]


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        ([[0]], "1 entries for 2 queries"),
        ([[0], []], "query 1 has no positive"),
        ([[0], [4]], r"positives\[1\] names gallery row 4, but the gallery's rows are 0 to 3"),
        ([[0], [1, -1]], r"positives\[1\] names gallery row -1"),
        ([[0], [1.5]], r"positives\[1\] holds float64"),
        ([[0], [True]], r"positives\[1\] holds bool"),
        ([0, 1], r"positives\[0\] is 0; give a list"),
    ],
)
def test_refuses_bad_positives(positives, message):
    with pytest.raises(DataError, match=message):
        best_positive_ranks(QUERIES, GALLERY, positives)


@pytest.mark.parametrize("k", [0, -1, 1.0, "1", True, None])
def test_refuses_bad_k(k):
    with pytest.raises(DataError, match=r"every k must be an integer of at least 1"):
        recall_at_k(QUERIES, GALLERY, [[0], [1]], ks=(1, k))


def test_refuses_no_k():
    with pytest.raises(DataError, match="ks is empty"):
        recall_at_k(QUERIES, GALLERY, [[0], [1]], ks=())


@pytest.mark.parametrize("chunk_size", [0, -3, 2.0])
def test_refuses_bad_chunk_size(chunk_size):
    with pytest.raises(DataError, match="chunk_size"):
        best_positive_ranks(QUERIES, GALLERY, [[0], [1]], chunk_size=chunk_size)


def test_refuses_vectors_that_cannot_be_compared():
    with pytest.raises(SpaceMismatchError, match="queries have dimension 3 but the gallery has 4"):
        best_positive_ranks(torch.ones(2, 3), GALLERY, [[0], [1]])
    with pytest.raises(DataError, match="gallery is empty"):
        best_positive_ranks(QUERIES, torch.empty(0, 4), [[0], [1]])
    with pytest.raises(DataError, match="queries is empty"):
        best_positive_ranks(torch.empty(0, 4), GALLERY, [])
    broken = GALLERY.clone()
    broken[2, 1] = float("nan")
    with pytest.raises(DataError, match=r"gallery has NaN .* row 2"):
        best_positive_ranks(QUERIES, broken, [[0], [1]])
    with pytest.raises(DataError, match=r"queries has NaN"):
        best_positive_ranks(broken, GALLERY, [[0]] * 4)


def test_refuses_scores_that_overflow():
    # inf - inf is NaN, which compares false with everything and would pass for rank 0.
    with pytest.raises(DataError, match="scores overflow"):
        best_positive_ranks(torch.tensor([[1e20, 1e20]]), torch.tensor([[1e20, -1e20], [1.0, 1.0]]), [[0]])


@pytest.mark.parametrize("ks", [None, 5, 10**30, "15", [10**30], [float("nan")], [None], 1.0])
def test_refuses_cut_offs_that_are_no_list_of_counts(ks):
    rows = torch.eye(3)
    with pytest.raises(DataError, match="ks "):
        recall_at_k(rows, rows, [[0], [1], [2]], ks)


@pytest.mark.parametrize(
    "positives", [5, None, "abc", {0: [0], 1: [1], 2: [2]}, iter([[0], [1], [2]]), [[0], [[1], 2], [2]]]
)
def test_refuses_positives_that_are_no_lists(positives):
    rows = torch.eye(3)
    with pytest.raises(DataError, match="positives"):
        best_positive_ranks(rows, rows, positives)


def test_ranks_of_scores_with_shared_columns_and_other_scores_of_positives():
    rng = np.random.default_rng(0)
    copies = np.array([1, 3, 1, 2, 1])
    scores = rng.integers(0, 4, (30, 5)).astype(np.float32)  # many ties
    own = scores - rng.integers(0, 2, (30, 5)).astype(np.float32)
    lists = [sorted(rng.choice(5, rng.integers(1, 4), replace=False)) for _ in range(30)]
    starts = np.concatenate([[0], np.cumsum([len(columns) for columns in lists])])
    ranks = module.count_before_best(scores, module.Positives(starts, np.concatenate(lists)), own, copies)
    for row, columns, rank in zip(range(30), lists, ranks, strict=True):
        best = max(own[row, column] for column in columns)
        as_high = sum(copies[column] for column in range(5) if scores[row, column] >= best)
        assert rank == as_high - sum(scores[row, column] >= best for column in columns)
