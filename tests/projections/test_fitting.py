"""fit_projection, and what every closed form has to stand."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import xbt.projections
from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections import (
    FitSchedule,
    LinearProjection,
    PairStatistics,
    PairVectors,
    Projection,
    Stage1Options,
    fit_projection,
)
from xbt.projections.fitting import CLOSED_FORMS, METHODS, grouped_options, option_names
from xbt.projections.sources import TERMS
from xbt.projections.trained import MLP_SCHEDULE
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore


def unit_rows(n, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, dim, generator=generator) + 0.1, dim=1)


def related(n, new_dim, old_dim, seed=0):
    """Vectors of the same items: the old ones are a turned and noisy part of the new ones."""
    new = unit_rows(n, new_dim, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(new_dim, old_dim, generator=generator) / new_dim**0.5
    noise = torch.randn(n, old_dim, generator=generator)
    return new, normalize(new @ hidden + 0.1 / old_dim**0.5 * noise, dim=1)


def as_pairs(n=12, new_dim=10, old_dim=6):
    texts, images = related(n, new_dim, old_dim, 7), related(n, new_dim, old_dim, 9)
    return PairVectors(texts[0], texts[1], images[1], range(n), images[0])


def store(path, vectors, space, ids=None):
    made = EmbeddingStore.create(path, modality="text", space=space, dtype="float32")
    made.append(vectors, ids or [str(number) for number in range(len(vectors))])
    return made


def probed(name, dim, seed):
    return EmbeddingSpace(name, dim, probe=unit_rows(20, dim, seed))


# The registry


def test_every_method_has_the_same_form():
    assert set(CLOSED_FORMS) <= set(METHODS)
    for name, fit in METHODS.items():
        parameters = inspect.signature(fit).parameters
        assert list(parameters)[:2] == ["new", "old"]
        assert all(
            each.kind is each.KEYWORD_ONLY and each.default is not each.empty
            for each in list(parameters.values())[2:]
        )
        assert fit.__name__ == f"fit_{name}"
        assert getattr(xbt.projections, fit.__name__) is fit
        assert fit.__doc__


def test_unknown_methods_and_options():
    new, old = related(30, 10, 6)
    with pytest.raises(ConfigError, match=r"'magic' is not known; there is .*procrustes, ridge"):
        fit_projection(new, old, "magic")
    with pytest.raises(ConfigError, match=r"'ridge' has no option 'alpha'; it has .*regularisation"):
        fit_projection(new, old, "ridge", alpha=3.0)
    with pytest.raises(ConfigError, match="'identity' cannot use pairs"):
        fit_projection(new, old, "identity", pairs=as_pairs())
    assert option_names("procrustes") == ["pairs", "pairs_weight", "centring", "scale"]
    with pytest.raises(ConfigError, match="'auto' is not known"):
        fit_projection(new, old, "auto")


def test_options_of_a_schedule_or_a_loss_go_by_their_own_names():
    new, old = related(40, 10, 6)
    options = grouped_options("xbt", {"noise": 0.2, "steps": 3, "pairs_weight": 0.5})
    assert options["stage1"] == Stage1Options(noise=0.2)
    assert options["schedule"] == FitSchedule(steps=3)
    assert options["pairs_weight"] == 0.5
    assert grouped_options("mlp", {"lr": 0.1})["schedule"] == replace(MLP_SCHEDULE, lr=0.1)
    given = {"schedule": FitSchedule(steps=9, lr=0.5), "steps": 2}
    assert grouped_options("lambda_orthogonal", given) == {"schedule": FitSchedule(steps=2, lr=0.5)}
    assert {"noise", "hidden_dim", "steps", "device", "pairs"} <= set(option_names("xbt"))
    by_name = fit_projection(new, old, "xbt", noise=0.5, hidden_dim=4, steps=2, eval_every=1)
    whole = fit_projection(
        new,
        old,
        "xbt",
        stage1=Stage1Options(noise=0.5, hidden_dim=4),
        schedule=FitSchedule(steps=2, eval_every=1),
    )
    assert torch.equal(by_name.mlp[0].weight, whole.mlp[0].weight)
    with pytest.raises(ConfigError, match=r"'mlp' has no option 'noise'; it has hidden_dim, steps"):
        fit_projection(new, old, "mlp", noise=1.0)
    with pytest.raises(ConfigError, match="steps must be at least 0, got -1"):
        fit_projection(new, old, "mlp", steps=-1)


@pytest.mark.parametrize("method", [name for name in CLOSED_FORMS if name != "identity"])
def test_pairs_reach_the_method(method):
    new, old = related(40, 10, 6)
    without, with_pairs = fit_projection(new, old, method), fit_projection(new, old, method, pairs=as_pairs())
    probe = unit_rows(5, 10, 3)
    assert not torch.allclose(without(probe, "image"), with_pairs(probe, "image"), atol=1e-3)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_statistics_are_all_a_closed_form_needs(method):
    new, old = related(40, 10, 6)
    found = CLOSED_FORMS[method](PairStatistics.of(new, old, TERMS), None)
    torch.testing.assert_close(found(new), fit_projection(new, old, method)(new), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", sorted({*CLOSED_FORMS} - {"identity"}))
def test_statistics_are_not_mixed_with_vectors(method):
    new, old = related(40, 10, 6)
    texts = PairStatistics.of(new, old, TERMS)
    for given, options in ((old, {}), (None, {"pairs": as_pairs()})):
        with pytest.raises(
            ConfigError, match="beside statistics of texts give statistics of images, or None"
        ):
            CLOSED_FORMS[method](texts, given, **options)


# Where vectors come from


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_stores_and_streams_give_what_vectors_give(method, tmp_path):
    new, old = related(40, 10, 6)
    spaces = probed("new", 10, 1), probed("old", 6, 2)
    stores = store(tmp_path / "new", new, spaces[0]), store(tmp_path / "old", old, spaces[1])
    wanted = fit_projection(new, old, method)(new)
    of_stores = fit_projection(*stores, method)
    torch.testing.assert_close(of_stores(new), wanted)
    assert of_stores.new_space.same_as(spaces[0])
    assert of_stores.old_space.same_as(spaces[1])
    streams = (new[start : start + 7] for start in range(0, 40, 7)), iter(old.split(11))
    of_streams = fit_projection(*streams, method)
    torch.testing.assert_close(of_streams(new), wanted)
    assert of_streams.new_space is None
    mixed = fit_projection(stores[0], old.numpy(), method, old_space=spaces[1])
    torch.testing.assert_close(mixed(new), wanted)
    assert mixed.old_space is spaces[1]


def test_a_space_must_be_that_of_the_store(tmp_path):
    new, old = related(40, 10, 6)
    stored = store(tmp_path / "new", new, probed("new", 10, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_projection(stored, old, new_space=probed("the same by another name", 10, 1))
    with pytest.raises(SpaceMismatchError, match="space of the new vectors is 'new'"):
        fit_projection(stored, old, new_space=probed("other", 10, 5))
    with pytest.raises(SpaceMismatchError, match=r"10 → 6.*'old' \(7-d\)"):
        fit_projection(new, old, old_space=probed("old", 7, 2))


def test_stores_of_other_items_are_refused(tmp_path):
    new, old = related(3, 10, 6)
    first = store(tmp_path / "new", new, probed("new", 10, 1), ["a", "b", "c"])
    second = store(tmp_path / "old", old, probed("old", 6, 2), ["a", "c", "b"])
    with pytest.raises(DataError, match=r"row 1 has the id 'b' in .*new but 'c' in .*old"):
        fit_projection(first, second)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_saved_and_loaded(method, tmp_path):
    new, old = related(40, 10, 6)
    options = {"centring": "modality"} if "centring" in option_names(method) else {}
    pairs = {"pairs": as_pairs()} if "pairs" in option_names(method) else {}
    projection = fit_projection(new, old, method, **pairs, **options)
    projection.save_pretrained(tmp_path)
    loaded = Projection.from_pretrained(tmp_path)
    for modality in ("text", "image", None):
        assert torch.equal(loaded(new, modality), projection(new, modality))


# What every closed form has to stand


@pytest.mark.parametrize("method", CLOSED_FORMS)
@pytest.mark.parametrize("dims", [(1, 1), (1, 5), (5, 1), (10, 6), (6, 10)])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_any_shape_gives_unit_rows(method, dims, n):
    new, old = related(n, *dims)
    projection = fit_projection(new, old, method)
    assert isinstance(projection, LinearProjection)
    out = projection(new)
    assert out.shape == (n, dims[1])
    assert torch.isfinite(projection.weight).all()
    if method not in ("identity", "mean_shift"):  # which may be right to leave nothing of a vector
        torch.testing.assert_close(out.norm(dim=1), torch.ones(n))
    if n == 1 and method != "identity":  # one item is met exactly
        torch.testing.assert_close(out, old, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", CLOSED_FORMS)
@pytest.mark.parametrize("dims", [(4096, 3), (3, 4096)])
def test_many_dimensions(method, dims):
    new, old = related(20, *dims)
    out = fit_projection(new, old, method)(new)
    assert out.shape == (20, dims[1])
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_constant_vectors(method):
    new, old = (side.expand(30, -1).contiguous() for side in related(1, 10, 6))
    projection = fit_projection(new, old, method)
    assert torch.isfinite(projection.weight).all()
    if method != "identity":
        torch.testing.assert_close(projection(new), old, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_repeating_every_row_changes_nothing(method):
    new, old = related(30, 10, 6)
    once, often = (fit_projection(new.repeat(k, 1), old.repeat(k, 1), method) for k in (1, 5))
    torch.testing.assert_close(often(new), once(new), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_the_order_of_rows_does_not_matter(method):
    for n in (4, 50):  # fewer rows than dimensions, and more
        new, old = related(n, 10, 6)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        one, other = fit_projection(new, old, method), fit_projection(new[order], old[order], method)
        probe = unit_rows(20, 10, 5)
        torch.testing.assert_close(one(probe), other(probe), atol=1e-4, rtol=1e-4)
        assert torch.equal(fit_projection(new, old, method).weight, one.weight)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_a_zero_row_is_no_error(method):
    new, old = related(30, 10, 6)
    new[3], old[3] = 0, 0
    out = fit_projection(new, old, method)(new)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("method", sorted(set(CLOSED_FORMS) - {"identity", "mean_shift"}))
@pytest.mark.parametrize("side", [0, 1])
def test_zero_rows_alone_are_an_error(method, side):
    sides = list(related(30, 10, 6))
    sides[side] = torch.zeros_like(sides[side])
    with pytest.raises(DataError, match="all zero"):
        fit_projection(*sides, method)


@pytest.mark.parametrize("method", CLOSED_FORMS)
@pytest.mark.parametrize("side", ["new", "old"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(method, side, value):
    sides = dict(zip(("new", "old"), related(30, 10, 6), strict=True))
    sides[side][17, 2] = value
    with pytest.raises(DataError, match=f"{side} vectors has NaN or infinite values, first in row 17"):
        fit_projection(sides["new"], sides["old"], method)
    with pytest.raises(DataError, match="first in row 17"):
        fit_projection(sides["new"].split(4), sides["old"].split(9), method)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_what_does_not_pair_is_an_error(method):
    new, old = related(30, 10, 6)
    with pytest.raises(DataError, match="30 new and 29 old"):
        fit_projection(new, old[:-1], method)
    with pytest.raises(DataError, match="is empty"):
        fit_projection(new[:0], old[:0], method)
    with pytest.raises(DataError, match="floating point"):
        fit_projection(new.long(), old, method)
    if "pairs" in option_names(method):
        with pytest.raises(SpaceMismatchError, match=r"9 \(new\) and 6 \(old\)"):
            fit_projection(new, old, method, pairs=as_pairs(12, 9, 6))


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_half_precision_is_good_enough(method):
    new, old = related(200, 10, 6)
    half = fit_projection(new.numpy().astype(np.float16), old.bfloat16(), method)
    assert half.weight.dtype == torch.float32
    torch.testing.assert_close(half(new), fit_projection(new, old, method)(new), atol=0.02, rtol=0)
