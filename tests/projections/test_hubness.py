"""Hubness bias and gallery-side steps: formulas, leaks, three deployments with the same ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError, SavedPartError, SpaceMismatchError
from xbt.projections import QueryEnsemble, fit_procrustes
from xbt.projections.caption_map import Neighbours, fit_caption_map
from xbt.projections.combinations import Nlerp
from xbt.projections.gallery_steps import GallerySteps
from xbt.projections.hubness import HubnessBias, hubness, qb_norm


def rows(n, dim, seed):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_hubness_is_the_mean_of_the_highest_scores():
    gallery, bank = rows(40, 8, 0), rows(100, 8, 1)
    scores = np.sort(gallery.double().numpy() @ bank.double().numpy().T, axis=1)[:, ::-1]
    np.testing.assert_allclose(hubness(gallery, bank, 5).numpy(), scores[:, :5].mean(axis=1), atol=1e-6)
    few = hubness(gallery, bank[:3], 10)
    np.testing.assert_allclose(few.numpy(), (gallery @ bank[:3].T).mean(dim=1).numpy(), atol=1e-6)
    bias = HubnessBias.from_bank(bank, weight=0.3, k=5)
    np.testing.assert_allclose(bias(gallery).numpy(), 0.3 * scores[:, :5].mean(axis=1), atol=1e-6)


def test_a_hub_is_found_less():
    """A row in the middle of all queries comes first for most of them, until its bias counts."""
    queries, bank = (normalize(rows(300, 8, seed) + 0.7 * torch.eye(8)[0], dim=1) for seed in (2, 3))
    answers = normalize(queries + 0.8 * rows(300, 8, 4), dim=1)
    gallery = torch.cat([answers, torch.eye(8)[:1]])
    scores = queries @ gallery.T
    better = scores - HubnessBias.from_bank(bank, 1.0)(gallery)
    found = [(each.argmax(dim=1) == 300).sum() for each in (scores, better)]
    assert found[1] < found[0] / 2
    hits = [(each.argmax(dim=1) == torch.arange(300)).sum() for each in (scores, better)]
    assert hits[1] > hits[0]


def test_an_item_of_its_own_in_the_bank_does_not_count():
    """With its own query in the bank a row is pushed down by the very query that it answers."""
    queries = rows(50, 8, 5)
    owners = torch.arange(50)
    leaking, honest = hubness(queries, queries, 1), hubness(queries, queries, 1, owners, owners)
    torch.testing.assert_close(leaking, torch.ones(50))
    scores = queries @ queries.T
    scores.fill_diagonal_(-torch.inf)
    torch.testing.assert_close(honest, scores.max(dim=1).values)
    two = torch.stack([owners, (owners + 1) % 50], dim=1)
    scores[owners, (owners + 1) % 50] = -torch.inf
    torch.testing.assert_close(hubness(queries, queries, 1, two, owners), scores.max(dim=1).values)
    assert hubness(queries[:1], queries[:1], 1, owners[:1], owners[:1]) == 0


def test_qb_norm_is_the_dynamic_inverted_softmax():
    scores, bank = torch.randn(20, 9), torch.randn(6, 9)
    found = qb_norm(scores, bank, beta=3.0)
    active = set(bank.argmax(dim=1).tolist())
    for row, own in zip(found.double().numpy(), scores.double().numpy(), strict=True):
        plain = np.exp(3 * own) / np.exp(3 * bank.double().numpy()).sum(axis=0)
        np.testing.assert_allclose(row, np.log(plain) if own.argmax() in active else own, atol=1e-5)


@pytest.fixture(scope="module")
def made():
    old, new = rows(200, 8, 6), rows(200, 10, 7)
    projection = fit_procrustes(new, old)
    ensemble = QueryEnsemble(8, {"T2I": Nlerp(0.3), "I2T": Nlerp(0.0)})
    rules = {"image": Neighbours(7, 0.1), "text": Neighbours(5, 0.05, residual=True)}
    forward = fit_caption_map(old, new, rules=rules)
    bank = torch.cat([ensemble(old[:60], projection(new[:60]), "T2I"), new[:60]], dim=1)
    biases = {
        "T2I": HubnessBias.from_bank(bank, 0.5, owners=torch.arange(60)),
        "I2T": HubnessBias.from_bank(old[:40], 0.25, 3),
    }
    steps = GallerySteps(ensemble, {"T2I": 0.4, "I2T": 0.0}, forward, biases)
    return steps, projection


def inputs():
    return rows(25, 10, 8), rows(25, 8, 9), rows(70, 8, 10)


def expected_scores(steps, projection):
    """The formula, step by step."""
    new, old, gallery = inputs()
    q = normalize(0.7 * old + 0.3 * projection(new), dim=1)
    f = steps.forward_map(gallery, "image")
    scores = 0.6 * q @ gallery.T + 0.4 * new @ f.T
    bank = steps.bias["T2I"].bank
    of_bank = 0.6 * bank[:, :8] @ gallery.T + 0.4 * bank[:, 8:] @ f.T
    return (scores - 0.5 * of_bank.topk(10, dim=0).values.mean(dim=0)).detach()


def test_one_row_of_an_inner_product_index(made):
    faiss = pytest.importorskip("faiss")
    steps, projection = made
    new, old, gallery = inputs()
    wanted = expected_scores(steps, projection)
    queries = steps.queries("T2I", old, projection(new).detach(), new)
    stored = steps.rows("T2I", 2 * gallery)
    assert stored.shape == (70, 8 + 10 + 1)
    index = faiss.IndexFlatIP(stored.shape[1])
    index.add(stored.numpy())
    scores, found = index.search(queries.numpy(), 70)
    np.testing.assert_allclose(scores, wanted.gather(1, torch.from_numpy(found)).numpy(), atol=2e-6)
    assert np.array_equal(found, wanted.argsort(dim=1, descending=True).numpy())


def test_a_second_vector_and_a_number(made):
    steps, projection = made
    new, old, gallery = inputs()
    first = steps.ensemble(old, projection(new), "T2I") @ gallery.T
    second = new @ steps.second_vectors("T2I", gallery).T
    scores = 0.6 * first + 0.4 * second - steps.biases("T2I", gallery)
    torch.testing.assert_close(scores.detach(), expected_scores(steps, projection), atol=2e-6, rtol=0)


def test_candidates_alone(made):
    """All candidates give the ranks of the whole; some give theirs; missing ones stay last."""
    steps, projection = made
    new, old, gallery = inputs()
    wanted = expected_scores(steps, projection)
    queries = steps.queries("T2I", old, projection(new).detach(), new)
    whole = torch.arange(70).expand(25, -1)
    torch.testing.assert_close(steps.rescore("T2I", queries, whole, gallery), wanted, atol=2e-6, rtol=0)
    few = torch.stack([torch.randperm(70)[:6] for _ in range(25)])
    few[3, 2] = -1
    scores = steps.rescore("T2I", queries, few, gallery)
    assert scores[3, 2] == -torch.inf
    scores[3, 2] = wanted.gather(1, few.clamp_min(0))[3, 2]
    torch.testing.assert_close(scores, wanted.gather(1, few.clamp_min(0)), atol=2e-6, rtol=0)


def test_a_bias_alone_needs_the_old_query_alone(made):
    steps, _ = made
    _, old, gallery = inputs()
    assert not steps.needs_new("I2T")
    assert steps.needs_new("T2I")
    queries = steps.queries("I2T", old, None, None)
    scores = queries @ steps.rows("I2T", gallery).T
    of_bank = (gallery @ steps.bias["I2T"].bank.T).topk(3, dim=1).values.mean(dim=1)
    torch.testing.assert_close(scores, old @ gallery.T - 0.25 * of_bank, atol=2e-6, rtol=0)
    with pytest.raises(ConfigError, match="have no forward map"):
        steps.second_vectors("I2T", gallery)


def test_saved_and_loaded(made, tmp_path):
    steps, projection = made
    new, old, gallery = inputs()
    loaded = GallerySteps.load(steps.save(tmp_path))
    for direction, own in (("T2I", torch.arange(70)), ("I2T", None)):
        assert torch.equal(loaded.rows(direction, gallery, own), steps.rows(direction, gallery, own))
        assert loaded.describe(direction) == steps.describe(direction)
    projected = projection(new).detach()
    assert torch.equal(loaded.queries("T2I", old, projected, new), steps.queries("T2I", old, projected, new))
    config = json.loads((tmp_path / "config.json").read_text())
    config["directions"]["T2I"]["bias"]["count"] = 10**12
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SavedPartError):
        GallerySteps.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "projection"}))
    with pytest.raises(SavedPartError, match="does not describe a set of gallery steps"):
        GallerySteps.load(tmp_path)


def test_what_is_refused(made):
    steps, projection = made
    new, old, gallery = inputs()
    for arguments in ((0, 0.5, 10), (3, -1.0, 10), (3, 0.5, 0)):
        with pytest.raises(ConfigError, match="the hubness bias was given"):
            HubnessBias(8, *arguments)
    with pytest.raises(SpaceMismatchError, match="bank's queries have dimension 18"):
        steps.bias["T2I"](gallery)
    with pytest.raises(ConfigError, match="but there is no forward map"):
        GallerySteps(steps.ensemble, {"T2I": 0.5})
    with pytest.raises(ConfigError, match="gallery steps are for"):
        GallerySteps(steps.ensemble, {})
    with pytest.raises(DataError, match="need the new model's query vectors"):
        steps.queries("T2I", old, projection(new), None)
