"""Drift-Adapter's MLP: its formula, its start, and that it only replaces the closed form if it is better."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, normalize

from xbt.errors import ConfigError, DataError
from xbt.projections import Projection, ResidualProjection, fit_procrustes
from xbt.projections.mlp import fit_mlp
from xbt.projections.trainer import text_score

QUICK = {"hidden_dim": 32, "batch_size": 256, "lr": 3e-3, "warmup_steps": 5, "eval_every": 25}


def bent(n=1200, new_dim=24, old_dim=16):
    """New vectors that bend the old ones: more than a linear map can undo."""
    old = normalize(torch.randn(n, old_dim), dim=1)
    frame = torch.linalg.qr(torch.randn(new_dim, old_dim))[0]
    new = torch.tanh(4 * old * torch.logspace(0, -1.5, old_dim)) @ frame.T
    return normalize(new + 0.03 * torch.randn(n, new_dim), dim=1), old


def test_without_steps_it_is_the_procrustes_rotation():
    for rows in (bent(), bent(1), bent(7)):
        projection = fit_mlp(*rows, steps=0)
        assert isinstance(projection, ResidualProjection)
        assert projection.hidden_dim == 256
        assert torch.equal(projection(rows[0]), fit_procrustes(*rows)(rows[0]))


def test_training_improves_what_was_never_seen():
    new, old = bent(1500)
    start = fit_mlp(new[:1200], old[:1200], steps=0)
    trained = fit_mlp(new[:1200], old[:1200], steps=150, **QUICK)
    assert text_score(trained, new[1200:], old[1200:]) > text_score(start, new[1200:], old[1200:]) + 0.05
    assert not torch.equal(trained.weight, start.weight)
    first, _, second = trained.mlp
    correction = gelu(new @ first.weight.T + first.bias) @ second.weight.T + second.bias
    expected = new @ trained.weight.T + correction
    torch.testing.assert_close(trained(new), normalize(expected, dim=1))


def test_step_zero_is_kept_when_the_learning_rate_wrecks_it():
    new, old = bent()
    wrecked = fit_mlp(new, old, steps=20, **{**QUICK, "lr": 30.0})
    assert torch.equal(wrecked(new), fit_procrustes(new, old)(new))


def test_seed_fixes_every_byte_and_it_is_saved(tmp_path):
    new, old = bent(300)
    before = torch.get_rng_state()
    first, second, other = (fit_mlp(new, old, steps=25, seed=seed, **QUICK) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.mlp[0].weight, other.mlp[0].weight)
    first.save_pretrained(tmp_path)
    assert torch.equal(Projection.from_pretrained(tmp_path)(new), first(new))


@pytest.mark.parametrize("dims", [(1, 1), (1, 4), (4, 1)])
def test_dimensions_of_one_and_constant_rows(dims):
    new, old = torch.ones(20, dims[0]), normalize(torch.ones(20, dims[1]), dim=1)
    torch.testing.assert_close(fit_mlp(new, old, steps=5, **QUICK)(new), old)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_dim": -3}, ConfigError, "hidden_dim must not be negative, got -3"),
        ({"steps": -1}, ConfigError, "steps must be at least 0"),
        ({"n": 3}, DataError, "at least 5 rows"),
        ({"nan": 8}, DataError, "new vectors has NaN.*row 8"),
    ],
)
def test_wrong_input_is_one_sentence(change, error, words):
    options = {**QUICK, "steps": 5, **change}
    new, old = bent(options.pop("n", 40))
    if "nan" in options:
        new[options.pop("nan")] = float("nan")
    with pytest.raises(error, match=words):
        fit_mlp(new, old, **options)
