from __future__ import annotations

import json

import pytest
import tiny
import torch

from xbt.data import PairSource, make_scenes
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, EncoderError
from xbt.evaluation import recall_at_k
from xbt.training import ClipConfig, TrainArgs, train_clip


@pytest.fixture
def model_file(tmp_path):
    file = tmp_path / "model.json"
    file.write_text(json.dumps(tiny.open_clip_config(context_length=40)))
    return str(file)


def settings(model, tmp_path, steps=4, **changes):
    training = TrainArgs(steps=steps, batch_size=32, lr=2e-3, warmup_steps=1, eval_every=100)
    base = {
        "model": model, "pairs": PairSource("scenes", limit=200), "output_dir": str(tmp_path / "run"),
        "training": training, "held_out": 0.1,
    }  # fmt: skip
    return ClipConfig(**{**base, **changes})


def test_saved_model_loads_as_an_encoder_with_the_same_vectors(model_file, tmp_path):
    trained = train_clip(settings(model_file, tmp_path))
    loaded = load_encoder(f"open_clip:local-dir:{tmp_path / 'run/model'}")
    pairs = make_scenes(5, split="test")
    assert torch.equal(loaded.encode_texts(pairs.texts), trained.encode_texts(pairs.texts))
    assert torch.equal(loaded.encode_images(pairs.images), trained.encode_images(pairs.images))
    assert loaded.space.same_as(trained.space)
    assert not any(p.requires_grad for p in trained.module.parameters())


def test_learns(model_file, tmp_path):
    config = settings(model_file, tmp_path, steps=250, pairs=PairSource("scenes", limit=64), held_out=0.2)
    config.training.lr = 4e-3
    encoder = train_clip(config)
    pairs = make_scenes(64)
    vectors = encoder.encode_texts(pairs.texts), encoder.encode_images(pairs.images)
    assert recall_at_k(*vectors, pairs.positives_t2i, (10,))[10] > 0.4  # 10 of 64 at random: 0.16
    assert 0 <= encoder.logit_scale.item() <= 4.6052


def test_preprocessing_is_saved_with_the_model(model_file, tmp_path):
    mean = [0.5, 0.5, 0.5]
    train_clip(settings(model_file, tmp_path, steps=1, preprocess={"mean": mean}))
    assert load_encoder(f"open_clip:local-dir:{tmp_path / 'run/model'}").preprocessing["mean"] == mean


def test_refusals(model_file, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json does not exist"):
        train_clip(settings("nowhere.json", tmp_path / "a"))
    for text, words in (("{", "not valid JSON"), ("[]", "must hold a JSON object")):
        broken = tmp_path / "broken.json"
        broken.write_text(text)
        with pytest.raises(ConfigError, match=words):
            train_clip(settings(str(broken), tmp_path / "b"))
    with pytest.raises(EncoderError, match="ViT-B-33"):
        train_clip(settings("ViT-B-33", tmp_path / "c"))
    with pytest.raises(DataError, match=r"batch_size 32"):
        train_clip(settings(model_file, tmp_path / "d", pairs=PairSource("scenes", limit=20)))
    with pytest.raises(ConfigError, match="--held_out"):
        settings(model_file, tmp_path, held_out=0.0)
