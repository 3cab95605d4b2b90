from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import xbt
from xbt.compatible import CompatibleEncoder
from xbt.data import make_scenes
from xbt.encoders import LoraSettings, add_lora, load_encoder
from xbt.errors import EncoderError, SpaceMismatchError
from xbt.hub import SavedPartError
from xbt.projections import fit_projection

SIZES, COLOURS, SHAPES = ("big", "small", "tiny"), ("red", "blue", "green"), ("circle", "star", "square")
TEXTS = [f"a {size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES]


def make(specs, backend, lora=False, seed=5):
    new, old = load_encoder(specs[backend]), load_encoder(specs["old"])
    projection = fit_projection(
        new.encode_texts(TEXTS), old.encode_texts(TEXTS), new_space=new.space, old_space=old.space
    )
    if lora:
        add_lora(new, LoraSettings(rank=3))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in new.module.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return CompatibleEncoder(new, projection)


def vectors(encoder):
    return encoder.encode_texts(TEXTS), encoder.encode_images(make_scenes(4).images)


def test_is_new_encoder_then_projection(specs, backend):
    compatible, new = make(specs, backend), load_encoder(specs[backend])
    texts, images = vectors(compatible)
    assert texts.shape == (27, 12)
    assert texts.dtype == torch.float32
    assert not texts.requires_grad
    torch.testing.assert_close(texts, compatible.projection(new.encode_texts(TEXTS)).detach())
    torch.testing.assert_close(
        images, compatible.projection(new.encode_images(make_scenes(4).images)).detach()
    )
    assert compatible.dim == 12
    assert compatible.space.same_as(load_encoder(specs["old"]).space)


@pytest.mark.parametrize("lora", [False, True])
def test_saved_and_loaded_in_a_fresh_process(specs, backend, lora, tmp_path):
    compatible = make(specs, backend, lora)
    compatible.save_pretrained(tmp_path / "saved")
    texts, images = vectors(compatible)
    save_file({"texts": texts, "images": images}, tmp_path / "expected")
    code = (
        "import sys, json, xbt; from safetensors.torch import load_file; from xbt.data import make_scenes\n"
        "root, texts = sys.argv[1], json.loads(sys.argv[2])\n"
        "e = xbt.CompatibleEncoder.from_pretrained(root + '/saved'); x = load_file(root + '/expected')\n"
        "assert (e.encode_texts(texts) - x['texts']).abs().max() <= 1e-6\n"
        "assert (e.encode_images(make_scenes(4).images) - x['images']).abs().max() <= 1e-6\n"
        "e.save_pretrained(root + '/again')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), json.dumps(TEXTS)], check=True)
    assert (tmp_path / "saved/lora/adapter_model.safetensors").is_file() == lora
    for file in sorted(path for path in (tmp_path / "saved").rglob("*") if path.is_file()):
        again = tmp_path / "again" / file.relative_to(tmp_path / "saved")
        assert again.read_bytes() == file.read_bytes(), file.name


def test_lora_changes_the_vectors_and_is_merged_for_serving(specs, backend, tmp_path):
    plain, adapted = make(specs, backend), make(specs, backend, lora=True)
    assert (vectors(plain)[0] - vectors(adapted)[0]).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    loaded = CompatibleEncoder.from_pretrained(tmp_path)
    tuned = [m for m in loaded.module.modules() if hasattr(m, "lora_A") and hasattr(m, "merged")]
    assert tuned
    assert all(module.merged for module in tuned)


def test_saving_without_lora_leaves_no_old_adapter_behind(specs, backend, tmp_path):
    make(specs, backend, lora=True).save_pretrained(tmp_path)
    plain = make(specs, backend)
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / "lora").exists()
    torch.testing.assert_close(
        vectors(CompatibleEncoder.from_pretrained(tmp_path)), vectors(plain), atol=1e-6, rtol=0
    )


def test_another_base_can_be_given(specs, backend, tmp_path):
    compatible = make(specs, backend, lora=True)
    compatible.save_pretrained(tmp_path / "saved")
    expected = vectors(compatible)
    elsewhere = tmp_path / "moved"
    shutil.copytree(specs[backend].split(":")[-1], elsewhere)
    spec = f"{specs[backend].rpartition(':')[0]}:{elsewhere}"
    for base in (spec, load_encoder(spec)):
        found = vectors(CompatibleEncoder.from_pretrained(tmp_path / "saved", base=base))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_wrong_base_is_refused_with_both_names(specs, backend, tmp_path):
    make(specs, backend, lora=True).save_pretrained(tmp_path / "saved")
    dim = 16 if backend == "open_clip" else 24
    other = tiny.tiny_open_clip(tmp_path / "other", seed=77, dim=dim)
    with pytest.raises(SpaceMismatchError) as caught:
        CompatibleEncoder.from_pretrained(tmp_path / "saved", base=other)
    assert other in str(caught.value)
    assert specs[backend] in str(caught.value)


def test_wrong_dimension_is_refused_with_both(specs, tmp_path):
    make(specs, "open_clip").save_pretrained(tmp_path / "saved")
    with pytest.raises(SpaceMismatchError, match=r"dimensions differ") as caught:
        CompatibleEncoder.from_pretrained(tmp_path / "saved", base=specs["transformers"])
    assert "(24-d)" in str(caught.value)
    assert "(16-d)" in str(caught.value)
    projection = make(specs, "open_clip").projection
    with pytest.raises(SpaceMismatchError, match=r"16-d vectors .*\(24-d\)"):
        CompatibleEncoder(load_encoder(specs["transformers"]), projection)


def test_other_weights_under_the_same_name_are_noticed(specs, tmp_path):
    spec = tiny.tiny_open_clip(tmp_path / "model", seed=1)
    make({**specs, "open_clip": spec}, "open_clip").save_pretrained(tmp_path / "saved")
    tiny.tiny_open_clip(tmp_path / "model", seed=2)
    with pytest.raises(SpaceMismatchError, match="probes agree only to a cosine of"):
        CompatibleEncoder.from_pretrained(tmp_path / "saved")


def test_missing_base_says_how_to_name_it(specs, tmp_path):
    spec = tiny.tiny_open_clip(tmp_path / "model", seed=1)
    make({**specs, "open_clip": spec}, "open_clip").save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(EncoderError, match=r"model.*does not exist.*pass base="):
        CompatibleEncoder.from_pretrained(tmp_path / "saved")


def test_projection_without_old_space_is_refused(specs):
    projection = make(specs, "open_clip").projection
    projection.old_space = None
    with pytest.raises(SpaceMismatchError, match="old_space="):
        CompatibleEncoder(load_encoder(specs["open_clip"]), projection)


def test_damaged_directories(specs, tmp_path):
    make(specs, "open_clip", lora=True).save_pretrained(tmp_path / "saved")

    def damaged(name):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "saved", tmp_path / "copy")
        return tmp_path / "copy" / name

    for name in ("projection/model.safetensors", "lora/adapter_model.safetensors"):
        file = damaged(name)
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises((SavedPartError, EncoderError), match=r"(damaged|cannot be read)"):
            CompatibleEncoder.from_pretrained(tmp_path / "copy")
        damaged(name).unlink()
        with pytest.raises((SavedPartError, EncoderError), match=r"(missing|has no adapter_model)"):
            CompatibleEncoder.from_pretrained(tmp_path / "copy")
    file = damaged("lora/adapter_model.safetensors")
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)
    with pytest.raises(EncoderError, match="1 weights are missing"):
        CompatibleEncoder.from_pretrained(tmp_path / "copy")
    config = damaged("config.json")
    config.write_text(json.dumps({"kind": "linear"}))
    with pytest.raises(SavedPartError, match="does not describe a compatible encoder"):
        CompatibleEncoder.from_pretrained(tmp_path / "copy")
    config.write_text(json.dumps({"format": "compatible_encoder"}))
    with pytest.raises(SavedPartError, match="lacks or misnames a key"):
        CompatibleEncoder.from_pretrained(tmp_path / "copy")


