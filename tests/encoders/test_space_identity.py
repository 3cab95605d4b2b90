"""Known mix-ups of two models of the same dimension: refused or harmless."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2 as transforms
from safetensors.torch import load_file, save_file
from tiny import tiny_open_clip, tiny_transformers_clip
from torchvision.transforms.functional import pil_to_tensor

import xbt
from xbt.errors import SpaceMismatchError
from xbt.space import EmbeddingSpace

SHARPER, OFF = 3.0, -2.0
"""Random towers are nearly linear, trained ones are not. For images, their weights are scaled; for GELU and
QuickGELU, which differ most where a hidden unit is off, most hidden units are switched off."""


def change_weights(directory: Path, weights: str, ending: tuple[str, ...], change) -> None:
    state = load_file(directory / weights)
    for name, value in state.items():
        if name.endswith(ending) and ("resblocks" in name or "layers" in name):
            change(value)
    save_file(state, directory / weights, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for variant in ("sharp", "off"):
        for make, weights in (
            (tiny_open_clip, "open_clip_model.safetensors"),
            (tiny_transformers_clip, "model.safetensors"),
        ):
            name = "open_clip" if make is tiny_open_clip else "transformers"
            directory = folder / variant / name
            make(directory, width=64)
            if variant == "sharp":
                change_weights(directory, weights, ("weight",), lambda value: value.mul_(SHARPER))
            else:
                change_weights(directory, weights, ("c_fc.bias", "fc1.bias"), lambda value: value.fill_(OFF))
    return folder


def edit(path: Path, *keys: str, **values) -> None:
    content = json.loads(path.read_text())
    part = content
    for key in keys:
        part = part[key]
    part.update(values)
    path.write_text(json.dumps(content))


HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
OPEN_CLIP = {
    "activation": lambda d: edit(d / "open_clip_config.json", "model_cfg", quick_gelu=True),
    "interpolation": lambda d: edit(d / "open_clip_config.json", "preprocess_cfg", interpolation="bilinear"),
    "resize": lambda d: edit(d / "open_clip_config.json", "preprocess_cfg", resize_mode="squash"),
    "normalisation": lambda d: edit(d / "open_clip_config.json", "preprocess_cfg", **HALF),
}


def edit_activations(directory: Path) -> None:
    for tower in ("text_config", "vision_config"):
        edit(directory / "config.json", tower, hidden_act="gelu")


TRANSFORMERS = {
    "activation": edit_activations,
    "interpolation": lambda d: edit(d / "preprocessor_config.json", resample=2),
    "resize": lambda d: edit(d / "preprocessor_config.json", size={"height": 32, "width": 32}),
    "normalisation": lambda d: edit(
        d / "preprocessor_config.json", image_mean=[0.5] * 3, image_std=[0.5] * 3
    ),
}
MIX_UPS = [("open_clip", name) for name in OPEN_CLIP] + [("transformers", name) for name in TRANSFORMERS]


def load(directory: Path):
    kind = "open_clip:local-dir:" if (directory / "open_clip_config.json").exists() else "transformers:"
    return xbt.load_encoder(f"{kind}{directory}")


@pytest.mark.parametrize(("backend", "mix_up"), MIX_UPS)
def test_a_mix_up_of_settings_is_refused(models, tmp_path, backend, mix_up):
    changed, original = tmp_path / mix_up, models / ("off" if mix_up == "activation" else "sharp") / backend
    shutil.copytree(original, changed)
    (OPEN_CLIP if backend == "open_clip" else TRANSFORMERS)[mix_up](changed)
    right, wrong = load(original), load(changed)
    assert right.dim == wrong.dim
    with pytest.raises(SpaceMismatchError) as caught:
        right.space.require(wrong.space, "the query vectors")
    message = str(caught.value)
    assert right.name in message
    assert wrong.name in message
    if mix_up != "activation":
        assert "in images alone" in message


@pytest.mark.parametrize("make", [tiny_open_clip, tiny_transformers_clip])
def test_other_weights_of_one_architecture_are_refused(tmp_path, make):
    first, second = (xbt.load_encoder(make(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    with pytest.raises(SpaceMismatchError):
        first.space.require(second.space, "the query vectors")


def resized_by_torchvision(encoder, antialias: bool):
    """The encoder's own preprocessing with torchvision's resizing in the place of PIL's."""
    steps = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC, antialias=antialias),
            transforms.CenterCrop(32),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(encoder.preprocessing["mean"], encoder.preprocessing["std"]),
        ]
    )
    return lambda image: steps(pil_to_tensor(image.convert("RGB")))


@pytest.mark.parametrize("backend", ["open_clip", "transformers"])
@pytest.mark.parametrize(("antialias", "same"), [(True, True), (False, False)])
def test_another_image_backend_is_refused_where_it_matters(models, backend, antialias, same, monkeypatch):
    """torchvision resizes like PIL with antialiasing, and quite unlike it without."""
    right, other = load(models / "sharp" / backend), load(models / "sharp" / backend)
    monkeypatch.setattr(other, "image_transform", resized_by_torchvision(other, antialias))
    assert right.space.same_as(other.space) is same


@pytest.mark.parametrize("backend", ["open_clip", "transformers"])
def test_no_false_alarms(models, backend, tmp_path):
    encoder = load(models / "sharp" / backend)
    shutil.copytree(models / "sharp" / backend, tmp_path / "elsewhere")
    spaces = {"elsewhere": load(tmp_path / "elsewhere").space}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            spaces[f"{count} threads"] = load(models / "sharp" / backend).space
    finally:
        torch.set_num_threads(threads)
    half = load(models / "sharp" / backend)
    half.precision = "bf16"
    spaces["bf16"] = half.space
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spaces["autocast"] = load(models / "sharp" / backend).space
    for name, space in spaces.items():
        assert encoder.space.agreement(space) >= 0.9999, name
        encoder.space.require(space, name)


def test_vectors_of_another_length_are_another_space(models):
    space = load(models / "sharp" / "open_clip").space
    raw = EmbeddingSpace(space.model, space.dim, space.preprocessing, space.probe, normalisation="none")
    with pytest.raises(SpaceMismatchError, match="normalised differently: 'unit' and 'none'"):
        space.require(raw, "the query vectors")


def test_every_carrier_of_a_space_refuses_a_foreign_one(models, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(models / "sharp" / "open_clip", changed)
    OPEN_CLIP["interpolation"](changed)
    right, wrong = load(models / "sharp" / "open_clip"), load(changed)
    texts = ["a red circle", "a dog", "rain", "a cat", "a star"]
    vectors = wrong.encode_texts(texts)
    gallery = xbt.Gallery.build(right.encode_texts(texts), texts, space=right.space)
    store = xbt.EmbeddingStore.create(tmp_path / "store", modality="text", space=right.space)
    store.append(right.encode_texts(texts), texts, space=right.space)
    projection = xbt.fit_projection(vectors, vectors, new_space=right.space, old_space=right.space)
    refusals = {
        "search": lambda: gallery.search(vectors, k=1, space=wrong.space),
        "add": lambda: gallery.add(vectors, [f"new {text}" for text in texts], space=wrong.space),
        "store": lambda: store.append(vectors, [f"new {text}" for text in texts], space=wrong.space),
        "compatible": lambda: xbt.CompatibleEncoder(wrong, projection),
    }
    for name, act in refusals.items():
        with pytest.raises(SpaceMismatchError) as caught:
            act()
        assert right.name in str(caught.value), name
        assert wrong.name in str(caught.value), name
    assert len(gallery) == len(store) == len(texts)
