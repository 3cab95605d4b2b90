from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from torch.nn.functional import cross_entropy, normalize

import xbt.training.compatible_clip as job
from xbt.compatible import CompatibleEncoder
from xbt.data import PairSource, load_pairs, make_scenes
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation.job import EvaluationConfig, run_evaluation
from xbt.index import Gallery
from xbt.projections import HeadProjection, fit_projection
from xbt.training import CompatibleClipConfig, TrainArgs, train_compatible_clip
from xbt.training.cached_vectors import EncodedPairs, cross_recall
from xbt.training.compatible_clip import (
    CrossModalObjective,
    CrossModalWeights,
    head_at_procrustes,
    whole_encoder,
)
from xbt.training.loop import TrainingLoop

pytestmark = pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")
METHODS = ("bct", "bt2", "oca")


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """Old and new; the new one has more dimensions."""
    root = tmp_path_factory.mktemp("clips")
    return tiny.tiny_open_clip(root / "old", seed=0, dim=12), tiny.tiny_open_clip(
        root / "new", seed=1, dim=20
    )


@pytest.fixture
def keep_last(monkeypatch):
    """Selection that always prefers the later step: random towers rarely get better in a few steps."""
    calls = []

    def score(queries, gallery, pairs):
        calls.append(1)
        return {**cross_recall(queries, gallery, pairs), "score": float(len(calls))}

    monkeypatch.setattr(job, "cross_recall", score)


def settings(specs, out, method="oca", steps=4, **changes):
    training = TrainArgs(
        steps=steps, batch_size=16, lr=3e-3, warmup_steps=1, eval_every=2, checkpoint_every=2
    )
    base = {
        "old": specs[0], "new": specs[1], "pairs": PairSource("scenes", limit=60), "method": method,
        "output_dir": str(out), "training": training,
    }  # fmt: skip
    return CompatibleClipConfig(**{**base, **changes})


@pytest.mark.usefixtures("keep_last")
@pytest.mark.parametrize("method", METHODS)
def test_both_faces_are_saved_and_serve(specs, tmp_path, method):
    trained = train_compatible_clip(settings(specs, tmp_path / "run", method))
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["best_step"] == 4
    assert {"new_old_t2i_r1", "new_new_i2t_r1", "score"} <= result["history"][0].keys()
    old, pairs = load_encoder(specs[0]), make_scenes(12, split="test")
    loaded, full = (
        CompatibleEncoder.from_pretrained(tmp_path / "run" / name) for name in ("compatible", "full")
    )
    images = list(pairs.images)
    vectors, whole = loaded.encode_texts(pairs.texts), full.encode_texts(pairs.texts)
    assert (vectors - trained.encode_texts(pairs.texts)).abs().max() <= 1e-6
    # The whole vector's leading coordinates are the compatible ones.
    assert (normalize(whole[:, :12], dim=1) - vectors).abs().max() <= 1e-5
    gallery = Gallery.build(old.encode_images(images), pairs.ids, old.space)
    assert len(gallery.search(vectors, 3, loaded.space).ids) == len(pairs.texts)
    own = Gallery.build(full.encode_images(images), pairs.ids, full.space)
    assert len(own.search(whole, 3, full.space).ids) == len(pairs.texts)
    with pytest.raises(SpaceMismatchError):
        own.search(vectors, 3, loaded.space)


def test_cells_of_both_faces_stand_in_one_table(specs, tmp_path):
    train_compatible_clip(settings(specs, tmp_path / "run", steps=1))
    faces = {
        name: {"oca": str(tmp_path / "run" / path)}
        for name, path in (("upgraded", "compatible"), ("own", "full"))
    }
    pairs = PairSource("scenes", limit=20, split="test")
    report = run_evaluation(EvaluationConfig(*specs, pairs, str(tmp_path / "out"), **faces))
    assert [cell.name for cell in report.cells] == ["old/old", "new/old", "new/new (oca)", "new/new"]


@pytest.mark.parametrize("method", METHODS)
def test_it_starts_at_the_procrustes_fit_to_both_modalities(method):
    generator = torch.Generator().manual_seed(0)
    new = EncodedPairs(*(normalize(torch.randn(200, 20, generator=generator), dim=1) for _ in range(2)))
    mix = torch.randn(20, 12, generator=generator)
    old = EncodedPairs(*(normalize(side @ mix, dim=1) for side in new))
    projection = head_at_procrustes(method, new, old, extra_dims=0 if method == "bt2" else None)
    cross = np.concatenate(old).T @ np.concatenate(new)
    left, _, right = scipy.linalg.svd(cross.astype(np.float64), full_matrices=False)
    wanted = normalize(torch.from_numpy(np.asarray(new.images) @ (left @ right).T).float(), dim=1)
    assert (projection(new.images) - wanted).abs().max() <= 1e-4


def test_bt2_with_extra_dimensions_starts_close_to_it():
    generator = torch.Generator().manual_seed(0)
    new = EncodedPairs(*(normalize(torch.randn(400, 20, generator=generator), dim=1) for _ in range(2)))
    mix = torch.linalg.qr(torch.randn(20, 12, generator=generator)).Q * torch.linspace(2, 0.1, 12)
    old = EncodedPairs(*(normalize(side @ mix, dim=1) for side in new))
    exact, extra = (head_at_procrustes("bt2", new, old, extra_dims=k) for k in (0, 3))
    cosine = (exact(new.images) * extra(new.images)).sum(dim=1).mean()
    assert cosine > 0.95


