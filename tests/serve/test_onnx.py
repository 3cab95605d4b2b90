"""ONNX models of projections and ensembles, run by onnxruntime and compared with torch."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from upgrades import IMAGES, TEXTS

from xbt.compatible import CompatibleEncoder
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, StoreError, XbtError
from xbt.projections import (
    HeadProjection,
    LinearProjection,
    Projection,
    QueryEnsemble,
    ResidualProjection,
    fit_projection,
)
from xbt.projections.combinations import _MODES, Adaptive, Linear, Nlerp, Slerp
from xbt.projections.forward import ForwardMap
from xbt.serve import export_onnx
from xbt.serve import onnx as onnx_job
from xbt.serve.onnx import CONTRACT
from xbt.space import EmbeddingSpace


def linear():
    return LinearProjection.from_weight(torch.randn(16, 24), torch.randn(16), torch.randn(16))


def residual():
    made = ResidualProjection.seeded(24, 16, 0, centred=True, image_means=True)
    means = {"new_mean": 24, "old_mean": 16, "new_image_mean": 24, "old_image_mean": 16}
    made.init_from(torch.randn(16, 24), {name: torch.randn(dim) for name, dim in means.items()})
    torch.nn.init.constant_(made.scale, 0.7)
    return made.eval()


def head(kind, options, output="old", old_dim=16):
    return HeadProjection(24, old_dim, kind, options, output).eval()


BT2 = {"new_dim": 20, "old_dim": 16, "extra_dims": 4}
PROJECTIONS = {
    "linear": linear,
    "linear without offsets": lambda: LinearProjection.from_weight(torch.randn(16, 24)),
    "residual": residual,
    "bt2": lambda: head("bt2", BT2),
    "bt2, whole": lambda: head("bt2", BT2, "full", 24),
    "oca": lambda: head("oca", {"old_dim": 16, "extra_dims": 4}),
    "forward": lambda: ForwardMap.from_linear(torch.randn(16, 24), 0, 12, 0).eval(),
    "bct": lambda: head("bct", {"new_dim": 20, "old_dim": 16}),
}
COMBINATIONS = [
    Nlerp(0.4), Nlerp(0.0), Nlerp(1.0), Slerp(0.4), Slerp(0.4, padded=True), Adaptive(0.1, 0.5),
    Adaptive(0.1, 0.5, 0.3), Linear(0.4), Linear(1.0, with_old=False),
]  # fmt: skip


def unit(count, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)


def ensemble_of(combination, direction="T2I"):
    needed = combination.tensors(16)
    tensors = {name: torch.randn(rows or 40, dim) * 0.3 for name, (rows, dim) in needed.items()}
    return QueryEnsemble(16, {direction: combination}, {direction: tensors} if tensors else None)


def run(path, **inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == list(inputs)
    return session.run(["queries"], {name: each.numpy() for name, each in inputs.items()})[0]


def test_every_kind_of_map_and_rule_is_tried():
    kinds = {each().kind for each in PROJECTIONS.values()}
    exported = {kind for kind, made in Projection._kinds.items() if made.__module__.startswith("xbt.")}
    assert kinds == exported - {"caption_forward"}  # it maps rows of a gallery, not queries
    assert {each.mode for each in COMBINATIONS} == set(_MODES)


@pytest.mark.parametrize(
    ("name", "modality"),
    [*((name, "text") for name in PROJECTIONS), ("linear", "image"), ("residual", "image")],
)
def test_projections_give_what_torch_gives(tmp_path, name, modality):
    projection = PROJECTIONS[name]()
    before = {key: tensor.clone() for key, tensor in projection.state_dict().items()}
    export_onnx(projection, tmp_path / "query.onnx", modality=modality)
    for count in (1, 2, 50):
        vectors = unit(count, 24, count)
        with torch.no_grad():
            wanted = projection(vectors, modality).numpy()
        assert np.abs(run(tmp_path / "query.onnx", new_vectors=vectors) - wanted).max() <= 1e-5
    assert all(torch.equal(tensor, before[key]) for key, tensor in projection.state_dict().items())


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_ensembles_give_what_torch_gives(tmp_path, combination):
    projection, ensemble = linear(), ensemble_of(combination)
    about = export_onnx(projection, tmp_path / "query.onnx", ensemble=ensemble)
    for count in (1, 2, 50):
        new, old = unit(count, 24, 1), unit(count, 16, 2)
        given = {"new_vectors": new, "old_vectors": old}
        inputs = {each["name"]: given[each["name"]] for each in about["inputs"]}
        assert ("old_vectors" in inputs) == combination.needs_old
        with torch.no_grad():
            wanted = ensemble(old, projection.project(new, "text"), "T2I").numpy()
        assert np.abs(run(tmp_path / "query.onnx", **inputs) - wanted).max() <= 1e-5


@pytest.mark.parametrize("name", ["residual", "bt2"])
def test_padded_slerp_sees_the_length_of_other_maps(tmp_path, name):
    projection, ensemble = PROJECTIONS[name](), ensemble_of(Slerp(0.4, padded=True), "I2T")
    export_onnx(projection, tmp_path / "query.onnx", modality="image", ensemble=ensemble)
    new, old = unit(9, 24, 1), unit(9, 16, 2)
    with torch.no_grad():
        wanted = ensemble(old, projection.project(new, "image"), "I2T").numpy()
    assert np.abs(run(tmp_path / "query.onnx", new_vectors=new, old_vectors=old) - wanted).max() <= 1e-5


def test_opposite_queries_take_the_larger_share(tmp_path):
    projection = LinearProjection.from_weight(torch.eye(16))
    export_onnx(projection, tmp_path / "query.onnx", ensemble=ensemble_of(Nlerp(0.5)))
    old = unit(5, 16, 3)
    found = run(tmp_path / "query.onnx", new_vectors=-old, old_vectors=old)
    assert np.abs(found - old.numpy()).max() <= 1e-6


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory):
    """A compatible encoder of tiny models, with an ensemble of both directions."""
    root = tmp_path_factory.mktemp("models")
    old = load_encoder(tiny.tiny_open_clip(root / "old"))
    new = load_encoder(tiny.tiny_transformers_clip(root / "new", seed=1))
    spaces = {"new_space": new.space, "old_space": old.space}
    projection = fit_projection(new.encode_texts(TEXTS), old.encode_texts(TEXTS), centring="joint", **spaces)
    ensemble = QueryEnsemble(16, {"T2I": Slerp(0.6), "I2T": Nlerp(0.3)}, old_space=old.space)
    return CompatibleEncoder(new, projection, ensemble, old)


def test_a_compatible_encoder_is_served_without_torch(tmp_path, upgraded):
    about = export_onnx(upgraded, tmp_path / "text.onnx")
    export_onnx(upgraded, tmp_path / "image.onnx", modality="image")
    texts = run(
        tmp_path / "text.onnx",
        new_vectors=upgraded.new.encode_texts(TEXTS),
        old_vectors=upgraded.old.encode_texts(TEXTS),
    )
    assert np.abs(texts - upgraded.encode_texts(TEXTS).numpy()).max() <= 1e-5
    images = run(
        tmp_path / "image.onnx",
        new_vectors=upgraded.new.encode_images(IMAGES),
        old_vectors=upgraded.old.encode_images(IMAGES),
    )
    assert np.abs(images - upgraded.encode_images(IMAGES).numpy()).max() <= 1e-5
    spaces = [EmbeddingSpace.from_dict(each["space"]) for each in (*about["inputs"], about["output"])]
    for space, wanted in zip(spaces, (upgraded.new.space, upgraded.space, upgraded.space), strict=True):
        assert space.compare(wanted).verified


def test_the_contract_is_in_the_model_and_beside_it(tmp_path, old_space, new_space):
    projection = linear()
    projection.set_spaces(new_space, old_space)
    about = export_onnx(projection, tmp_path / "made/query.onnx", ensemble=ensemble_of(Slerp(0.25)))
    model = onnx.load(tmp_path / "made/query.onnx")
    onnx.checker.check_model(model, full_check=True)
    kept = {each.key: each.value for each in model.metadata_props}
    beside = (tmp_path / "made/query.json").read_text()
    assert json.loads(kept[CONTRACT]) == json.loads(beside) == about
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["query.json", "query.onnx"]
    assert [(each["name"], each["dim"], each["rows"]) for each in about["inputs"]] == [
        ("new_vectors", 24, "unit"), ("old_vectors", 16, "unit"),
    ]  # fmt: skip
    assert (about["output"]["name"], about["output"]["dim"], about["modality"]) == ("queries", 16, "text")
    assert about["ensemble"] == {"mode": "slerp", "alpha": 0.25, "padded": False}
    assert EmbeddingSpace.from_dict(about["inputs"][0]["space"]).compare(new_space).verified
    shapes = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input]
    assert shapes == [["n", 24], ["n", 16]]


def test_the_model_is_the_same_each_time_and_names_no_place(tmp_path):
    projection, ensemble = linear(), ensemble_of(Slerp(0.5))
    for name in ("a.onnx", "b.onnx"):
        export_onnx(projection, tmp_path / name, ensemble=ensemble)
    first = (tmp_path / "a.onnx").read_bytes()
    assert first == (tmp_path / "b.onnx").read_bytes()
    assert b".py" not in first


def test_nothing_is_warned_of_and_nothing_printed(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(linear(), tmp_path / "query.onnx", ensemble=ensemble_of(Nlerp(0.5)))
    assert capfd.readouterr() == ("", "")


def test_a_model_that_differs_is_not_written(tmp_path, monkeypatch):
    projection = linear()
    traced = onnx_job._traced

    def wrong(graph, *rest):
        program = traced(graph, *rest)
        graph.map.bias = torch.nn.Parameter(graph.map.bias + 1)  # what torch gives is another now
        return program

    monkeypatch.setattr(onnx_job, "_traced", wrong)
    with pytest.raises(
        XbtError, match=r"the ONNX model of a linear projection differs from torch by .* rows"
    ):
        export_onnx(projection, tmp_path / "query.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("query.pt", {}, "ends in .onnx, got 'query.pt'"),
        ("query.onnx", {"modality": "audio"}, "'text' or 'image', got 'audio'"),
        ("query.onnx", {"modality": "image", "ensemble": ensemble_of(Nlerp(0.5))}, "made for T2I alone"),
        ("query.onnx", {"ensemble": QueryEnsemble.midpoint(8)}, "combines 8-d vectors, but the projection"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, name, options, words):
    with pytest.raises(ConfigError, match=words):
        export_onnx(linear(), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_other_wrong_input(tmp_path, upgraded, monkeypatch):
    with pytest.raises(ConfigError, match="has its own ensemble"):
        export_onnx(upgraded, tmp_path / "query.onnx", ensemble=QueryEnsemble.midpoint(16))
    with pytest.raises(ConfigError, match="give a Projection or a CompatibleEncoder to export, not a str"):
        export_onnx("projection", tmp_path / "query.onnx")
    with pytest.raises(ConfigError, match="the map needs 3-d side information"):
        export_onnx(ForwardMap(24, 16, side_dim=3), tmp_path / "query.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        export_onnx(linear(), tmp_path / "file" / "query.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"onnxscript is not installed, .* pip install 'xbt\[onnx\]'"):
        export_onnx(linear(), tmp_path / "query.onnx")
