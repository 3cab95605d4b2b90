"""Untrusted configs and weights: refused in one sentence, before memory is allocated."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path

import pytest
import torch
from hub.helpers import adapted
from safetensors.torch import load_file, save_file

from xbt.backbones import CompatibleBackbone, ImagePreprocessing, load_backbone
from xbt.compatible import CompatibleEncoder
from xbt.encoders import load_encoder, load_lora
from xbt.errors import EncoderError, XbtError
from xbt.heads import BT2Head, CompatibleHead, OCAHead, make_head
from xbt.hub import SavedPartError, fetch
from xbt.projections import (
    ForwardMap,
    HeadProjection,
    LinearProjection,
    Projection,
    QueryEnsemble,
    ResidualProjection,
)
from xbt.projections.ensemble import Linear

HUGE = 10**9


@pytest.fixture
def little_memory():
    """Limit further address space to 2 GiB, so that a larger allocation fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def respoil(directory, change):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def put(path, value):
    """A change of a config: the value at a path of keys."""

    def change(config):
        *rest, last = path.split(".")
        for key in rest:
            config = config[key]
        config[last] = value

    return change


PARTS = {
    "linear": lambda: LinearProjection(12, 8),
    "residual": lambda: ResidualProjection(12, 8, centred=True),
    "forward": lambda: ForwardMap(12, 8, hidden_dim=4),
    "head": lambda: HeadProjection(12, 8, "oca", {"old_dim": 8, "extra_dims": 2}),
    "bt2": lambda: BT2Head(6, 6, 2, n_classes=3),
    "oca": lambda: OCAHead(8, 2),
    "ensemble": lambda: QueryEnsemble(
        8, {"I2T": Linear(0.2)}, {"I2T": {"old_matrix": torch.eye(8), "new_matrix": torch.eye(8)}}
    ),
}


def reader(kind):
    heads, ensembles = ("bt2", "oca"), ("ensemble",)
    return CompatibleHead if kind in heads else QueryEnsemble if kind in ensembles else Projection


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("linear", {"new_dim": HUGE}),
        ("linear", {"new_dim": HUGE, "old_dim": HUGE}),
        ("linear", {"new_dim": 2**70}),
        ("linear", {"new_dim": -3}),
        ("residual", {"options.hidden_dim": HUGE}),
        ("forward", {"options.side_dim": HUGE}),
        ("forward", {"options.hidden_dim": 30_000}),
        ("head", {"options.head_options.extra_dims": HUGE}),
        ("head", {"options.head_options.extra_dims": 5_000}),
        ("bt2", {"options.new_dim": HUGE}),
        ("bt2", {"options.n_classes": HUGE}),
        ("oca", {"options.extra_dims": HUGE}),
        ("oca", {"options.extra_dims": 20_000}),
        ("ensemble", {"old_dim": HUGE, "directions.I2T.tensors": {
            "old_matrix": [HUGE, HUGE], "new_matrix": [HUGE, HUGE]}}),
        ("ensemble", {"old_dim": 20_000, "directions.I2T.tensors": {
            "old_matrix": [20_000, 20_000], "new_matrix": [20_000, 20_000]}}),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_too_much(kind, changes, tmp_path, little_memory):
    PARTS[kind]().save_pretrained(tmp_path)
    for path, value in changes.items():
        respoil(tmp_path, put(path, value))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SavedPartError, match=r"config"):
        reader(kind).from_pretrained(tmp_path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert grown < 100 * 2**20


def saved_backbone(directory, spec="small_resnet"):
    backbone = load_backbone(spec)
    head = make_head("oca", {"old_dim": 8, "extra_dims": 4})
    CompatibleBackbone(backbone, head, backbone.preprocessing or ImagePreprocessing(32)).save_pretrained(
        directory
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("backbone.spec", "small_resnet:100000"),
        ("backbone.image_size", HUGE),
        ("preprocessing.image_size", HUGE),
        ("head.options.extra_dims", HUGE),
        ("head.options.n_classes", HUGE),
    ],
)
def test_a_backbone_that_asks_for_too_much(path, value, tmp_path, little_memory):
    saved_backbone(tmp_path)
    respoil(tmp_path, put(path, value))
    with pytest.raises(SavedPartError, match="config"):
        CompatibleBackbone.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("width", 10**6), ("layers", 10**8), ("layers", [10**8]), ("patch_size", 1)]
)
def test_a_tower_that_asks_for_too_much(open_clip_spec, key, value, tmp_path, little_memory):
    saved_backbone(tmp_path, f"clip:{open_clip_spec}")
    respoil(tmp_path, put(f"backbone.architecture.config.vision_cfg.{key}", value))
    with pytest.raises(SavedPartError, match="config"):
        CompatibleBackbone.from_pretrained(tmp_path)


