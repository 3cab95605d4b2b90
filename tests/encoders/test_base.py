"""The interface of every encoder, on both backends."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, ImageError, TruncationWarning
from xbt.space import draw_probe_images

TEXTS = ["a red circle", "two dogs", "", "naïve café ☕ 数字"]


@pytest.fixture(params=["open_clip_spec", "transformers_spec"])
def spec(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def encoder(spec):
    return load_encoder(spec)


@pytest.fixture
def words(encoder):
    """Makes a text of exactly the given number of tokens, start and end tokens included."""
    return lambda tokens: " ".join(["dog"] * (tokens - 2))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_vectors_are_unit_float32_cpu_rows_without_a_graph(encoder):
    for vectors, count in ((encoder.encode_texts(TEXTS), 4), (encoder.encode_images(draw_probe_images()), 4)):
        assert vectors.shape == (count, encoder.dim)
        assert vectors.dtype == torch.float32
        assert vectors.device.type == "cpu"
        assert not vectors.requires_grad
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(count))


def test_loaded_encoders_are_frozen_fp32_and_in_eval_mode(encoder):
    assert not encoder.module.training
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    assert {parameter.dtype for parameter in encoder.module.parameters()} == {torch.float32}
    assert encoder.device == torch.device("cpu")
    assert encoder.logit_scale.shape == ()


def test_batches_do_not_change_the_result(encoder):
    images = draw_probe_images()
    torch.testing.assert_close(encoder.encode_texts(TEXTS, batch_size=3), encoder.encode_texts(TEXTS))
    torch.testing.assert_close(encoder.encode_images(images, batch_size=3), encoder.encode_images(images))


def test_every_kind_of_image_source_gives_the_same_vector(encoder, tmp_path):
    image = draw_probe_images()[2]
    path = tmp_path / "disc.png"
    image.save(path)
    vectors = encoder.encode_images([image, path, str(path), png(image)])
    for vector in vectors[1:]:
        torch.testing.assert_close(vector, vectors[0], rtol=0, atol=1e-6)


def test_grey_and_transparent_images_are_made_rgb(encoder):
    grey = Image.new("L", (40, 30), 128)
    vectors = encoder.encode_images([grey, grey.convert("RGB"), grey.convert("RGBA")])
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(vectors[0], vectors[2], rtol=0, atol=1e-6)


def test_empty_lists_give_empty_matrices(encoder):
    assert encoder.encode_texts([]).shape == (0, encoder.dim)
    assert encoder.encode_images([]).shape == (0, encoder.dim)
    assert encoder.tokenize([]).shape == (0, encoder.context_length)
    assert encoder.tokenize([]).dtype == torch.int64


def test_one_text_or_image_instead_of_a_list_is_refused(encoder, tmp_path):
    with pytest.raises(DataError, match="single text 'a dog'"):
        encoder.encode_texts("a dog")
    with pytest.raises(DataError, match="single text"):
        encoder.tokenize("a dog")
    for image in (draw_probe_images()[0], "dog.png", b"bytes", tmp_path):
        with pytest.raises(DataError, match="images must be a list"):
            encoder.encode_images(image)


def test_items_that_are_not_texts_are_named(encoder):
    with pytest.raises(DataError, match=r"texts\[1\] is 3, a int"):
        encoder.encode_texts(["a dog", 3])
    with pytest.raises(DataError, match=r"texts\[2\] is not valid Unicode"):
        encoder.encode_texts(["a", "b", "\ud800"])


def test_a_numpy_array_of_texts_is_a_list_too(encoder):
    texts = np.array(["a red circle", "a dog"])
    torch.testing.assert_close(encoder.encode_texts(texts), encoder.encode_texts(list(map(str, texts))))


def test_a_batch_size_of_nothing_is_refused(encoder):
    with pytest.raises(ConfigError, match="batch_size is 0"):
        encoder.encode_texts(["a"], batch_size=0)


def test_a_corrupt_image_is_named(encoder, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(png(draw_probe_images()[1])[:60])
    with pytest.raises(ImageError, match=r"broken\.jpg cannot be decoded"):
        encoder.encode_images([draw_probe_images()[0], broken])
    with pytest.raises(ImageError, match="number 1 cannot be decoded"):
        encoder.encode_images([draw_probe_images()[0], b"no image"])


def test_images_are_decoded_batch_by_batch(encoder, monkeypatch):
    seen = []
    original = encoder.embed_pixels
    monkeypatch.setattr(encoder, "embed_pixels", lambda pixels: seen.append(len(pixels)) or original(pixels))
    with pytest.raises(ImageError):
        encoder.encode_images([*draw_probe_images(), b"no image"], batch_size=2)
    assert seen == [2, 2]


def test_nan_is_an_error_that_names_the_item(encoder, monkeypatch):
    original = encoder._text_features

    def broken(tokens):
        features = original(tokens)
        features[-1] = float("nan")
        return features

    monkeypatch.setattr(encoder, "_text_features", broken)
    with pytest.raises(DataError, match="NaN for text number 1;"):
        encoder.encode_texts(TEXTS, batch_size=2)


def test_the_mode_of_every_module_is_restored(encoder):
    encoder.module.train()
    frozen = next(iter(encoder.module.children()))
    frozen.eval()
    before = [module.training for module in encoder.module.modules()]
    encoder.encode_texts(["a dog"])
    with pytest.raises(ImageError):
        encoder.encode_images([b"no image"])
    assert [module.training for module in encoder.module.modules()] == before
    assert True in before
    assert False in before


def test_vectors_can_be_trained_on(encoder):
    layer = torch.nn.Linear(encoder.dim, 3)
    layer(encoder.encode_texts(TEXTS)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_embed_is_differentiable_and_equals_encode(encoder):
    encoder.module.requires_grad_(True)
    images = draw_probe_images()
    texts = encoder.embed_tokens(encoder.tokenize(TEXTS))
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    vectors = encoder.embed_pixels(pixels)
    assert pixels.shape == (4, 3, 32, 32)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(texts.detach(), encoder.encode_texts(TEXTS), rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors.detach(), encoder.encode_images(images), rtol=0, atol=1e-5)
    (texts @ vectors.T).diagonal().sum().backward()
    with_gradient = [name for name, p in encoder.module.named_parameters() if p.grad is not None]
    assert len(with_gradient) > 20


def test_a_text_of_exactly_the_context_length_is_not_cut(encoder, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error", TruncationWarning)
        tokens = encoder.tokenize([words(encoder.context_length), "a dog"])
    assert tokens.shape == (2, encoder.context_length)
    longer = words(encoder.context_length + 1)
    with pytest.warns(TruncationWarning, match="1 of 3 texts are longer than the"):
        cut = encoder.tokenize(["a dog", longer, words(encoder.context_length)])
    assert torch.equal(cut[1], tokens[0])


def test_cut_texts_are_counted_once_over_all_batches(encoder, words):
    long = words(encoder.context_length + 5)
    with pytest.warns(TruncationWarning) as caught:
        encoder.encode_texts([long, "a", long, words(encoder.context_length), long], batch_size=2)
    assert [str(each.message) for each in caught] == [
        f"3 of 5 texts are longer than the {encoder.context_length} tokens of {encoder.name} and were cut"
    ]
    assert caught[0].filename == __file__


def test_the_space_is_the_same_after_a_reload_and_another_for_other_weights(spec, tmp_path):
    first, again = load_encoder(spec), load_encoder(spec)
    make = tiny.tiny_open_clip if spec.startswith("open_clip") else tiny.tiny_transformers_clip
    other = load_encoder(make(tmp_path / "other", seed=1))
    assert first.space.probe.shape == (20, first.dim)
    assert first.space.same_as(again.space)
    assert first.space.agreement(again.space) == pytest.approx(1.0, abs=1e-6)
    assert not first.space.same_as(other.space)
    assert first.space.preprocessing["backend"] == "pil"


def test_the_space_is_computed_once_until_it_is_invalidated(encoder):
    space = encoder.space
    assert encoder.space is space
    with torch.no_grad():
        for parameter in encoder.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    assert encoder.space is space
    encoder.invalidate_space()
    assert not encoder.space.same_as(space)


def test_a_short_context_does_not_make_the_probe_warn(tmp_path):
    encoder = load_encoder(tiny.tiny_open_clip(tmp_path, context_length=6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoder.space.probe.shape == (20, 16)


def test_progress_goes_to_stderr(encoder, capsys):
    encoder.encode_texts(TEXTS, progress=True)
    quiet = capsys.readouterr()
    assert "4/4" in quiet.err
    assert quiet.out == ""
    encoder.encode_texts(TEXTS)
    assert capsys.readouterr().err == ""


def test_importing_the_encoders_loads_no_backend():
    code = "import sys, xbt.encoders; print({'open_clip', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
