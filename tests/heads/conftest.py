"""Heads of every kind, and a few steps of training that leave nothing where it was."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from xbt.heads import BCTLoss, BT2Loss, ClassificationLoss, OCALoss, Targets, class_prototypes, make_head

OPTIONS = {
    "independent": {"dim": 12, "n_classes": 5},
    "bct": {"new_dim": 12, "old_dim": 10, "extra_dims": 3, "n_classes": 5},
    "bt2": {"new_dim": 12, "old_dim": 10, "extra_dims": 4, "scale": 2.0, "n_classes": 5},
    "oca": {"old_dim": 10, "extra_dims": 4, "n_classes": 5},
}


@pytest.fixture(params=list(OPTIONS))
def kind(request):
    """The four kinds of heads."""
    return request.param


@pytest.fixture
def options():
    """Options of a head of each kind."""
    return OPTIONS


@pytest.fixture
def head(kind):
    """A head of each kind."""
    return make_head(kind, OPTIONS[kind])


@pytest.fixture
def sample():
    """Draws n features for a head, and targets that fit it."""

    def draw(head, n=40, seed=0):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(n, head.in_dim, generator=generator)
        labels = torch.arange(n) % (head.n_classes or 5)
        old = normalize(torch.randn(n, head.old_dim or 3, generator=generator), dim=1)
        new = normalize(torch.randn(n, getattr(head, "new_dim", head.in_dim), generator=generator), dim=1)
        return features, Targets(labels, old, new)

    return draw


@pytest.fixture
def loss_of():
    """The loss that belongs to a head."""

    def build(head, targets):
        if head.kind == "independent":
            return ClassificationLoss()
        prototypes = class_prototypes(targets.old, targets.labels, head.n_classes)
        return {"bct": BCTLoss, "bt2": BT2Loss, "oca": OCALoss}[head.kind](prototypes)

    return build


@pytest.fixture
def train(sample, loss_of):
    """Trains a head for some steps of a learning rate that moves everything; calls ``seen`` after each."""

    def run(head, steps=30, lr=3e-2, seen=lambda: None):
        features, targets = sample(head)
        loss = loss_of(head, targets)
        optimizer = torch.optim.Adam(head.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(head(features), targets)[0].backward()
            optimizer.step()
            seen()
        return head

    return run