def test_a_transformers_tower_that_asks_for_too_much(transformers_spec, tmp_path, little_memory):
    for key, value in (("num_hidden_layers", 10**8), ("hidden_size", 10**8)):
        saved_backbone(tmp_path, f"clip:{transformers_spec}")
        respoil(tmp_path, put(f"backbone.architecture.config.vision_config.{key}", value))
        with pytest.raises(SavedPartError, match="config"):
            CompatibleBackbone.from_pretrained(tmp_path)


def test_a_header_that_promises_more_than_the_file_holds(tmp_path):
    LinearProjection(12, 8).save_pretrained(tmp_path)
    header = {"weight": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4 * HUGE * HUGE]}}
    text = json.dumps(header).encode()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    with pytest.raises(SavedPartError, match=r"model\.safetensors is damaged"):
        Projection.from_pretrained(tmp_path)
    weights.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(SavedPartError, match=r"model\.safetensors is damaged"):
        Projection.from_pretrained(tmp_path)
    weights.write_bytes(b"\x80\x04\x95")  # how a pickle begins
    with pytest.raises(SavedPartError, match=r"model\.safetensors is damaged"):
        Projection.from_pretrained(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 40, -1])
def test_truncated_weights(cut, tmp_path):
    LinearProjection(12, 8).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(SavedPartError, match=r"model\.safetensors is damaged"):
        Projection.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_numbers(value, tmp_path):
    projection = LinearProjection(12, 8)
    projection.save_pretrained(tmp_path)
    weight = projection.weight.detach().clone()
    weight[3, 4] = value
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(SavedPartError, match=r"weight of .*model\.safetensors holds NaN or infinite values"):
        Projection.from_pretrained(tmp_path)
    with torch.no_grad():
        projection.weight.copy_(weight)
    with pytest.raises(SavedPartError, match="weight of the LinearProjection holds NaN"):
        projection.save_pretrained(tmp_path / "again")


def test_weights_of_another_type(tmp_path):
    LinearProjection(12, 8).save_pretrained(tmp_path)
    respoil(tmp_path, lambda config: config.pop("sha256"))
    save_file({"weight": torch.ones(8, 12, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(SavedPartError, match="weight has the type I32, the config needs F32"):
        Projection.from_pretrained(tmp_path)
    half = torch.randn(8, 12).half()
    save_file({"weight": half}, tmp_path / "model.safetensors")
    assert torch.equal(Projection.from_pretrained(tmp_path).weight, half.float())


def test_changed_weights_and_digests(tmp_path):
    LinearProjection(12, 8).save_pretrained(tmp_path)
    save_file({"weight": torch.ones(8, 12)}, tmp_path / "model.safetensors")
    with pytest.raises(SavedPartError, match=r"its SHA-256 differs from the one in config\.json"):
        Projection.from_pretrained(tmp_path)
    for record in ({"../../x": "0"}, ["model.safetensors"], {"/etc/passwd": "0"}):
        respoil(tmp_path, put("sha256", record))
        with pytest.raises(SavedPartError, match="must name files that xbt saves"):
            Projection.from_pretrained(tmp_path)


def test_artifacts_without_digests_load(tmp_path):
    projection = LinearProjection(12, 8)
    projection.save_pretrained(tmp_path)
    respoil(tmp_path, lambda config: config.pop("sha256"))
    assert torch.equal(Projection.from_pretrained(tmp_path).weight, projection.weight)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000 + "1" + "}" * 200_000, "nested too deeply"),
        ('{"kind": "linear", "new_dim": NaN}', "NaN is not a JSON number"),
        ('{"kind": "linear", "new_dim": Infinity}', "Infinity is not a JSON number"),
        ('{"new_dim": ' + "9" * 10_000 + "}", "not valid JSON"),
        ('{"pad": "' + "x" * (16 * 2**20) + '"}', "at most 16,777,216 are read"),
        ("\x00\x01", "not valid JSON"),
    ],
    ids=["lists", "objects", "nan", "infinity", "digits", "size", "binary"],
)
def test_configs_that_are_bombs(text, words, tmp_path):
    LinearProjection(12, 8).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SavedPartError, match=words):
        Projection.from_pretrained(tmp_path)


