from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import normalize

from xbt.encoders import LoraSettings, add_lora, load_encoder
from xbt.encoders.image_tower import build_image_tower, take_image_tower
from xbt.errors import EncoderError
from xbt.space import draw_probe_images


@pytest.fixture(params=["open_clip_spec", "transformers_spec"])
def encoder(request):
    return load_encoder(request.getfixturevalue(request.param))


def test_shares_weights_and_gives_the_encoders_vectors(encoder):
    tower = take_image_tower(encoder)
    pixels = torch.stack([encoder.preprocess(image) for image in draw_probe_images()])
    with torch.no_grad():
        assert torch.equal(normalize(tower(pixels), dim=1), encoder.embed_pixels(pixels))
    whole = {parameter.data_ptr() for parameter in encoder.module.parameters()}
    assert {parameter.data_ptr() for parameter in tower.parameters()} < whole
    assert tower.image_size == 32


def test_a_tower_is_rebuilt_from_its_description_in_json(encoder):
    tower = take_image_tower(encoder)
    again = build_image_tower(json.loads(json.dumps(tower.architecture)))
    assert again.architecture == tower.architecture
    again.load_state_dict(tower.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels), tower.eval()(pixels))


def test_text_towers_of_other_kinds_do_not_matter(tmp_path):
    import tiny

    tower = take_image_tower(load_encoder(tiny.tiny_open_clip(tmp_path, custom_text=True, quick_gelu=True)))
    again = build_image_tower(tower.architecture)
    again.load_state_dict(tower.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels), tower.eval()(pixels))


def test_refuses_lora_and_unknown_descriptions(encoder):
    for wrong in ({"library": "jax", "config": {}}, {}, {"library": "open_clip", "config": {"embed_dim": 8}}):
        with pytest.raises(EncoderError, match="cannot build an image tower from"):
            build_image_tower(wrong)
    add_lora(encoder, LoraSettings(rank=2))
    with pytest.raises(EncoderError, match="has LoRA attached; give an encoder as it was loaded"):
        take_image_tower(encoder)
