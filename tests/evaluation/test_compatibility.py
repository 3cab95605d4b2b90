from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from xbt.errors import ConfigError, DataError
from xbt.evaluation import (
    CompatibilityMatrix,
    compatibility_matrix,
    compatibility_tax,
    difference_over_seeds,
    evaluate_labels,
    over_seeds,
    prefix_vectors,
    update_gain,
)

VERSIONS = ("alex", "vgg", "res", "vit")
# Zhou et al., the official README's table of a series of updates on ImageNet, percentages.
PUBLISHED = {
    ("bct", "top1"): [[46.6], [54.4, 58.4], [46.0, 48.9, 64.3], [54.9, 57.5, 70.3, 73.9]],
    ("bt2", "top1"): [[46.6], [56.5, 61.0], [56.7, 61.5, 66.6], [57.9, 62.5, 72.0, 75.6]],
    ("bct", "mAP"): [[29.1], [36.2, 47.0], [30.6, 44.4, 52.7], [36.3, 50.5, 57.0, 65.8]],
    ("bt2", "mAP"): [[29.1], [37.1, 47.5], [37.2, 50.6, 56.8], [37.6, 52.7, 60.6, 68.0]],
}


def published(method, metric):
    rows = PUBLISHED[method, metric]
    return CompatibilityMatrix(
        VERSIONS, {(i, j): value for i, row in enumerate(rows) for j, value in enumerate(row)}
    )


@pytest.mark.parametrize(
    ("method", "metric", "met", "average"),
    [
        ("bct", "top1", 3, 57.52),
        ("bt2", "top1", 6, 61.69),
        ("bct", "mAP", 5, 44.96),
        ("bt2", "mAP", 6, 47.72),
    ],
)
def test_published_series(method, metric, met, average):
    matrix = published(method, metric)
    assert matrix.average_compatibility() == (met, 6, met / 6)
    assert str(matrix.average_compatibility()) == f"{met}/6"
    assert matrix.average_metric() == pytest.approx(average, abs=0.005)


def test_criterion_is_strict_and_names_the_pairs():
    # res/alex 46.0 is below alex/alex 46.6; res/vgg and vit/vgg are below vgg/vgg 58.4.
    verdicts = published("bct", "top1").criterion()
    assert [pair for pair, met in verdicts.items() if not met] == [(2, 0), (2, 1), (3, 1)]
    assert list(verdicts) == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    tie = CompatibilityMatrix(["a", "b"], {(0, 0): 0.5, (1, 0): 0.5, (1, 1): 0.9})
    assert tie.average_compatibility().met == 0


@pytest.mark.parametrize(
    ("new_old", "old_old", "independent", "gain"),
    [(25.0, 33.6, 62.7, -29.6), (38.7, 33.6, 62.7, 17.5), (44.3, 40.9, 67.9, 12.6), (44.4, 40.9, 67.9, 13.0)],
)
def test_published_update_gains(new_old, old_old, independent, gain):
    assert 100 * update_gain(new_old, old_old, independent) == pytest.approx(gain, abs=0.05)


def test_update_gain_without_anything_to_gain():
    assert update_gain(0.5, 0.4, 0.4) is None
    assert update_gain(0.5, 0.4, 0.3) is None


def test_published_taxes():
    assert compatibility_tax(62.7, 60.0) == pytest.approx(2.7)
    assert compatibility_tax(62.7, 62.4) == pytest.approx(0.3)


def test_an_array_is_as_good_as_a_mapping():
    values = np.array([[0.5, 99.0], [0.6, 0.7]])
    matrix = CompatibilityMatrix(["a", "b"], values, "mAP")
    assert np.isnan(matrix.values[0, 1])  # values above the diagonal are ignored
    assert matrix[1, 0] == 0.6
    assert matrix.average_metric() == pytest.approx(0.6)
    assert json.loads(json.dumps(matrix.to_dict())) == {
        "metric": "mAP",
        "versions": ["a", "b"],
        "entries": {"a/a": 0.5, "b/a": 0.6, "b/b": 0.7},
        "criterion": {"b/a": True},
        "average_compatibility": 1.0,
        "average_metric": pytest.approx(0.6),
    }


def test_one_version_alone():
    matrix = CompatibilityMatrix(["a"], [[0.5]])
    assert matrix.average_metric() == 0.5
    assert matrix.to_dict()["average_compatibility"] is None
    assert "AC" not in matrix.format()
    with pytest.raises(DataError, match="a is the only version"):
        matrix.average_compatibility()


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        ([], {}, "at least one"),
        (["a", "a"], np.zeros((2, 2)), "its own name"),
        (["a", "b"], {(0, 0): 1.0, (1, 1): 1.0}, "the entry b/a is missing"),
        (["a", "b"], {(0, 1): 1.0}, r"\(0, 1\) is no entry"),
        (["a", "b"], {(2, 0): 1.0}, r"\(2, 0\) is no entry"),
        (["a", "b"], np.zeros((3, 3)), r"need a \(2, 2\) matrix, but it is \(3, 3\)"),
        (["a"], [[float("nan")]], "the entry a/a is missing"),
    ],
)
def test_refuses_incomplete_matrices(names, values, message):
    with pytest.raises(DataError, match=message):
        CompatibilityMatrix(names, values)


