"""Forward maps: closed forms with the roles exchanged, FCT against a hidden truth, files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.projections import FitSchedule, Projection, fit_procrustes
from xbt.projections.forward import FCT_SCHEDULE, ForwardMap, fit_forward
from xbt.space import EmbeddingSpace


def rows(n, dim, seed):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(scope="module")
def bent():
    """Old vectors, side information, and new vectors that are no linear function of them."""
    old, side = rows(900, 8, 0), rows(900, 4, 1)
    mixing = torch.randn(12, 10, generator=torch.Generator().manual_seed(2))
    joined = torch.cat([old, side], dim=1)
    new = normalize(joined @ mixing + 2 * (joined @ mixing).square(), dim=1)
    return old, side, new


def error(projection, old, new, side=None):
    with torch.no_grad():
        mapped = projection(old) if side is None else projection(old, side=side)
    return float((mapped - new).square().sum(dim=1).mean())


def test_closed_forms_exchange_the_roles(bent):
    old, side, new = bent
    rotation = fit_forward(old, new)
    assert torch.equal(rotation.weight, fit_procrustes(old, new).weight)
    model = Ridge(alpha=2.0, fit_intercept=False).fit(old.double().numpy(), new.double().numpy())
    ridge = fit_forward(old, new, method="ridge", regularisation=2.0)
    np.testing.assert_allclose(ridge.weight.detach().numpy(), model.coef_, atol=1e-5)
    joined = torch.cat([old, side], dim=1)
    model = Ridge(alpha=2.0, fit_intercept=False).fit(joined.double().numpy(), new.double().numpy())
    ridge = fit_forward(old, new, side, method="ridge", regularisation=2.0)
    expected = normalize(torch.from_numpy(model.predict(joined.double().numpy())).float(), dim=1)
    np.testing.assert_allclose(ridge(old, side=side).detach().numpy(), expected.numpy(), atol=1e-5)


def test_a_rotation_is_found_again():
    turn = torch.linalg.qr(rows(8, 8, 3)).Q
    old = rows(50, 8, 4)
    projection = fit_forward(old, old @ turn)
    torch.testing.assert_close(projection(old), old @ turn, atol=1e-5, rtol=0)


def test_fct_learns_what_no_line_can(bent):
    old, side, new = bent
    errors, schedule = {}, replace(FCT_SCHEDULE, steps=200, lr=3e-3)
    for name, information in (("without", None), ("with", side)):
        part = None if information is None else information[:700]
        rest = None if information is None else information[700:]
        for method in ("ridge", "fct"):
            fitted = fit_forward(old[:700], new[:700], part, method=method, hidden_dim=32, schedule=schedule)
            errors[method, name] = error(fitted, old[700:], new[700:], rest)
    assert errors["fct", "without"] < 0.95 * errors["ridge", "without"]
    assert errors["fct", "with"] < 0.7 * errors["ridge", "with"]
    assert errors["fct", "with"] < 0.7 * errors["fct", "without"]


def test_fct_keeps_the_closed_form_if_no_step_is_better(bent):
    old, _, new = bent
    fitted = fit_forward(
        old, new, method="fct", hidden_dim=8, schedule=FitSchedule(steps=3, lr=0.0, eval_every=1)
    )
    ridge = fit_forward(old, new, method="ridge")
    torch.testing.assert_close(fitted(old), ridge(old), atol=1e-6, rtol=0)
    begun = ForwardMap.from_linear(ridge.weight.detach(), 0, 16, seed=0)
    torch.testing.assert_close(begun(old), ridge(old), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["ridge", "fct"])
def test_saved_and_loaded(bent, tmp_path, method):
    old, side, new = bent
    spaces = (EmbeddingSpace("old-model", dim=8), EmbeddingSpace("new-model", dim=10))
    schedule = replace(FCT_SCHEDULE, steps=60)
    fitted = fit_forward(old, new, side, method=method, hidden_dim=16, schedule=schedule)
    fitted.set_spaces(*spaces)
    fitted.save_pretrained(tmp_path / method)
    loaded = Projection.from_pretrained(tmp_path / method)
    assert isinstance(loaded, ForwardMap)
    assert torch.equal(loaded(old, side=side), fitted(old, side=side))
    names = loaded.new_space.model, loaded.old_space.model
    assert names == ("old-model", "new-model"), "what comes in is the old model's"
    torch.testing.assert_close(loaded(old, side=side).norm(dim=1), torch.ones(len(old)))
    torch.testing.assert_close(loaded(old[:3], side=side[:3]), loaded(old, side=side)[:3])


def test_the_same_seed_gives_the_same_map_and_leaves_torch_alone(bent):
    old, _, new = bent
    before = torch.random.get_rng_state()
    schedule = replace(FCT_SCHEDULE, steps=20, eval_every=5)
    one, two = (fit_forward(old, new, method="fct", hidden_dim=8, schedule=schedule) for _ in range(2))
    assert torch.equal(one(old), two(old))
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_is_refused(bent):
    old, side, new = bent
    with pytest.raises(ConfigError, match="'mlp' is not known; there is procrustes, ridge, fct"):
        fit_forward(old, new, method="mlp")
    with pytest.raises(ConfigError, match="'procrustes' cannot use side information"):
        fit_forward(old, new, side)
    with pytest.raises(DataError, match="899 rows of new vectors for 900 old vectors"):
        fit_forward(old, new[1:])
    with pytest.raises(DataError, match="899 rows of side information"):
        fit_forward(old, new, side[1:], method="ridge")
    with pytest.raises(ConfigError, match="hidden_dim is 0"):
        fit_forward(old, new, method="fct", hidden_dim=0)
    with pytest.raises(ConfigError, match="side_dim must not be negative"):
        ForwardMap(8, 10, side_dim=-1)
    fitted = fit_forward(old, new, side, method="ridge")
    with pytest.raises(SpaceMismatchError, match="side information of dimension 4, got 0"):
        fitted(old)
    with pytest.raises(SpaceMismatchError, match="as many rows of side information"):
        fitted(old[1:], side=side)
    with pytest.raises(SpaceMismatchError, match="takes vectors of dimension 8"):
        fit_forward(old, new, method="fct", schedule=FitSchedule(steps=0))(new)
