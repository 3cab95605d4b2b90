"""BT²: the head's algebra against an independent form of it, and the loss against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError
from xbt.heads import BT2Head, BT2Loss, HeadOutput, Targets, class_prototypes
from xbt.heads.orthogonal import ORTHOGONAL_MAPS

SHAPES = [(8, 8, 2), (8, 8, 0), (8, 8, 8), (10, 6, 3), (10, 6, 0), (6, 9, 3), (6, 9, 5)]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_hand(head, features):
    """Step by step in float64 numpy, with the matrices as they are."""
    h = features.double().numpy()
    p, q = (each.weight.detach().double().numpy() for each in (head.new_rotation, head.old_rotation))
    f = unit(h[:, : head.new_dim])
    parts = [head.scale * f @ p.T]
    if head.extra_dims:
        weight, bias = (each.detach().double().numpy() for each in head.code.parameters())
        parts.insert(0, unit(np.maximum(h, 0) @ weight.T + bias))
    z = np.concatenate(parts, axis=1)
    return f, np.concatenate([z[:, : head.old_dim] @ q.T, z[:, head.old_dim :]], axis=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_what_the_formula_says(shape, train):
    head = train(BT2Head(*shape, scale=1.5, n_classes=5))
    features = torch.randn(30, head.in_dim)
    seen, full = by_hand(head, features)
    output = head(features)
    np.testing.assert_allclose(output.features.detach().numpy(), seen, atol=1e-5)
    np.testing.assert_allclose(output.full.detach().numpy(), full, atol=1e-5)


@pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0, 5.0])
def test_norm_and_what_is_retained(shape, scale, orthogonal_map, train):
    head = train(BT2Head(*shape, scale=scale, n_classes=5, orthogonal_map=orthogonal_map), steps=5)
    features = torch.randn(50, head.in_dim)
    output = head(features)
    expected = (scale**2 + (head.extra_dims > 0)) ** 0.5
    assert (output.full.norm(dim=1) / expected - 1).abs().max() <= 1e-5
    assert (head.unrotate(output.full) - output.features).abs().max() <= 1e-5


def test_angles_are_those_of_the_code_and_of_the_features(train):
    head = train(BT2Head(12, 10, 4, n_classes=5))
    features = torch.randn(40, head.in_dim)
    output = head(features)
    code = normalize(head.code(features.relu()), dim=1)
    expected = code @ code.T + head.scale**2 * output.features @ output.features.T
    assert (output.full @ output.full.T - expected).abs().max() <= 1e-5


def test_loss_is_what_the_formula_says(sample):
    head = BT2Head(12, 10, 4, n_classes=5)
    features, targets = sample(head)
    prototypes = class_prototypes(targets.old, targets.labels, 5)
    loss, parts = BT2Loss(prototypes, 0.5, 2.0, 3.0, 4.0)(head(features), targets)
    seen, full = by_hand(head, features)
    b, labels = unit(full[:, :10]), targets.labels.numpy()
    logits = seen @ head.classifier.weight.detach().double().numpy().T
    means = np.stack([targets.old.double().numpy()[labels == each].mean(axis=0) for each in range(5)])

    def cross_entropy(scores):
        return np.mean(np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(scores)), labels])

    expected = {
        "classification": cross_entropy(logits),
        "influence": cross_entropy(b @ means.T),
        "new": 1 - np.mean((seen * targets.new.numpy()).sum(axis=1)),
        "old": 1 - np.mean((b * targets.old.numpy()).sum(axis=1)),
    }
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected, abs=1e-5)
    total = sum(
        weight * expected[name]
        for name, weight in (("classification", 0.5), ("new", 2), ("influence", 3), ("old", 4))
    )
    assert loss.item() == pytest.approx(total, abs=1e-4)
    assert all(not part.requires_grad for part in parts.values())


@pytest.mark.parametrize("term", ["influence_weight", "old_weight"])
@pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)
def test_gradients_reach_both_rotations_and_no_teacher(term, orthogonal_map, sample):
    head = BT2Head(12, 10, 4, n_classes=5, orthogonal_map=orthogonal_map)
    features, targets = sample(head)
    prototypes = class_prototypes(targets.old, targets.labels, 5)
    weights = {"classification_weight": 0, "new_weight": 1, "influence_weight": 0, "old_weight": 0, term: 1}
    loss = BT2Loss(prototypes, **weights)
    old, new = (each.clone().requires_grad_() for each in (targets.old, targets.new))
    loss(head(features), Targets(targets.labels, old, new))[0].backward()
    for rotation in (head.new_rotation, head.old_rotation):
        assert rotation.parametrizations.weight.original.grad.abs().max() > 1e-6
    assert head.code.weight.grad.abs().max() > 1e-6
    assert old.grad is None
    assert new.grad is None
    assert not list(prototypes.parameters())
    assert not prototypes.vectors.requires_grad


def test_what_is_already_there_costs_nothing(sample):
    head = BT2Head(12, 10, 4, n_classes=5)
    _, targets = sample(head)
    prototypes = class_prototypes(targets.old, targets.labels, 5)
    output = HeadOutput(targets.new, 3 * targets.old, torch.zeros(1), torch.zeros(40, 5))
    _, parts = BT2Loss(prototypes)(output, targets)
    assert parts["old"].abs() <= 1e-6
    assert parts["new"].abs() <= 1e-6
    # Old vectors that are not of unit length, such as the whole vectors of an older BT² model.
    _, again = BT2Loss(prototypes)(output, Targets(targets.labels, 5 * targets.old, targets.new))
    torch.testing.assert_close(again["old"], parts["old"])


def test_the_influence_of_prototypes_is_bounded_below():
    prototypes = class_prototypes(torch.eye(100), torch.arange(100), 100)
    output = HeadOutput(torch.eye(100), torch.eye(100), torch.eye(100), torch.zeros(100, 100))
    targets = Targets(torch.arange(100), torch.eye(100), torch.eye(100))
    influence = BT2Loss(prototypes)(output, targets)[1]["influence"].item()
    assert influence == pytest.approx(np.log(np.e + 99) - 1)
    assert influence > np.log(1 + 99 * np.exp(-2))


def test_a_weight_of_zero_needs_no_teacher(sample):
    head = BT2Head(12, 10, 4, n_classes=5)
    features, targets = sample(head)
    prototypes = class_prototypes(targets.old, targets.labels, 5)
    output, bare = head(features), Targets(targets.labels)
    _, parts = BT2Loss(prototypes, new_weight=0, old_weight=0)(output, bare)
    assert set(parts) == {"classification", "influence"}
    with pytest.raises(DataError, match="needs the new vectors of every row"):
        BT2Loss(prototypes)(output, bare)
    with pytest.raises(DataError, match="needs the old vectors of every row"):
        BT2Loss(prototypes, new_weight=0)(output, bare)
    with pytest.raises(ConfigError, match=r"the new vectors have the shape \(40, 3\), but .* \(40, 12\)"):
        BT2Loss(prototypes)(output, Targets(targets.labels, targets.old, torch.ones(40, 3)))
