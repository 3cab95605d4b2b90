from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import xbt.training.lora_finetuning as stage2
from xbt.compatible import CompatibleEncoder
from xbt.data import PairSource, load_pairs, make_scenes, read_captions
from xbt.encoders import LoraSettings, add_lora, load_encoder
from xbt.errors import ConfigError, DataError, EncoderError, SpaceMismatchError, TruncationWarning
from xbt.hub import SavedPartError
from xbt.projections import Projection, fit_projection
from xbt.store import EmbeddingStore
from xbt.training import LoraFinetuningConfig, TrainArgs, finetune_lora
from xbt.training.cached_vectors import cross_recall

pytestmark = pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")


@pytest.fixture
def keep_last(monkeypatch):
    """Selection that always prefers the later step: random towers rarely get better in a few steps."""
    calls = []

    def score(queries, gallery, pairs):
        calls.append(cross_recall(queries, gallery, pairs))
        return {**calls[-1], "score": float(len(calls))}

    monkeypatch.setattr(stage2, "cross_recall", score)


@pytest.fixture(scope="module", params=["open_clip", "transformers"])
def models(request, tmp_path_factory):
    """(new spec, old spec, directory of stage 1's projection, old model's directory)."""
    root = tmp_path_factory.mktemp("stage2")
    make = tiny.tiny_open_clip if request.param == "open_clip" else tiny.tiny_transformers_clip
    new_spec, old_spec = make(root / "new", seed=1), tiny.tiny_open_clip(root / "old", seed=0)
    new, old = load_encoder(new_spec), load_encoder(old_spec)
    texts = read_captions("scenes")[:300]
    projection = fit_projection(
        new.encode_texts(texts), old.encode_texts(texts), new_space=new.space, old_space=old.space
    )
    projection.save_pretrained(root / "projection")
    return new_spec, old_spec, root / "projection", root / "old"


def settings(models, tmp_path, steps=6, **changes):
    training = TrainArgs(
        steps=steps, batch_size=16, lr=3e-3, warmup_steps=1, eval_every=3, checkpoint_every=2
    )
    base = {
        "new": models[0], "projection": str(models[2]), "pairs": PairSource("scenes", limit=60),
        "output_dir": str(tmp_path / "run"), "training": training,
    }  # fmt: skip
    return LoraFinetuningConfig(**{**base, **changes})


def test_runs_without_the_old_model_and_saves_only_adapters(models, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        stage2, "load_encoder", lambda spec, *rest: loaded.append(spec) or load_encoder(spec, *rest)
    )
    hidden = models[3].rename(models[3].with_name("hidden"))  # nothing of the old model is left to find
    try:
        compatible = finetune_lora(settings(models, tmp_path))
    finally:
        hidden.rename(models[3])
    assert loaded == [models[0]]
    out = tmp_path / "run" / "compatible"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {
        "README.md", "config.json", "projection/config.json", "projection/model.safetensors",
        "lora/adapter_config.json", "lora/adapter_model.safetensors",
    }  # fmt: skip
    assert all(".lora_" in name for name in load_file(out / "lora/adapter_model.safetensors"))
    assert compatible.space.model == models[1]


