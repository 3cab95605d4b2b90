from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from xbt.errors import DataError, SpaceMismatchError
from xbt.evaluation import evaluate_labels, retrieval


def brute_force(queries, query_labels, gallery, gallery_labels, excluded=None):
    """Ranks of the first right item and average precisions in float64, one query at a time."""
    queries, gallery = (np.asarray(each, dtype=np.float64) for each in (queries, gallery))
    queries, gallery = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries, gallery))
    query_labels, gallery_labels = np.asarray(query_labels), np.asarray(gallery_labels)
    ranks, precisions = [], []
    for row, query in enumerate(queries):
        kept = np.ones(len(gallery), dtype=bool)
        if excluded is not None and excluded[row] is not None:
            kept[excluded[row]] = False
        scores, right = gallery[kept] @ query, gallery_labels[kept] == query_labels[row]
        if right.any():
            ranks.append(int((scores[~right] >= scores[right].max()).sum()))
            precisions.append(average_precision_score(right, scores))
    return ranks, precisions


@pytest.fixture
def problem():
    rng = np.random.default_rng(1)
    query_labels, gallery_labels = rng.integers(0, 7, 40), rng.integers(2, 9, 90)
    centres = rng.standard_normal((9, 6))
    queries = centres[query_labels] + rng.standard_normal((40, 6))
    gallery = centres[gallery_labels] + rng.standard_normal((90, 6))
    return queries.astype(np.float32), query_labels, gallery.astype(np.float32), gallery_labels


def check(report, ranks, precisions):
    assert report.first_ranks.tolist() == ranks
    np.testing.assert_allclose(report.average_precisions.numpy(), precisions, atol=1e-6)
    assert report.mean_average_precision == pytest.approx(np.mean(precisions), abs=1e-6)
    for k, value in report.cmc.items():
        assert value == np.mean(np.array(ranks) < k)
    assert report.n_queries == len(ranks)


def test_separate_gallery_against_brute_force_and_sklearn(problem):
    # Classes 0 and 1 occur among the queries alone, 7 and 8 in the gallery alone.
    report = evaluate_labels(*problem, ks=(1, 3, 5, 500))
    ranks, precisions = brute_force(*problem)
    check(report, ranks, precisions)
    assert report.n_without_positive == int((problem[1] < 2).sum()) > 0
    assert report.cmc[500] == 1.0


def test_self_test_leaves_every_query_out_of_its_own_ranking(problem):
    _, _, vectors, labels = problem
    report = evaluate_labels(vectors, labels)
    check(report, *brute_force(vectors, labels, vectors, labels, excluded=range(len(vectors))))


def test_top_one_is_the_nearest_neighbour_classifier(problem):
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    _, _, vectors, labels = problem
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    classifier = KNeighborsClassifier(1, algorithm="brute")
    expected = cross_val_score(classifier, unit, labels, cv=LeaveOneOut()).mean()
    assert evaluate_labels(vectors, labels).cmc[1] == expected


def test_ids_leave_out_the_same_image_wherever_it_is(problem):
    queries, query_labels, gallery, gallery_labels = problem
    gallery, gallery_labels = (
        np.concatenate([gallery, queries]),
        np.concatenate([gallery_labels, query_labels]),
    )
    order = np.random.default_rng(0).permutation(len(gallery))
    names = [f"g{i}" for i in range(90)] + [f"q{i}" for i in range(40)]
    names = [names[i] for i in order]
    query_ids = [f"q{i}" for i in range(40)]
    query_ids[3] = "elsewhere"
    report = evaluate_labels(
        queries, query_labels, gallery[order], gallery_labels[order], query_ids=query_ids, gallery_ids=names
    )
    excluded = [names.index(name) if name in names else None for name in query_ids]
    check(report, *brute_force(queries, query_labels, gallery[order], gallery_labels[order], excluded))
    assert report.first_ranks[3] == 0


def test_ids_may_be_tensors(problem):
    _, _, vectors, labels = problem
    ids = torch.arange(len(vectors))
    report = evaluate_labels(vectors, labels, vectors, labels, query_ids=ids, gallery_ids=ids)
    expected = evaluate_labels(vectors, labels)
    assert torch.equal(report.first_ranks, expected.first_ranks)
    assert torch.equal(report.average_precisions, expected.average_precisions)
    assert torch.equal(evaluate_labels(vectors, labels, query_ids=ids).first_ranks, expected.first_ranks)


