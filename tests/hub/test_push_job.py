"""The push job: files that it finds in a directory, uploads or refuses."""

from __future__ import annotations

import json

import pytest
import torch
from hub.helpers import adapted
from huggingface_hub import ModelCard

from xbt.backbones import CompatibleBackbone, ImagePreprocessing, load_backbone
from xbt.cli.push import PushConfig, PushResult, find_artifact, push
from xbt.compatible import CompatibleEncoder
from xbt.config import config_to_dict
from xbt.errors import ConfigError
from xbt.evaluation.cells import Cell, RetrievalReport
from xbt.heads import BCTHead, CompatibleHead, make_head
from xbt.hub import SavedPartError
from xbt.projections import Projection, QueryEnsemble
from xbt.projections.ensemble import Nlerp


def run_directory(root, name):
    """What a run leaves behind besides the part itself."""
    run = root / "run"
    (run / "checkpoints/step_1").mkdir(parents=True)
    (run / "checkpoints/step_1/optimizer.bin").write_bytes(b"\x80\x04")
    (run / "vectors/texts").mkdir(parents=True)
    (run / "vectors/texts/config.json").write_text("{}")
    for file in ("config.yaml", "versions.json", "result.json"):
        (run / file).write_text("{}")
    return run, run / name


def report():
    recall = {1: 0.25, 5: 0.5}
    cells = [Cell(name, recall, recall, 10, 50) for name in ("old/old", "new/old", "new/new")]
    return RetrievalReport(cells)


def test_a_runs_projection_with_the_results_beside_it(hub, projection, tmp_path):
    run, place = run_directory(tmp_path, "projection")
    projection.save_pretrained(place)
    (run / "retrieval.json").write_text(json.dumps(report().to_dict()))
    found = push(
        PushConfig(
            str(run), "org/p", private=True, message="stage 1", license="mit", datasets=["org/captions"],
            evaluated_on="our catalogue",
        )
    )  # fmt: skip
    main = hub.repos["org/p"].refs["main"]
    assert found == PushResult(f"{hub.url}/org/p/commit/{main}", main, "LinearProjection", str(place))
    assert str(found) == f"pushed the LinearProjection in {place}\n{found.url}"
    assert found.to_dict()["commit"] == main
    assert set(hub.files("org/p")) == {"README.md", "config.json", "model.safetensors"}
    assert hub.repos["org/p"].private
    assert hub.repos["org/p"].messages[-1] == "stage 1"
    card = ModelCard.load("org/p")
    assert (card.data.license, card.data.datasets) == ("mit", ["org/captions"])
    assert {each.metric_value for each in card.data.eval_results} == {0.25, 0.5}
    assert ModelCard.load(place / "README.md").data.eval_results  # the directory tells the same
    assert torch.equal(Projection.from_pretrained("org/p").weight, projection.weight)


def test_a_runs_compatible_encoder(hub, hosted, tmp_path):
    run, place = run_directory(tmp_path, "compatible")
    encoder = adapted(*hosted, place)
    results = tmp_path / "elsewhere.json"
    results.write_text(json.dumps(report().to_dict()))
    found = push(PushConfig(str(run), "org/e", results=str(results), create_pr=True))
    assert found.kind == "CompatibleEncoder"
    assert found.url == f"{hub.url}/org/e/discussions/1"
    assert found.commit == hub.repos["org/e"].refs["refs/pr/1"]
    names = hub.files("org/e", "refs/pr/1")
    assert set(names) == {
        "README.md", "config.json", "lora/adapter_config.json", "lora/adapter_model.safetensors",
        "projection/config.json", "projection/model.safetensors",
    }  # fmt: skip
    assert names["lora/adapter_model.safetensors"] == (place / "lora/adapter_model.safetensors").read_bytes()
    pulled = CompatibleEncoder.from_pretrained("org/e", revision="refs/pr/1")
    assert torch.equal(pulled.encode_texts(["a red star"]), encoder.encode_texts(["a red star"]))


def test_a_backbone_an_ensemble_and_a_head_are_recognised(hub, tmp_path):
    head = make_head("oca", {"old_dim": 6, "extra_dims": 2})
    run, place = run_directory(tmp_path, "model")
    CompatibleBackbone(load_backbone("small_resnet"), head, ImagePreprocessing(32)).save_pretrained(place)
    QueryEnsemble(4, {"T2I": Nlerp()}).save_pretrained(tmp_path / "ensemble")
    BCTHead(4, 4).save_pretrained(tmp_path / "head")
    assert push(PushConfig(str(run), "org/b", revision="trial")).kind == "CompatibleBackbone"
    assert set(hub.files("org/b", "trial")) == {"README.md", "config.json", "model.safetensors"}
    assert hub.files("org/b") == {}
    assert push(PushConfig(str(tmp_path / "ensemble"), "org/q")).kind == "QueryEnsemble"
    assert find_artifact(tmp_path / "head") == (tmp_path / "head", CompatibleHead)


def test_a_directory_of_several_runs_is_not_guessed(projection, tmp_path):
    for stage in ("stage1/projection", "stage2/compatible/projection"):
        projection.save_pretrained(tmp_path / stage)
    (tmp_path / "stage2/compatible/config.json").write_text('{"format": "compatible_encoder"}')
    with pytest.raises(SavedPartError, match=r"holds 2 things to share: .*stage1/proj.*, .*stage2/"):
        find_artifact(tmp_path)
    assert find_artifact(tmp_path / "stage2")[1] is CompatibleEncoder
    assert find_artifact(tmp_path / "stage1") == (tmp_path / "stage1/projection", Projection)


def test_nothing_to_share(projection, tmp_path):
    with pytest.raises(SavedPartError, match="does not exist; name what a run"):
        push(PushConfig(str(tmp_path / "nowhere"), "org/p"))
    with pytest.raises(SavedPartError, match="holds no projection, ensemble, compatible encoder or backbone"):
        push(PushConfig(str(tmp_path), "org/p"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(SavedPartError, match=r"model\.bin would have to be unpickled and is not shared"):
        push(PushConfig(str(tmp_path), "org/p"))


def test_damaged_artifacts_are_not_pushed(hub, projection, tmp_path):
    projection.save_pretrained(tmp_path / "p")
    weights = tmp_path / "p" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(SavedPartError, match=r"model\.safetensors is damaged"):
        push(PushConfig(str(tmp_path / "p"), "org/p"))
    assert hub.requests == []


def test_results_that_cannot_be_read(hub, projection, tmp_path):
    projection.save_pretrained(tmp_path / "p")
    file = tmp_path / "results.json"
    file.write_text('{"top1": 3}')
    with pytest.raises(ConfigError, match=r"results\.json is not a retrieval report"):
        push(PushConfig(str(tmp_path / "p"), "org/p", results=str(file)))
    assert hub.requests == []


def test_the_config_is_a_command_line():
    config = PushConfig("run", "org/p", private=True)
    assert PushConfig(**config_to_dict(config)) == config
