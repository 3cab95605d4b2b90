from __future__ import annotations

import dataclasses
import inspect
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from scipy.linalg import orthogonal_procrustes
from torch.nn.functional import normalize

from xbt.batches import Draw
from xbt.data import CaptionSource, read_captions
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError, DataError
from xbt.projections import Projection, fit_projection
from xbt.projections.closed_form import procrustes_start
from xbt.projections.trained import fit_xbt
from xbt.projections.trainer import NoisyVectors, text_hits
from xbt.run_dir import RunDirectory
from xbt.store import EmbeddingStore
from xbt.training import TextProjectionConfig, TrainArgs, pretrain_text_projection
from xbt.training.cached_vectors import TextVectors
from xbt.training.loop import make_accelerator
from xbt.training.text_projection import train_text_projection


def settings(tmp_path, steps=20, lr=3e-3, **changes):
    training = TrainArgs(steps=steps, batch_size=64, lr=lr, warmup_steps=2, eval_every=5, checkpoint_every=5)
    base = {
        "old": "old", "new": "new", "captions": CaptionSource("scenes"),
        "output_dir": str(tmp_path / "run"), "training": training, "held_out": 200,
        "noise": 0.3, "relational_weight": 0.0,
    }  # fmt: skip
    return TextProjectionConfig(**{**base, **changes})


def toy_vectors(n=1000, new_dim=24, old_dim=16, seed=0):
    """New vectors that are a bent, noisy view of the old ones: more than a rotation can undo."""
    generator = torch.Generator().manual_seed(seed)
    old = normalize(torch.randn(n, old_dim, generator=generator), dim=1)
    frame = torch.linalg.qr(torch.randn(max(new_dim, old_dim), old_dim, generator=generator))[0][:new_dim]
    bent = torch.tanh(4 * old * torch.logspace(0, -1.5, old_dim)) @ frame.T
    return TextVectors(normalize(bent + 0.03 * torch.randn(n, new_dim, generator=generator), dim=1), old)


def train(config, vectors):
    run = RunDirectory(config.output_dir, config, config.overwrite)
    accelerator = make_accelerator(config.training, run, config, "test")
    return train_text_projection(vectors, config, accelerator, run)


def split(config, n):
    order = np.random.default_rng(config.training.seed).permutation(n)
    return order[config.held_out :], order[: config.held_out]


def test_step_zero_is_the_procrustes_rotation(tmp_path):
    vectors, config = toy_vectors(new_dim=16), settings(tmp_path, steps=0)
    projection, state = train(config, vectors)
    expected, _ = orthogonal_procrustes(vectors.new.double().numpy(), vectors.old.double().numpy())
    closed = normalize(vectors.new.double() @ torch.from_numpy(expected), dim=1)
    assert state.best_step == 0
    assert (projection(vectors.new).double() - closed).abs().max() < 1e-6


def test_training_improves_held_out_recall_where_it_can(tmp_path):
    vectors = toy_vectors()
    config = settings(tmp_path, steps=100, lr=1e-2, noise=0.2)
    trained, state = train(config, vectors)
    _, held_out = split(config, 1000)
    after = float(text_hits(trained, vectors.new[held_out], vectors.old[held_out]).mean())
    assert after > state.history[0]["score"] + 0.02
    assert after == pytest.approx(state.best_score)
    assert state.best_step > 0


def test_a_run_that_wrecks_the_projection_keeps_step_zero(tmp_path):
    config, vectors = settings(tmp_path, lr=1.0), toy_vectors(seed=5)
    projection, state = train(config, vectors)
    assert state.best_step == 0
    assert state.best_score == state.history[0]["score"]
    assert torch.equal(projection.weight, procrustes_start(vectors).rotation), "of all captions again"
    assert projection.scale == 0


