from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from xbt.errors import ConfigError, SpaceMismatchError
from xbt.evaluation import recall_at_k
from xbt.projections import LinearProjection, ResidualProjection, pair_tuning
from xbt.projections.ensemble import Linear, QueryEnsemble
from xbt.projections.pair_tuning import tune_on_pairs
from xbt.projections.pairs import PairVectors
from xbt.space import EmbeddingSpace


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=-1)


def world(n=300, captions=3, images=True, old_dim=16, new_dim=20):
    """Queries that a linear map, the same for both models, has taken away from where they belong."""
    bent = torch.eye(old_dim) + 0.8 * torch.randn(old_dim, old_dim) / old_dim**0.5
    rotation = torch.linalg.qr(torch.randn(new_dim, new_dim))[0][:, :old_dim]
    gallery, owner = unit(torch.randn(n, old_dim)), torch.arange(n).repeat_interleave(captions)

    def noisy(rows):
        return rows + 1.4 * torch.randn(rows.shape) / old_dim**0.5

    pairs = PairVectors(
        noisy(gallery[owner]) @ bent @ rotation.T,
        noisy(gallery[owner]) @ bent,
        gallery,
        owner,
        noisy(gallery) @ bent @ rotation.T if images else None,
    )
    projection = LinearProjection.from_weight(rotation.T)
    projection.set_spaces(EmbeddingSpace("new", new_dim), EmbeddingSpace("old", old_dim))
    return pairs.subset(range(n // 2)), pairs.subset(range(n // 2, n)), projection


def recalls(pairs, projection, ensemble=None):
    found = []
    for direction in pairs.directions:
        new, old = pairs.queries(direction)
        query = projection(new) if ensemble is None else ensemble(old, projection.project(new), direction)
        found += recall_at_k(query, pairs.gallery(direction), pairs.positives(direction)).values()
    return torch.tensor(found)


def test_better_than_the_midpoint_on_held_out_pairs():
    train, test, projection = world()
    tuned = tune_on_pairs(projection, train, penalty=1.0)
    before = recalls(test, projection, QueryEnsemble.midpoint(16))
    assert recalls(test, projection, tuned).mean() > before.mean() + 0.02
    assert tuned.directions == {"T2I": Linear(0.5), "I2T": Linear(0.5)}
    assert tuned.old_space is projection.old_space
    for name in ("old_matrix", "new_matrix"):
        assert torch.equal(tuned.tensors("T2I")[name], tuned.tensors("I2T")[name])
        assert tuned.tensors("T2I")[name].abs().max() > 0


def test_without_the_old_query_it_is_another_linear_map():
    train, test, projection = world()
    weight = projection.weight.detach().clone()
    tuned = tune_on_pairs(projection, train, use_old=False, penalty=1.0)
    assert isinstance(tuned, LinearProjection)
    assert tuned.foldable
    assert (tuned.new_space.model, tuned.old_space.model) == ("new", "old")
    assert torch.equal(projection.weight, weight)
    assert recalls(test, tuned).mean() > recalls(test, projection).mean() + 0.02
    # The same as an ensemble, for a projection that is more than a matrix.
    curved = ResidualProjection(20, 16)
    with torch.no_grad():
        curved.weight.copy_(weight)
    ensemble = tune_on_pairs(curved.eval(), train, use_old=False, penalty=1.0)
    assert ensemble.directions["T2I"] == Linear(1.0, with_old=False)
    assert not ensemble.needs_old("I2T")
    query = ensemble(None, projection(test.new_texts), "T2I")
    torch.testing.assert_close(query, tuned(test.new_texts), atol=1e-5, rtol=0)


def test_no_steps_are_the_weighted_mean():
    train, _, projection = world()
    start = tune_on_pairs(projection, train, steps=0, beta={"T2I": 0.3, "I2T": 0.6})
    u, v = train.old_texts, projection(train.new_texts)
    torch.testing.assert_close(start(u, v, "T2I"), unit(0.7 * u + 0.3 * v))
    assert start.directions["I2T"].beta == 0.6


def test_a_heavy_penalty_keeps_it_near_the_start():
    train, _, projection = world()
    sizes = [
        tune_on_pairs(projection, train, penalty=p).tensors("T2I")["new_matrix"].norm()
        for p in (0.1, 10, 1e4)
    ]
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2]


def test_the_loss_is_the_documented_one():
    train, _, projection = world(24)
    a, b = (0.1 * torch.randn(16, 16) for _ in range(2))
    matrices = [b.clone(), a.clone()]
    for each in matrices:
        each.grad = torch.zeros(16, 16)
    expected, slope = 0.0, [each.double().requires_grad_() for each in matrices]
    for direction in train.directions:
        new, u = (each.double().numpy() for each in (projection(train.queries(direction)[0]).detach(),
                                                     train.queries(direction)[1]))  # fmt: skip
        q = 0.5 * u + 0.5 * new + u @ a.numpy().T + new @ b.numpy().T
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        logits = q @ train.gallery(direction).numpy().T / 0.05
        expected += np.mean(
            [logsumexp(row) - logsumexp(row[own])
             for row, own in zip(logits, train.positives(direction), strict=True)]
        )  # fmt: skip
    found = sum(
        pair_tuning._add_gradient(
            train, direction, train.queries(direction)[1], projection(train.queries(direction)[0]).detach(),
            0.5, matrices, 0.05,
        )
        for direction in train.directions
    )  # fmt: skip
    assert float(found) == pytest.approx(expected, rel=1e-4)
    for direction in train.directions:
        new, u = (each.double() for each in (projection(train.queries(direction)[0]).detach(),
                                             train.queries(direction)[1]))  # fmt: skip
        q = unit(0.5 * u + 0.5 * new + new @ slope[0].T + u @ slope[1].T)
        logits = q @ train.gallery(direction).double().T / 0.05
        answers = zip(logits, train.positives(direction), strict=True)
        right = torch.stack([row[own].logsumexp(0) for row, own in answers])
        (logits.logsumexp(1) - right).mean().backward()
    for each, wanted in zip(matrices, slope, strict=True):
        torch.testing.assert_close(each.grad, wanted.grad.float(), rtol=1e-4, atol=1e-5)


def test_many_pairs_are_added_up_piece_by_piece(monkeypatch):
    """The same result with logits of three queries at a time, and again on a second run."""
    train, _, projection = world()
    whole, again = (tune_on_pairs(projection, train, penalty=1.0).tensors("I2T") for _ in range(2))
    monkeypatch.setattr(pair_tuning, "LOGIT_BYTES", 4 * 3 * len(train))
    pieces = tune_on_pairs(projection, train, penalty=1.0).tensors("I2T")
    for name in ("new_matrix", "old_matrix"):
        assert torch.equal(whole[name], again[name])
        torch.testing.assert_close(pieces[name], whole[name], rtol=0, atol=1e-3)


def test_texts_alone_and_no_gradients_around():
    train, _, projection = world(images=False)
    with torch.no_grad():
        tuned = tune_on_pairs(projection, train, steps=3)
    assert list(tuned.directions) == ["T2I"]
    assert tuned.tensors("T2I")["old_matrix"].abs().max() > 0


@pytest.mark.parametrize("option", [{"temperature": 0}, {"steps": -1}, {"penalty": -0.1}])
def test_wrong_options(option):
    train, _, projection = world(20)
    with pytest.raises(ConfigError, match="pair tuning was given"):
        tune_on_pairs(projection, train, **option)


def test_wrong_inputs():
    train, _, projection = world(20)
    with pytest.raises(ConfigError, match="beta has no value for I2T"):
        tune_on_pairs(projection, train, beta={"T2I": 0.5})
    with pytest.raises(ConfigError, match=r"beta .* is 1\.5"):
        tune_on_pairs(projection, train, beta=1.5, steps=0)
    with pytest.raises(SpaceMismatchError, match="but the pairs are of 20 and 16"):
        tune_on_pairs(LinearProjection(20, 8), train)
