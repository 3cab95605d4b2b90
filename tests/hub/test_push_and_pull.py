"""Pushing to a local Hub server, pulling in another process, and failures in between."""

from __future__ import annotations

import json
import pickle

import huggingface_hub
import pytest
import torch
from hub.helpers import TEXTS, adapted, run_fresh
from hub.server import READER
from safetensors.torch import load_file, save_file

from xbt.backbones import CompatibleBackbone, ImagePreprocessing, load_backbone
from xbt.data import make_scenes
from xbt.heads import make_head
from xbt.hub import SavedPartError, fetch
from xbt.projections import LinearProjection, Projection, QueryEnsemble
from xbt.projections.ensemble import Nlerp

PULL = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
import xbt
from xbt.data import make_scenes

texts = json.loads(sys.argv[1])
# Clones, because another memory layout can change rounding.
given = {name: each.clone() for name, each in load_file(sys.argv[2]).items()}
images = make_scenes(3).images
encoder = xbt.CompatibleEncoder.from_pretrained("org/encoder")
model = xbt.CompatibleBackbone.from_pretrained("org/backbone")
found = {
    "projection": xbt.Projection.from_pretrained("org/projection")(given["vectors"]).detach(),
    "ensemble": xbt.QueryEnsemble.from_pretrained("org/ensemble")(given["old"], given["old"].flip(0), "T2I"),
    "texts": encoder.encode_texts(texts),
    "images": encoder.encode_images(images),
    "backbone": model.encode_images(images),
    "compatible": model.encode_images(images, space="old"),
}
save_file({name: each.contiguous() for name, each in found.items()}, sys.argv[3])
"""


def backbone():
    head = make_head("bt2", {"new_dim": 8, "old_dim": 6, "extra_dims": 2, "n_classes": 3})
    model = CompatibleBackbone(load_backbone("small_resnet"), head, ImagePreprocessing(32), ["a", "b", "c"])
    return model.eval()


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_vectors(hub, hosted, projection, tmp_path):
    encoder = adapted(*hosted, tmp_path / "encoder")
    model, ensemble = backbone(), QueryEnsemble(8, {"T2I": Nlerp(0.3)})
    given = {"vectors": torch.randn(5, 12), "old": torch.randn(5, 8)}
    save_file(given, tmp_path / "given")
    images = make_scenes(3).images
    expected = {
        "projection": projection(given["vectors"]).detach(),
        "ensemble": ensemble(given["old"], given["old"].flip(0), "T2I"),
        "texts": encoder.encode_texts(TEXTS),
        "images": encoder.encode_images(images),
        "backbone": model.encode_images(images),
        "compatible": model.encode_images(images, space="old"),
    }
    for name, part in (
        ("projection", projection), ("ensemble", ensemble), ("encoder", encoder), ("backbone", model),
    ):  # fmt: skip
        url = part.push_to_hub(f"org/{name}")
        assert str(url).startswith(f"{hub.url}/org/{name}/commit/")
        assert url.oid == hub.repos[f"org/{name}"].refs["main"]
    assert set(hub.files("org/encoder")) == {
        "README.md", "config.json", "lora/adapter_config.json", "lora/adapter_model.safetensors",
        "projection/config.json", "projection/model.safetensors",
    }  # fmt: skip
    assert len(hub.verified) == 5  # every large file was uploaded by its hash, once
    run_fresh(PULL, json.dumps(TEXTS), tmp_path / "given", tmp_path / "found")
    found = load_file(tmp_path / "found")
    assert set(found) == set(expected)
    for name, vectors in expected.items():
        assert torch.equal(found[name], vectors), name
    # The same again from the cache alone: no request is made.
    hub.requests.clear()
    run_fresh(PULL, json.dumps(TEXTS), tmp_path / "given", tmp_path / "offline", HF_HUB_OFFLINE="1")
    assert hub.requests == []
    for name, vectors in load_file(tmp_path / "offline").items():
        assert torch.equal(vectors, expected[name]), name


def test_revisions_are_pinned(hub, projection):
    first = projection.push_to_hub("org/p").oid
    later = LinearProjection.from_weight(torch.randn(8, 12))
    second = later.push_to_hub("org/p", commit_message="better").oid
    hub.repos["org/p"].refs["v1"] = first
    for revision, weight in ((first, projection), ("v1", projection), (second, later), (None, later)):
        loaded = Projection.from_pretrained("org/p", revision=revision)
        assert torch.equal(loaded.weight, weight.weight), revision
    assert hub.repos["org/p"].messages[-1] == "better"
    with pytest.raises(SavedPartError, match=r"org/p at revision v9 does not exist; look at .* tags"):
        Projection.from_pretrained("org/p", revision="v9")


def test_branches_and_pull_requests(hub, projection):
    projection.push_to_hub("org/p")
    main = hub.repos["org/p"].refs["main"]
    other = LinearProjection.from_weight(torch.randn(8, 12))
    other.push_to_hub("org/p", revision="trial")
    proposed = other.push_to_hub("org/p", create_pr=True)
    assert hub.repos["org/p"].refs["main"] == main
    assert proposed.pr_url.endswith("/discussions/1")
    for revision in ("trial", "refs/pr/1"):
        assert torch.equal(Projection.from_pretrained("org/p", revision=revision).weight, other.weight)
    assert torch.equal(Projection.from_pretrained("org/p").weight, projection.weight)
    with pytest.raises(SavedPartError, match="opened against main, not trial"):
        other.push_to_hub("org/p", revision="trial", create_pr=True)


def test_a_second_pull_downloads_nothing(hub, projection):
    projection.push_to_hub("org/p")
    Projection.from_pretrained("org/p")
    assert hub.counts()["download"] == 3  # card, config, weights
    hub.requests.clear()
    Projection.from_pretrained("org/p")
    assert hub.counts()["download"] == hub.counts()["head"] == 0
    assert len(hub.requests) <= 1  # whether main has moved
    hub.requests.clear()
    Projection.from_pretrained("org/p", revision=hub.repos["org/p"].refs["main"])
    Projection.from_pretrained("org/p", local_files_only=True)
    assert hub.requests == []
    Projection.from_pretrained("org/p", force_download=True)
    assert hub.counts()["download"] == 3


def test_pushing_the_same_again_commits_nothing(hub, projection):
    first = projection.push_to_hub("org/p")
    again = projection.push_to_hub("org/p")
    assert again.oid == first.oid
    assert hub.counts()["commit"] == 1
    assert hub.counts()["upload"] == 1


def test_files_of_an_earlier_artifact_are_deleted(hub, hosted, projection, tmp_path):
    adapted(*hosted, tmp_path / "encoder").push_to_hub("org/p")
    projection.push_to_hub("org/p")
    assert set(hub.files("org/p")) == {"README.md", "config.json", "model.safetensors"}
    hub.repos["org/p"].commits[hub.repos["org/p"].refs["main"]]["notes.txt"] = b"mine"
    projection.push_to_hub("org/p", commit_message="again")
    assert "notes.txt" in hub.files("org/p")  # what xbt did not make is left alone


def test_the_server_may_be_gone(hub, projection, tmp_path):
    projection.push_to_hub("org/p")
    Projection.from_pretrained("org/p")
    hub.__exit__()
    huggingface_hub.close_session()
    assert torch.equal(Projection.from_pretrained("org/p").weight, projection.weight)
    with pytest.raises(SavedPartError, match=r"org/q is not in the cache and cannot be reached"):
        Projection.from_pretrained("org/q")
    with pytest.raises(SavedPartError, match=r"org/q was not pushed: .*; nothing is lost, push again"):
        projection.push_to_hub("org/q")


def test_offline_mode(hub, projection, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SavedPartError, match=r"org/p cannot be pushed to in offline mode; unset HF_HUB_OFF"):
        projection.push_to_hub("org/p")
    with pytest.raises(SavedPartError, match="not in the cache"):
        Projection.from_pretrained("org/p")
    assert hub.requests == []


def test_private_repositories(hub, projection, monkeypatch, tmp_path):
    projection.push_to_hub("org/p", private=True)
    assert hub.repos["org/p"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SavedPartError) as caught:
        Projection.from_pretrained("org/p")
    assert str(caught.value) == (
        "Hub repository org/p does not exist, or is private and needs a token that may read it"
    )
    loaded = Projection.from_pretrained("org/p", token=READER)
    assert torch.equal(loaded.weight, projection.weight)
    for token, status in ((None, 401), (READER, 403)):
        with pytest.raises(SavedPartError, match=rf"cannot be written to \({status}\); pass a token"):
            projection.push_to_hub("org/p", token=token)


def test_private_is_not_taken_for_granted(hub, projection):
    projection.push_to_hub("org/p")
    before = hub.repos["org/p"].refs["main"]
    with pytest.raises(SavedPartError, match=r"org/p already exists and is public"):
        projection.push_to_hub("org/p", private=True)
    assert hub.repos["org/p"].refs["main"] == before


def test_a_download_that_is_cut_short_is_taken_up_again(hub, projection):
    projection.push_to_hub("org/p")
    hub.faults["model.safetensors"] = ["truncate"]
    assert torch.equal(Projection.from_pretrained("org/p").weight, projection.weight)
    assert hub.counts()["download"] == 4


def test_a_file_that_stays_short_is_refused(hub, projection):
    projection.push_to_hub("org/p")
    files = hub.files("org/p")
    hub.put("org/p", {**files, "model.safetensors": files["model.safetensors"][:-40]})
    with pytest.raises(SavedPartError, match=r"model\.safetensors is damaged"):
        Projection.from_pretrained("org/p")


def test_a_file_that_was_tampered_with_is_refused(hub, projection):
    projection.push_to_hub("org/p")
    weights = bytearray(hub.files("org/p")["model.safetensors"])
    weights[-1] ^= 1
    hub.tampered["model.safetensors"] = bytes(weights)
    with pytest.raises(SavedPartError, match=r"model\.safetensors is not the file that was saved"):
        Projection.from_pretrained("org/p")


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_a_tampered_part_of_an_encoder_is_refused(hub, hosted, part, tmp_path):
    adapted(*hosted, tmp_path / "encoder").push_to_hub("org/e")
    name = f"projection/{part}"
    content = hub.files("org/e")[name]
    changed = content.replace(b'"linear"', b'"linear" ') if part == "config.json" else None
    hub.tampered[name] = changed or content[:-1] + bytes([content[-1] ^ 1])
    from xbt.compatible import CompatibleEncoder

    with pytest.raises(SavedPartError, match=rf"projection/{part} is not the file that was saved"):
        CompatibleEncoder.from_pretrained("org/e")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "projection.pkl", "weights.ckpt"])
def test_a_repository_of_pickles_is_not_even_fetched(hub, name):
    hub.put("org/p", {name: pickle.dumps({"weight": 1}), "README.md": b"# mine"})
    with pytest.raises(SavedPartError, match=rf"org/p holds {name} and no config\.json.*could run any code"):
        Projection.from_pretrained("org/p")
    assert not any(name in line for line in hub.requests)


def test_pickles_beside_a_config_are_left_there(hub, projection):
    projection.push_to_hub("org/p")
    files = {**hub.files("org/p"), "pytorch_model.bin": b"\x80\x04.", "run.py": b"boom", "a/b.json": b"{}"}
    hub.put("org/p", files)
    loaded = fetch("org/p")
    assert {each.name for each in loaded.rglob("*")} == {"README.md", "config.json", "model.safetensors"}
    hub.put("org/p", {name: files[name] for name in ("config.json", "pytorch_model.bin")})
    with pytest.raises(SavedPartError, match=r"model\.safetensors is missing"):
        Projection.from_pretrained("org/p")


def test_an_empty_repository(hub):
    hub.put("org/p", {"README.md": b"# soon"})
    with pytest.raises(
        SavedPartError, match=r"org/p has no config\.json, so it holds nothing that xbt saved"
    ):
        Projection.from_pretrained("org/p")


def test_a_short_server_error_is_retried(hub, projection, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults["/preupload/"] = [503]
    hub.faults["/lfs/objects/batch"] = [500]
    projection.push_to_hub("org/p")
    assert torch.equal(Projection.from_pretrained("org/p").weight, projection.weight)


def test_a_persistent_server_error_is_one_sentence(hub, projection):
    projection.push_to_hub("org/p")
    hub.faults["/commit/"] = [500]
    other = LinearProjection.from_weight(torch.randn(8, 12))
    with pytest.raises(SavedPartError, match=r"org/p was not pushed: .*500.*; nothing is lost, push again"):
        other.push_to_hub("org/p")
    other.push_to_hub("org/p")
    assert torch.equal(Projection.from_pretrained("org/p").weight, other.weight)


@pytest.mark.parametrize("name", ["adapter", "a/b/c", "/tmp/x", "org/../x", "https://x/y"])
def test_names_that_are_no_repository(projection, name):
    with pytest.raises(SavedPartError, match="is not the name of a Hub repository; write 'org/name'"):
        projection.push_to_hub(name)


def test_save_and_push_at_once(hub, projection, tmp_path):
    commit = projection.save_pretrained(tmp_path, push_to_hub=True, repo_id="org/p", private=True)
    assert hub.repos["org/p"].private
    assert commit.oid == hub.repos["org/p"].refs["main"]
    assert (tmp_path / "model.safetensors").read_bytes() == hub.files("org/p")["model.safetensors"]
    with pytest.raises(TypeError, match="repo_id only with push_to_hub=True"):
        projection.save_pretrained(tmp_path, repo_id="org/p")
