"""Images in batches: the same vectors with and without workers, and no image lost silently."""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
import subprocess
import sys
from multiprocessing import reduction
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from xbt.encoders import image_batching, load_encoder
from xbt.encoders.image_batching import decode_batches
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.errors import ConfigError, DataError, ImageError
from xbt.space import draw_probe_images


def jpeg(image, mode="RGB"):
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(params=["open_clip_spec", "transformers_spec"])
def encoder(request):
    return load_encoder(request.getfixturevalue(request.param))


@pytest.fixture
def batches(tmp_path):
    """Every kind of source, with broken ones at the start, in the middle and at the end, and a lost batch."""
    flat, stripes, disc, ramp = draw_probe_images()
    path = tmp_path / "disc.png"
    disc.save(path)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(jpeg(stripes)[:-300])
    lazy = Image.open(broken)  # not decoded before it is used
    return [
        [flat, jpeg(disc), b"no image", str(path)],
        [broken, path, jpeg(stripes, "CMYK")],
        [b"", tmp_path / "none.png", lazy],
        [],
        [ramp],
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_encoded_and_accounted_for(encoder, batches, num_workers):
    results = list(encoder.encode_image_batches(iter(batches), num_workers=num_workers))
    assert [result.kept for result in results] == [[0, 1, 3], [1, 2], [], [], [0]]
    assert [sorted(result.rejected) for result in results] == [[2], [0], [0, 1, 2], [], []]
    assert "cannot be decoded" in results[0].rejected[2]
    assert "broken.jpg cannot be decoded" in results[1].rejected[0]
    assert "none.png does not exist" in results[2].rejected[1]
    assert results[1].notes == {2: "CMYK converted to RGB"}
    for batch, result in zip(batches, results, strict=True):
        expected = encoder.encode_images([batch[position] for position in result.kept])
        torch.testing.assert_close(result.vectors, expected, rtol=0, atol=1e-6)
        assert result.vectors.shape == (len(result.kept), encoder.dim)
        assert not result.vectors.requires_grad


def test_workers_give_the_same_vectors(encoder):
    images = [jpeg(image.resize((50 + n, 40))) for n in range(5) for image in draw_probe_images()]
    plain = encoder.encode_images(images, batch_size=3)
    assert torch.equal(encoder.encode_images(images, batch_size=3, num_workers=2), plain)


def test_the_first_unreadable_image_is_named(encoder):
    images = [jpeg(draw_probe_images()[0])] * 7
    images[4] = b"no image"
    images[6] = b""
    for num_workers in (0, 2):
        with pytest.raises(ImageError, match="image number 4 cannot be decoded"):
            encoder.encode_images(images, batch_size=3, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_consumed_lazily(encoder, num_workers):
    taken = []

    def stream():
        for number in range(50):
            taken.append(number)
            yield [draw_probe_images()[0]]

    results = encoder.encode_image_batches(stream(), num_workers=num_workers)
    assert not taken
    next(results)
    assert len(taken) <= 1 + 2 * num_workers + 1
    results.close()
    assert len(taken) <= 1 + 2 * num_workers + 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_stream_comes_after_earlier_results(encoder, num_workers):
    def stream():
        yield [draw_probe_images()[0]]
        yield [draw_probe_images()[1]]
        raise DataError("the archive ends here")

    results = encoder.encode_image_batches(stream(), num_workers=num_workers)
    assert [len(next(results).vectors), len(next(results).vectors)] == [1, 1]
    with pytest.raises(DataError, match=r"^the archive ends here$"):
        next(results)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("place", ["PIL.Image.open", "preprocess", "torch.stack"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), MemoryError(), RuntimeError("can't allocate memory: x")],
)
def test_a_fault_of_the_system_is_one_sentence(tmp_path, monkeypatch, num_workers, place, error):
    draw_probe_images()[0].save(tmp_path / "a.png")

    def fail(*arguments, **options):
        raise error

    if place != "preprocess":
        monkeypatch.setattr(place, fail)
    transform = fail if place == "preprocess" else Threads()
    words = "Input/output error" if isinstance(error, OSError) else "memory ran out"
    with pytest.raises(DataError, match=f"^[^\n]*{words}[^\n]*$") as caught:
        list(decode_batches([[(str(tmp_path / "a.png"), None)]], transform, num_workers))
    assert not isinstance(caught.value, ImageError)


def test_images_that_cannot_be_preprocessed_are_rejected(encoder):
    original = encoder.image_transform

    def fragile(image):
        if image.width < 10:
            raise ValueError("too narrow")
        return original(image)

    encoder.image_transform = fragile
    images = [*draw_probe_images()[:2], Image.new("RGB", (5, 5))]
    (result,) = encoder.encode_image_batches([images])
    assert result.kept == [0, 1]
    assert result.rejected == {2: "image of 5 x 5 pixels cannot be preprocessed: ValueError: too narrow"}
    with pytest.raises(ImageError, match="5 x 5 pixels cannot be preprocessed"):
        encoder.encode_images(images)


class Deadly:
    def __call__(self, image):
        os._exit(9)


def test_a_worker_that_dies_is_one_sentence():
    with pytest.raises(DataError, match="one of the 1 worker processes died"):
        list(decode_batches([[(b"x", None), (jpeg(draw_probe_images()[0]), None)]], Deadly(), num_workers=1))


def test_nan_names_the_image(encoder, monkeypatch):
    original = encoder._image_features

    def broken(pixels):
        features = original(pixels)
        features[-1] = float("nan")
        return features

    good = jpeg(draw_probe_images()[0])
    monkeypatch.setattr(encoder, "_image_features", lambda p: broken(p) if len(p) == 2 else original(p))
    results = encoder.encode_image_batches([[good], [good, b"no image", good]])
    next(results)
    with pytest.raises(DataError, match="NaN for image number 3;"):
        next(results)


def test_nothing_is_held_between_two_results(encoder):
    encoder.module.train()
    results = encoder.encode_image_batches([[image] for image in draw_probe_images()])
    for _ in results:
        assert encoder.module.training
        assert torch.is_grad_enabled()


def test_the_callers_randomness_is_left_alone(encoder):
    before = torch.get_rng_state()
    encoder.encode_images([jpeg(draw_probe_images()[0])], num_workers=1)
    encoder.encode_texts(["a dog"], num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


class Threads:
    """Pixels that tell how many threads torch has where they are made."""

    def __call__(self, image):
        return torch.full((3, 2, 2), float(torch.get_num_threads()))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_are_decoded_on_one_thread(num_workers):
    torch.set_num_threads(2)
    batch = [(jpeg(draw_probe_images()[0]), None)]
    (decoded,) = decode_batches([batch], Threads(), num_workers)
    assert decoded.pixels.unique().tolist() == [1.0]
    assert torch.get_num_threads() == 2


def test_a_used_tokenizer_does_not_complain_in_the_workers(transformers_spec, monkeypatch, capfd):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    encoder = load_encoder(transformers_spec)
    encoder.encode_texts(["a dog", "a cat"] * 400)
    capfd.readouterr()
    encoder.encode_texts([f"a dog {n}" for n in range(800)], num_workers=2)
    assert capfd.readouterr().err == ""
    assert "TOKENIZERS_PARALLELISM" not in os.environ


SPAWNED = """
import multiprocessing, sys, torch
from xbt.encoders import load_encoder
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    encoder = load_encoder(sys.argv[1])
    images = sys.argv[2:]
    assert torch.equal(encoder.encode_images(images, num_workers=1), encoder.encode_images(images))
    texts = ["a red circle", "dog"]
    assert torch.equal(encoder.encode_texts(texts, num_workers=1), encoder.encode_texts(texts))
    print("the same")
"""


@pytest.mark.slow
def test_workers_can_be_spawned(encoder, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    paths = []
    for number, image in enumerate(draw_probe_images()):
        paths.append(str(tmp_path / f"{number}.png"))
        image.save(paths[-1])
    done = subprocess.run(
        [sys.executable, str(script), encoder.name, *paths], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "the same", done.stderr[-2000:]


@pytest.mark.parametrize("custom_text", [False, True])
def test_transforms_hold_no_weights(tmp_path, custom_text):
    encoder = load_encoder(tiny.tiny_open_clip(tmp_path, custom_text=custom_text, width=256))
    weights = sum(p.numel() * p.element_size() for p in encoder.module.parameters())
    image = draw_probe_images()[2]
    again = pickle.loads(pickle.dumps(encoder.image_transform))
    assert torch.equal(again(image), encoder.preprocess(image))
    assert len(pickle.dumps(encoder.image_transform)) < 10_000
    assert len(pickle.dumps(encoder.text_transform)) < weights / 5


def test_bf16_is_close_to_fp32(encoder):
    encoder = (
        OpenClipEncoder.create(tiny.open_clip_config(width=64, dim=64)) if encoder.dim == 16 else encoder
    )
    texts, images = ["a red circle", "dog", ""], draw_probe_images()
    exact = torch.cat([encoder.encode_texts(texts), encoder.encode_images(images)])
    encoder.precision = "bf16"
    rough = torch.cat([encoder.encode_texts(texts), encoder.encode_images(images)])
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.norm(dim=1), torch.ones(7), rtol=0, atol=1e-6)
    cosines = torch.nn.functional.cosine_similarity(exact, rough)
    assert cosines.min() > 0.999
    assert (exact - rough).abs().max() > 1e-5  # it did compute in bf16
    tokens = encoder.tokenize(texts)
    torch.testing.assert_close(encoder.embed_tokens(tokens).detach(), exact[:3], rtol=0, atol=1e-5)


def test_the_space_does_not_depend_on_the_precision(encoder):
    other = load_encoder(encoder.name)
    other.precision = "bf16"
    assert torch.equal(other.space.probe, encoder.space.probe)
    assert other.precision == "bf16"


def test_unknown_precision_and_workers_are_refused(encoder):
    with pytest.raises(ConfigError, match="num_workers is -1"):
        encoder.encode_images(draw_probe_images(), num_workers=-1)
    encoder.precision = "fp16"
    with pytest.raises(ConfigError, match="precision is 'fp16', but must be 'fp32' or 'bf16'"):
        encoder.encode_images(draw_probe_images())


def test_compiled_towers_give_the_same_vectors(encoder, monkeypatch):
    """Compile with the front end alone: it traces the towers and runs the traced graph."""
    texts, images = ["a red circle", "dog", "", "dog " * 20], draw_probe_images()
    expected = encoder.encode_texts(texts, batch_size=2), encoder.encode_images(images)
    traced, compile_module = [], torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **options: compile_module(f, backend=lambda g, x: traced.append(g) or g.forward, **options),
    )
    assert encoder.compile_towers() is encoder
    torch.testing.assert_close(encoder.encode_texts(texts, batch_size=2), expected[0], rtol=0, atol=1e-5)
    assert traced
    traced.clear()
    torch.testing.assert_close(encoder.encode_images(images), expected[1], rtol=0, atol=1e-5)
    assert traced


def test_tasks_and_their_order():
    assert list(image_batching.run_ahead(str, range(9), num_workers=2, look_ahead=1)) == [
        str(n) for n in range(9)
    ]
    assert list(image_batching.run_ahead(str, [], num_workers=1)) == []


def own_a_descriptor(_task):
    return reduction.DupFd(os.dup(1))


def test_a_reader_that_breaks_off_makes_no_noise(capfd):
    results = image_batching.run_ahead(own_a_descriptor, [0, 1], num_workers=1)
    descriptor = next(results)
    address, _key = descriptor._id
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(address)  # and away again, as after Ctrl-C, in the midst of the handshake
    os.close(descriptor.detach())  # the worker serves one after the other, so the first is done with
    results.close()
    assert capfd.readouterr().err == ""


def test_other_errors_of_a_worker_s_threads_are_shown(capsys):
    image_batching._ignore_lost_connections(ValueError, ValueError("of another kind"), None)
    assert "of another kind" in capsys.readouterr().err
