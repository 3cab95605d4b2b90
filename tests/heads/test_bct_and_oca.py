"""BCT and OCA: their losses against the formulas, and what OCA's orthogonal layer can and cannot change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from xbt.errors import ConfigError
from xbt.heads import (
    BCTHead,
    BCTLoss,
    BT2Loss,
    ClassificationLoss,
    HeadOutput,
    OCAHead,
    OCALoss,
    PlainHead,
    Targets,
    class_prototypes,
)
from xbt.heads.orthogonal import ORTHOGONAL_MAPS


def smoothed(scores, labels, smoothing):
    """Cross entropy with a share of the target spread over all classes, in float64 numpy."""
    scores = scores.detach().double().numpy()
    log_probabilities = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    target = np.full_like(scores, smoothing / scores.shape[1])
    target[np.arange(len(scores)), labels.numpy()] += 1 - smoothing
    return -np.mean((target * log_probabilities).sum(axis=1))


def test_classification_loss_by_hand(sample):
    head = PlainHead(6, 5)
    features, targets = sample(head)
    output = head(features)
    for smoothing in (0.0, 0.1):
        loss, parts = ClassificationLoss(smoothing)(output, targets)
        assert loss.item() == pytest.approx(smoothed(output.logits, targets.labels, smoothing), abs=1e-5)
        assert parts["classification"].item() == loss.item()


def test_bct_loss_by_hand(sample):
    head = BCTHead(12, 10, 3, n_classes=5)
    features, targets = sample(head)
    prototypes = class_prototypes(targets.old, targets.labels, 5)
    output = head(features)
    loss, parts = BCTLoss(prototypes, 3.0, 2.0, 0.2)(output, targets)
    own = smoothed(output.logits, targets.labels, 0.2)
    pull = smoothed(normalize(output.compatible, dim=1) @ prototypes.vectors.T, targets.labels, 0.2)
    assert parts["classification"].item() == pytest.approx(own, abs=1e-5)
    assert parts["influence"].item() == pytest.approx(pull, abs=1e-5)
    assert loss.item() == pytest.approx(2 * own + 3 * pull, abs=1e-4)


def test_oca_loss_by_hand(sample):
    head = OCAHead(10, 4, n_classes=5)
    features, targets = sample(head)
    prototypes = class_prototypes(targets.old, targets.labels, 5)
    output = head(features)
    loss, parts = OCALoss(prototypes, 2.0, 3.0, 4.0, 0.2)(output, targets)
    u = normalize(output.compatible, dim=1)
    own = smoothed(output.logits, targets.labels, 0.2)
    pull = smoothed(u @ prototypes.vectors.T, targets.labels, 0.2)
    wanted = normalize(prototypes.vectors[targets.labels], dim=1)
    apart = 1 - (wanted * u).sum(dim=1).mean().item()
    expected = {"classification": own, "influence": pull, "prototype": apart}
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected, abs=1e-5)
    assert loss.item() == pytest.approx(2 * own + 3 * pull + 4 * apart, abs=1e-4)


def test_defaults_are_those_of_the_authors():
    prototypes = class_prototypes(torch.eye(3), torch.arange(3), 3)
    bct, bt2, oca = BCTLoss(prototypes), BT2Loss(prototypes), OCALoss(prototypes)
    assert (bct.classification_weight, bct.influence_weight, bct.label_smoothing) == (1, 10, 0.1)
    assert (bt2.classification_weight, bt2.new_weight, bt2.influence_weight, bt2.old_weight) == (1, 1, 10, 5)
    assert (oca.classification_weight, oca.influence_weight, oca.prototype_weight) == (5, 10, 5)
    assert oca.label_smoothing == 0.1


@pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)
def test_the_orthogonal_layer_keeps_every_angle_and_folds_into_the_classifier(orthogonal_map, train):
    head = train(OCAHead(10, 4, n_classes=5, orthogonal_map=orthogonal_map))
    output = head(torch.randn(40, head.in_dim))
    gram = output.full @ output.full.T
    assert (output.features @ output.features.T - gram).abs().max() <= 1e-5
    folded = head.classifier.weight @ head.rotation.weight
    assert (output.full @ folded.T - output.logits).abs().max() <= 1e-5
    apart = torch.cdist(output.features.double(), output.features.double())
    assert (apart - torch.cdist(output.full.double(), output.full.double())).abs().max() <= 1e-5


def test_without_the_orthogonal_layer_the_classifier_sees_what_is_stored():
    output = OCAHead(10, 4, orthogonal=False)(torch.randn(5, 14))
    assert torch.equal(output.features, output.full)


def test_the_layer_is_trained_and_prototypes_are_not(sample):
    head = OCAHead(10, 4, n_classes=5)
    features, targets = sample(head)
    prototypes = class_prototypes(targets.old, targets.labels, 5)
    before = prototypes.vectors.clone()
    OCALoss(prototypes)(head(features), targets)[0].backward()
    assert head.rotation.parametrizations.weight.original.grad.abs().max() > 1e-6
    assert not any(each.requires_grad for each in prototypes.buffers())
    assert torch.equal(prototypes.vectors, before)


def test_vectors_on_their_prototype_cost_nothing():
    prototypes = class_prototypes(torch.eye(3), torch.arange(3), 3)
    output = HeadOutput(torch.eye(3), 0.4 * torch.eye(3), torch.eye(3), torch.zeros(3, 3))
    assert OCALoss(prototypes)(output, Targets(torch.arange(3)))[1]["prototype"].abs() <= 1e-6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: BCTLoss(p, -1.0), "influence_weight must be a number of at least 0, got -1.0"),
        (lambda p: BCTLoss(p, 0.0, 0.0), "influence_weight, classification_weight are all 0"),
        (lambda p: BT2Loss(p, old_weight=float("nan")), "old_weight must be a number of at least 0, got nan"),
        (lambda p: OCALoss(p, prototype_weight=float("inf")), "prototype_weight must be a number"),
        (lambda p: OCALoss(p, label_smoothing=1.0), r"label_smoothing must lie in \[0, 1\), got 1.0"),
        (lambda p: ClassificationLoss(-0.1), r"label_smoothing must lie in \[0, 1\), got -0.1"),
    ],
)
def test_unusable_weights_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build(class_prototypes(torch.eye(3), torch.arange(3), 3))


def test_a_loss_that_does_not_fit_the_head_is_refused():
    prototypes = class_prototypes(torch.eye(3), torch.arange(3), 3)
    targets = Targets(torch.arange(2))
    plain, no_classes = PlainHead(4, 3)(torch.randn(2, 4)), BCTHead(3, 3)(torch.randn(2, 3))
    other = BCTHead(4, 4, n_classes=3)(torch.randn(2, 4))
    with pytest.raises(ConfigError, match="has no compatible part"):
        BCTLoss(prototypes)(plain, targets)
    with pytest.raises(ConfigError, match="no classifier to train; give it n_classes"):
        BCTLoss(prototypes)(no_classes, targets)
    with pytest.raises(ConfigError, match="has 4 dimensions, but the prototypes have 3"):
        BCTLoss(prototypes)(other, targets)
