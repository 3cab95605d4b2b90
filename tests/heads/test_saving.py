"""Heads on disk: what is loaded is what was saved, and what is damaged is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from xbt.heads import BCTHead, BT2Head, CompatibleHead, OCAHead, make_head
from xbt.heads.orthogonal import ORTHOGONAL_MAPS
from xbt.hub import SavedPartError

ORTHOGONAL = 5e-6


def distance(matrix):
    matrix = matrix.detach()
    return float((matrix @ matrix.T - torch.eye(len(matrix)).to(matrix)).abs().max())


def test_saved_and_loaded_is_the_same(head, train, tmp_path):
    train(head)
    features = torch.randn(9, head.in_dim)
    head.save_pretrained(tmp_path)
    loaded = CompatibleHead.from_pretrained(tmp_path)
    assert type(loaded) is type(head)
    assert loaded.options() == head.options()
    assert not loaded.training
    torch.testing.assert_close(loaded(features).full, head(features).full, rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded(features).logits, head(features).logits, rtol=0, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)
def test_rotations_are_still_orthogonal_and_train_on(orthogonal_map, train, tmp_path):
    bt2 = train(BT2Head(12, 10, 4, n_classes=5, orthogonal_map=orthogonal_map))
    oca = train(OCAHead(10, 4, n_classes=5, orthogonal_map=orthogonal_map))
    bt2.save_pretrained(tmp_path / "bt2")
    oca.save_pretrained(tmp_path / "oca")
    again = BT2Head.from_pretrained(tmp_path / "bt2")
    other = OCAHead.from_pretrained(tmp_path / "oca")
    for before, after in (
        (bt2.new_rotation, again.new_rotation),
        (bt2.old_rotation, again.old_rotation),
        (oca.rotation, other.rotation),
    ):
        assert distance(after.weight) <= ORTHOGONAL
        assert (after.weight - before.weight).abs().max() <= 1e-6
    train(again.train(), steps=5)
    assert distance(again.new_rotation.weight) <= ORTHOGONAL
    assert (again.new_rotation.weight - bt2.new_rotation.weight).abs().max() > 1e-3


def test_a_kind_can_be_asked_for(tmp_path):
    BCTHead(4, 4).save_pretrained(tmp_path)
    assert isinstance(BCTHead.from_pretrained(tmp_path), BCTHead)
    with pytest.raises(SavedPartError, match="holds a BCTHead, not a BT2Head"):
        BT2Head.from_pretrained(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    BT2Head(6, 6, 2).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    base = "old_rotation.parametrizations.weight.0.base"
    save_file({name: tensor for name, tensor in tensors.items() if name != base}, weights)
    with pytest.raises(SavedPartError, match=rf"missing tensors \['{base}'\]"):
        CompatibleHead.from_pretrained(tmp_path)
    save_file({**tensors, "extra": torch.zeros(1)}, weights)
    with pytest.raises(SavedPartError, match=r"unexpected \['extra'\]"):
        CompatibleHead.from_pretrained(tmp_path)
    save_file({**tensors, base: torch.eye(5)}, weights)
    with pytest.raises(SavedPartError, match=r"base has the shape \(5, 5\).*\(6, 6\)"):
        CompatibleHead.from_pretrained(tmp_path)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(SavedPartError, match=r"model\.safetensors is damaged"):
        CompatibleHead.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(SavedPartError, match=r"model\.safetensors is missing"):
        CompatibleHead.from_pretrained(tmp_path)


def test_damaged_configs_are_refused(tmp_path):
    BT2Head(6, 6, 2).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for change, words in (
        ({"kind": "magic"}, r"config\.json cannot be used: head 'magic' is not known"),
        ({"kind": ["bt2"]}, "is not known"),
        ({"options": {"new_dim": 6, "old_dim": 6, "extra_dims": 9}}, "extra_dims 9 is more than"),
        ({"options": {"depth": 3}}, "depth"),
        ({"options": None}, "must be a mapping, got None"),
    ):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(SavedPartError, match=words):
            CompatibleHead.from_pretrained(tmp_path)
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "options"}))
    with pytest.raises(SavedPartError, match="'options' is missing"):
        CompatibleHead.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(SavedPartError, match="not valid JSON"):
        CompatibleHead.from_pretrained(tmp_path)
    with pytest.raises(SavedPartError, match="does not exist"):
        CompatibleHead.from_pretrained(tmp_path / "nowhere")


def test_a_head_built_again_draws_other_weights():
    first, second = (make_head("bct", {"new_dim": 4, "old_dim": 4, "n_classes": 3}) for _ in range(2))
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