def test_four_points_by_hand():
    # Angles 0°, 10°, 25°, 90°: the order of neighbours can be read off.
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 25.0, 90.0]))
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    report = evaluate_labels(vectors, [0, 1, 0, 1], ks=(1, 2, 3))
    # 0: [1, 2, 3], right 2 → rank 1, AP 1/2.   1: [0, 2, 3], right 3 → rank 2, AP 1/3.
    # 2: [1, 0, 3], right 0 → rank 1, AP 1/2.   3: [2, 1, 0], right 1 → rank 1, AP 1/2.
    assert report.first_ranks.tolist() == [1, 2, 1, 1]
    assert report.cmc == {1: 0.0, 2: 0.75, 3: 1.0}
    assert report.mean_average_precision == pytest.approx((3 * 1 / 2 + 1 / 3) / 4)
    assert report.metrics() == {"top1": 0.0, "top2": 0.75, "top3": 1.0, "mAP": report.mean_average_precision}
    assert report.to_dict() == {**report.metrics(), "n_queries": 4, "n_without_positive": 0}


def test_labels_of_queries_and_gallery_may_differ():
    # A right item at rank 2 is no hit at rank 1, although the label sets are not the same.
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, 0.5]])
    report = evaluate_labels(torch.tensor([[1.0, 0.0]]), [5], gallery, [6, 7, 5], ks=(1, 2, 3))
    assert report.cmc == {1: 0.0, 2: 0.0, 3: 1.0}
    assert report.mean_average_precision == pytest.approx(1 / 3)


@pytest.mark.parametrize(("n_queries", "n_gallery", "dim"), [(1, 7, 5), (3, 100, 33), (17, 129, 64)])
def test_ties_count_against_us(n_queries, n_gallery, dim):
    rng = np.random.default_rng(0)
    gallery = np.repeat(rng.standard_normal((1, dim)).astype(np.float32), n_gallery, axis=0)
    queries = rng.standard_normal((n_queries, dim)).astype(np.float32)
    labels = np.arange(n_gallery) % 3
    report = evaluate_labels(queries, np.ones(n_queries, dtype=int), gallery, labels)
    wrong = int((labels != 1).sum())
    assert report.first_ranks.tolist() == [wrong] * n_queries
    assert report.mean_average_precision == pytest.approx((n_gallery - wrong) / n_gallery)


def test_partial_ties_agree_with_sklearn():
    # Rows of ±1 in 16 dimensions: cosines are multiples of 1/8 without rounding, and nearly all of them tie.
    rng = np.random.default_rng(3)
    vectors = rng.choice([-1.0, 1.0], (75, 16)).astype(np.float32)
    vectors[60:] = vectors[:15]
    labels = rng.integers(0, 4, 75)
    report = evaluate_labels(vectors, labels)
    check(report, *brute_force(vectors, labels, vectors, labels, excluded=range(75)))
    check(evaluate_labels(vectors, labels, vectors, labels), *brute_force(vectors, labels, vectors, labels))


@pytest.mark.parametrize("chunk_size", [1, 7, 10**6])
def test_chunks_change_nothing(problem, chunk_size, monkeypatch):
    whole = evaluate_labels(*problem)
    parts = evaluate_labels(*problem, chunk_size=chunk_size)
    assert torch.equal(parts.first_ranks, whole.first_ranks)
    torch.testing.assert_close(parts.average_precisions, whole.average_precisions)
    monkeypatch.setattr(retrieval, "SCORE_BYTES", 4 * 90 * chunk_size)
    assert torch.equal(evaluate_labels(*problem).first_ranks, whole.first_ranks)


def test_rotation_and_length_change_nothing(problem):
    queries, query_labels, gallery, gallery_labels = problem
    rng = np.random.default_rng(5)
    rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    stretch = rng.uniform(1e-3, 1e3, (90, 1))
    expected = evaluate_labels(queries.astype(np.float64), query_labels, gallery, gallery_labels)
    turned = evaluate_labels(
        queries @ rotation * 7.0, query_labels, gallery @ rotation * stretch, gallery_labels
    )
    assert torch.equal(turned.first_ranks, expected.first_ranks)
    torch.testing.assert_close(turned.average_precisions, expected.average_precisions)


