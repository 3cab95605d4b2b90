"""Heads as projections: the compatible part, the whole vector, one set of weights."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import normalize

from xbt.errors import ConfigError, SpaceMismatchError
from xbt.heads import BCTHead, BT2Head, OCAHead, PlainHead
from xbt.hub import SavedPartError
from xbt.projections import HeadProjection, Projection, fit_procrustes
from xbt.space import EmbeddingSpace

BT2 = {"new_dim": 12, "old_dim": 8, "extra_dims": 3}


def vectors(n=40, dim=12, seed=0):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture
def projection():
    return HeadProjection(12, 8, "bt2", BT2, new_space=EmbeddingSpace("new", 12)).eval()


def test_gives_what_the_head_gives(projection):
    z = vectors()
    output = projection.head(z @ projection.embedding.weight.T)
    torch.testing.assert_close(projection(z), normalize(output.compatible, dim=1))
    torch.testing.assert_close(projection.full()(z), normalize(output.full, dim=1))
    assert torch.equal(projection(z, "image"), projection(z, "text"))


def test_the_whole_vector_begins_with_the_compatible_part(projection):
    z = vectors()
    full = projection.full()
    assert (full.new_dim, full.old_dim, projection.old_dim) == (12, 15, 8)
    assert full.new_space is projection.new_space
    assert full.old_space is None
    assert torch.equal(full.project(z)[:, :8], projection.project(z))
    assert not full.training
    assert full.full().old_dim == 15


def test_the_twin_shares_the_weights(projection):
    full = projection.full()
    assert full.head is projection.head
    assert full.embedding is projection.embedding
    with torch.no_grad():
        projection.embedding.weight.mul_(-1)
    torch.testing.assert_close(full(vectors())[:, :8], full.project(vectors())[:, :8] / 5**0.5)


@pytest.mark.parametrize(
    "head",
    [BCTHead(12, 8), OCAHead(8, 4), BT2Head(12, 8, 0), BT2Head(12, 8, 0, orthogonal_map="cayley")],
    ids=["bct", "oca", "bt2", "bt2-cayley"],
)
def test_starts_at_a_procrustes_rotation(head):
    new = vectors(200)
    old = normalize(new @ torch.linalg.qr(torch.randn(12, 8))[0] + 0.05 * torch.randn(200, 8), dim=1)
    fitted = fit_procrustes(new, old)
    projection = HeadProjection.starting_at(fitted.weight, head)
    assert projection.head is head
    torch.testing.assert_close(projection(new), fitted(new), atol=1e-5, rtol=0)
    whole = projection.full()(new)
    torch.testing.assert_close(whole @ whole.T, new @ new.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("output", ["old", "full"])
def test_saved_and_loaded(projection, output, tmp_path):
    chosen = projection if output == "old" else projection.full()
    chosen.save_pretrained(tmp_path)
    loaded = Projection.from_pretrained(tmp_path)
    assert isinstance(loaded, HeadProjection)
    assert loaded.output == output
    assert loaded.new_space.same_as(chosen.new_space)
    torch.testing.assert_close(loaded(vectors()), chosen(vectors()), rtol=0, atol=1e-6)
    rotation = loaded.head.new_rotation.weight
    assert (rotation @ rotation.T - torch.eye(12)).abs().max() <= 5e-6


def test_damaged_configs_are_refused(projection, tmp_path):
    projection.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "options": {**config["options"], "head": "magic"}}))
    with pytest.raises(SavedPartError, match=r"config\.json cannot be used: head 'magic' is not known"):
        Projection.from_pretrained(tmp_path)
    wider = {**config["options"]["head_options"], "new_dim": 13}
    file.write_text(json.dumps({**config, "options": {**config["options"], "head_options": wider}}))
    with pytest.raises(SavedPartError, match=r"does not fit its config: .*has the shape"):
        Projection.from_pretrained(tmp_path)


def test_is_trained_through(projection):
    projection.train()(vectors()).sum().backward()
    assert projection.embedding.weight.grad.abs().max() > 0
    assert projection.head.old_rotation.parametrizations.weight.original.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HeadProjection(12, 9, "bt2", BT2), "old_dim is 9, but the bt2 head's output 'old' has 8"),
        (lambda: HeadProjection(12, 8, "bt2", BT2, "full"), "old_dim is 8, .* 'full' has 15 dimensions"),
        (lambda: HeadProjection(12, 8, "bt2", BT2, "new"), "output 'new' is not known; there is old, full"),
        (lambda: HeadProjection(12, 0, "independent", {"dim": 4}), "old_dim is 0"),
        (lambda: HeadProjection.starting_at(torch.eye(8, 12), PlainHead(12)), "has no old model"),
        (lambda: HeadProjection.starting_at(torch.eye(7, 12), BCTHead(12, 8)), "leads to 7 dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_refuses_vectors_of_another_dimension(projection):
    with pytest.raises(SpaceMismatchError, match="takes vectors of dimension 12"):
        projection(vectors(dim=8))