@pytest.mark.parametrize("family", ["gaussian", "uniform", "centred"])
def test_the_recipe_and_fit_projection_give_the_same_map(tmp_path, family):
    """One stage 1: the same objective, draws, schedule and choice of the step."""
    vectors = toy_vectors()
    options = {"noise": 0.2, "noise_family": family, "relational_weight": 10.0, "hidden_dim": 32}
    config = settings(tmp_path, steps=100, lr=1e-2, **options)
    from_recipe, state = train(config, vectors)
    fitted = fit_projection(
        vectors.new, vectors.old, "xbt", held_out=200, **config.training.common(), **options
    )
    assert state.best_step > 0
    for name, tensor in fitted.state_dict().items():
        torch.testing.assert_close(from_recipe.state_dict()[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_the_recipe_and_fit_projection_have_the_same_defaults():
    config = TextProjectionConfig(new_store="new", old_store="old", output_dir="out")
    defaults = inspect.signature(fit_xbt).parameters
    stage1, schedule = defaults["stage1"].default, defaults["schedule"].default
    assert {each.name: getattr(config, each.name) for each in dataclasses.fields(stage1)} == vars(stage1)
    assert {**config.training.common(), "held_out": config.held_out, "device": "cpu"} == vars(schedule)


def test_the_rotation_stays_fixed_unless_asked(tmp_path):
    vectors = toy_vectors()
    for flag in (False, True):
        config = settings(tmp_path / f"b{flag}", steps=100, lr=1e-2, noise=0.2, train_rotation=flag)
        trained, state = train(config, vectors)
        assert state.best_step > 0
        start = procrustes_start(vectors, split(config, 1000)[0])
        assert torch.equal(trained.weight, start.rotation) != flag


@pytest.mark.parametrize("family", ["uniform", "centred"])
def test_other_noise_and_the_relational_loss(tmp_path, family):
    vectors = toy_vectors()
    vectors = TextVectors(normalize(vectors.new + 0.3, dim=1), normalize(vectors.old - 0.2, dim=1))
    changes = {"noise_family": family, "noise": 0.1, "relational_weight": 10.0}
    config = settings(tmp_path / "b", steps=150, lr=1e-2, **changes)
    trained, state = train(config, vectors)
    assert state.best_step > 0
    rows, held_out = split(config, 1000)
    after = float(text_hits(trained, vectors.new[held_out], vectors.old[held_out]).mean())
    assert after > state.history[0]["score"] + 0.01
    assert (trained.new_mean is not None) == (family == "centred")
    if family == "centred":
        torch.testing.assert_close(trained.new_mean, vectors.new[rows].mean(dim=0))
        torch.testing.assert_close(trained.old_mean, vectors.old[rows].mean(dim=0))
    trained.save_pretrained(tmp_path / "saved")
    assert torch.equal(Projection.from_pretrained(tmp_path / "saved")(vectors.new), trained(vectors.new))


def test_noise_of_every_family_depends_on_step_and_position_alone():
    vectors = toy_vectors(n=2048, new_dim=64)
    draws = [Draw(3, position, position) for position in range(2048)]
    for family, mean in (("gaussian", None), ("uniform", None), ("centred", vectors.new.mean(dim=0))):
        data = NoisyVectors(vectors, np.arange(2048), 1, 0.5, family, mean)
        whole = data.__getitems__(draws)["new"]
        parts = [data.__getitems__(part)["new"] for part in (draws[:700], draws[700:])]
        assert torch.equal(torch.cat(parts), whole)
        about = torch.zeros(64) if mean is None else mean
        cos = torch.nn.functional.cosine_similarity(whole - about, vectors.new - about)
        tangent = (1 / cos.square() - 1).clamp(min=0).sqrt()
        assert tangent.mean() == pytest.approx(0.25 if family == "uniform" else 0.5, abs=0.02)
        assert tangent.std() == pytest.approx(0.5 / 12**0.5 if family == "uniform" else 0.0, abs=0.06)


def test_seed_fixes_the_run(tmp_path):
    first, _ = train(settings(tmp_path / "a"), toy_vectors())
    second, _ = train(settings(tmp_path / "b"), toy_vectors())
    assert all(torch.equal(first.state_dict()[k], v) for k, v in second.state_dict().items())


pytestmark = pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [7, 13, 20])
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch, kill_at):
    vectors = toy_vectors()
    whole, whole_state = train(settings(tmp_path / "whole"), vectors)

    from xbt.training.loop import TrainingLoop

    original = TrainingLoop._step

    def step_until_killed(self, batch):
        if self.state.step == kill_at - 1:
            raise Killed
        return original(self, batch)

    config = settings(tmp_path / "killed")
    monkeypatch.setattr(TrainingLoop, "_step", step_until_killed)
    with pytest.raises(Killed):
        train(config, vectors)
    monkeypatch.setattr(TrainingLoop, "_step", original)
    done = []
    monkeypatch.setattr(TrainingLoop, "_step", lambda self, batch: done.append(1) or original(self, batch))
    continued, state = train(config, vectors)

    assert len(done) == 20 - (kill_at - 1) // 5 * 5  # from the last checkpoint, not from the start
    assert state.best_step == whole_state.best_step
    assert state.history == whole_state.history
    for name, tensor in whole.state_dict().items():
        assert (continued.state_dict()[name] - tensor).abs().max() <= 1e-6


def test_a_half_written_checkpoint_is_ignored(tmp_path):
    config, vectors = settings(tmp_path), toy_vectors()
    first, _ = train(config, vectors)
    broken = tmp_path / "run" / "checkpoints" / "step_00000025.partial"
    broken.mkdir()
    (broken / "trainable.safetensors").write_bytes(b"half")
    again, _ = train(config, vectors)
    assert torch.equal(first(vectors.new), again(vectors.new))
    assert sorted(path.name for path in broken.parent.iterdir() if path.suffix == "") == [
        "step_00000015", "step_00000020",
    ]  # fmt: skip


