"""Encoders made of functions, against the functions themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import SCENES
from torch.nn.functional import normalize

from xbt import CompatibleEncoder, fit_projection, wrap_encoder
from xbt.data import make_scenes
from xbt.encoders import LoraSettings, add_lora
from xbt.errors import ConfigError, DataError, EncoderError, ImageError
from xbt.evaluation import evaluate_retrieval

WORDS = ["red", "green", "blue", "circle", "square", "a"]


def of_texts(texts):
    return np.array([[1.0 + text.count(word) for word in WORDS] for text in texts])


def of_images(images):
    return torch.stack(
        [torch.tensor([*image.resize((1, 1)).getpixel((0, 0)), 9.0, 9, 9]) for image in images]
    )


@pytest.fixture
def encoder():
    return wrap_encoder(texts=of_texts, images=of_images, name="my-api-v2", preprocessing={"size": [8, 8]})


def test_vectors_are_those_of_the_functions(encoder):
    texts = ["a red circle", "a blue square", "a red circle", "green"]
    expected = normalize(torch.from_numpy(of_texts(texts)).float(), dim=1)
    torch.testing.assert_close(encoder.encode_texts(texts, batch_size=2), expected)
    images = [SCENES.image(number) for number in range(3)]
    torch.testing.assert_close(
        encoder.encode_images(images, batch_size=2), normalize(of_images(images), dim=1)
    )
    assert encoder.encode_texts([]).shape == (0, 6)
    assert encoder.encode_images([]).shape == (0, 6)
    assert encoder.dim == 6


def test_a_text_is_embedded_once_in_batches_of_the_given_size():
    calls = []

    def embed(texts):
        calls.append(texts)
        return of_texts(texts)

    encoder = wrap_encoder(texts=embed, name="counted")
    calls.clear()
    encoder.encode_texts(["one", "two", "one", "three"], batch_size=2)
    assert [sorted(batch) for batch in calls] in ([["one", "two"], ["three"]], [["one", "three"], ["two"]])


def test_the_space_tells_models_apart(encoder):
    other = wrap_encoder(texts=of_texts, images=lambda images: of_images(images) ** 2, name="my-api-v2",
                         preprocessing={"size": [8, 8]})  # fmt: skip
    assert encoder.space.compare(encoder.space).state == "same"
    assert encoder.space.compare(other.space).state == "other"
    only_texts = wrap_encoder(texts=of_texts, name="my-api-v2", preprocessing={"size": [8, 8]})
    assert encoder.space.compare(only_texts.space).state == "unverified"


def test_images_are_decoded_and_bad_ones_are_named(encoder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    SCENES.image(0).save(tmp_path / "good.png")
    sources = [str(tmp_path / "broken.png"), str(tmp_path / "good.png")]
    (batch,) = encoder.encode_image_batches([sources])
    assert batch.kept == [1]
    assert "broken.png" in batch.rejected[0]
    assert batch.vectors.shape == (1, 6)
    with pytest.raises(ImageError, match=r"broken\.png"):
        encoder.encode_images(sources)


def test_it_evaluates_behind_a_projection_like_any_other(encoder):
    other = wrap_encoder(
        texts=lambda t: of_texts(t)[:, ::-1], images=lambda i: of_images(i).flip(1), name="new"
    )
    texts = [f"a {word} {word}" for word in WORDS] * 2
    projection = fit_projection(
        other.encode_texts(texts), encoder.encode_texts(texts), new_space=other.space, old_space=encoder.space
    )
    upgraded = CompatibleEncoder(other, projection)
    report = evaluate_retrieval(make_scenes(20, seed=0), encoder, other, {"procrustes": upgraded})
    cells = {cell.name: cell for cell in report.cells}
    # The axes are reversed, which is a rotation.
    assert cells["new/old"].t2i == cells["old/old"].t2i
    assert cells["new/old"].i2t == cells["old/old"].i2t
    images = [SCENES.image(number) for number in range(3)]
    torch.testing.assert_close(
        upgraded.encode_images(images), encoder.encode_images(images), rtol=0, atol=1e-5
    )


def test_lists_of_numbers_are_vectors():
    encoder = wrap_encoder(texts=lambda texts: of_texts(texts).tolist(), name="json")
    assert encoder.encode_texts(["a"]).shape == (1, 6)


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [
        ({}, ConfigError, "give at least one"),
        ({"texts": of_texts, "name": ""}, ConfigError, "needs a name"),
        (
            {"texts": lambda texts: of_texts(texts)[1:]},
            EncoderError,
            r"gave 19 vectors for 20 texts|gave \d+ vec",
        ),
        ({"texts": lambda texts: of_texts(texts) * 0}, EncoderError, "gave a row of zeros"),
        ({"texts": lambda texts: of_texts(texts) * np.nan}, EncoderError, "failed on .* NaN or infinite"),
        ({"texts": lambda texts: 1 / 0}, EncoderError, "failed on .* texts: ZeroDivisionError"),
        ({"texts": lambda texts: "no"}, EncoderError, "must be a torch tensor or a numpy array"),
        (
            {"texts": lambda t: of_texts(t)[:, :2], "images": of_images},
            EncoderError,
            "texts of 2 and images of 6",
        ),
    ],
)
def test_functions_that_cannot_be_used(functions, error, message):
    with pytest.raises(error, match=message):
        wrap_encoder(**{"name": "bad", **functions})


def test_what_needs_weights_is_refused(encoder):
    with pytest.raises(EncoderError, match="wraps functions, so xbt cannot reach its tokens"):
        encoder.tokenize(["a"])
    with pytest.raises(EncoderError, match="my-api-v2"):
        encoder.folded(torch.eye(6))
    with pytest.raises(EncoderError, match="my-api-v2"):
        add_lora(encoder, LoraSettings())
    only_texts = wrap_encoder(texts=of_texts, name="texts")
    with pytest.raises(EncoderError, match="texts has no function for images; give wrap_encoder images="):
        only_texts.encode_images([SCENES.image(0)])
    with pytest.raises(DataError, match="str"):
        only_texts.encode_texts("a single string")