def random_batch(n=8, new=20, old=12):
    generator = torch.Generator().manual_seed(3)
    dims = {"old_texts": old, "old_images": old, "own_texts": new, "own_images": new}
    return {name: normalize(torch.randn(n, dim, generator=generator), dim=1) for name, dim in dims.items()}


class Towers(torch.nn.Module):
    """Two linear towers in place of an encoder; its pixels and tokens are vectors."""

    def __init__(self):
        super().__init__()
        self.module = torch.nn.Linear(20, 20)

    def embed_tokens(self, rows):
        return normalize(self.module(rows), dim=1)

    embed_pixels = embed_tokens


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_formula(method):
    batch = random_batch()
    new = EncodedPairs(batch["own_images"], batch["own_texts"])
    old = EncodedPairs(batch["old_images"], batch["old_texts"])
    projection = head_at_procrustes(method, new, old)
    weights = {"contrastive": 0.7, "influence": 1.3, "old": 0.4, "own": 0.9 if method == "bt2" else 0.0}
    objective = CrossModalObjective(Towers(), projection, weights, 0.1)
    batch |= {"tokens": batch["own_texts"], "pixels": batch["own_images"]}
    loss, parts = objective(batch)
    with torch.no_grad():
        rows = [objective._encoder.embed_tokens(batch[key]) for key in ("tokens", "pixels")]
        texts, images = (projection.head(projection.embedding(side)) for side in rows)

    def nce(a, b):
        logits = (normalize(a, dim=1) @ normalize(b, dim=1).T) / 0.1
        target = torch.arange(len(a))
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    def off(a, b):
        return (1 - torch.nn.functional.cosine_similarity(a, b)).mean()

    expected = {
        "contrastive": nce(texts.features, images.features),
        "influence": (nce(texts.compatible, old.images) + nce(images.compatible, old.texts)) / 2,
        "old": (off(texts.compatible, old.texts) + off(images.compatible, old.images)) / 2,
    }
    if method == "bt2":
        expected["own"] = (off(texts.features, new.texts) + off(images.features, new.images)) / 2
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value.item(), abs=1e-5), name
    total = sum(weights[name] * value for name, value in expected.items())
    assert loss.item() == pytest.approx(total.item(), abs=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projection.embedding.parameters())


def test_weights_have_their_methods_defaults():
    assert CrossModalWeights().of("bct")["old"] == 0
    assert CrossModalWeights(old=0.5).of("bt2") == {"contrastive": 1, "influence": 1, "old": 0.5, "own": 1}


class Killed(Exception):
    pass


@pytest.mark.usefixtures("keep_last")
def test_a_killed_run_ends_like_an_uninterrupted_one(specs, tmp_path, monkeypatch):
    whole = train_compatible_clip(settings(specs, tmp_path / "whole", "bt2"))
    original = TrainingLoop._step

    def step_until_killed(self, batch):
        if self.state.step == 3:
            raise Killed
        return original(self, batch)

    monkeypatch.setattr(TrainingLoop, "_step", step_until_killed)
    with pytest.raises(Killed):
        train_compatible_clip(settings(specs, tmp_path / "killed", "bt2"))
    monkeypatch.setattr(TrainingLoop, "_step", original)
    continued = train_compatible_clip(settings(specs, tmp_path / "killed", "bt2"))
    texts = make_scenes(4, split="test").texts
    assert (continued.encode_texts(texts) - whole.encode_texts(texts)).abs().max() <= 1e-6


def test_refusals(specs, tmp_path):
    config = settings(specs, tmp_path / "a")
    large = replace(config, training=replace(config.training, batch_size=64))
    with pytest.raises(DataError, match=r"48 training pairs, fewer than --training.batch_size 64"):
        train_compatible_clip(large)
    for changes, word in (
        ({"temperature": 2.0}, "--temperature"),
        ({"held_out": 0.0}, "--held_out"),
        ({"extra_dims": -1}, "--extra_dims"),
    ):
        with pytest.raises(ConfigError, match=word):
            settings(specs, tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"--weights.old must not be negative, got -1"):
        CrossModalWeights(old=-1.0)
    with pytest.raises(ConfigError):  # the old model has more dimensions than the new one can fill
        train_compatible_clip(settings(specs[::-1], tmp_path / "b", "bct"))
    old, new = (load_encoder(spec) for spec in specs)
    texts = load_pairs("scenes").texts[:100]
    plain = fit_projection(
        new.encode_texts(texts), old.encode_texts(texts), new_space=new.space, old_space=old.space
    )
    with pytest.raises(ConfigError, match="a LinearProjection, which has no dimensions beyond the old ones"):
        whole_encoder(CompatibleEncoder(new, plain), "x")


def test_the_projection_of_a_run_is_a_head(specs, tmp_path):
    trained = train_compatible_clip(settings(specs, tmp_path / "run", steps=1, extra_dims=3))
    assert isinstance(trained.projection, HeadProjection)
    assert trained.projection.full().old_dim == 15
