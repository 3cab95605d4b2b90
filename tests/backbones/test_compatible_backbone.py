from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import xbt
from xbt.backbones import CompatibleBackbone, ImagePreprocessing, load_backbone
from xbt.data import make_scenes
from xbt.errors import ConfigError, DataError, ImageError, SpaceMismatchError
from xbt.heads import make_head
from xbt.hub import SavedPartError

HEADS = {
    "independent": {"dim": 12, "n_classes": 3},
    "bct": {"new_dim": 12, "old_dim": 8, "n_classes": 3},
    "bt2": {"new_dim": 12, "old_dim": 8, "extra_dims": 4, "n_classes": 3},
    "oca": {"old_dim": 8, "extra_dims": 4, "n_classes": None},
}
DIMS = {"independent": (12, 0), "bct": (12, 8), "bt2": (16, 8), "oca": (12, 8)}
SCENES = make_scenes(10)


def build(kind="bt2", spec="small_resnet", seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = load_backbone(spec)
        head = make_head(kind, HEADS[kind])
        model = CompatibleBackbone(backbone, head, ImagePreprocessing(32), **options)
        # A step in training mode: batch norms have statistics, rotations are no longer where they began.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        output = model.train()(torch.randn(8, 3, 32, 32))
        loss = output.full[:, 0].sum() + output.features[:, 0].sum()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def old():
    return build("independent", seed=3)


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_vectors(kind):
    model = build(kind)
    dim, old_dim = DIMS[kind]
    assert (model.dim, model.old_dim) == (dim, old_dim)
    output = model.eval()(torch.randn(2, 3, 32, 32))
    assert output.full.shape == (2, dim)
    vectors = model.encode_images(SCENES.images)
    assert vectors.shape == (10, dim)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(10))
    if not old_dim:
        with pytest.raises(ConfigError, match="compatible with no old model"):
            model.encode_images(SCENES.images, space="old")
        return
    leading = model.encode_images(SCENES.images, space="old")
    torch.testing.assert_close(leading, nn.functional.normalize(vectors[:, :old_dim], dim=1))


def test_encoding_is_the_forward_pass_in_evaluation_mode():
    model = build()
    transform = model.preprocessing.evaluation()
    pixels = torch.stack([transform(SCENES.image(row)) for row in range(10)])
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vectors = model.encode_images(SCENES.images, batch_size=3)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        expected = nn.functional.normalize(model.eval()(pixels).full, dim=1)
    torch.testing.assert_close(vectors, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode_images(SCENES.images, batch_size=3), vectors)
    assert torch.equal(model.encode_images(SCENES.images, batch_size=3, num_workers=1), vectors)


def test_embed_pixels_can_be_trained_through():
    model = build()
    model.embed_pixels(torch.randn(2, 3, 32, 32), "old").sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="space is 'both'"):
        model.embed_pixels(torch.randn(2, 3, 32, 32), "both")


def test_files_bytes_and_images_give_the_same(tmp_path):
    model = build()
    SCENES.image(0).save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), SCENES.image(0)]
    vectors = model.encode_images(forms)
    torch.testing.assert_close(vectors, vectors[:1].expand(4, -1))
    assert model.encode_images([]).shape == (0, 16)


def test_damaged_images_are_named(tmp_path):
    model = build()
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"bad\.png cannot be decoded"):
        model.encode_images([SCENES.image(0), tmp_path / "bad.png"])
    with pytest.raises(ImageError, match="image number 3 cannot be decoded"):
        model.encode_images([SCENES.image(0)] * 3 + [b"no image"], batch_size=2)
    with pytest.raises(DataError, match="must be a list"):
        model.encode_images(SCENES.image(0))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        model.encode_images(SCENES.images, batch_size=0)


def test_broken_weights_are_found():
    model = build()
    with torch.no_grad():
        model.embedding.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"small_resnet\+bt2 gives NaN for image number 0"):
        model.encode_images(SCENES.images)


def test_space_is_identified_by_the_weights(old):
    same, other = build("independent", seed=3), build("independent", seed=4)
    assert old.space.dim == 12
    assert not old.space.probe[:16].any()
    assert old.space.probe.shape == (20, 12)
    assert old.space.same_as(same.space)
    assert old.space.compare(same.space).verified
    assert not old.space.same_as(other.space)


def test_space_changes_with_training():
    model = build()
    model.eval()
    before = model.space
    assert model.space is before
    model.train()
    with torch.no_grad():
        model.embedding.weight.normal_()
    assert not model.space.same_as(before)
    model.eval()
    middle = model.space
    with torch.no_grad():
        model.embedding.weight.normal_()
    model.invalidate_space()
    assert not model.space.same_as(middle)


def test_gallery_takes_its_own_and_refuses_foreign_vectors(old):
    gallery = xbt.Gallery.build(old.encode_images(SCENES.images), SCENES.ids, space=old.space)
    found = gallery.search(old.encode_images(SCENES.images), k=1, space=old.space)
    assert [ids[0] for ids in found.ids] == SCENES.ids
    stranger = build("independent", seed=4)
    with pytest.raises(SpaceMismatchError, match="probes agree only"):
        gallery.search(stranger.encode_images(SCENES.images), k=1, space=stranger.space)


