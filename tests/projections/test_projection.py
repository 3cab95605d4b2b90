from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from xbt.errors import DataError, SpaceMismatchError
from xbt.hub import SavedPartError
from xbt.projections import LinearProjection, Projection, ResidualProjection, fit_projection
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


STORED = {
    "fp16": lambda z: z.half(),
    "bf16": lambda z: z.bfloat16(),
    "float64": lambda z: z.double(),
    "numpy fp16": lambda z: z.numpy().astype(np.float16),
    "numpy float64": lambda z: z.double().numpy(),
    "memory map": lambda z: np.frombuffer(z.numpy().tobytes(), np.float32).reshape(z.shape),  # read-only
    "big endian": lambda z: z.numpy().astype(">f4"),
}


@pytest.mark.parametrize("kind", STORED)
def test_takes_vectors_as_stores_and_files_give_them(residual, kind):
    z = torch.randn(6, 12).half().float()
    found = residual(STORED[kind](z))
    assert found.dtype == torch.float32
    tolerance = 2e-2 if kind == "bf16" else 1e-6
    torch.testing.assert_close(found, residual(z), atol=tolerance, rtol=0)


def test_answers_in_the_dtype_of_its_weights(residual):
    z = torch.randn(6, 12)
    assert residual.double()(z).dtype == torch.float64
    assert residual.bfloat16()(z.numpy()).dtype == torch.bfloat16


def test_gradients_flow_through_a_change_of_dtype(residual):
    z = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    residual(z).square()[:, 0].sum().backward()
    assert z.grad.dtype == torch.float64
    assert z.grad.abs().sum() > 0
    assert residual.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_by_row(residual, value):
    z = torch.randn(6, 12)
    z[4, 2] = value
    for given in (z, z.half(), z.numpy()):
        with pytest.raises(DataError, match="vectors to project has NaN or infinite values, first in row 4"):
            residual(given)
    with pytest.raises(DataError, match="first in row 0"):
        residual(z[4])
    # A training step is not held up for it; the loss tells.
    assert residual.train()(z).isnan().any(dim=1).tolist() == [False] * 4 + [True, False]


def test_zero_rows_have_no_direction():
    weight = torch.randn(8, 12)
    z = torch.randn(3, 12)
    z[1] = 0
    out = LinearProjection.from_weight(weight)(z)
    assert out[1].tolist() == [0] * 8
    torch.testing.assert_close(out.norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    bias = torch.randn(8)
    out = LinearProjection.from_weight(weight, bias)(z)
    torch.testing.assert_close(out[1], bias / bias.norm())


def test_refuses_what_is_no_vectors(residual):
    with pytest.raises(DataError, match=r"vectors to project must be floating point, got torch.int64"):
        residual(torch.ones(2, 12, dtype=torch.int64))
    with pytest.raises(DataError, match="must be floating point, got int64"):
        residual(np.ones((2, 12), np.int64))


def test_can_be_exported_and_compiled(residual):
    z = torch.randn(6, 12)
    rows = torch.export.Dim("n", min=1, max=1024)
    exported = torch.export.export(residual, (z,), dynamic_shapes=({0: rows},))
    compiled = torch.compile(residual, backend="eager", fullgraph=True)
    for given in (z, torch.randn(9, 12)):
        torch.testing.assert_close(exported.module()(given), residual(given))
        torch.testing.assert_close(compiled(given), residual(given))
    half = torch.compile(residual, backend="eager", fullgraph=True)(z.half())
    torch.testing.assert_close(half, residual(z.half()))


@pytest.mark.parametrize("kind", ["linear", "affine", "residual"])
@pytest.mark.parametrize("exponent", [-42, -30, -14, 0, 14, 30, 38])
def test_rows_of_extreme_length_are_mapped_as_in_double_precision(residual, kind, exponent):
    generator = torch.Generator().manual_seed(1)
    if kind == "residual":
        projection = residual
    else:
        bias = torch.randn(8, generator=generator) if kind == "affine" else None
        projection = LinearProjection.from_weight(torch.randn(8, 12, generator=generator), bias)
    z = torch.nn.functional.normalize(torch.randn(6, 12, generator=generator), dim=1).double()
    z = (z * 10.0**exponent).float()
    before = [each.clone() for each in projection.parameters()]
    found = projection(z)
    wide = copy.deepcopy(projection).double().project(z.double())
    torch.testing.assert_close(found, torch.nn.functional.normalize(wide / wide.abs().max(), dim=1).float())
    assert all(map(torch.equal, before, projection.parameters()))
    assert projection(z[0]).shape == (8,)
    torch.testing.assert_close(projection(z[0]), found[0])


@pytest.mark.parametrize(
    "given", [torch.ones(3, 12).to("meta"), torch.eye(12).to_sparse(), torch.tensor(1.0), 5.0]
)
def test_what_holds_no_rows_is_refused(residual, given):
    with pytest.raises(DataError, match="vectors to project"):
        residual(given)


@pytest.mark.parametrize("method", ["mean_shift", "low_rank", "whitened_procrustes"])
def test_maps_that_would_swallow_every_query_are_refused(method):
    generator = torch.Generator().manual_seed(2)
    new, old = (torch.randn(60, dim, generator=generator) for dim in (6, 5))
    with pytest.raises(DataError, match="about unit length"):
        fit_projection(new * 1e30, old * 1e30, method)
