from __future__ import annotations

import open_clip
import pytest
import tiny
import torch
from torch import nn

from xbt.data import make_scenes
from xbt.encoders import LoraSettings, add_lora, has_lora, load_encoder
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.encoders.towers import at_path, fold_layers
from xbt.errors import EncoderError, SpaceMismatchError

TEXTS = ["a red circle", "two cats", "the dog on a square"]
IMAGES = make_scenes(3).images


def check(encoder, atol=1e-5):
    weight = torch.randn(10, encoder.dim)
    texts, images = encoder.encode_texts(TEXTS), encoder.encode_images(IMAGES)
    state = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    folded = encoder.folded(weight)
    normalise = torch.nn.functional.normalize
    torch.testing.assert_close(folded.encode_texts(TEXTS), normalise(texts @ weight.T), atol=atol, rtol=0)
    torch.testing.assert_close(folded.encode_images(IMAGES), normalise(images @ weight.T), atol=atol, rtol=0)
    assert (folded.dim, encoder.dim) == (10, weight.shape[1])
    assert folded.space.dim == 10
    assert torch.equal(encoder.encode_texts(TEXTS), texts)
    assert all(torch.equal(value, encoder.module.state_dict()[name]) for name, value in state.items())
    # All weights are shared but those of the two last layers. peft makes new parameters at each call.
    if not has_lora(encoder):
        kept = {id(each) for each in encoder.module.parameters()}
        assert 2 <= sum(id(each) not in kept for each in folded.module.parameters()) <= 4


@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clip(tmp_path, custom_text):
    check(load_encoder(tiny.tiny_open_clip(tmp_path, custom_text=custom_text)))


def test_transformers(transformers_spec):
    check(load_encoder(transformers_spec))


@pytest.mark.parametrize("backend", ["open_clip", "transformers"])
def test_under_lora(request, backend):
    encoder = load_encoder(request.getfixturevalue(f"{backend}_spec"))
    add_lora(encoder, LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in encoder.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    check(encoder)


def test_open_clip_with_linear_layers_and_offsets():
    config = tiny.open_clip_config()
    config["text_cfg"]["proj_bias"] = True
    config["vision_cfg"] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    encoder = OpenClipEncoder.create(config)
    encoder.module.eval().requires_grad_(False)
    assert isinstance(encoder.module.text_projection, nn.Linear)
    nn.init.normal_(encoder.module.text_projection.bias)
    assert isinstance(encoder.module.visual, open_clip.modified_resnet.ModifiedResNet)
    check(encoder)


def test_siglip_has_no_such_layer(tmp_path):
    encoder = load_encoder(tiny.tiny_siglip(tmp_path))
    with pytest.raises(EncoderError, match=r"image tower of .* ends in a .*Head at vision_model\.head"):
        encoder.folded(torch.randn(10, encoder.dim))


def test_a_missing_layer_and_a_wrong_matrix(open_clip_spec):
    encoder = load_encoder(open_clip_spec)
    with pytest.raises(SpaceMismatchError, match=r"shape \(10, 15\) cannot be folded into .* dimension 16"):
        encoder.folded(torch.randn(10, 15))
    with pytest.raises(EncoderError, match="image tower of me ends in nothing at visual"):
        fold_layers(nn.Module(), {"image": "visual.proj"}, torch.eye(3), "me")
    encoder.module.visual.proj = None
    with pytest.raises(EncoderError, match=r"ends in nothing at visual\.proj"):
        encoder.folded(torch.randn(10, 16))
    assert at_path(encoder.module, "visual.proj.weight") is None


def test_a_layer_under_lora_is_not_a_matrix(transformers_spec):
    encoder = load_encoder(transformers_spec)
    add_lora(encoder, LoraSettings(rank=2, target_modules=["text_projection"]))
    with pytest.raises(EncoderError, match=r"text tower of .* at text_projection, not in a matrix"):
        encoder.folded(torch.randn(10, 24))
