"""A compatible encoder whose queries are mixed with the old model's."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import tiny
import torch
from PIL import Image
from upgrades import IMAGES, TEXTS, parts

from xbt.compatible import CompatibleEncoder
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, EncoderError, SpaceMismatchError, TruncationWarning
from xbt.hub import SavedPartError
from xbt.projections import LinearProjection
from xbt.projections.ensemble import Adaptive, Linear, Nlerp, QueryEnsemble, Slerp
from xbt.space import EmbeddingSpace


def both():
    generator = torch.Generator().manual_seed(0)
    reference, *matrices = (torch.randn(12, 12, generator=generator) for _ in range(3))
    names = ("old_matrix", "new_matrix")
    return {
        "nlerp": QueryEnsemble(12, {"T2I": Nlerp(0.3), "I2T": Nlerp(0.8)}),
        "padded": QueryEnsemble(12, dict.fromkeys(("T2I", "I2T"), Slerp(0.6, padded=True))),
        "adaptive": QueryEnsemble(
            12,
            dict.fromkeys(("T2I", "I2T"), Adaptive(0.2, 1.0, 0.5)),
            {direction: {"reference": reference} for direction in ("T2I", "I2T")},
        ),
        "linear": QueryEnsemble(
            12,
            dict.fromkeys(("T2I", "I2T"), Linear(0.5)),
            {direction: dict(zip(names, matrices, strict=True)) for direction in ("T2I", "I2T")},
        ),
    }


def expected(new, projection, old, ensemble):
    with torch.no_grad():
        return (
            ensemble(old.encode_texts(TEXTS), projection.project(new.encode_texts(TEXTS), "text"), "T2I"),
            ensemble(
                old.encode_images(IMAGES), projection.project(new.encode_images(IMAGES), "image"), "I2T"
            ),
        )


@pytest.mark.parametrize("kind", ["nlerp", "padded", "adaptive", "linear"])
def test_queries_are_combined_with_the_old_encoders(specs, backend, kind):
    new, projection, old = parts(specs, backend)
    ensemble = both()[kind]
    compatible = CompatibleEncoder(new, projection, ensemble, old)
    texts, images = expected(new, projection, old, ensemble)
    torch.testing.assert_close(compatible.encode_texts(TEXTS), texts, atol=1e-6, rtol=0)
    torch.testing.assert_close(compatible.encode_images(IMAGES, batch_size=2), images, atol=1e-5, rtol=0)
    plain = CompatibleEncoder(new, projection)
    assert (plain.encode_texts(TEXTS) - texts).abs().max() > 1e-3
    assert not texts.requires_grad
    assert compatible.encode_texts([]).shape == compatible.encode_images([]).shape == (0, 12)


@pytest.mark.parametrize("kind", ["nlerp", "padded"])
def test_old_vectors_stand_in_for_the_old_encoder(specs, backend, kind):
    new, projection, old = parts(specs, backend)
    ensemble = both()[kind]
    texts, images = expected(new, projection, old, ensemble)
    compatible = CompatibleEncoder(new, projection, ensemble)
    found = compatible.encode_texts(TEXTS, old_vectors=old.encode_texts(TEXTS).numpy())
    torch.testing.assert_close(found, texts, atol=1e-6, rtol=0)
    found = compatible.encode_images(IMAGES, old_vectors=old.encode_images(IMAGES))
    torch.testing.assert_close(found, images, atol=1e-5, rtol=0)
    assert compatible.encode_texts([], old_vectors=torch.zeros(0, 12)).shape == (0, 12)


def test_the_error_names_missing_old_vectors(specs):
    new, projection, _ = parts(specs, "open_clip")
    compatible = CompatibleEncoder(new, projection, both()["nlerp"])
    words = r"text queries of .* combined with the old model's .*beta=0\.3.* give old=, so that '.*old'"
    with pytest.raises(EncoderError, match=words):
        compatible.encode_texts(TEXTS)
    with pytest.raises(EncoderError, match=r"image queries of .* or its vectors as old_vectors="):
        compatible.encode_images(IMAGES)
    with pytest.raises(EncoderError, match="image queries of"):
        list(compatible.encode_image_batches([IMAGES]))


def test_wrong_old_vectors(specs):
    new, projection, old = parts(specs, "open_clip")
    compatible = CompatibleEncoder(new, projection, both()["nlerp"])
    with pytest.raises(DataError, match="old_vectors has 2 rows for 18 queries"):
        compatible.encode_texts(TEXTS, old_vectors=torch.ones(2, 12))
    with pytest.raises(SpaceMismatchError, match="old_vectors has dimension 16, but 12"):
        compatible.encode_images(IMAGES, old_vectors=torch.ones(5, 16))
    with pytest.raises(DataError, match="NaN"):
        compatible.encode_texts(["a"], old_vectors=torch.full((1, 12), torch.nan))
    with pytest.raises(DataError, match=r"write \[text\]"):
        compatible.encode_texts("a dog", old_vectors=torch.ones(5, 12))
    with pytest.raises(DataError, match=r"write \[image\]"):
        compatible.encode_images(IMAGES[0], old_vectors=torch.ones(1, 12))
    plain = CompatibleEncoder(new, projection)
    for call in (plain.encode_texts, plain.encode_images):
        with pytest.raises(ConfigError, match="only used with an ensemble"):
            call([], old_vectors=old.encode_texts(TEXTS))


def test_one_sided_ensembles_run_one_encoder(specs, monkeypatch):
    new, projection, old = parts(specs, "open_clip")
    texts, images = old.encode_texts(TEXTS), old.encode_images(IMAGES)
    alone = CompatibleEncoder(new, projection, QueryEnsemble(12, dict.fromkeys(("T2I", "I2T"), Nlerp(1.0))))
    plain = CompatibleEncoder(new, projection)
    torch.testing.assert_close(alone.encode_texts(TEXTS), plain.encode_texts(TEXTS), atol=1e-6, rtol=0)
    torch.testing.assert_close(alone.encode_images(IMAGES), plain.encode_images(IMAGES), atol=1e-6, rtol=0)
    tokens = new.tokenize(TEXTS)
    torch.testing.assert_close(alone.embed_tokens(tokens), plain.embed_tokens(tokens), atol=1e-6, rtol=0)

    only_old = CompatibleEncoder(
        new, projection, QueryEnsemble(12, dict.fromkeys(("T2I", "I2T"), Nlerp(0.0))), old
    )

    def fail(*args):
        raise AssertionError("the new encoder ran")

    monkeypatch.setattr(new, "_text_features", fail)
    monkeypatch.setattr(new, "_image_features", fail)
    torch.testing.assert_close(only_old.encode_texts(TEXTS), texts, atol=1e-6, rtol=0)
    torch.testing.assert_close(only_old.encode_images(IMAGES), images, atol=1e-6, rtol=0)


def test_tokens_and_pixels_cannot_be_combined(specs):
    compatible = CompatibleEncoder(*parts(specs, "open_clip")[:2], both()["nlerp"])
    with pytest.raises(EncoderError, match="tokens and pixels of the new model cannot give"):
        compatible.embed_tokens(compatible.tokenize(TEXTS))
    with pytest.raises(EncoderError, match="tokens and pixels"):
        compatible.embed_pixels(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streams_of_images_with_broken_ones(specs, tmp_path, num_workers):
    new, projection, old = parts(specs, "open_clip")
    compatible = CompatibleEncoder(new, projection, both()["nlerp"], old)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    grey = Image.new("CMYK", (40, 40), (9, 80, 10, 0))
    batches = [[IMAGES[0], broken], [IMAGES[1], grey, IMAGES[2]], [broken]]
    results = list(compatible.encode_image_batches(iter(batches), num_workers))
    assert [each.kept for each in results] == [[0], [0, 1, 2], []]
    assert [sorted(each.rejected) for each in results] == [[1], [], [0]]
    assert [sorted(each.notes) for each in results] == [[], [1], []]
    found = torch.cat([each.vectors for each in results])
    whole = compatible.encode_images([IMAGES[0], IMAGES[1], grey, IMAGES[2]])
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    with pytest.raises(DataError, match="broken"):
        compatible.encode_images([IMAGES[0], broken])


def test_exceptions_of_a_stream_are_raised(specs):
    new, projection, old = parts(specs, "open_clip")
    compatible = CompatibleEncoder(new, projection, both()["nlerp"], old)

    def stream():
        yield [IMAGES[0]]
        raise RuntimeError("the disk is gone")

    results = compatible.encode_image_batches(stream())
    assert next(results).kept == [0]
    with pytest.raises(RuntimeError, match="the disk is gone"):
        next(results)


def test_images_have_an_offset_of_their_own(specs):
    new, projection, _ = parts(specs, "open_clip")
    offset = LinearProjection.from_weight(projection.weight, torch.zeros(12), torch.ones(12))
    offset.set_spaces(projection.new_space, projection.old_space)
    compatible = CompatibleEncoder(new, offset)
    with torch.no_grad():
        images = offset(new.encode_images(IMAGES), "image")
    torch.testing.assert_close(compatible.encode_images(IMAGES), images, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        compatible.encode_texts(TEXTS), CompatibleEncoder(new, projection).encode_texts(TEXTS)
    )


def test_foreign_parts_are_refused(specs):
    new, projection, old = parts(specs, "open_clip")
    with pytest.raises(SpaceMismatchError, match="the old encoder given to the ensemble"):
        CompatibleEncoder(new, projection, both()["nlerp"], load_encoder(specs["transformers"]))
    with pytest.raises(SpaceMismatchError, match="combines 16-d vectors, but the projection leads to"):
        CompatibleEncoder(new, projection, QueryEnsemble.midpoint(16))
    with pytest.raises(SpaceMismatchError, match="space of the ensemble is 'another'"):
        CompatibleEncoder(new, projection, QueryEnsemble.midpoint(12, EmbeddingSpace("another", 12)))
    with pytest.raises(ConfigError, match="only used with an ensemble"):
        CompatibleEncoder(new, projection, old=old)


@pytest.mark.parametrize("kind", ["nlerp", "adaptive"])
def test_saved_and_loaded(specs, backend, kind, tmp_path):
    new, projection, old = parts(specs, backend)
    compatible = CompatibleEncoder(new, projection, both()[kind], old)
    compatible.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["ensemble"], config["old"]) == (True, specs["old"])
    texts = compatible.encode_texts(TEXTS)
    for options in ({}, {"old": old}, {"old": specs["old"], "load_old": True}):
        loaded = CompatibleEncoder.from_pretrained(tmp_path, **options)
        assert loaded.old is not None
        torch.testing.assert_close(loaded.encode_texts(TEXTS), texts, atol=1e-6, rtol=0)
        torch.testing.assert_close(loaded.encode_images(IMAGES), compatible.encode_images(IMAGES))
    light = CompatibleEncoder.from_pretrained(tmp_path, load_old=False)
    assert light.old is None
    found = light.encode_texts(TEXTS, old_vectors=old.encode_texts(TEXTS))
    torch.testing.assert_close(found, texts, atol=1e-6, rtol=0)
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert f"T2I: {kind}; I2T: {kind}" in card
    assert "also runs on every query" in card


def test_saving_without_ensemble_leaves_none_behind(specs, tmp_path):
    new, projection, old = parts(specs, "open_clip")
    CompatibleEncoder(new, projection, both()["nlerp"], old).save_pretrained(tmp_path)
    plain = CompatibleEncoder(new, projection)
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / "ensemble").exists()
    assert "runs on every query" not in str(plain.generate_model_card())
    with pytest.raises(ConfigError, match="has no ensemble to use an old encoder"):
        CompatibleEncoder.from_pretrained(tmp_path, old=old)
    assert json.loads((tmp_path / "config.json").read_text())["ensemble"] is False
    loaded = CompatibleEncoder.from_pretrained(tmp_path)
    assert loaded.ensemble is None
    torch.testing.assert_close(loaded.encode_texts(TEXTS), plain.encode_texts(TEXTS))


def test_damaged_or_foreign_saved_parts(specs, tmp_path):
    new, projection, old = parts(specs, "open_clip")
    elsewhere = tiny.tiny_open_clip(tmp_path / "old", seed=0, dim=12)
    CompatibleEncoder(new, projection, both()["nlerp"], load_encoder(elsewhere)).save_pretrained(
        tmp_path / "c"
    )
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(EncoderError, match=r"old model recorded in .* cannot be loaded: .*load_old=False"):
        CompatibleEncoder.from_pretrained(tmp_path / "c")
    assert CompatibleEncoder.from_pretrained(tmp_path / "c", old=old).old is old
    with pytest.raises(SpaceMismatchError, match="the old encoder given to the ensemble"):
        CompatibleEncoder.from_pretrained(tmp_path / "c", old=specs["transformers"])
    (tmp_path / "c/ensemble/model.safetensors").unlink()
    with pytest.raises(SavedPartError, match=r"ensemble.*model\.safetensors is missing"):
        CompatibleEncoder.from_pretrained(tmp_path / "c", load_old=False)


def test_precision_is_that_of_the_encoders(specs):
    new, projection, old = parts(specs, "open_clip")
    new.precision = "bf16"
    compatible = CompatibleEncoder(new, projection, both()["nlerp"], old)
    assert (compatible.precision, old.precision) == ("bf16", "fp32")
    compatible.precision = "fp32"
    fine = compatible.encode_texts(TEXTS)
    compatible.precision = "bf16"
    assert (new.precision, old.precision) == ("bf16", "bf16")
    assert 0 < (compatible.encode_texts(TEXTS) - fine).abs().max() < 0.1


def test_the_warning_about_cut_texts_points_to_the_caller(specs):
    compatible = CompatibleEncoder(*parts(specs, "open_clip")[:2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compatible.encode_texts(["a dog " * 40])
    assert [(each.category, each.filename) for each in caught] == [(TruncationWarning, __file__)]
