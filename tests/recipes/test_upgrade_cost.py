"""The benchmark of an upgrade's cost: its counts against formulas, its sums against hand-made ones."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny
import torch

from xbt.encoders.open_clip import OpenClipEncoder
from xbt.report.cost import Spread

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "upgrade_cost.py"
WIDTH, LAYERS, DIM = 32, 2, 16


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def tower_flops(tokens, width, layers, dim):
    """Per block: q, k, v, out and an MLP of four times the width, QKᵀ and its product with V; one row out."""
    block = 2 * tokens * width * (4 * width + 8 * width) + 2 * 2 * tokens * tokens * width
    return layers * block + 2 * width * dim


def test_operations_are_those_of_the_formula(script):
    torch.manual_seed(0)
    encoder = OpenClipEncoder.create(tiny.open_clip_config(dim=DIM, width=WIDTH, layers=LAYERS))
    encoder.module.requires_grad_(False).eval()
    assert encoder.short_context is not None
    assert script["full_context_flops"](encoder) == tower_flops(32, WIDTH, LAYERS, DIM)
    texts = ["a red circle", "a blue square"]  # 3 words each, a start and an end
    lengths = script["text_lengths"](encoder, texts)
    assert lengths == {"needed": 5, "context": 32, "full_context_flops": tower_flops(32, WIDTH, LAYERS, DIM)}
    found = script["count_flops"](lambda: encoder.encode_texts(texts)) / 2
    assert found == tower_flops(5, WIDTH, LAYERS, DIM)
    patches, pixels = (32 // 8) ** 2, torch.zeros(3, 3, 32, 32)
    images = script["count_flops"](lambda: script["embed_images"](encoder, pixels)) / 3
    assert images == 2 * patches * 3 * 8 * 8 * WIDTH + tower_flops(patches + 1, WIDTH, LAYERS, DIM)


def test_sums_are_made_round_by_round(script):
    cost, names = script["Cost"], ("old text", "new text", "fit", "step", "new image")
    units = {name: cost(Spread((10.0**k, 2 * 10.0**k)), float(k + 1)) for k, name in enumerate(names)}
    config = script["UpgradeCostBenchmark"](n_captions=3, steps=2, galleries=[7])
    upgrade, gallery = script["compare"](config, units)
    seconds = 3 * (1 + 10 + 100) + 2 * 1000
    assert upgrade["days on this machine"].values == (seconds / 86_400, 2 * seconds / 86_400)
    assert gallery["of the upgrade's time"].values == pytest.approx((70_000 / seconds,) * 2)
    assert gallery["of the upgrade's"] == f"× {7 * 5 / (3 * (1 + 2 + 3) + 2 * 4):,.3g}"


def test_the_report_says_what_it_is_made_of(tmp_path, monkeypatch, capsys):
    for name, dim in (("old", 16), ("new", 24)):
        (tmp_path / f"{name}.json").write_text(json.dumps(tiny.open_clip_config(dim=dim)))
    flags = {
        "old": tmp_path / "old.json", "new": tmp_path / "new.json", "sample_texts": 40, "rounds": 2,
        "batch_size": 64, "threads": 1, "results": tmp_path / "results" / "cost",
    }  # fmt: skip
    argv = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *argv])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result = json.loads((tmp_path / "results" / "cost.json").read_text())
    assert [row["what"].split()[-2] for row in result["rows"]] == ["1,000,000"] * 2 + [
        "100,000,000",
        "1,000,000,000",
    ]
    assert set(result["units"]) == {"old text", "new text", "new image", "fit", "step"}
    assert result["units"]["fit"]["flops"] == 2 * 24 * 16
    shown = (tmp_path / "results" / "cost.md").read_text()
    assert "upgrade = N · (old text + new text + fit) + steps · step" in shown
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sample_texts", "10000000"], "distinct captions, fewer than --sample_texts 10000000"),
        (["--galleries", "[]"], "--galleries must be numbers of images"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_wrong_input_is_one_sentence(monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
