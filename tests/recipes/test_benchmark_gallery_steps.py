"""The benchmark of gallery-side steps at a small size, and its old query with steps against numpy."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from xbt.evaluation import recall_at_k
from xbt.projections import PairVectors
from xbt.projections.auto.steps import StepSetting
from xbt.projections.caption_map import Neighbours

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


def unit(*shape):
    rows = np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gallery_steps")


def test_the_old_query_with_steps_is_what_the_formula_says(module):
    splits = importlib.import_module("projection_splits")
    texts, rows, queries = (torch.from_numpy(unit(n, 12)) for n in (150, 40, 9))
    support = PairVectors(texts, texts, unit(150, 13)[:, :12], torch.arange(150))
    own = torch.full((40,), -1)
    own[3] = 5
    asked = splits.Asked(queries, queries, rows, [[0]] * 9, torch.arange(9), own=own)
    split = splits.Split("x", 0, None, support, {"T2I": asked})
    corpus = splits.Split("x", 0, (texts[:, :9], texts), support, {"T2I": asked})
    setting = StepSetting("old", 0.4, Neighbours(20, 0.05), 0.5)
    asked_with, rows_with = module.old_with_steps(split, "T2I", asked, setting)
    g, t, q = rows.numpy().astype(float), texts.numpy().astype(float), queries.numpy().astype(float)
    cosines = g @ t.T
    cosines[3, 5] = -np.inf
    weights = np.where(cosines >= np.sort(cosines, axis=1)[:, [-20]], np.exp(cosines / 0.05), 0)
    estimates = weights @ t
    estimates /= np.linalg.norm(estimates, axis=1, keepdims=True)
    bank = 0.6 * t @ g.T + 0.4 * t @ estimates.T
    bank[5, 3] = -np.inf
    hubs = np.sort(bank, axis=0)[-10:].mean(axis=0)
    expected = 0.6 * q @ g.T + 0.4 * q @ estimates.T - 0.5 * hubs
    np.testing.assert_allclose(asked_with @ rows_with.T, expected, atol=2e-5)
    own[:] = -1
    same = module.old_with_steps(split, "T2I", asked, setting)
    for of_corpus, of_pairs in zip(module.old_with_steps(corpus, "T2I", asked, setting), same, strict=True):
        torch.testing.assert_close(of_corpus, of_pairs)


def test_the_script(monkeypatch, tmp_path):
    concepts = unit(160, 16) * 3
    words, photos = concepts + unit(160, 17)[:, :16], concepts + 2 * unit(160, 18)[:, :16]
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))[0].astype(np.float32)
    articles = np.arange(160) // 2
    np.savez(
        tmp_path / "news.npz",
        old_text=words,
        new_text=words @ turn,
        old_image=photos,
        new_image=concepts @ turn,
        pairs=np.stack([np.arange(150), np.arange(150)], axis=1),
        text_article=articles,
    )
    flags = ["--verite", str(tmp_path / "news.npz"), "--results", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", ["gallery_steps.py", *flags])
    runpy.run_path(str(BENCHMARKS / "gallery_steps.py"), run_name="__main__")
    record = json.loads((tmp_path / "r.json").read_text())
    rows = {row["method"]: row for row in record["rows"]}
    assert set(rows["auto with steps"]) == {"method", "verite T2I", "verite I2T"}
    # All folds together ask every pair once: an independent number.
    expected = recall_at_k(
        words[:150] / np.linalg.norm(words[:150], axis=1, keepdims=True),
        photos / np.linalg.norm(photos, axis=1, keepdims=True),
        [[row] for row in range(150)],
        (1, 5),
    )
    found = record["intervals"]["recall"]["verite T2I old/old"]
    assert [found["R@1"][0], found["R@5"][0]] == [expected[1], expected[5]]
    gains = record["intervals"]["gains"]["verite I2T auto with steps minus old + its best steps"]
    assert set(gains) == {"R@1", "R@5", "R@10"}
    assert len(record["settings"]) == 5
    assert any("weight=0.0" not in each for one in record["settings"] for each in one["control"].values())
