"""Backfill orders: permutations, known answers, and the gain of the learned ones on synthetic data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn.functional import normalize

from xbt.backfill.curve import backfill_curve
from xbt.backfill.orders import (
    distance_to_mean_order,
    fastfill_order,
    oldest_first,
    query_log_order,
    random_order,
    spread_out,
)
from xbt.backfill.rehearsal import (
    FEATURES,
    Slopes,
    fit_rehearsed_order,
    item_features,
    moving_gains,
    search_statistics,
)
from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.index.calibration import MixedScores, fit_kind
from xbt.index.mixed import RankMerge, RawMerge
from xbt.index.neighbours import nearest_items
from xbt.projections import fit_procrustes


def rows(n, dim, seed=0):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def is_permutation(order, count):
    return order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(count))


@pytest.fixture(scope="module")
def world():
    made = make_vector_world(*WORLDS["much better"], n_corpus=800, n_support=80, n_test=120)
    projection = fit_procrustes(made.corpus_new, made.corpus_old)

    def labelled(part):
        with torch.no_grad():
            old = projection(part["new_texts"])
        positives = [[int(row)] for row in part["image_of_text"]]
        return old, part["new_texts"], part["old_images"], part["new_images"], positives

    with torch.no_grad():
        sample = {"sample_old": projection(made.corpus_new), "sample_new": made.corpus_new}
    return labelled(made.support), labelled(made.test), sample, made


def test_simple_orders():
    assert is_permutation(random_order(50, 1), 50)
    assert torch.equal(random_order(50, 1), random_order(50, 1))
    assert not torch.equal(random_order(50, 1), random_order(50, 2))
    assert oldest_first([3.0, 1.0, 2.0, 1.0]).tolist() == [1, 3, 2, 0]


def test_query_log_counts_the_first_k(monkeypatch):
    queries, items = rows(40, 8, 1), rows(30, 8, 2)
    top = np.argsort(-(queries @ items.T).numpy(), axis=1)[:, :3]
    counts = np.bincount(top.ravel(), minlength=30)
    expected = np.argsort(-counts, kind="stable").tolist()
    assert query_log_order(queries, items, k=3).tolist() == expected
    monkeypatch.setattr("xbt.backfill.orders.SCORES_AT_ONCE", 30 * 7)
    assert query_log_order(queries, items, k=3).tolist() == expected
    assert is_permutation(query_log_order(queries, items, k=99), 30)


def test_distance_to_mean_by_class_by_cluster_and_to_one_mean():
    items = rows(60, 6)
    labels = torch.arange(60) % 4
    means = torch.stack([items[labels == label].mean(dim=0) for label in range(4)])
    expected = (items - means[labels]).norm(dim=1).double().argsort(descending=True)
    assert torch.equal(distance_to_mean_order(items, labels), expected)
    alone = (items - items.mean(dim=0)).norm(dim=1).argsort(descending=True)
    assert torch.equal(distance_to_mean_order(items, clusters=1), alone)


def test_clusters_are_those_of_k_means():
    centres = 10 * rows(3, 6, 1)
    items = torch.cat([centre + 0.2 * rows(20, 6, seed) for seed, centre in enumerate(centres)])
    model = KMeans(3, n_init=5, random_state=0).fit(items.double().numpy())
    distances = np.linalg.norm(items.numpy() - model.cluster_centers_[model.labels_], axis=1)
    order = distance_to_mean_order(items, clusters=3)
    np.testing.assert_allclose(distances[order.numpy()], -np.sort(-distances), atol=1e-5)
    assert is_permutation(distance_to_mean_order(torch.ones(5, 3), clusters=4), 5)


def test_fastfill_finds_what_the_map_cannot_know():
    """Items on one side of the old space have new vectors that are noise: they come first."""
    old = rows(400, 8, 3)
    uncertain = old[:, 0] > 0.2
    new = torch.where(uncertain[:, None], rows(400, 8, 4), old @ torch.linalg.qr(rows(8, 8, 5)).Q)
    order = fastfill_order(old[200:], old[:200], new[:200], steps=400, lr=0.01)
    assert is_permutation(order, 200)
    first = uncertain[200:][order][: int(uncertain[200:].sum())]
    assert float(first.double().mean()) > 0.85
    again = fastfill_order(old[200:], old[:200], new[:200], steps=400, lr=0.01)
    assert torch.equal(order, again)


def test_fastfill_with_queries(world):
    support, test, _, made = world
    order = fastfill_order(test[2], support[2], support[3], support[1], made.support["image_of_text"])
    assert is_permutation(order, 120)


@pytest.mark.parametrize("several", [False, True])
def test_moving_gains_by_brute_force(world, several):
    """Every item is moved by itself in every state, and the ranks are counted again."""
    old_queries, new_queries, old_items, new_items, positives = (part[:25] for part in world[0])
    positives = [[row[0]] for row in positives if row[0] < 25][:25]
    if several:
        positives = [[*row, (row[0] + 5) % 25] for row in positives]
    n = len(positives)
    scores = MixedScores(old_queries[:n], new_queries[:n], old_items, new_items, positives)
    merge = fit_kind("affine", scores)
    found = moving_gains(scores, merge, states=3, seed=4)
    old, new = scores.calibrated(merge)
    rng, expected, count = np.random.default_rng(4), np.zeros(25), 0
    for _ in range(3):
        mask = rng.random(25) < rng.random()
        for item in range(25):
            hits = []
            for value in (False, True):
                state = mask.copy()
                state[item] = value
                mixed = np.where(state, new, old)
                for query, own in enumerate(positives):
                    wrong = np.setdiff1d(np.arange(25), own)
                    for answer in own:
                        rank = (mixed[query, wrong] >= mixed[query, answer]).sum()
                        hits.append(np.mean([rank < k for k in (1, 5, 10)]))
            half = len(hits) // 2
            expected[item] += sum(hits[half:]) - sum(hits[:half])
            count = half
    np.testing.assert_allclose(found.numpy(), expected / (3 * count), atol=1e-12)


def test_search_statistics_by_brute_force(monkeypatch):
    queries, items = rows(50, 6, 1), rows(20, 6, 2)
    scores = (queries @ items.T).numpy().astype(np.float64)
    chances = np.exp(4 * scores) / np.exp(4 * scores).sum(axis=1, keepdims=True)
    monkeypatch.setattr("xbt.backfill.rehearsal.SCORES_AT_ONCE", 20 * 7)
    found = search_statistics(queries, items, 4.0, (0.001, 0.25))
    for counts, cut in zip(found.found, (1, 5), strict=True):
        expected = np.bincount(np.argsort(-scores, axis=1)[:, :cut].ravel(), minlength=20)
        np.testing.assert_array_equal(counts.numpy(), expected)
    np.testing.assert_allclose(found.summed, chances.sum(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.greatest, chances.max(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.mean, scores.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.highest, scores.max(axis=0), atol=1e-6)


def test_features_are_percentiles_and_neighbours_exact():
    items = rows(40, 6, 3)
    centred = (items - items.mean(dim=0)).numpy()
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = centred @ centred.T
    np.fill_diagonal(cosines, -2)
    values, near = nearest_items(items, 5)
    np.testing.assert_array_equal(near.numpy(), np.argsort(-cosines, axis=1)[:, :5])
    features = item_features(items, 2 * items, rows(30, 6, 4), rows(30, 6, 5), Slopes(3.0, 5.0), values)
    assert features.shape == (40, len(FEATURES))
    np.testing.assert_allclose(features.mean(dim=0), 0, atol=1e-5)
    distance = FEATURES.index("distance to the mean")
    expected = (items - items.mean(dim=0)).norm(dim=1).argsort()
    assert torch.equal(features[:, distance].argsort(), expected)
    assert not features[:, FEATURES.index("length when mapped")].isnan().any()


def test_spread_out_by_brute_force():
    urgency, near = torch.randn(50), nearest_items(rows(50, 4), 6)[1]
    assert torch.equal(spread_out(urgency, near, 0.0), (-urgency).argsort(stable=True))
    left, expected = urgency.double().clone(), []
    for _ in range(50):
        row = int(left.argmax())
        expected.append(row)
        left -= 1.5 / 6 * (near == row).any(dim=1)
        left[row] = -torch.inf
    assert spread_out(urgency, near, 1.5).tolist() == expected


def test_rehearsed_order_beats_the_random_one(world):
    support, test, sample, _ = world
    merge = fit_kind("affine", MixedScores(*support))
    learned = fit_rehearsed_order(*support, merge, **sample)
    order = learned.order(test[2])
    assert is_permutation(order, 120)
    scores = MixedScores(*test)
    ours = backfill_curve(scores, order, merge).area
    random = [backfill_curve(scores, random_order(120, seed), merge).area for seed in range(10)]
    assert ours > np.mean(random)
    assert ours > backfill_curve(scores, order.flip(0), merge).area
    assert torch.equal(order, fit_rehearsed_order(*support, merge, **sample).order(test[2]))
    assert set(learned.to_dict()["weights"]) == set(FEATURES)
    assert fit_rehearsed_order(*support, merge, spreads=[3.0], **sample).spread == 3.0


def test_what_is_refused(world):
    support, test, sample, _ = world
    merge = RawMerge()
    with pytest.raises(ConfigError, match="0 items to order"):
        random_order(0)
    with pytest.raises(DataError, match="no NaN"):
        oldest_first([1.0, float("nan")])
    with pytest.raises(ConfigError, match="k is 0"):
        query_log_order(rows(2, 3), rows(2, 3), k=0)
    with pytest.raises(SpaceMismatchError, match="queries have dimension 3 but the items have 4"):
        query_log_order(rows(2, 3), rows(2, 4))
    with pytest.raises(ConfigError, match="clusters is 0"):
        distance_to_mean_order(rows(2, 3), clusters=0)
    with pytest.raises(DataError, match="1 labels for 2 items"):
        distance_to_mean_order(rows(2, 3), [0])
    with pytest.raises(DataError, match="10 items or more, got 9 and 9"):
        fastfill_order(rows(5, 4), rows(9, 4), rows(9, 4))
    with pytest.raises(ConfigError, match="'rank' compares no scores"):
        fit_rehearsed_order(*support, RankMerge(), **sample)
    with pytest.raises(ConfigError, match="spreads are"):
        fit_rehearsed_order(*support, merge, spreads=[], **sample)
    few = (*(part[:19] for part in support[:4]), [[0]] * 19)
    with pytest.raises(DataError, match="the sample has 19 items"):
        fit_rehearsed_order(*few, merge, **sample)
    with pytest.raises(SpaceMismatchError, match="project the queries into the old space"):
        fit_rehearsed_order(*support, merge, sample_old=sample["sample_new"], sample_new=sample["sample_new"])
    with pytest.raises(DataError, match="799 sample queries in the old space and 800 in the new one"):
        fit_rehearsed_order(
            *support, merge, sample_old=sample["sample_old"][1:], sample_new=sample["sample_new"]
        )
    learned = fit_rehearsed_order(*support, merge, spreads=[0.0], **sample)
    with pytest.raises(DataError, match="single item"):
        learned.order(test[2][:1])
    with pytest.raises(SpaceMismatchError, match="dimension"):
        learned.order(test[3])
