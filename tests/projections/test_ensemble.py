from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation.retrieval import best_positive_ranks
from xbt.hub import SavedPartError
from xbt.projections.combinations import confidence
from xbt.projections.ensemble import Adaptive, Linear, Nlerp, QueryEnsemble, Slerp, direction_of
from xbt.space import EmbeddingSpace

OLD, NEW = 12, 20


def unit(n, dim=OLD, seed=0):
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


def one(combination, tensors=None, dim=OLD):
    return QueryEnsemble(dim, {"T2I": combination}, {"T2I": tensors} if tensors else None)


def numpy_slerp(u, v, alpha):
    """Row by row, as the formula is written."""
    rows = []
    for a, b in zip(u.double().numpy(), v.double().numpy(), strict=True):
        theta = np.arccos(np.clip(a @ b, -1, 1))
        rows.append((np.sin((1 - alpha) * theta) * a + np.sin(alpha * theta) * b) / np.sin(theta))
    return torch.from_numpy(np.array(rows))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_nlerp_ranks_like_interpolated_scores(beta):
    u, v, gallery = unit(40), unit(40, seed=1), unit(60, seed=2)
    query = one(Nlerp(beta))(u, v, "T2I")
    scores = (1 - beta) * u @ gallery.T + beta * v @ gallery.T
    assert torch.equal((query @ gallery.T).argsort(dim=1), scores.argsort(dim=1))
    positives = [[i] for i in range(40)]
    by_scores = best_positive_ranks(scores, torch.eye(60), positives)
    assert torch.equal(best_positive_ranks(query, gallery, positives), by_scores)


def test_nlerp_ends_need_one_side_only():
    u, v = unit(5), unit(5, seed=1)
    old, new = one(Nlerp(0)), one(Nlerp(1))
    assert (old.needs_old("T2I"), old.needs_new("T2I")) == (True, False)
    assert (new.needs_old("T2I"), new.needs_new("T2I")) == (False, True)
    torch.testing.assert_close(old(u, None, "T2I"), u)
    torch.testing.assert_close(new(None, 3 * v, "T2I"), v)
    with pytest.raises(DataError, match=r"T2I queries need the old query vectors .*beta=0\.5"):
        one(Nlerp())(None, v, "T2I")
    with pytest.raises(DataError, match="need the projected new query vectors"):
        one(Nlerp())(u, None, "T2I")


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_slerp_is_the_formula(alpha):
    u, v = unit(30), unit(30, seed=1)
    query = one(Slerp(alpha))(u, 0.3 * v, "T2I")  # its length does not matter here
    torch.testing.assert_close(query.double(), numpy_slerp(u, v, alpha), atol=2e-6, rtol=0)


def test_slerp_midpoint_is_nlerp_midpoint():
    u, v = unit(30), unit(30, seed=1)
    torch.testing.assert_close(one(Slerp(0.5))(u, v, "T2I"), one(Nlerp(0.5))(u, v, "T2I"))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_padded_slerp_is_a_slerp_among_padded_vectors(alpha):
    """The old side padded with zeros, a square rotation, and only the first coordinates searched."""
    u, z, gallery = unit(30), unit(30, NEW, seed=1), unit(50, seed=2)
    rotation = torch.linalg.qr(torch.randn(NEW, NEW, generator=torch.Generator().manual_seed(3)))[0]
    whole = z @ rotation.T
    padded = torch.cat([u, torch.zeros(30, NEW - OLD)], dim=1)
    expected = numpy_slerp(padded, whole, alpha)[:, :OLD]
    query = one(Slerp(alpha, padded=True))(u, whole[:, :OLD], "T2I")
    torch.testing.assert_close(
        query.double(), expected / expected.norm(dim=1, keepdim=True), atol=3e-6, rtol=0
    )
    assert torch.equal((query @ gallery.T).argsort(dim=1), (expected.float() @ gallery.T).argsort(dim=1))
    other = one(Slerp(alpha))(u, whole[:, :OLD], "T2I")
    assert ((query - other).abs().max() > 1e-3) == (alpha not in (0.0, 1.0))