def test_output_directory_of_another_run_is_refused(tmp_path):
    vectors = toy_vectors()
    train(settings(tmp_path), vectors)
    with pytest.raises(ConfigError, match=r"noise was 0.3 and is 0.5.*--overwrite"):
        train(settings(tmp_path, noise=0.5), vectors)
    _, state = train(settings(tmp_path, noise=0.5, overwrite=True), vectors)
    assert state.step == 20
    logged = settings(tmp_path, noise=0.5)
    logged.training = dataclasses.replace(logged.training, log_every=1, num_workers=1)
    train(logged, vectors)  # how it is logged does not make it another run


def test_nan_in_vectors_is_named(tmp_path):
    vectors = toy_vectors()
    vectors.new[17, 2] = float("nan")
    with pytest.raises(DataError, match=r"new text vectors has NaN.*1 of 1000 rows, first in row 17"):
        train(settings(tmp_path), vectors)


def test_diverging_training_stops_and_says_so(tmp_path):
    config = settings(tmp_path, contrastive_weight=0.0, cosine_weight=1e38)
    config.training = dataclasses.replace(config.training, lr=1e30, log_every=1, grad_clip=0.0)
    with pytest.raises(DataError, match=r"the loss is (nan|inf) at step \d+; lower --training.lr"):
        train(config, toy_vectors())


def test_too_few_captions(tmp_path):
    _, state = train(settings(tmp_path), toy_vectors(n=50))
    assert state.step == 20, "fewer captions than a batch are taken whole"
    with pytest.raises(DataError, match="at least 5 distinct captions, got 4"):
        train(settings(tmp_path / "few"), toy_vectors(n=4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise": -1.0}, "--noise"),
        ({"noise_family": "pink"}, "--noise_family 'pink' is not known; there is gaussian, uniform, centred"),
        ({"relational_weight": -1.0}, "--relational_weight must be a number of at least 0, got -1"),
        ({"temperature": 0.0}, "--temperature"),
        ({"held_out": 0}, "--held_out"),
        ({"encode_batch_size": 0}, "--encode_batch_size"),
    ],
)
def test_settings_are_checked(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        settings(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"--training\.batch_size must be at least 1, got 0"):
        TrainArgs(batch_size=0)


def test_end_to_end_with_two_backends(tmp_path, open_clip_spec, transformers_spec, monkeypatch):
    captions = tmp_path / "captions.txt"
    texts = read_captions(CaptionSource("scenes", limit=200))
    captions.write_text("\n".join([*texts, *texts[:20]]), encoding="utf-8")
    config = settings(
        tmp_path, old=open_clip_spec, new=transformers_spec, captions=CaptionSource(str(captions))
    )
    config.held_out = 40
    projection = pretrain_text_projection(config)
    out = tmp_path / "run"
    saved = Projection.from_pretrained(out / "projection")
    new, old = load_encoder(transformers_spec), load_encoder(open_clip_spec)
    assert torch.equal(saved(new.encode_texts(texts[:3])), projection(new.encode_texts(texts[:3])))
    assert saved.new_space.same_as(new.space)
    assert saved.old_space.same_as(old.space)
    assert {"config.yaml", "versions.json", "result.json", "projection", "checkpoints"} <= {
        path.name for path in out.iterdir()
    }
    assert json.loads((out / "result.json").read_text())["history"][0]["step"] == 0
    assert len(EmbeddingStore.open(out / "vectors" / "new")) == 200  # repeats are embedded once

    embedded, original = [], DualEncoder.encode_texts

    def counting(self, texts, *arguments, **options):
        embedded.append(len(texts))
        return original(self, texts, *arguments, **options)

    monkeypatch.setattr(DualEncoder, "encode_texts", counting)
    pretrain_text_projection(config)
    assert embedded == [16, 16]  # the probe texts that tell whose vectors are there, and no caption
    shutil.rmtree(out / "vectors")
    pretrain_text_projection(config)
    assert sum(embedded[2:]) == 2 * (16 + 200)


def test_cached_vectors_of_another_model_are_not_used(tmp_path, open_clip_spec):
    captions = CaptionSource("scenes", limit=100)
    other = tiny.tiny_open_clip(tmp_path / "model", seed=1)
    config = settings(tmp_path, steps=0, old=open_clip_spec, new=other, captions=captions, held_out=10)
    first = pretrain_text_projection(config)
    tiny.tiny_open_clip(tmp_path / "model", seed=2)  # same name, other weights
    second = pretrain_text_projection(config)
    assert not torch.equal(first.weight, second.weight)
