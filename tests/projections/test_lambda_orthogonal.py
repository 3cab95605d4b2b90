"""λ-orthogonal maps: the limits of λ, the closed form they begin at, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError
from xbt.projections import LinearProjection, Projection, fit_procrustes, fit_projection
from xbt.projections.objective import LambdaOrthogonalObjective, TextLoss, distance_from_orthogonal
from xbt.projections.trainer import text_hits

QUICK = {"batch_size": 256, "lr": 3e-3, "warmup_steps": 5, "eval_every": 25}


def fit_lambda_orthogonal(new, old, **options):
    return fit_projection(new, old, "lambda_orthogonal", **options)


def stretched(n=1200, new_dim=24, old_dim=16, noise=0.03):
    """Old vectors that are the new ones turned, stretched and moved: a rotation cannot do that."""
    new = normalize(torch.randn(n, new_dim), dim=1)
    frame = torch.linalg.qr(torch.randn(max(new_dim, old_dim), min(new_dim, old_dim)))[0]
    turned = new @ (frame if new_dim >= old_dim else frame.T)
    old = turned * torch.logspace(0, -1.2, old_dim) + 0.2
    return new, normalize(old + noise * torch.randn(n, old_dim) / old_dim**0.5, dim=1)


@pytest.mark.parametrize("dims", [(24, 16), (16, 16), (12, 16)])
def test_lambda_bounds_how_far_the_matrix_goes(dims):
    new, old = stretched(new_dim=dims[0], old_dim=dims[1])
    distances = []
    for lam in (0.0, 0.5, math.inf):
        projection = fit_lambda_orthogonal(new, old, lam=lam, steps=150, **QUICK)
        assert projection.bias is not None  # a later step than the closed form was kept
        distances.append(distance_from_orthogonal(projection.weight).item())
    assert distances[0] < 0.1
    assert distances[1] < 0.6
    assert distances[0] < distances[1] < distances[2]
    assert distances[2] > 0.8


def test_a_larger_weight_holds_zero_better():
    new, old = stretched()
    loose, tight = (
        distance_from_orthogonal(
            fit_lambda_orthogonal(new, old, lam=0.0, orthogonality_weight=weight, steps=100, **QUICK).weight
        )
        for weight in (1.0, 100.0)
    )
    assert tight < loose / 3


def test_distance_by_hand():
    assert distance_from_orthogonal(torch.eye(3, 5)) == 0
    assert distance_from_orthogonal(torch.eye(5, 3)) == 0
    assert distance_from_orthogonal(2 * torch.eye(2)).item() == pytest.approx(3 * math.sqrt(2))
    single = torch.ones(1, 1, requires_grad=True)
    distance_from_orthogonal(single).backward()
    assert single.grad.isfinite().all()  # a norm has no derivative at 0


def test_loss_by_hand():
    projection = LinearProjection.from_weight(2 * torch.eye(3), torch.zeros(3))
    batch = {"new": torch.eye(3), "old": torch.eye(3)}
    for lam, expected in ((0.0, 10 * 27.0), (1.0, 10 * (27**0.5 - 1) ** 2), (6.0, 0.0), (math.inf, 0.0)):
        objective = LambdaOrthogonalObjective(projection, TextLoss(contrastive_weight=0.0), lam, 10.0)
        loss, parts = objective(batch)
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert parts["cosine"].abs() < 1e-6
        projection.zero_grad()
        loss.backward()
        assert projection.weight.grad.isfinite().all()


def test_training_improves_what_was_never_seen_and_step_zero_is_procrustes():
    new, old = stretched(1500)
    start = fit_lambda_orthogonal(new[:1200], old[:1200], steps=0)
    assert torch.equal(start.weight, fit_procrustes(new[:1200], old[:1200]).weight)
    assert start.foldable
    trained = fit_lambda_orthogonal(new[:1200], old[:1200], lam=math.inf, steps=150, **QUICK)
    before, after = (text_hits(each, new[1200:], old[1200:]).mean() for each in (start, trained))
    assert after > before + 0.05


def test_step_zero_is_kept_when_training_cannot_help():
    new, _ = stretched()
    frame = torch.linalg.qr(torch.randn(24, 16))[0]
    old = normalize(new @ frame, dim=1)
    projection = fit_lambda_orthogonal(new, old, steps=20, **{**QUICK, "lr": 10.0})
    assert projection.foldable
    assert torch.equal(projection.weight, fit_procrustes(new, old).weight)


def test_seed_fixes_every_byte_and_it_is_saved(tmp_path):
    new, old = stretched(300)
    first, second = (
        fit_lambda_orthogonal(new, old, steps=25, contrastive_weight=0.5, relational_weight=1.0, **QUICK)
        for _ in range(2)
    )
    assert torch.equal(first.weight, second.weight)
    first.save_pretrained(tmp_path)
    assert torch.equal(Projection.from_pretrained(tmp_path)(new), first(new))


@pytest.mark.parametrize("dims", [(1, 1), (1, 4), (4, 1)])
def test_dimensions_of_one_and_constant_rows(dims):
    new, old = torch.ones(20, dims[0]), torch.ones(20, dims[1])
    projection = fit_lambda_orthogonal(new, normalize(old, dim=1), steps=5, lam=0.0)
    torch.testing.assert_close(projection(new), normalize(old, dim=1))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lam": -1.0}, ConfigError, "lam and orthogonality_weight must be at least 0, got -1.0 and 10.0"),
        ({"lam": math.nan}, ConfigError, "lam"),
        ({"orthogonality_weight": math.inf}, ConfigError, "orthogonality_weight"),
        ({"cosine_weight": 0.0}, ConfigError, "are all 0"),
        ({"n": 3}, DataError, "at least 5 rows"),
        ({"nan": 8}, DataError, "old vectors has NaN.*row 8"),
    ],
)
def test_wrong_input_is_one_sentence(change, error, words):
    options = {**QUICK, "steps": 5, **change}
    new, old = stretched(options.pop("n", 40))
    if "nan" in options:
        old[options.pop("nan")] = math.nan
    with pytest.raises(error, match=words):
        fit_lambda_orthogonal(new, old, **options)