@pytest.mark.parametrize("padded", [False, True])
def test_slerp_at_and_near_equal_and_opposite_vectors(padded):
    u = unit(8)
    for alpha in (0.0, 0.3, 0.5, 0.7, 1.0):
        ensemble = one(Slerp(alpha, padded))
        torch.testing.assert_close(ensemble(u, u, "T2I"), u)
        near = torch.nn.functional.normalize(u + 1e-6 * unit(8, seed=1))
        torch.testing.assert_close(ensemble(u, near, "T2I"), u, atol=3e-6, rtol=0)
        opposite = ensemble(u, -u, "T2I")
        assert torch.equal(opposite, ensemble(u, -u, "T2I"))
        torch.testing.assert_close(opposite.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(one(Slerp(0.5, padded))(u, -u, "T2I"), u)
    torch.testing.assert_close(one(Nlerp(0.5))(u, -u, "T2I"), u)


def test_adaptive_weights_depend_on_agreement_and_confidence():
    u, v, reference = unit(25), unit(25, seed=1), unit(40, seed=2)

    def conf(q):
        scores = (q @ reference.T).numpy().astype(np.float64)
        return (scores.max(1) - scores.mean(1)) / scores.std(1)

    cosines = (u * v).sum(1).double().numpy()
    for c, tensors in ((0.0, None), (0.7, {"reference": reference})):
        beta = 1 / (1 + np.exp(-(-0.5 + 2 * cosines + c * (conf(v) - conf(u)))))
        expected = torch.from_numpy((1 - beta)[:, None] * u.numpy() + beta[:, None] * v.numpy())
        query = one(Adaptive(-0.5, 2.0, c), tensors)(u, 2 * v, "T2I")
        expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(query.double(), expected, atol=3e-6, rtol=0)
    assert len(confidence(u[:0], reference)) == 0


def test_confidence_is_counted_in_parts_of_the_queries(monkeypatch):
    u, reference = unit(25), unit(40, seed=2)
    whole = confidence(u, reference)
    monkeypatch.setattr("xbt.projections.combinations._SCORE_BYTES", 4 * 40 * 3)
    torch.testing.assert_close(confidence(u, reference), whole)


def test_linear_is_the_formula():
    u, v, a, b = unit(9), unit(9, seed=1), torch.randn(OLD, OLD), torch.randn(OLD, OLD)
    ensemble = one(Linear(0.4), {"old_matrix": a, "new_matrix": b})
    expected = 0.6 * u + 0.4 * v + u @ a.T + v @ b.T
    torch.testing.assert_close(
        ensemble(u, 5 * v, "T2I"), expected / expected.norm(dim=1, keepdim=True), atol=1e-6, rtol=1e-5
    )
    alone = one(Linear(1.0, with_old=False), {"new_matrix": b})
    assert not alone.needs_old("T2I")
    expected = v + v @ b.T
    torch.testing.assert_close(
        alone(None, v, "T2I"), expected / expected.norm(dim=1, keepdim=True), atol=1e-6, rtol=1e-5
    )


def test_each_direction_has_its_own_combination():
    u, v = unit(4), unit(4, seed=1)
    ensemble = QueryEnsemble(OLD, {"T2I": Nlerp(0), "I2T": Nlerp(1)})
    torch.testing.assert_close(ensemble(u, v, "T2I"), u)
    torch.testing.assert_close(ensemble(u, v, "I2T"), v)
    assert (direction_of("text"), direction_of("image")) == ("T2I", "I2T")
    with pytest.raises(ConfigError, match="made for T2I alone, not for I2T"):
        one(Nlerp())(u, v, "I2T")
    with pytest.raises(DataError, match="no direction 't2i'"):
        ensemble(u, v, "t2i")
    assert QueryEnsemble.midpoint(OLD).directions == {"T2I": Nlerp(0.5), "I2T": Nlerp(0.5)}


def test_precision_and_empty_inputs():
    u, v = unit(4), unit(4, seed=1)
    ensemble = QueryEnsemble.midpoint(OLD)
    assert ensemble(u.double(), v, "T2I").dtype == torch.float64
    assert ensemble(u.half(), v.half(), "T2I").dtype == torch.float32
    for combination in (Nlerp(), Slerp(), Adaptive(0, 1)):
        assert one(combination)(u[:0], v[:0], "T2I").shape == (0, OLD)


def test_wrong_inputs():
    u, v, space = unit(4), unit(4, seed=1), EmbeddingSpace("old", OLD)
    with pytest.raises(SpaceMismatchError, match=r"\(n, 12\) vectors of 'old' .*shape \(4, 20\)"):
        QueryEnsemble.midpoint(OLD, space)(u, unit(4, NEW), "T2I")
    with pytest.raises(DataError, match="4 old and 3 new"):
        QueryEnsemble.midpoint(OLD)(u, v[:3], "T2I")
    with pytest.raises(SpaceMismatchError, match=r"16-d vectors, but its space is 'old' \(12-d\)"):
        QueryEnsemble.midpoint(16, space)
    for directions in ({}, {"T2T": Nlerp()}):
        with pytest.raises(ConfigError, match="'T2I' and 'I2T' or one of them"):
            QueryEnsemble(OLD, directions)
    with pytest.raises(DataError, match=r"needs the tensors \['reference'\], but was given \[\]"):
        one(Adaptive(0, 0, 1.0))
    with pytest.raises(DataError, match=r"needs the tensors \[\], but was given \['reference'\]"):
        one(Nlerp(), {"reference": u})
    for rows in (unit(4, NEW), unit(4097), unit(1)):
        with pytest.raises(DataError, match=r"reference of T2I has the shape .*2 to 4096"):
            one(Adaptive(0, 0, 1.0), {"reference": rows})
    with pytest.raises(DataError, match="holds NaN"):
        one(Linear(with_old=False), {"new_matrix": torch.full((OLD, OLD), torch.nan)})
    with pytest.raises(DataError, match="tensors for 'I2T', but no combination"):
        QueryEnsemble(OLD, {"T2I": Nlerp()}, {"I2T": {}})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Nlerp(1.1),
        lambda: Nlerp("0.5"),
        lambda: Slerp(-0.1),
        lambda: Slerp(0.5, padded=1),
        lambda: Adaptive(float("nan")),
        lambda: Adaptive(0, True),
        lambda: Linear(2),
        lambda: Linear(with_old=None),
    ],
)
def test_wrong_numbers(make):
    with pytest.raises(ConfigError, match="of the ensemble mode"):
        make()