def test_format():
    matrix = CompatibilityMatrix(["v|1", "v2"], {(0, 0): 0.5, (1, 0): 0.4, (1, 1): 0.75}, "mAP")
    plain = matrix.format().splitlines()
    assert plain == [
        "query \\ gallery (mAP)     v|1    v2",
        "v|1                      50.0",
        "v2                     40.0 x  75.0",
        "",
        "AC 0/1 (x: does not beat the gallery's own model)",
        "AM 55.00",
    ]
    assert matrix.format(markdown=True).splitlines() == [
        "| query \\ gallery (mAP) | v\\|1 | v2 |",
        "|---|---:|---:|",
        "| v\\|1 | 50.0 |  |",
        "| v2 | 40.0 x | 75.0 |",
        "",
        "- AC 0/1 (x: does not beat the gallery's own model)",
        "- AM 55.00",
    ]
    assert "46.6" in published("bt2", "top1").format(scale=1)


def test_prefix_vectors():
    queries, gallery = torch.tensor([[3.0, 4.0, 12.0]]), np.array([[0.0, 2.0]], dtype=np.float32)
    left, right = prefix_vectors(queries, gallery)
    torch.testing.assert_close(left, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(right, torch.tensor([[0.0, 1.0]]))
    right, left = prefix_vectors(gallery, queries)
    torch.testing.assert_close(left, torch.tensor([[0.6, 0.8]]))
    with pytest.raises(DataError, match="gallery is empty"):
        prefix_vectors(queries, torch.empty(0, 2))


def test_matrix_of_versions_against_single_evaluations():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 5
    centres = torch.randn(5, 12, generator=generator)
    noise = torch.randn(60, 12, generator=generator)
    versions = {
        "v1": (centres[labels] + 2.0 * noise)[:, :6],
        "v2": (centres[labels] + 1.5 * noise)[:, :8],
        "v3": centres[labels] + noise,
    }
    matrices = compatibility_matrix(versions, labels)
    assert list(matrices) == ["top1", "top5", "mAP"]
    for i, query in enumerate(versions.values()):
        own = evaluate_labels(query, labels)
        assert matrices["mAP"][i, i] == pytest.approx(own.mean_average_precision)
        for j, gallery in enumerate(list(versions.values())[: i + 1]):
            cut = evaluate_labels(
                query[:, : gallery.shape[1]],
                labels,
                gallery,
                labels,
                query_ids=range(60),
                gallery_ids=range(60),
            )
            assert matrices["top5"][i, j] == cut.cmc[5]
            assert matrices["mAP"][i, j] == pytest.approx(cut.mean_average_precision, abs=1e-6)
    assert matrices["mAP"].average_compatibility().pairs == 3


def test_a_rotated_model_is_incompatible_and_its_rotation_back_is_not():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 8
    old = torch.randn(8, 16, generator=generator)[labels] + torch.randn(80, 16, generator=generator)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    matrix = compatibility_matrix(
        {"old": old, "turned": old @ rotation, "back": old @ rotation @ rotation.T}, labels
    )
    values = matrix["mAP"]
    assert values[1, 0] < values[0, 0] - 0.2
    assert values[1, 1] == pytest.approx(values[0, 0], abs=1e-6)
    assert values[2, 0] == pytest.approx(values[0, 0], abs=1e-6)


def test_matrix_refuses_other_images():
    with pytest.raises(DataError, match=r"\{'a': 4, 'b': 3\} vectors; embed the same images"):
        compatibility_matrix({"a": torch.eye(4), "b": torch.ones(3, 4)}, [0, 0, 1, 1])
    with pytest.raises(DataError, match="no versions"):
        compatibility_matrix({}, [])


def test_over_seeds():
    values = [0.50, 0.52, 0.48, 0.55, 0.45]
    interval = over_seeds(values)
    assert interval.estimate == pytest.approx(0.5)
    assert 0.45 <= interval.low < 0.5 < interval.high <= 0.55
    assert over_seeds(values) == interval
    # Seeds that differ much, but always in the same direction: only pairing shows it.
    better = [value + 0.01 for value in values]
    paired = difference_over_seeds(better, values)
    assert paired.estimate == pytest.approx(0.01)
    assert paired.low > 0.009
    assert over_seeds(better).low < interval.high


def test_over_seeds_refuses():
    with pytest.raises(DataError, match="at least two values, got 1"):
        over_seeds([0.5])
    with pytest.raises(DataError, match="3 values and 2 to compare with"):
        difference_over_seeds([1, 2, 3], [1, 2])
    with pytest.raises(ConfigError, match="confidence"):
        over_seeds([0.5, 0.6], confidence=1.0)
