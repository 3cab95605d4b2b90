"""Class prototypes: means of what the old model says, and classes of which it says nothing."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import xbt.heads.losses as module
from xbt.errors import ConfigError, DataError
from xbt.heads import BCTHead, BCTLoss, Prototypes, Targets, class_prototypes
from xbt.heads.losses import influence
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore


def drawn(n=103, dim=6, n_classes=7):
    return normalize(torch.randn(n, dim) + 0.3, dim=1), torch.randint(n_classes, (n,))


def test_are_the_means_of_the_classes_as_given():
    features, labels = drawn()
    prototypes = class_prototypes(features, labels, 7)
    for each in range(7):
        mean = features[labels == each].double().mean(dim=0)
        assert (prototypes.vectors[each] - mean).abs().max() <= 1e-6
        assert prototypes.counts[each] == (labels == each).sum()
    assert prototypes.vectors.norm(dim=1).max() < 1  # not normalised
    assert prototypes.vectors.dtype == torch.float32
    assert (len(prototypes), prototypes.dim) == (7, 6)


def test_tensors_arrays_stores_and_any_block_agree(tmp_path, monkeypatch):
    features, labels = drawn()
    whole = class_prototypes(features, labels, 7)
    store = EmbeddingStore.create(
        tmp_path / "old",
        modality="image",
        space=EmbeddingSpace("old", 6, normalisation="none"),
        dtype="float32",
    )
    store.append(features, [str(row) for row in range(len(features))])
    monkeypatch.setattr(module, "_BLOCK_ROWS", 10)
    for given in (features, features.numpy(), store):
        blocked = class_prototypes(given, labels.numpy(), 7)
        torch.testing.assert_close(blocked.vectors, whole.vectors, rtol=0, atol=1e-7)
        assert torch.equal(blocked.counts, whole.counts)


def test_many_rows_of_one_class_do_not_drift():
    features = torch.full((50_000, 2), 0.1)
    prototypes = class_prototypes(features, torch.zeros(50_000, dtype=torch.int64), 1)
    assert torch.equal(prototypes.vectors, torch.full((1, 2), 0.1))


def test_classes_without_samples_are_named_and_left_out():
    features, labels = drawn(n_classes=3)
    with pytest.warns(UserWarning, match=r"7 of 10 classes have no sample .*: 3, 4, 5, 6, 7, …;"):
        prototypes = class_prototypes(features, labels, 10)
    assert torch.isfinite(prototypes.vectors).all()
    assert prototypes.present.shape == (3, 6)
    directions = normalize(torch.randn(8, 6), dim=1)
    chosen = torch.arange(8) % 3
    for smoothing in (0.0, 0.1):
        lean = influence(directions, class_prototypes(features, labels, 3), chosen, smoothing)
        torch.testing.assert_close(influence(directions, prototypes, chosen, smoothing), lean)
        assert torch.isfinite(lean)


def test_classes_in_the_middle_may_be_empty():
    features = torch.eye(3)
    with pytest.warns(UserWarning, match="2 of 5 classes have no sample and so no prototype: 1, 3; they"):
        prototypes = class_prototypes(features, torch.tensor([0, 2, 4]), 5)
    assert prototypes.columns(torch.tensor([4, 0, 2])).tolist() == [2, 0, 1]
    assert torch.equal(prototypes.present, features)


def test_a_label_without_prototype_is_one_sentence():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prototypes = class_prototypes(torch.eye(3), torch.tensor([0, 2, 4]), 5)
    head = BCTHead(3, 3, n_classes=6)
    output = head(torch.randn(2, 3))
    for label in (3, 5):
        with pytest.raises(DataError, match=f"label {label} has no prototype"):
            BCTLoss(prototypes)(output, Targets(torch.tensor([0, label])))
    with pytest.raises(DataError, match="label -1 has no prototype"):
        prototypes.columns(torch.tensor([-1]))


def test_prototypes_move_with_the_loss_and_are_no_weights():
    loss = BCTLoss(class_prototypes(torch.eye(3), torch.arange(3), 3))
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert loss.to(torch.float64).prototypes.present.dtype == torch.float64


@pytest.mark.parametrize(
    ("features", "labels", "n_classes", "error", "message"),
    [
        (torch.eye(3), torch.arange(3), 0, ConfigError, "n_classes must be at least 1, got 0"),
        (torch.eye(3), torch.arange(2), 3, DataError, r"3 vectors but labels of the shape \(2,\)"),
        (torch.eye(3), torch.eye(3).long(), 3, DataError, r"labels of the shape \(3, 3\)"),
        (torch.eye(3), torch.arange(3), 2, DataError, "label 2 in row 2 is not a class.*0 to 1"),
        (torch.eye(3), torch.tensor([0, -1, 1]), 2, DataError, "label -1 in row 1 is not a class"),
        (torch.eye(3), torch.ones(3), 2, DataError, "labels must be whole numbers, got torch.float32"),
        (torch.zeros(0, 3), torch.zeros(0).long(), 2, DataError, "no vectors to average"),
        (np.array([[1.0, math.nan]]), torch.zeros(1).long(), 1, DataError, "the old vectors has NaN.*row 0"),
        (torch.arange(3), torch.arange(3), 3, DataError, "floating point"),
    ],
)
def test_unusable_input_is_refused(features, labels, n_classes, error, message):
    with pytest.raises(error, match=message):
        class_prototypes(features, labels, n_classes)


@pytest.mark.parametrize(
    ("vectors", "counts", "message"),
    [
        (torch.eye(3), torch.ones(2), r"3 prototypes but counts of the shape \(2,\)"),
        (torch.eye(3), torch.zeros(3), "none of the 3 classes has samples"),
        (torch.full((1, 2), math.nan), torch.ones(1), "prototypes has NaN"),
    ],
)
def test_unusable_prototypes_are_refused(vectors, counts, message):
    with pytest.raises(DataError, match=message):
        Prototypes(vectors, counts)