def test_loads_from_the_hub_cache_with_a_revision(specs, tmp_path):
    compatible, commit = make(specs, "open_clip", lora=True), "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache" / "models--org--adapter"
    compatible.save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(commit)
    loaded = xbt.CompatibleEncoder.from_pretrained(
        "org/adapter",
        base=specs["open_clip"],
        revision="v1",
        cache_dir=tmp_path / "cache",
        local_files_only=True,
    )
    torch.testing.assert_close(vectors(loaded), vectors(compatible), atol=1e-6, rtol=0)


def test_card_names_both_models(specs, tmp_path):
    make(specs, "open_clip", lora=True).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: xbt" in card
    assert "`local:a` in the space of `local:old`" in card
    assert specs["open_clip"].rpartition("/")[0] not in card
    assert "with a LoRA adapter" in card


def test_an_evaluator_refuses_an_encoder_of_another_old_space(specs, backend):
    compatible = make(specs, backend)
    pairs = make_scenes(4)
    new = load_encoder(specs[backend])
    with pytest.raises(SpaceMismatchError):
        xbt.evaluate_retrieval(pairs, load_encoder(specs["transformers"]), new, {"x": compatible})
    report = xbt.evaluate_retrieval(pairs, load_encoder(specs["old"]), new, {"x": compatible})
    assert [cell.name for cell in report.cells] == ["old/old", "new/old", "new/new"]
