"""Configs of a newer xbt load with one warning about ignored keys; other unknown keys are errors."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from hub.helpers import adapted

from xbt.backbones import CompatibleBackbone, ImagePreprocessing, load_backbone
from xbt.compatible import CompatibleEncoder
from xbt.heads import BCTHead, CompatibleHead, make_head
from xbt.hub import NewerConfigWarning, SavedPartError
from xbt.projections import HeadProjection, LinearProjection, Projection, QueryEnsemble
from xbt.projections.ensemble import Nlerp
from xbt.version import __version__

NEWER = "99.1.0"


def rewrite(file, *paths, version=NEWER):
    """Adds an unknown key under each path of keys, and the version that wrote it."""
    config = json.loads(file.read_text())
    for path in paths:
        place = config
        for key in filter(None, path.split(".")):
            place = place[key]
        place["novelty"] = 1
    if version is None:
        config.pop("xbt_version", None)
    else:
        config["xbt_version"] = version
    file.write_text(json.dumps(config))


def test_keys_of_a_newer_xbt_are_left_out_with_one_warning(projection, tmp_path):
    projection.save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", "", "options", "new_space")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = Projection.from_pretrained(tmp_path)
    assert torch.equal(loaded.weight, projection.weight)
    assert [each.category for each in caught] == [NewerConfigWarning]
    message = str(caught[0].message)
    assert f"xbt {NEWER} wrote this" in message
    assert f"xbt {__version__} does not: novelty, options.novelty, new_space.novelty" in message


@pytest.mark.parametrize("version", [__version__, "0.0.1", None, "nonsense", 7])
def test_keys_of_the_same_or_an_older_xbt_are_errors(projection, version, tmp_path):
    projection.save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", "options", version=version)
    with pytest.raises(SavedPartError, match=r"config\.json lacks or misnames a key"):
        Projection.from_pretrained(tmp_path)


def test_unknown_tensors_are_errors_for_any_version(projection, tmp_path):
    from safetensors.torch import load_file, save_file

    projection.save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json")
    weights = tmp_path / "model.safetensors"
    save_file({**load_file(weights), "more": torch.zeros(1)}, weights)
    with pytest.raises(SavedPartError, match=r"unexpected \['more'\]"):
        Projection.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["kind", "new_dim", "old_dim", "options", "new_space", "xbt_version"])
@pytest.mark.parametrize("newer", [False, True])
def test_missing_keys_are_errors_for_any_version(projection, key, newer, tmp_path):
    projection.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["xbt_version"] = NEWER if newer else __version__
    del config[key]
    file.write_text(json.dumps(config))
    with pytest.raises(SavedPartError, match=key):
        Projection.from_pretrained(tmp_path)


def backbone():
    head = make_head("oca", {"old_dim": 4, "extra_dims": 2})
    return CompatibleBackbone(load_backbone("small_resnet"), head, ImagePreprocessing(32))


@pytest.mark.parametrize(
    ("make", "kind", "paths"),
    [
        (lambda: QueryEnsemble(4, {"T2I": Nlerp()}), QueryEnsemble, ("", "directions.T2I")),
        (lambda: BCTHead(4, 4), CompatibleHead, ("", "options")),
        (
            lambda: HeadProjection(6, 4, "bct", {"new_dim": 5, "old_dim": 4}),
            Projection,
            ("options", "options.head_options"),
        ),
        (backbone, CompatibleBackbone, ("", "backbone", "head", "head.options", "preprocessing")),
    ],
    ids=["ensemble", "head", "head_projection", "backbone"],
)
def test_every_part_does_so(make, kind, paths, tmp_path):
    make().save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", *paths)
    with pytest.warns(NewerConfigWarning) as caught:
        kind.from_pretrained(tmp_path)
    assert len(caught) == 1
    for path in paths:
        assert (f"{path}.novelty" if path else "novelty") in str(caught[0].message)
    rewrite(tmp_path / "config.json", *paths, version=__version__)
    with pytest.raises(SavedPartError, match="novelty"):
        kind.from_pretrained(tmp_path)


def test_an_encoder_tells_of_all_its_parts_at_once(models, tmp_path):
    specs = (f"open_clip:local-dir:{models / name}" for name in ("new-clip", "old-clip"))
    adapted(*specs, tmp_path)
    for file in (tmp_path / "config.json", tmp_path / "projection/config.json"):
        rewrite(file, "")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(NewerConfigWarning) as caught:
        CompatibleEncoder.from_pretrained(tmp_path)
    assert len([each for each in caught if each.category is NewerConfigWarning]) == 1


def test_the_method_is_recorded(tmp_path):
    projection = LinearProjection(4, 3)
    projection.method = "ridge"
    projection.save_pretrained(tmp_path)
    assert Projection.from_pretrained(tmp_path).method == "ridge"