def test_links_are_not_followed(tmp_path):
    secret = tmp_path / "secret.safetensors"
    projection = LinearProjection(12, 8)
    projection.save_pretrained(tmp_path / "part")
    weights = tmp_path / "part" / "model.safetensors"
    weights.rename(secret)
    weights.symlink_to(secret)
    with pytest.raises(SavedPartError, match=r"is a link to .*secret.*such links are not followed"):
        Projection.from_pretrained(tmp_path / "part")
    weights.unlink()
    secret.rename(tmp_path / "part" / "other")
    weights.symlink_to("other")  # within the directory
    assert torch.equal(Projection.from_pretrained(tmp_path / "part").weight, projection.weight)
    (tmp_path / "link").symlink_to(tmp_path / "part")  # the user's own
    assert torch.equal(Projection.from_pretrained(tmp_path / "link").weight, projection.weight)


@pytest.mark.parametrize("name", ["../../x", "a/../b", "../x/y", "org/..", "org/a@../b"])
def test_names_that_climb(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SavedPartError, match="it is not a Hub repository"):
        fetch(name)


def test_the_place_of_an_encoders_models(models, tmp_path, monkeypatch):
    new, old = (f"open_clip:local-dir:{models / name}" for name in ("new-clip", "old-clip"))
    encoder = adapted(new, old, tmp_path / "encoder")
    base = f"open_clip:local-dir:{models}/x/../new-clip"
    for spec, words in (
        (base, r"a path that leaves its directory.*pass base="),
        ("transformers:../../new-clip", "leaves its directory"),
        ("open_clip:ViT-B-32/../../weights.pt", "leaves its directory"),
        ("local:new-clip", r"is 'new-clip', a directory of the machine that uploaded it; pass base="),
        (["x"], "must be specifications of models"),
    ):
        respoil(tmp_path / "encoder", put("base", spec))
        with pytest.raises(SavedPartError, match=words):
            CompatibleEncoder.from_pretrained(tmp_path / "encoder")
        loaded = (
            None
            if isinstance(spec, list)
            else CompatibleEncoder.from_pretrained(tmp_path / "encoder", base=new)
        )
        assert loaded is None or torch.equal(loaded.projection.weight, encoder.projection.weight)


def test_paths_in_configs_from_the_hub_are_not_followed(models, tmp_path):
    new, old = (f"open_clip:local-dir:{models / name}" for name in ("new-clip", "old-clip"))
    snapshot = tmp_path / "models--org--e" / "snapshots" / ("0" * 40)
    adapted(new, old, tmp_path / "encoder").save_pretrained(snapshot)
    with pytest.raises(SavedPartError, match=r"a path of another machine and is not followed; pass base="):
        CompatibleEncoder.from_pretrained(snapshot)
    assert CompatibleEncoder.from_pretrained(snapshot, base=new).dim == 12


def test_a_lora_of_an_impossible_rank(models, tmp_path, little_memory):
    new, old = (f"open_clip:local-dir:{models / name}" for name in ("new-clip", "old-clip"))
    adapted(new, old, tmp_path)
    file = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(file.read_text())
    encoder = load_encoder(new)
    for change, words in (
        ({"r": HUGE}, "its config says rank 1000000000 for .*, but its weights have rank 2"),
        ({"r": 0}, r"cannot be read: adapter_config\.json has r 0"),
        ({"r": "x"}, r"cannot be read: adapter_config\.json has r 'x'"),
        ({"lora_alpha": None}, "has lora_alpha None"),
        ({"target_modules": 7}, "cannot be read: .* has target_modules 7"),
        ({"rank_pattern": {"attn": 0.5}}, "cannot be read: .* has rank_pattern"),
        ({"rank_pattern": {"attn": HUGE}}, "rank 1000000000"),
        ({"peft_type": "PREFIX_TUNING"}, "not a LoRA"),
    ):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(EncoderError, match=words):
            load_lora(encoder, tmp_path / "lora")
        assert not hasattr(encoder.module, "peft_config")
    file.write_text("[" * 100_000)
    with pytest.raises(EncoderError, match="nested too deeply"):
        load_lora(encoder, tmp_path / "lora")
    file.write_text(json.dumps(config))
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    state = load_file(weights)
    state[sorted(state)[0]][0, 0] = torch.nan
    save_file(state, weights)
    with pytest.raises(XbtError, match="holds NaN"):
        load_lora(encoder, tmp_path / "lora")


def test_only_a_whole_loads_of_a_directory_with_pickles(tmp_path):
    LinearProjection(12, 8).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        SavedPartError, match=r"there is pytorch_model\.bin, but unpickling it could run any code"
    ):
        Projection.from_pretrained(tmp_path)
