"""Specifications that cannot be loaded."""

from __future__ import annotations

import pytest
import torch

from xbt.encoders import load_encoder
from xbt.encoders.loading import FORMS
from xbt.errors import EncoderError


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "ViT-B-32",
        "clip:ViT-B-32",
        "open_clip",
        "open_clip:",
        "open_clip:ViT-B-32",
        "open_clip:ViT-B-32/",
        "open_clip:/openai",
        "open_clip:local-dir:",
        "open_clip:hf-hub:",
        "transformers:",
        None,
    ],
)
def test_malformed_specifications_list_the_forms(spec):
    with pytest.raises(EncoderError) as caught:
        load_encoder(spec)
    for form in FORMS:
        assert form in str(caught.value)
    assert str(spec) in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["transformers:/no/such/dir", "transformers:./none", "transformers:~/none/x"]
)
def test_a_missing_directory_is_named(spec):
    with pytest.raises(EncoderError, match=r"the directory .*(dir|none).* does not exist"):
        load_encoder(spec)


@pytest.mark.parametrize("spec", ["transformers:nobody/no-clip", "open_clip:hf-hub:nobody/no-clip"])
def test_an_unreachable_hub_is_one_sentence(spec):
    with pytest.raises(EncoderError, match=f"'{spec}' could not be loaded: ") as caught:
        load_encoder(spec)
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_missing_device(open_clip_spec, device):
    with pytest.raises(EncoderError, match=f"could not be moved to device '{device}'"):
        load_encoder(open_clip_spec, device=device)


def test_the_name_is_the_specification(open_clip_spec, transformers_spec):
    for spec in (open_clip_spec, transformers_spec):
        encoder = load_encoder(spec, device=torch.device("cpu"))
        assert encoder.name == spec
        assert spec in repr(encoder)
