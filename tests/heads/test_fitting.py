"""Fitting heads on vectors: it learns, its seed fixes it, and it refuses what it cannot use."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from xbt.errors import ConfigError, DataError
from xbt.heads import (
    BT2Head,
    BT2Loss,
    ClassificationLoss,
    EpochSchedule,
    PlainHead,
    Targets,
    class_prototypes,
    fit_on_vectors,
)


def fit(*arguments, **schedule):
    return fit_on_vectors(*arguments, schedule=EpochSchedule(**schedule))


def toy(n=120, n_classes=4):
    labels = torch.arange(n) % n_classes
    return nn.functional.one_hot(labels, 8).float() + 0.3 * torch.randn(n, 8), labels


def test_every_kind_learns_its_classes(head, sample, loss_of):
    _, targets = sample(head, 120)
    inputs = nn.functional.one_hot(targets.labels, 8).float() + 0.2 * torch.randn(120, 8)
    module = nn.Linear(8, head.in_dim)
    first = loss_of(head, targets)(head(module(inputs)), targets)[0]
    assert fit(module, head, loss_of(head, targets), inputs, targets, epochs=60, lr=1e-2) is head
    assert not head.training
    assert not module.training
    output = head(module(inputs))
    assert loss_of(head, targets)(output, targets)[0] < first
    assert (output.logits.argmax(dim=1) == targets.labels).float().mean() > 0.9


def test_a_head_can_read_the_inputs_itself():
    head = BT2Head(5, 3, 2, n_classes=4)
    inputs, labels = toy()
    old, new = torch.randn(120, 3), torch.randn(120, 5)
    before = head.code.weight.detach().clone()
    loss = BT2Loss(class_prototypes(old, labels, 4))
    fit(None, head, loss, inputs, Targets(labels, old, new), epochs=2)
    assert not torch.equal(head.code.weight, before)


def test_the_seed_fixes_every_byte_and_nothing_else_is_drawn():
    inputs, labels = toy()

    def run(seed):
        torch.manual_seed(1)
        head = PlainHead(8, 4)
        state = torch.get_rng_state()
        fit(None, head, ClassificationLoss(), inputs, Targets(labels), epochs=3, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return head.classifier.weight

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
def test_weight_decay_leaves_the_rotations_alone(orthogonal_map):
    inputs, labels = toy()
    old, new = torch.randn(120, 3), torch.randn(120, 5)
    head = BT2Head(5, 3, 2, n_classes=4, orthogonal_map=orthogonal_map)
    start = head.new_rotation.weight.detach().clone()
    loss = BT2Loss(class_prototypes(old, labels, 4), 1.0, 0.0, 0.0, 0.0)  # no gradient for the rotations
    fit(None, head, loss, inputs, Targets(labels, old, new), epochs=5, lr=0.1, weight_decay=1.0)
    torch.testing.assert_close(head.new_rotation.weight, start, rtol=0, atol=1e-6)
    assert head.code.weight.abs().max() < 0.1  # while what is decayed has shrunk


def test_the_rate_warms_up_and_falls_to_nothing():
    settings = EpochSchedule(lr=1.0)
    rates = [settings.lr_at(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(rates[5:]))
    assert rates[-1] < 0.001
    assert settings.lr_at(0, 1) == 1.0


def test_fewer_rows_than_a_batch_and_batch_norm():
    inputs, labels = toy(n=65)
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    fit(module, PlainHead(8, 4), ClassificationLoss(), inputs, Targets(labels), epochs=1)
    fit(None, PlainHead(8, 4), ClassificationLoss(), inputs[:3], Targets(labels[:3]), epochs=1)


def test_a_loss_that_is_not_finite_is_refused():
    class Broken(ClassificationLoss):
        def forward(self, output, targets):
            loss, parts = super().forward(output, targets)
            return loss * math.nan, parts

    inputs, labels = toy()
    with pytest.raises(DataError, match=r"the loss is NaN or infinite in epoch 1; lower lr \(now 0.002\)"):
        fit(None, PlainHead(8, 4), Broken(), inputs, Targets(labels))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ConfigError, "epochs must be a whole number of at least 1, got 0"),
        ({"batch_size": 0}, ConfigError, "batch_size must be a whole number of at least 1"),
        ({"lr": -1.0}, ConfigError, "lr must be a number of at least 0, got -1.0"),
        ({"weight_decay": math.nan}, ConfigError, "weight_decay must be a number of at least 0, got nan"),
        ({"seed": -1}, ConfigError, "seed must be a whole number of at least 0"),
        ({"labels": torch.arange(3)}, DataError, r"120 inputs but labels of the shape \(3,\)"),
        ({"old": torch.ones(3, 2)}, DataError, "120 inputs but 3 old vectors"),
        ({"inputs": torch.full((120, 8), math.nan)}, DataError, "inputs has NaN"),
        ({"head": PlainHead(8)}, ConfigError, "nothing to train"),
    ],
)
def test_unusable_input_is_refused(change, error, message):
    inputs, labels = toy()
    parts = {"inputs": inputs, "labels": labels, "old": None, "head": PlainHead(8, 4)}
    parts |= {name: change[name] for name in parts.keys() & change.keys()}
    options = {"epochs": 3, **{name: value for name, value in change.items() if name not in parts}}
    targets = Targets(parts["labels"], parts["old"])
    with pytest.raises(error, match=message):
        fit(None, parts["head"], ClassificationLoss(), parts["inputs"], targets, **options)
