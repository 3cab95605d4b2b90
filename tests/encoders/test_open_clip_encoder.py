"""The open_clip backend against open_clip itself, and its traps."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import tiny
import torch
from fuzzing import damaged, damaged_json, dump, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from xbt.encoders import LoraSettings, add_lora, load_encoder
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.errors import EncoderError, TruncationWarning
from xbt.space import draw_probe_images

TEXTS = ["a red circle", "Two dogs & a cat!!", "", "naïve café ☕"]


def with_hf_tokenizer(directory):
    """An encoder whose tokenizer is one of transformers, read from a directory."""
    vocabulary = tiny.write_clip_tokenizer(directory, context_length=24)
    config = tiny.open_clip_config(context_length=24)
    config["text_cfg"] |= {"vocab_size": len(vocabulary), "hf_tokenizer_name": str(directory)}
    return OpenClipEncoder.create(config)


@pytest.mark.parametrize("options", [{}, {"custom_text": True}, {"quick_gelu": True}])
def test_parity_with_open_clip(tmp_path, options):
    encoder = load_encoder(tiny.tiny_open_clip(tmp_path, **options))
    name = f"local-dir:{tmp_path}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    assert type(model).__name__ == ("CustomTextCLIP" if "custom_text" in options else "CLIP")
    images = draw_probe_images()
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
        vectors = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), texts, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_images(images), vectors, rtol=0, atol=1e-5)


def test_parity_of_coca_with_open_clip(tmp_path):
    config = tiny.open_clip_config(context_length=19) | {"custom_text": True}
    config["multimodal_cfg"] = {
        "width": 32,
        "context_length": 20,
        "vocab_size": 49408,
        "layers": 1,
        "heads": 2,
    }
    config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    made = OpenClipEncoder.create(config)
    # open_clip leaves this weight of the caption decoder, which embeds nothing, as uninitialised memory.
    torch.nn.init.constant_(made._clip.text_decoder.text_projection, float("nan"))
    made.save_pretrained(tmp_path)
    encoder, name = load_encoder(f"open_clip:local-dir:{tmp_path}"), f"local-dir:{tmp_path}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    assert type(model.eval()).__name__ == "CoCa"
    images = draw_probe_images()
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
        vectors = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), texts, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_images(images), vectors, rtol=0, atol=1e-5)
    assert made.space.compare(encoder.space).state == "same"
    folded = encoder.folded(torch.eye(16)[:8])
    torch.testing.assert_close(folded.encode_texts(TEXTS), torch.nn.functional.normalize(texts[:, :8]))


def test_quick_gelu_is_part_of_the_model(tmp_path):
    plain = load_encoder(tiny.tiny_open_clip(tmp_path / "plain"))
    quick = load_encoder(tiny.tiny_open_clip(tmp_path / "quick", quick_gelu=True))
    assert torch.equal(plain.module.token_embedding.weight, quick.module.token_embedding.weight)
    assert not torch.allclose(plain.encode_texts(TEXTS), quick.encode_texts(TEXTS), atol=1e-5)


def test_activation_mismatch_is_refused_before_any_download(monkeypatch):
    def download(*_args, **_kwargs):
        pytest.fail("tried to download")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    with pytest.raises(EncoderError, match="use 'open_clip:ViT-B-32-quickgelu/openai'"):
        load_encoder("open_clip:ViT-B-32/openai")


def test_a_failed_download_is_one_error(monkeypatch):
    def download(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    with pytest.raises(EncoderError, match=r"ViT-B-32-quickgelu/openai' could not be loaded: .*no network"):
        load_encoder("open_clip:ViT-B-32-quickgelu/openai")


def test_unknown_tags_and_architectures_are_named():
    with pytest.raises(EncoderError, match=r"'laion3b' is neither .* its tags are: openai, laion400m_e31"):
        load_encoder("open_clip:ViT-B-32/laion3b")
    with pytest.raises(EncoderError, match=r"no architecture 'ViT-B-33'; did you mean .*ViT-B-32"):
        load_encoder("open_clip:ViT-B-33/openai")


def test_weights_from_a_file(tmp_path, monkeypatch, open_clip_spec):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-arch", tiny.open_clip_config())
    weights = Path(open_clip_spec.removeprefix("open_clip:local-dir:")) / "open_clip_model.safetensors"
    encoder = load_encoder(f"open_clip:tiny-arch/{weights}")
    torch.testing.assert_close(encoder.encode_texts(TEXTS), load_encoder(open_clip_spec).encode_texts(TEXTS))
    with pytest.raises(EncoderError, match="neither a file nor a pretrained tag"):
        load_encoder(f"open_clip:tiny-arch/{tmp_path}/none.safetensors")


def test_a_directory_without_weights_is_not_filled_with_random_ones(tmp_path):
    spec = tiny.tiny_open_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"has no weights; put open_clip_model\.safetensors there"):
        load_encoder(spec)


def test_broken_directories(tmp_path):
    with pytest.raises(EncoderError, match=rf"directory {tmp_path}/none .* does not exist"):
        load_encoder(f"open_clip:local-dir:{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderError, match=r"empty has no open_clip_config\.json"):
        load_encoder(f"open_clip:local-dir:{tmp_path}/empty")
    spec = tiny.tiny_open_clip(tmp_path / "model")
    (tmp_path / "model" / "open_clip_config.json").write_text("{")
    with pytest.raises(EncoderError, match="could not be loaded") as caught:
        load_encoder(spec)
    assert caught.value.__cause__ is not None


def test_a_truncated_weights_file(tmp_path):
    spec = tiny.tiny_open_clip(tmp_path)
    file = tmp_path / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(EncoderError, match="could not be loaded") as caught:
        load_encoder(spec)
    assert caught.value.__cause__ is not None


def test_missing_and_misshapen_weights(tmp_path):
    spec = tiny.tiny_open_clip(tmp_path)
    file, config_file = tmp_path / "open_clip_model.safetensors", tmp_path / "open_clip_config.json"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if key != "ln_final.weight"}, file)
    with pytest.raises(EncoderError, match=r"missing are ln_final\.weight, unexpected are none"):
        load_encoder(spec)
    save_file(state, file)
    config = json.loads(config_file.read_text())
    config["model_cfg"]["embed_dim"] = 20
    config_file.write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="do not fit the model: text_projection has the shape"):
        load_encoder(spec)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    config = tiny.open_clip_config()
    config["text_cfg"]["vocab_size"] = 1000
    with pytest.raises(EncoderError, match=r"gives token id 49407, but the model only embeds 1000"):
        OpenClipEncoder.create(config)


def test_created_models_are_trainable_and_follow_the_seed():
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(OpenClipEncoder.create(tiny.open_clip_config()))
    assert models[0].module.training
    assert all(parameter.requires_grad for parameter in models[0].module.parameters())
    torch.testing.assert_close(
        models[0].encode_texts(TEXTS), models[1].encode_texts(TEXTS), rtol=0, atol=1e-6
    )
    assert not torch.allclose(models[0].encode_texts(TEXTS), models[2].encode_texts(TEXTS), atol=1e-3)


def test_create_refuses_invalid_model_configs():
    with pytest.raises(EncoderError, match="lacks text_cfg, vision_cfg"):
        OpenClipEncoder.create({"embed_dim": 16})
    with pytest.raises(EncoderError, match="no architecture 'ViT-Q'"):
        OpenClipEncoder.create("ViT-Q")
    config = tiny.open_clip_config()
    config["vision_cfg"]["wdith"] = 32
    with pytest.raises(EncoderError, match=r"open_clip cannot build a model .*wdith"):
        OpenClipEncoder.create(config)


def test_create_by_name_and_without_changing_the_given_config(monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-arch", tiny.open_clip_config())
    assert OpenClipEncoder.create("tiny-arch").dim == 16
    config = tiny.open_clip_config(custom_text=True)
    encoder = OpenClipEncoder.create(config)
    assert config == tiny.open_clip_config(custom_text=True)
    assert type(encoder.module).__name__ == "CustomTextCLIP"


@pytest.mark.parametrize("custom_text", [False, True])
def test_save_and_load_give_the_same_vectors(tmp_path, custom_text):
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    encoder = OpenClipEncoder.create(tiny.open_clip_config(custom_text=custom_text), preprocess)
    encoder.save_pretrained(tmp_path)
    loaded = load_encoder(f"open_clip:local-dir:{tmp_path}")
    images = draw_probe_images()
    torch.testing.assert_close(loaded.encode_texts(TEXTS), encoder.encode_texts(TEXTS), rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded.encode_images(images), encoder.encode_images(images), rtol=0, atol=1e-6)
    assert loaded.preprocessing == encoder.preprocessing == {"backend": "pil", "size": [32, 32], **preprocess}
    assert json.loads(json.dumps(loaded.preprocessing)) == loaded.preprocessing
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


def test_preprocessing_changes_the_pixels():
    image = draw_probe_images()[2]
    plain = OpenClipEncoder.create(tiny.open_clip_config())
    squash = OpenClipEncoder.create(tiny.open_clip_config(), {"resize_mode": "squash"})
    assert not torch.allclose(plain.preprocess(image), squash.preprocess(image))


def test_save_refuses_an_encoder_with_lora(tmp_path, open_clip_spec):
    encoder = load_encoder(open_clip_spec)
    add_lora(encoder, LoraSettings(rank=2))
    with pytest.raises(EncoderError, match="save_lora"):
        encoder.save_pretrained(tmp_path)


def test_a_tokenizer_of_transformers_is_saved_along(tmp_path):
    encoder = with_hf_tokenizer(tmp_path / "tokenizer")
    encoder.save_pretrained(tmp_path / "model")
    loaded = load_encoder(f"open_clip:local-dir:{tmp_path}/model")
    assert torch.equal(loaded.tokenize(TEXTS), encoder.tokenize(TEXTS))
    torch.testing.assert_close(loaded.encode_texts(TEXTS), encoder.encode_texts(TEXTS), rtol=0, atol=1e-6)


def test_truncation_is_counted_exactly_with_a_tokenizer_of_transformers(tmp_path):
    encoder = with_hf_tokenizer(tmp_path)
    fits, over = " ".join(["dog"] * 22), " ".join(["dog"] * 23)
    with pytest.warns(TruncationWarning, match="2 of 4 texts are longer than the 24 tokens"):
        tokens = encoder.tokenize([fits, over, "a dog", over])
    assert torch.equal(tokens[0], tokens[1])


def test_only_full_rows_are_tokenised_twice(open_clip_spec, monkeypatch):
    encoder = load_encoder(open_clip_spec)
    calls = []
    original = encoder.tokenizer.encode
    monkeypatch.setattr(encoder.tokenizer, "encode", lambda text: calls.append(text) or original(text))
    encoder.tokenize(["a dog"] * 5)
    assert len(calls) == 5
    calls.clear()
    with pytest.warns(TruncationWarning, match="1 of 3"):
        encoder.tokenize(["a dog", "dog " * 40, "cat"])
    assert len(calls) == 4


def test_loading_leaves_the_root_logger_alone(tmp_path, caplog):
    spec = tiny.tiny_open_clip(tmp_path)
    with caplog.at_level("INFO"):
        load_encoder(spec)
    assert caplog.records == []


@fuzzed
@given(data=st.data())
def test_fuzz_directories(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-open-clip"
    if not folder.exists():
        tiny.tiny_open_clip(folder, dim=8, width=16, layers=1, preprocess={"mean": [0.5] * 3})
        (folder / "whole.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    whole = (folder / "whole.json").read_bytes()
    as_json = damaged_json(json.loads(whole)).map(dump)
    (folder / "open_clip_config.json").write_bytes(data.draw(st.one_of(as_json, damaged(whole))))
    loads_or_refuses(lambda: load_encoder(f"open_clip:local-dir:{folder}"))
