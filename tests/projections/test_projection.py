from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from xbt.errors import SpaceMismatchError
from xbt.hub import SavedPartError
from xbt.projections import LinearProjection, Projection, ResidualProjection
from xbt.space import EmbeddingSpace


@pytest.fixture
def residual():
    torch.manual_seed(3)
    projection = ResidualProjection(
        12, 8, hidden_dim=20, new_space=EmbeddingSpace("new", 12, {"size": [32, 32]}, torch.randn(20, 12)),
        old_space=EmbeddingSpace("old", 8),
    )  # fmt: skip
    with torch.no_grad():
        projection.scale.fill_(0.3)
    return projection.eval()


def test_formula(residual):
    z = torch.randn(5, 12)
    expected = z @ residual.weight.T + 0.3 * residual.mlp(z)
    torch.testing.assert_close(residual(z), expected / expected.norm(dim=1, keepdim=True))


def test_is_the_linear_map_while_the_gate_is_closed():
    projection = ResidualProjection(12, 8)
    assert projection.hidden_dim == 24
    with torch.no_grad():
        projection.weight.copy_(torch.randn(8, 12))
    linear = LinearProjection.from_weight(projection.weight)
    z = torch.randn(5, 12)
    assert torch.equal(projection(z), linear(z))


def test_saved_and_loaded_in_another_process(residual, tmp_path):
    residual.save_pretrained(tmp_path / "p")
    z = torch.randn(6, 12)
    save_file({"z": z}, tmp_path / "z.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file; from xbt import Projection\n"
        "root = sys.argv[1]; p = Projection.from_pretrained(root + '/p')\n"
        "assert type(p).__name__ == 'ResidualProjection' and not p.training\n"
        "assert p.new_space.model == 'new' and p.old_space.dim == 8\n"
        "save_file({'y': p(load_file(root + '/z.safetensors')['z']).detach()}, root + '/y.safetensors')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (load_file(tmp_path / "y.safetensors")["y"] - residual(z)).abs().max() <= 1e-6
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        "config.json", "model.safetensors", "README.md",
    }  # fmt: skip


def test_probe_survives_saving(residual, tmp_path):
    residual.save_pretrained(tmp_path)
    loaded = Projection.from_pretrained(tmp_path)
    assert loaded.new_space.same_as(residual.new_space)
    assert loaded.new_space.agreement(residual.new_space) > 0.99999


def test_refuses_vectors_of_another_dimension(residual):
    with pytest.raises(SpaceMismatchError, match=r"dimension 12 from 'new' \(12-d\), got 8"):
        residual(torch.randn(2, 8))


def test_loading_is_strict(residual, tmp_path):
    residual.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)

    save_file({k: v for k, v in tensors.items() if k != "scale"}, weights)
    with pytest.raises(SavedPartError, match=r"model\.safetensors.*missing tensors \['scale'\]"):
        Projection.from_pretrained(tmp_path)
    save_file({**tensors, "extra": torch.zeros(1)}, weights)
    with pytest.raises(SavedPartError, match=r"unexpected \['extra'\]"):
        Projection.from_pretrained(tmp_path)
    save_file({**tensors, "weight": torch.zeros(3, 3)}, weights)
    with pytest.raises(SavedPartError, match=r"weight has the shape \(3, 3\).*\(8, 12\)"):
        Projection.from_pretrained(tmp_path)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(SavedPartError, match=r"model\.safetensors is damaged"):
        Projection.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(SavedPartError, match=r"model\.safetensors is missing"):
        Projection.from_pretrained(tmp_path)


def test_bad_configs(residual, tmp_path):
    residual.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for change, words in (
        ({"kind": "magic"}, "of kind 'magic'"),
        ({"options": {"depth": 3}}, "depth"),
        ({"options": None}, "lacks or misnames"),
    ):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(SavedPartError, match=words):
            Projection.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(SavedPartError, match="not valid JSON"):
        Projection.from_pretrained(tmp_path)
    file.write_text("[]")
    with pytest.raises(SavedPartError, match="a JSON object"):
        Projection.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(SavedPartError, match=r"config\.json is missing"):
        Projection.from_pretrained(tmp_path)


def test_a_kind_can_be_asked_for(residual, tmp_path):
    residual.save_pretrained(tmp_path)
    assert isinstance(ResidualProjection.from_pretrained(tmp_path), ResidualProjection)
    with pytest.raises(SavedPartError, match="holds a ResidualProjection, not a LinearProjection"):
        LinearProjection.from_pretrained(tmp_path)


def test_spaces_must_fit_the_dimensions():
    with pytest.raises(SpaceMismatchError, match=r"12 → 8.*new space is 'x' \(9-d\)"):
        ResidualProjection(12, 8, new_space=EmbeddingSpace("x", 9))