def test_very_long_and_very_short_rows(problem):
    queries, query_labels, gallery, gallery_labels = problem
    expected = evaluate_labels(queries, query_labels, gallery, gallery_labels)
    for scale in (1e-36, 1e30):
        scaled = evaluate_labels(queries * np.float32(scale), query_labels, gallery, gallery_labels)
        assert torch.equal(scaled.first_ranks, expected.first_ranks)


def test_precision_is_that_of_the_vectors():
    gallery = np.array([[1.0, 1e-9], [1.0, 0.0]])
    query = np.array([[1.0, 0.0]])
    assert evaluate_labels(query, [1], gallery, [0, 1]).first_ranks.tolist() == [1]  # cosines differ by 5e-19
    gallery = np.array([[1.0, 1e-6], [1.0, 0.0]])
    assert evaluate_labels(query, [1], gallery, [0, 1]).first_ranks.tolist() == [0]
    single = gallery.astype(np.float32)
    assert evaluate_labels(query.astype(np.float32), [1], single, [0, 1]).first_ranks.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype(problem, dtype):
    queries, query_labels, gallery, gallery_labels = problem
    queries, gallery = torch.from_numpy(queries).to(dtype), torch.from_numpy(gallery).to(dtype)
    report = evaluate_labels(queries, torch.from_numpy(query_labels), gallery, list(gallery_labels))
    check(report, *brute_force(queries.double(), query_labels, gallery.double(), gallery_labels))


def test_collapsed_model_gets_nothing():
    labels = torch.arange(20) % 4
    report = evaluate_labels(torch.zeros(20, 8), labels)
    assert report.cmc[5] == 0
    assert report.mean_average_precision == pytest.approx(4 / 19)
    assert not math.isnan(report.mean_average_precision)


VECTORS, LABELS = torch.eye(4), [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((VECTORS, [0, 0, 1]), {}, "query_labels has 3 entries for 4 queries"),
        ((VECTORS, [0.0, 0.0, 1.0, 1.0]), {}, "query_labels must hold one integer per vector"),
        ((VECTORS, [[0, 0, 1, 1]]), {}, r"query_labels must hold .* shape \(1, 4\)"),
        ((VECTORS, LABELS, VECTORS), {}, "belong together"),
        ((VECTORS, LABELS, VECTORS, [0]), {}, "gallery_labels has 1 entries for 4 gallery items"),
        ((VECTORS, LABELS), {"query_ids": ["a"]}, "query_ids has 1 entries for 4 queries"),
        ((VECTORS, LABELS), {"gallery_ids": list("abcd")}, "without a gallery"),
        ((VECTORS, LABELS), {"query_ids": list("abca")}, "gallery id 'a' occurs twice, again in row 3"),
        ((VECTORS, LABELS, VECTORS, LABELS), {"query_ids": list("abcd")}, "gallery_ids are missing"),
        ((VECTORS, LABELS, VECTORS, LABELS), {"gallery_ids": list("abcd")}, "query_ids are missing"),
        ((VECTORS, [0, 1, 2, 3]), {}, "no query has an item of its class"),
        ((VECTORS, LABELS), {"ks": ()}, "ks is empty"),
        ((VECTORS, LABELS), {"ks": (0,)}, "ks holds 0"),
        ((VECTORS, LABELS), {"chunk_size": 0}, "chunk_size is 0"),
        ((VECTORS, LABELS), {"chunk_size": True}, "chunk_size is True"),
        ((torch.empty(0, 4), []), {}, "queries is empty"),
        ((VECTORS / 0, LABELS), {}, "queries has NaN"),
    ],
)
def test_refuses_what_cannot_be_measured(arguments, options, message):
    with pytest.raises(DataError, match=message):
        evaluate_labels(*arguments, **options)


def test_refuses_other_dimensions():
    with pytest.raises(SpaceMismatchError, match="queries have dimension 3 but the gallery has 4"):
        evaluate_labels(torch.ones(4, 3), LABELS, VECTORS, LABELS)
