"""The loop of trained maps: what it draws, what it keeps, and what it leaves alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from xbt.batches import Draw
from xbt.errors import ConfigError, DataError
from xbt.projections import LinearProjection
from xbt.projections.pairs import PairVectors
from xbt.projections.trainer import (
    FitSchedule,
    NoisyVectors,
    fit_trained,
    pairs_score,
    split,
    text_hits,
    train,
)


class Rows:
    def __init__(self, n=10, dim=2):
        self.new = torch.arange(n, dtype=torch.float32)[:, None].repeat(1, dim)
        self.old, self.dims = -self.new, (dim, dim)

    def __len__(self):
        return len(self.new)

    def take(self, positions):
        return self.new[torch.from_numpy(positions)], self.old[torch.from_numpy(positions)]


class Line(nn.Module):
    """The loss (w − 3)², of a weight that begins at 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        return (self.w - 3) ** 2 * batch["factor"], {}


def schedule(**changes):
    return FitSchedule(
        **{"steps": 10, "batch_size": 4, "lr": 0.5, "warmup_steps": 2, "eval_every": 2, **changes}
    )


def run(line, values, **changes):
    """Trains with held-out scores that are given."""
    scores = iter(values)
    factor = {"factor": torch.tensor(changes.pop("factor", 1.0))}
    return train(line, itertools.repeat(factor), schedule(**changes), lambda: next(scores))


def drawn(positions, **changes):
    """The rows of every batch, as a fit with a schedule sees them."""
    batches = []

    def objective(projection, pairs):
        def forward(batch):
            batches.append(batch)
            return projection.weight.sum(), {}

        module = nn.Module()
        module.projection, module.forward = projection, forward
        return module

    start = LinearProjection(2, 2)
    plan = schedule(weight_decay=0.0, **changes)
    rows = Rows(len(positions))
    fit_trained(rows, lambda *_: start, objective, plan, score=lambda *_: 0.0)
    return batches


def test_an_epoch_shows_every_row_once_and_pairs_stay_together():
    batches = drawn(range(15), batch_size=6, steps=4)  # three of the fifteen are held out
    rows = [batch["new"][:, 0].tolist() for batch in batches]
    assert sorted(rows[0] + rows[1]) == sorted(rows[2] + rows[3])
    assert len(set(rows[0] + rows[1])) == 12
    assert rows[0] != rows[2]
    assert all(torch.equal(batch["new"], -batch["old"]) for batch in batches)
    again = drawn(range(15), batch_size=6, steps=4)
    assert all(torch.equal(one["new"], two["new"]) for one, two in zip(batches, again, strict=True))


def test_fewer_rows_than_a_batch_are_taken_whole():
    (batch,) = drawn(range(10), batch_size=64, steps=1)
    assert len(set(batch["new"][:, 0].tolist())) == 8


def test_the_best_step_is_kept_and_a_tie_keeps_the_earlier():
    line = Line()
    outcome = run(line, [0.1, 0.3, 0.5, 0.5, 0.2, 0.4])
    assert outcome.best_step == 4
    assert outcome.history == {0: 0.1, 2: 0.3, 4: 0.5, 6: 0.5, 8: 0.2, 10: 0.4}
    twin = Line()
    twin_outcome = run(twin, [0, 0, 1, 0, 0, 0])
    assert torch.equal(twin.w, line.w)
    assert twin_outcome.best_step == 4
    assert line.w.item() != 0


def test_step_zero_is_kept_unless_beaten():
    line = Line()
    assert run(line, [0.5] * 6).best_step == 0
    assert line.w.item() == 0


def hits(count, found):
    return torch.cat([torch.ones(found), torch.zeros(count - found)])


def test_step_zero_is_left_only_for_a_gain_above_its_error():
    saturated = [hits(192, found) for found in (190, 191, 192, 190, 191, 192)]
    assert run(Line(), saturated).best_step == 0
    outcome = run(Line(), [hits(192, found) for found in (150, 152, 156, 157, 156, 157)])
    assert outcome.best_step == 6  # once step 0 is left, the best step counts, by however little
    assert outcome.history[0] == 150 / 192
    # As many broken as fixed, but for one.
    shuffled = torch.cat([torch.zeros(20), torch.ones(171), torch.zeros(1)])
    assert run(Line(), [hits(192, 171), *[shuffled] * 5]).best_step == 0
    # Found both ways: the ways of one text are one item.
    ways = [
        torch.stack([hits(192, found), hits(192, found)], dim=1) for found in (150, 153, 150, 150, 150, 153)
    ]
    assert run(Line(), ways).best_step == 0
    assert run(Line(), [hits(1, 0), *[hits(1, 1)] * 5]).best_step == 0


def test_the_last_step_is_judged_and_training_converges():
    line = Line()
    outcome = run(line, range(30), steps=101, eval_every=50)
    assert list(outcome.history) == [0, 50, 100, 101]
    assert line.w.item() == pytest.approx(3, abs=0.1)


def test_learning_rate():
    plan = schedule(steps=12, warmup_steps=2, lr=1.0)
    rates = [plan.lr_factor(step) for step in range(13)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_a_loss_that_is_not_finite_is_named():
    with pytest.raises(DataError, match=r"loss is NaN or infinite at step 1; lower lr \(now 0.5\)"):
        run(Line(), [0.0] * 6, factor=float("nan"))
    with pytest.raises(DataError, match=r"weights are NaN or infinite at step 1; lower lr \(now 1e\+38\)"):
        run(Line(), [0.0] * 6, lr=1e38, factor=1e30, grad_clip=0.0, steps=1, warmup_steps=0)


def test_global_generators_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    data = NoisyVectors(Rows(), np.arange(10), 0, noise=0.5)
    data.__getitems__([Draw(0, position, position) for position in range(4)])
    run(Line(), [0.0] * 6)
    split(100, 10, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == state).all()


def test_split_holds_out_at_most_a_fifth():
    chosen, held_out = split(100, 2000, seed=1)
    assert (len(chosen), len(held_out)) == (80, 20)
    assert sorted([*chosen, *held_out]) == list(range(100))
    assert len(split(100, 7, seed=1)[1]) == 7
    with pytest.raises(DataError, match="at least 5 rows, of which it holds some out, and got 4"):
        split(4, 1, 0)


def test_scores_by_hand():
    vectors = normalize(torch.randn(20, 6), dim=1)
    identity = LinearProjection(6, 6)
    assert text_hits(identity, vectors, vectors).mean() == 1
    # Equal vectors tie, which counts against us; the other way round one row is nearest to all.
    assert text_hits(identity, vectors, torch.ones(20, 6)).sum(dim=0).tolist() == [0, 1]
    pairs = PairVectors(vectors, vectors, vectors[:10], torch.arange(20) % 10, vectors[:10])
    assert (
        pairs_score(identity, pairs) > 0.5
    )  # an image finds its first text, which is itself; half the texts
    texts_only = PairVectors(vectors[:10], vectors[:10], vectors[:10], torch.arange(10))
    assert pairs_score(identity, texts_only) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"held_out": 0}, "held_out must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"lr": float("nan")}, "lr must be a number of at least 0, got nan"),
        ({"grad_clip": -1.0}, "grad_clip must be a number of at least 0"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
    ],
)
def test_settings_are_checked(changes, words):
    with pytest.raises(ConfigError, match=words):
        schedule(**changes)
