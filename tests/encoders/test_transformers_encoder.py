"""The transformers backend against transformers itself, and its traps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    SiglipImageProcessorPil,
    SiglipModel,
)

from xbt.encoders import load_encoder
from xbt.encoders.hf_transformers import pooled
from xbt.errors import EncoderError, TruncationWarning
from xbt.space import draw_probe_images

TEXTS = ["a red circle", "Two dogs & a cat!!", "zebra", "naïve café ☕"]


@pytest.fixture
def model(tmp_path):
    """A separate tiny CLIP in tmp_path, to be damaged."""
    return tiny.tiny_transformers_clip(tmp_path)


def edit(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            content[key].update(value)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def folder(spec):
    return Path(spec.removeprefix("transformers:"))


def test_parity_with_transformers(transformers_spec):
    encoder, path = load_encoder(transformers_spec), folder(transformers_spec)
    clip, tokenizer = CLIPModel.from_pretrained(path).eval(), CLIPTokenizer.from_pretrained(path)
    images = draw_probe_images()
    with torch.no_grad():
        # With a mask and padded only to the longest text: a causal tower must not care.
        encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
        texts = clip.text_projection(clip.text_model(**encoded).pooler_output)
        pixels = CLIPImageProcessorPil.from_pretrained(path)(images, return_tensors="pt")
        vectors = clip.visual_projection(clip.vision_model(**pixels).pooler_output)
    normalize = torch.nn.functional.normalize
    torch.testing.assert_close(encoder.encode_texts(TEXTS), normalize(texts), rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_images(images), normalize(vectors), rtol=0, atol=1e-5)


def test_parity_of_siglip(tmp_path):
    encoder = load_encoder(tiny.tiny_siglip(tmp_path))
    siglip = SiglipModel.from_pretrained(tmp_path).eval()
    images = draw_probe_images()
    tokens = encoder.tokenizer(TEXTS, padding="max_length", max_length=64, return_tensors="pt").input_ids
    pixels = SiglipImageProcessorPil.from_pretrained(tmp_path)(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = siglip(input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), output.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.encode_images(images), output.image_embeds, rtol=0, atol=1e-5)
    assert (encoder.dim, encoder.context_length) == (32, 64)


def test_siglip_counts_truncation_exactly(tmp_path):
    encoder = load_encoder(tiny.tiny_siglip(tmp_path))
    with pytest.warns(TruncationWarning, match="1 of 3 texts are longer than the 64 tokens"):
        encoder.tokenize(["x" * 63, "x" * 64, "x"])


def test_towers_of_different_dimensions_are_refused(tmp_path):
    spec = tiny.tiny_siglip(tmp_path)
    edit(tmp_path / "config.json", text_config={"projection_size": 48})
    with pytest.raises(EncoderError):
        load_encoder(spec)


def test_both_shapes_of_features_are_understood():
    vectors = torch.randn(2, 3)
    assert pooled(vectors) is vectors
    assert pooled(SimpleNamespace(pooler_output=vectors, last_hidden_state=None)) is vectors


def test_images_are_resized_with_pil(transformers_spec):
    encoder = load_encoder(transformers_spec)
    assert type(encoder.processor) is CLIPImageProcessorPil
    image = draw_probe_images()[2]
    expected = CLIPImageProcessorPil.from_pretrained(folder(transformers_spec))(image, return_tensors="pt")
    assert torch.equal(encoder.preprocess(image), expected.pixel_values[0])
    assert encoder.preprocessing == {
        "backend": "pil",
        "size": [32, 32],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }
    assert json.loads(json.dumps(encoder.preprocessing)) == encoder.preprocessing


def test_squashing_is_recorded(tmp_path):
    preprocessing = load_encoder(tiny.tiny_siglip(tmp_path, image_size=24)).preprocessing
    assert preprocessing["resize_mode"] == "squash"
    assert preprocessing["size"] == [24, 24]


def test_texts_are_padded_to_the_full_context_on_the_right(transformers_spec):
    tokens = load_encoder(transformers_spec).tokenize(["a dog"])
    vocabulary, _ = tiny.clip_vocabulary()
    expected = [vocabulary[each] for each in (tiny.BOS, "a</w>", "dog</w>", tiny.EOS)]
    assert tokens.tolist() == [expected + [vocabulary[tiny.EOS]] * 73]


def test_an_end_token_the_model_does_not_know_is_refused(tmp_path):
    spec = tiny.tiny_transformers_clip(tmp_path, eos_token_id=7)
    vocabulary, _ = tiny.clip_vocabulary()
    with pytest.raises(EncoderError, match=rf"ends texts with id {vocabulary[tiny.EOS]}, .* at id 7 "):
        load_encoder(spec)


def test_the_legacy_end_token_is_understood(tmp_path, transformers_spec):
    legacy = load_encoder(tiny.tiny_transformers_clip(tmp_path, eos_token_id=2))
    torch.testing.assert_close(
        legacy.encode_texts(TEXTS), load_encoder(transformers_spec).encode_texts(TEXTS)
    )


def test_a_legacy_model_needs_the_highest_end_token(tmp_path):
    spec = tiny.tiny_transformers_clip(tmp_path, eos_token_id=2)
    vocabulary, _ = tiny.clip_vocabulary()
    highest, dog = vocabulary[tiny.EOS], vocabulary["dog</w>"]
    edit(tmp_path / "vocab.json", **{tiny.EOS: dog, "dog</w>": highest})
    with pytest.raises(EncoderError, match=rf"must be its highest id {highest}, but is {dog};"):
        load_encoder(spec)


def test_missing_tokenizer_files_are_noticed(model, tmp_path):
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(EncoderError):
        load_encoder(model)


def test_missing_tokenizer_files_are_noticed_in_legacy_models_too(tmp_path):
    spec = tiny.tiny_transformers_clip(tmp_path, eos_token_id=2)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(EncoderError):
        load_encoder(spec)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(model, tmp_path):
    vocabulary, _ = tiny.clip_vocabulary()
    edit(tmp_path / "vocab.json", **{"dog</w>": len(vocabulary)})
    with pytest.raises(EncoderError, match=rf"gives token id {len(vocabulary)}, but the model only embeds"):
        load_encoder(model)


def test_spare_ids_of_a_tokenizer_are_harmless(model, tmp_path):
    vocabulary, _ = tiny.clip_vocabulary()
    edit(tmp_path / "vocab.json", **{"neverheard</w>": len(vocabulary)})
    assert load_encoder(model).encode_texts(TEXTS).shape == (4, 24)


def test_a_model_that_is_not_a_clip_is_refused(tmp_path):
    config = BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="is a 'bert' model, not a CLIP"):
        load_encoder(f"transformers:{tmp_path}")


def test_missing_weights_are_an_error(model, tmp_path):
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["text_projection.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"1 weights of .* first text_projection\.weight"):
        load_encoder(model)


def test_misshapen_weights_are_an_error(model, tmp_path):
    edit(tmp_path / "config.json", projection_dim=20)
    with pytest.raises(EncoderError, match="could not be loaded") as caught:
        load_encoder(model)
    assert caught.value.__cause__ is not None


def test_a_truncated_weights_file_is_an_error(model, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(EncoderError, match="could not be loaded"):
        load_encoder(model)


def test_pickled_weights_are_not_read(model, tmp_path):
    file = tmp_path / "model.safetensors"
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(EncoderError, match="could not be loaded"):
        load_encoder(model)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [None, "{"])
def test_missing_or_broken_json(model, tmp_path, name, content):
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(EncoderError, match=name.replace(".", r"\.")) as caught:
        load_encoder(model)
    assert "\n" not in str(caught.value)


def test_only_full_rows_are_tokenised_twice(transformers_spec, monkeypatch):
    encoder = load_encoder(transformers_spec)
    counted = []

    class Counting:
        def __call__(self, texts, **options):
            counted.append(len(texts))
            return original(texts, **options)

    original = encoder.tokenizer
    monkeypatch.setattr(encoder, "tokenizer", Counting())
    encoder.tokenize(["a dog"] * 5)
    assert counted == [5]
    counted.clear()
    with pytest.warns(TruncationWarning, match="1 of 3"):
        encoder.tokenize(["a dog", "dog " * 90, "cat"])
    assert counted == [3, 1]


def test_loading_says_nothing(transformers_spec, capfd):
    load_encoder(transformers_spec)
    said = capfd.readouterr()
    assert said.out == said.err == ""


@pytest.mark.parametrize("shard", [None, "../outside.safetensors", 7])
def test_an_index_of_shards_names_files_of_its_folder(shard, transformers_spec, tmp_path):
    folder = shutil.copytree(transformers_spec.removeprefix("transformers:"), tmp_path / "sharded")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard or "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if shard is None:
        expected = load_encoder(transformers_spec).encode_texts(["a dog"])
        assert torch.equal(load_encoder(f"transformers:{folder}").encode_texts(["a dog"]), expected)
        return
    with pytest.raises(EncoderError, match=r"weight_map of .* must name safetensors files of that folder"):
        load_encoder(f"transformers:{folder}")