@pytest.fixture
def full():
    matrix = torch.randn(OLD, OLD)
    return QueryEnsemble(
        OLD,
        {"T2I": Adaptive(0.5, 1.0, -0.3), "I2T": Linear(0.25)},
        {"T2I": {"reference": unit(7, seed=5)}, "I2T": {"old_matrix": matrix, "new_matrix": matrix}},
        EmbeddingSpace("old", OLD, probe=unit(20, seed=6)),
    )


def test_saved_and_loaded(full, tmp_path):
    for number, ensemble in enumerate((full, QueryEnsemble.midpoint(OLD), one(Slerp(0.3, padded=True)))):
        ensemble.save_pretrained(tmp_path / str(number))
        loaded = QueryEnsemble.from_pretrained(tmp_path / str(number))
        assert loaded.directions == ensemble.directions
        assert not loaded.training
        for direction in ensemble.directions:
            u, v = unit(6), unit(6, seed=1)
            assert torch.equal(loaded(u, v, direction), ensemble(u, v, direction))
        assert (loaded.old_space is None) == (ensemble.old_space is None)
    assert QueryEnsemble.from_pretrained(tmp_path / "0").old_space.same_as(full.old_space)


def test_loading_is_strict(full, tmp_path):
    full.save_pretrained(tmp_path)
    weights, file = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, config = load_file(weights), json.loads(file.read_text())

    def entry(**changes):
        return {**config, "directions": {**config["directions"], "I2T": changes}}

    linear = config["directions"]["I2T"]
    for change, words in (
        ({**config, "extra": 1}, "extra is not known to xbt"),
        ({key: config[key] for key in config if key != "old_dim"}, "'old_dim' is missing"),
        ({**config, "format": "projection"}, "query ensemble: its format is 'projection'"),
        (entry(**{**linear, "mode": "lerp"}), "no ensemble mode 'lerp'"),
        (entry(**linear, gamma=1), "I2T.gamma is not known"),
        (entry(**{**linear, "beta": 2}), r"must lie in \[0, 1\]"),
        (entry(mode="nlerp"), "lacks or misnames a key: 'tensors'"),
        (entry(**{**linear, "tensors": {"old_matrix": [12, 12]}}), "needs the tensors"),
        ({**config, "old_dim": 13, "old_space": None}, r"reference of T2I has the shape \(7, 12\)"),
        ({**config, "directions": []}, "lacks or misnames a key"),
    ):
        file.write_text(json.dumps(change))
        with pytest.raises(SavedPartError, match=words):
            QueryEnsemble.from_pretrained(tmp_path)
    file.write_text(json.dumps(config))
    save_file({**tensors, "t2i_reference": torch.zeros(6, OLD)}, weights)
    with pytest.raises(SavedPartError, match=r"t2i_reference has the shape \(6, 12\).*\(7, 12\)"):
        QueryEnsemble.from_pretrained(tmp_path)
    save_file({**tensors, "more": torch.zeros(1)}, weights)
    with pytest.raises(SavedPartError, match=r"unexpected \['more'\]"):
        QueryEnsemble.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(SavedPartError, match=r"model\.safetensors is missing"):
        QueryEnsemble.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(SavedPartError, match=r"config\.json is missing"):
        QueryEnsemble.from_pretrained(tmp_path)