def test_new_model_searches_the_old_gallery(old):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = make_head("bct", {"new_dim": 12, "old_dim": 12, "extra_dims": 4})
    new = CompatibleBackbone(load_backbone("small_resnet"), head, ImagePreprocessing(32), old_space=old.space)
    gallery = xbt.Gallery.build(old.encode_images(SCENES.images), SCENES.ids, space=old.space)
    queries = new.encode_images(SCENES.images[:2], space="old")
    assert len(gallery.search(queries, k=3, space=new.old_space).ids) == 2
    with pytest.raises(SpaceMismatchError):
        gallery.search(new.encode_images(SCENES.images[:2]), k=3, space=new.space)


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_saved_and_loaded_to_the_bit(kind, tmp_path, old):
    names = ["cat", "dog", "owl"]
    space = old.space if DIMS[kind][1] == old.dim else None
    model = build(kind, class_names=names, old_space=space)
    model.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    again = CompatibleBackbone.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not again.training
    assert again.class_names == names
    assert again.preprocessing == model.preprocessing
    for side in ("new", "old") if DIMS[kind][1] else ("new",):
        assert torch.equal(again.encode_images(SCENES.images, side), model.encode_images(SCENES.images, side))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert any("running_mean" in name for name in again.state_dict())
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert model.space.same_as(again.space)


def test_saved_with_its_old_space(tmp_path, old):
    head = make_head("oca", {"old_dim": 12, "extra_dims": 4})
    model = CompatibleBackbone(
        load_backbone("small_resnet"), head, ImagePreprocessing(32), old_space=old.space
    )
    model.save_pretrained(tmp_path)
    again = CompatibleBackbone.from_pretrained(tmp_path)
    assert again.old_space.same_as(old.space)
    assert again.old_space.compare(old.space).verified
    card = (tmp_path / "README.md").read_text()
    assert "first 12 coordinates" in card
    assert 'space="old"' in card
    assert "library_name: xbt" in card


@pytest.mark.parametrize("clip", ["open_clip_spec", "transformers_spec"])
def test_clip_tower_round_trip(clip, request, tmp_path, monkeypatch):
    spec = f"clip:{request.getfixturevalue(clip)}"
    backbone = load_backbone(spec)
    model = CompatibleBackbone(backbone, make_head("oca", HEADS["oca"]), backbone.preprocessing)
    model.save_pretrained(tmp_path)

    def refuse(*_):
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr("xbt.encoders.load_encoder", refuse)
    again = CompatibleBackbone.from_pretrained(tmp_path)
    assert torch.equal(again.encode_images(SCENES.images), model.encode_images(SCENES.images))


def spoil(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del config[key]
        else:
            config[key] = value
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something"}, "does not describe a compatible backbone"),
        ({"head": None}, "lacks or misnames a key: 'head'"),
        ({"head": {"kind": "magic", "options": {}}}, "head 'magic' is not known"),
        (
            {"head": {"kind": "oca", "options": {"old_dim": 8, "extra_dims": 4, "x": 1}}},
            "options.x is not known",
        ),
        ({"head": {"kind": "oca", "options": {"old_dim": 8, "extra_dims": 5}}}, "does not fit its config"),
        (
            {"backbone": {"spec": "magic", "image_size": 32, "architecture": None}},
            "'magic' is not a backbone",
        ),
        ({"backbone": {"spec": "small_resnet"}}, "lacks or misnames a key"),
        ({"backbone": {"spec": "small_resnet:2", "image_size": 32, "architecture": None}}, "does not fit"),
        ({"preprocessing": {"image_size": 32, "zoom": 2}}, "lacks or misnames a key"),
        ({"preprocessing": {"image_size": 0}}, "image_size is 0"),
        ({"old_space": {"model": "x"}}, "lacks or misnames a key"),
        ({"class_names": ["a"]}, "1 class names"),
    ],
)
def test_refuses_configs_that_do_not_fit(changes, message, tmp_path):
    build("bt2", class_names=["a", "b", "c"]).save_pretrained(tmp_path)
    spoil(tmp_path, **changes)
    with pytest.raises(SavedPartError, match=message):
        CompatibleBackbone.from_pretrained(tmp_path)


def test_refuses_damaged_files(tmp_path):
    build().save_pretrained(tmp_path / "a")
    weights, config = tmp_path / "a" / "model.safetensors", tmp_path / "a" / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(SavedPartError, match=r"model\.safetensors is damaged"):
        CompatibleBackbone.from_pretrained(tmp_path / "a")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({**tensors, "extra": torch.zeros(1)}, weights)
    with pytest.raises(SavedPartError, match=r"unexpected \['extra'\]"):
        CompatibleBackbone.from_pretrained(tmp_path / "a")
    tensors.pop("embedding.weight")
    save_file(tensors, weights)
    with pytest.raises(SavedPartError, match=r"missing tensors \['embedding.weight'\]"):
        CompatibleBackbone.from_pretrained(tmp_path / "a")
    weights.unlink()
    with pytest.raises(SavedPartError, match=r"model\.safetensors is missing"):
        CompatibleBackbone.from_pretrained(tmp_path / "a")
    config.write_text("{")
    with pytest.raises(SavedPartError, match="not valid JSON"):
        CompatibleBackbone.from_pretrained(tmp_path / "a")
    with pytest.raises(SavedPartError, match="does not exist"):
        CompatibleBackbone.from_pretrained(tmp_path / "nowhere")


def test_refuses_parts_that_do_not_belong_together(old):
    backbone, how = load_backbone("small_resnet"), ImagePreprocessing(32)
    with pytest.raises(SpaceMismatchError, match="compatible with 8 dimensions"):
        CompatibleBackbone(backbone, make_head("bct", HEADS["bct"]), how, old_space=old.space)
    with pytest.raises(ConfigError, match="2 class names, but the head's classifier has 3"):
        CompatibleBackbone(backbone, make_head("bct", HEADS["bct"]), how, class_names=["a", "b"])


def test_images_of_any_shape():
    vectors = build().encode_images(
        [Image.new("RGB", size, "red") for size in ((5, 90), (300, 20), (32, 32))]
    )
    assert torch.isfinite(vectors).all()