def test_loaded_in_a_fresh_process_it_gives_the_same_vectors(models, tmp_path):
    compatible = finetune_lora(settings(models, tmp_path, steps=8))
    assert json.loads((tmp_path / "run/result.json").read_text())["history"][-1]["step"] == 8
    pairs = make_scenes(6, split="test")
    expected = {"t": compatible.encode_texts(pairs.texts), "i": compatible.encode_images(list(pairs.images))}
    code = (
        "import sys, xbt; from safetensors.torch import save_file; from xbt.data import make_scenes\n"
        "e = xbt.CompatibleEncoder.from_pretrained(sys.argv[1] + '/run/compatible')\n"
        "p = make_scenes(6, split='test')\n"
        "save_file({'t': e.encode_texts(p.texts), 'i': e.encode_images(list(p.images))}, sys.argv[1] + '/v')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    found = load_file(tmp_path / "v")
    for key, vectors in expected.items():
        assert (found[key] - vectors).abs().max() <= 1e-6


@pytest.mark.usefixtures("keep_last")
def test_training_moves_both_towers_and_the_projection(models, tmp_path):
    config = settings(models, tmp_path, steps=30)
    config.training.lr = 1e-2
    compatible = finetune_lora(config)
    state = {name: p for name, p in compatible.module.named_parameters() if "lora_B" in name}
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["best_step"] > 0
    for tower in ("vis", "text" if "transformers:" in models[0] else "model.transformer"):
        assert any(p.abs().max() > 0 for name, p in state.items() if tower in name), tower
    assert not torch.equal(compatible.projection.weight, Projection.from_pretrained(models[2]).weight)


@pytest.mark.usefixtures("keep_last")
def test_the_anchor_holds_texts_where_stage_1_put_them(models, tmp_path):
    start = CompatibleEncoder(load_encoder(models[0]), Projection.from_pretrained(models[2]))
    texts = read_captions("scenes")[:40]
    drift = {}
    for weight in (0.0, 30.0):
        config = settings(models, tmp_path / str(weight), steps=30, anchor_weight=weight)
        config.training.lr = 1e-2
        moved = finetune_lora(config).encode_texts(texts)
        drift[weight] = 1 - (moved * start.encode_texts(texts)).sum(dim=1).mean().item()
    assert drift[30.0] < drift[0.0] / 2


def test_anchors_are_what_stage_1_made_of_the_texts(models, tmp_path):
    shutil.copytree(models[2], tmp_path / "p")
    config = settings(models, tmp_path, projection=str(tmp_path / "p"))
    train, _ = load_pairs(config.pairs).split(config.held_out, config.training.seed)
    for _ in range(2):
        finetune_lora(config)
        stage1 = CompatibleEncoder(load_encoder(models[0]), Projection.from_pretrained(tmp_path / "p"))
        store = EmbeddingStore.open(tmp_path / "run/anchors", space=stage1.space)
        assert np.abs(store.read() - stage1.encode_texts(train.texts).numpy()).max() <= 1e-6
        # Another projection in the same place has other anchors.
        other = Projection.from_pretrained(tmp_path / "p")
        with torch.no_grad():
            other.weight.copy_(other.weight.flip(0))
        other.save_pretrained(tmp_path / "p")


def test_projection_can_stay_fixed(models, tmp_path):
    compatible = finetune_lora(settings(models, tmp_path, train_projection=False))
    assert torch.equal(compatible.projection.weight, Projection.from_pretrained(models[2]).weight)


class Killed(Exception):
    pass


def test_a_killed_run_ends_like_an_uninterrupted_one(models, tmp_path, monkeypatch):
    from xbt.training.loop import TrainingLoop

    whole = finetune_lora(settings(models, tmp_path / "whole"))
    original = TrainingLoop._step

    def step_until_killed(self, batch):
        if self.state.step == 5:
            raise Killed
        return original(self, batch)

    config = settings(models, tmp_path / "killed")
    monkeypatch.setattr(TrainingLoop, "_step", step_until_killed)
    with pytest.raises(Killed):
        finetune_lora(config)
    monkeypatch.setattr(TrainingLoop, "_step", original)
    continued = finetune_lora(config)
    texts = read_captions("scenes")[:20]
    assert (continued.encode_texts(texts) - whole.encode_texts(texts)).abs().max() <= 1e-6
    for name, tensor in whole.projection.state_dict().items():
        assert (continued.projection.state_dict()[name] - tensor).abs().max() <= 1e-6


def test_checkpoints_hold_only_what_is_trained(models, tmp_path):
    finetune_lora(settings(models, tmp_path))
    tensors = load_file(tmp_path / "run/checkpoints/step_00000006/trainable.safetensors")
    assert all(".lora_" in name or name.startswith(("projection", "temperature")) for name in tensors)


@pytest.fixture
def karpathy(tmp_path):
    scenes = make_scenes(40)
    folder = tmp_path / "images"
    folder.mkdir()
    images = []
    for row in range(40):
        scenes.image(row).save(folder / f"{row:02d}.jpg")
        sentences = [{"raw": text, "tokens": text.split()} for text in scenes.captions[row]]
        images.append({"filename": f"{row:02d}.jpg", "split": "train", "sentences": sentences})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images, "dataset": "toy"}))
    return PairSource(str(tmp_path / "dataset.json"), image_root=str(folder), split="train"), folder


