"""Declared settings: read from the running model, and equal for one model in both libraries."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from torch import nn
from transformers.activations import ACT2FN

from xbt.encoders import load_encoder
from xbt.encoders.text_batching import Tokenized, text_cleaning
from xbt.encoders.towers import activation
from xbt.errors import UnverifiedSpaceWarning


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gelu", "gelu"),
        ("quick_gelu", "quick_gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("silu", "silu"),
    ],
)
def test_activations_of_transformers(name, expected):
    layer = ACT2FN[name]
    assert activation(nn.Sequential(nn.Linear(2, 2), layer, nn.MultiheadAttention(2, 1))) == expected


def test_activations_of_torch_and_open_clip():
    from open_clip.transformer import QuickGELU

    assert activation(nn.Sequential(QuickGELU())) == "quick_gelu"
    assert activation(nn.Sequential(nn.GELU("tanh"))) == "gelu_tanh"
    assert activation(nn.Sequential(nn.GELU(), nn.ReLU(), nn.GELU())) == "gelu, relu"
    assert activation(nn.Sequential(nn.Linear(2, 2), nn.Softmax(dim=1))) == "none"


@pytest.mark.parametrize(
    ("clean", "expected"),
    [
        (str.lower, "lower"),
        (lambda text: text, "none"),
        (lambda text: text.lower().replace(",", "").replace(".", ""), "canonicalize"),
    ],
)
def test_cleaning_is_tried_out(clean, expected):
    def transform(texts):
        rows = torch.zeros(len(texts), 16, dtype=torch.int64)
        for row, text in zip(rows, map(clean, texts), strict=True):
            row[: len(text)] = torch.tensor([ord(letter) for letter in text])
        return Tokenized(rows, torch.zeros(len(texts), dtype=torch.bool))

    assert text_cleaning(transform) == expected


def test_open_clips_cleaning_is_respected(tmp_path):
    for clean, expected in (("canonicalize", "canonicalize"), ("lower", "lower"), ("whitespace", "none")):
        folder = tmp_path / clean
        tiny.tiny_open_clip(folder, layers=1)
        file = folder / "open_clip_config.json"
        config = json.loads(file.read_text())
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": clean}
        file.write_text(json.dumps(config))
        assert load_encoder(f"open_clip:local-dir:{folder}").space.settings["text_cleaning"] == expected


def test_an_activation_that_the_probe_does_not_show_is_declared(tmp_path):
    tiny.tiny_transformers_clip(tmp_path / "quick")
    quick = load_encoder(f"transformers:{tmp_path / 'quick'}")
    tiny.tiny_transformers_clip(tmp_path / "gelu")
    file = tmp_path / "gelu" / "config.json"
    config = json.loads(file.read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = "gelu"
    file.write_text(json.dumps(config))
    gelu = load_encoder(f"transformers:{tmp_path / 'gelu'}")
    assert quick.space.agreement(gelu.space) > 0.999
    with pytest.warns(UnverifiedSpaceWarning, match="text_activation quick_gelu and gelu"):
        quick.space.require(gelu.space, "the queries")


def test_both_libraries_declare_the_same_for_one_kind_of_model(tmp_path):
    open_clip = load_encoder(tiny.tiny_open_clip(tmp_path / "a", context_length=77, quick_gelu=True))
    transformers = load_encoder(tiny.tiny_transformers_clip(tmp_path / "b"))
    assert open_clip.settings == transformers.settings
    assert open_clip.settings == {
        "text_activation": "quick_gelu",
        "image_activation": "quick_gelu",
        "text_cleaning": "lower",
        "context_length": 77,
    }
