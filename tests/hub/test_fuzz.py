"""Damaged or hostile artifacts: every loader loads them, or refuses them in one sentence."""

from __future__ import annotations

import json
import struct
import warnings

import pytest
import torch
from fuzzing import damaged, damaged_json, dump, fuzzed, fuzzed_in, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st

from xbt.backbones import CompatibleBackbone, ImagePreprocessing, load_backbone
from xbt.compatible import CompatibleEncoder
from xbt.encoders import load_encoder
from xbt.heads import BT2Head, CompatibleHead, OCAHead, make_head
from xbt.hub import CONFIG_NAME, WEIGHTS_NAME
from xbt.projections import (
    ForwardMap,
    HeadProjection,
    LinearProjection,
    Projection,
    QueryEnsemble,
    ResidualProjection,
)
from xbt.projections.ensemble import Linear, Nlerp
from xbt.space import EmbeddingSpace

SPACE = EmbeddingSpace(
    "open_clip:ViT-B-32/openai", 8, {"size": 224, "mean": [0.5, 0.5, 0.5]}, torch.ones(20, 8)
)


def backbone(spec, size):
    head = make_head("oca", {"old_dim": 8, "extra_dims": 4, "n_classes": 2})
    return CompatibleBackbone(load_backbone(spec), head, ImagePreprocessing(size), ["a", "b"], SPACE)


def linear():
    made = LinearProjection(12, 8)
    made.set_spaces(EmbeddingSpace("new", 12, {}, torch.ones(20, 12)), SPACE)
    return made


PARTS = {
    "linear": (Projection, linear),
    "residual": (Projection, lambda: ResidualProjection(12, 8, centred=True)),
    "forward": (Projection, lambda: ForwardMap(12, 8, hidden_dim=4)),
    "projection_head": (
        Projection,
        lambda: HeadProjection(12, 8, "oca", {"old_dim": 8, "extra_dims": 2}),
    ),
    "ensemble": (
        QueryEnsemble,
        lambda: QueryEnsemble(
            8, {"I2T": Linear(0.2)}, {"I2T": {"old_matrix": torch.eye(8), "new_matrix": torch.eye(8)}}
        ),
    ),
    "bt2": (CompatibleHead, lambda: BT2Head(6, 6, 2, n_classes=3)),
    "oca": (CompatibleHead, lambda: OCAHead(8, 2)),
    "backbone": (CompatibleBackbone, lambda: backbone("small_resnet:4", 32)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each part, its config without digests, and the bytes of its weights."""
    found = {}
    for name, (_, make) in PARTS.items():
        folder = tmp_path_factory.mktemp(name)
        make().save_pretrained(folder)
        config = json.loads((folder / CONFIG_NAME).read_text())
        # A hostile part has the right digest; here, none.
        config.pop("sha256")
        found[name] = folder, config, (folder / WEIGHTS_NAME).read_bytes()
    return found


def load(kind, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind.from_pretrained(folder, **options)


@pytest.mark.parametrize("name", PARTS)
@fuzzed_in(4)
@given(data=st.data())
def test_fuzz_configs(name, saved, data):
    folder, config, weights = saved[name]
    (folder / WEIGHTS_NAME).write_bytes(weights)
    (folder / CONFIG_NAME).write_bytes(dump(data.draw(damaged_json(config))))
    loads_or_refuses(lambda: load(PARTS[name][0], folder))


@pytest.mark.parametrize("name", ["linear", "ensemble", "bt2", "backbone"])
@fuzzed_in(4)
@given(data=st.data())
def test_fuzz_files(name, saved, data):
    folder, config, weights = saved[name]
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    kind = data.draw(st.sampled_from(["config", "header", "weights"]))
    length = 8 + int.from_bytes(weights[:8], "little")
    if kind == "config":
        (folder / CONFIG_NAME).write_bytes(data.draw(damaged(json.dumps(config).encode())))
    elif kind == "header":
        header = dump(data.draw(damaged_json(json.loads(weights[8:length]))))
        weights = struct.pack("<Q", len(header)) + header + weights[length:]
    else:
        weights = data.draw(damaged(weights))
    (folder / WEIGHTS_NAME).write_bytes(weights)
    loads_or_refuses(lambda: load(PARTS[name][0], folder))


@pytest.fixture(scope="module")
def encoder(open_clip_spec, tmp_path_factory):
    """A folder with a compatible encoder that has an ensemble, its config, and its base."""
    folder = tmp_path_factory.mktemp("encoder")
    base = load_encoder(open_clip_spec)
    projection = LinearProjection(base.dim, base.dim)
    projection.set_spaces(base.space, base.space)
    ensemble = QueryEnsemble(base.dim, {"T2I": Nlerp(0.2)})
    CompatibleEncoder(base, projection, ensemble, base).save_pretrained(folder)
    config = json.loads((folder / CONFIG_NAME).read_text())
    config.pop("sha256")
    return folder, config, base


@fuzzed
@given(data=st.data())
def test_fuzz_compatible_encoders(encoder, data):
    folder, config, base = encoder
    changed = data.draw(damaged_json(config))
    (folder / CONFIG_NAME).write_bytes(dump(changed))
    loads_or_refuses(lambda: load(CompatibleEncoder, folder, base=base, load_old=False))
    # Without a base the recorded one is looked for, by whatever it is called.
    recorded = changed.get("base") if isinstance(changed, dict) else None
    if recorded != config["base"]:
        loads_or_refuses(lambda: load(CompatibleEncoder, folder, load_old=False))