def test_corrupt_images_are_named_counted_and_skipped(models, tmp_path, karpathy):
    pairs, folder = karpathy
    (folder / "03.jpg").write_bytes((folder / "03.jpg").read_bytes()[:200])
    (folder / "07.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"skipped 2 of 40 images: .*03\.jpg.*07\.jpg"):
        finetune_lora(settings(models, tmp_path, pairs=pairs))


def test_real_jpegs_need_no_special_treatment(models, tmp_path, karpathy):
    pairs, folder = karpathy
    Image.open(folder / "00.jpg").convert("L").resize((70, 41)).save(folder / "00.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", TruncationWarning)
        # transformers 5.4 reads a tokenizer's files in a way that tokenizers deprecates.
        warnings.filterwarnings("ignore", message="Deprecated in 0.9.0: BPE", category=DeprecationWarning)
        finetune_lora(settings(models, tmp_path, pairs=pairs, steps=2))


def test_targets_are_checked_before_anything_is_embedded(models, tmp_path, monkeypatch):
    monkeypatch.setattr(stage2, "embed_texts_once", lambda *_: pytest.fail("embedded first"))
    with pytest.raises(EncoderError, match="matches no module"):
        finetune_lora(settings(models, tmp_path, lora=LoraSettings(target_modules="nothing.*")))


def test_only_the_dropout_of_lora_is_on(tmp_path):
    encoder = load_encoder(tiny.tiny_transformers_clip(tmp_path / "new", seed=1))
    encoder.module.visual_dropout = torch.nn.Dropout(0.5)
    encoder.module.visual_norm = torch.nn.BatchNorm1d(2)
    add_lora(encoder, LoraSettings(dropout=0.1))
    projection = fit_projection(torch.eye(encoder.dim), torch.eye(encoder.dim), "identity")
    objective = stage2.CompatibleObjective(encoder, projection, settings((0, 0, 0), tmp_path))
    for mode in (True, False, True):
        objective.train(mode)
        modes = {"lora_dropout" in name: module.training for name, module in objective.towers.named_modules()}
        assert modes == {False: False, True: mode}
        assert projection.training == mode


def test_refusals(models, tmp_path, karpathy):
    pairs, _ = karpathy
    with pytest.raises(EncoderError, match=r"lora.target_modules 'nothing.*' matches no module"):
        finetune_lora(settings(models, tmp_path / "a", lora=LoraSettings(target_modules="nothing.*")))
    other = tiny.tiny_open_clip(tmp_path / "other", seed=9, dim=Projection.from_pretrained(models[2]).new_dim)
    with pytest.raises(SpaceMismatchError, match=r"other.*is needed"):
        finetune_lora(settings(models, tmp_path / "b", new=other))
    narrow = tiny.tiny_open_clip(tmp_path / "narrow", seed=9, dim=8)
    with pytest.raises(SpaceMismatchError, match=r"takes (16|24)-d vectors.*narrow' \(8-d\)"):
        finetune_lora(settings(models, tmp_path / "c", new=narrow))
    config = settings(models, tmp_path / "d", pairs=pairs)
    config.training.batch_size = 64
    with pytest.raises(DataError, match=r"32 training pairs, fewer than --training.batch_size 64"):
        finetune_lora(config)
    for changes, word in (
        ({"anchor_weight": -1.0}, "--anchor_weight"),
        ({"held_out": 1.0}, "--held_out"),
        ({"temperature": 2.0}, "--temperature"),
    ):
        with pytest.raises(ConfigError, match=word):
            settings(models, tmp_path, **changes)


def test_a_projection_of_nan_is_found(models, tmp_path):
    shutil.copytree(models[2], tmp_path / "p")
    weights = tmp_path / "p/model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "weight": tensors["weight"] * float("nan")}, weights)
    with pytest.raises(SavedPartError, match="holds NaN"):
        finetune_lora(settings(models, tmp_path, projection=str(tmp_path / "p")))
