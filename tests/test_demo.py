from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

from xbt.config import config_to_yaml
from xbt.demo import DemoConfig, run_demo, stage2_verdict
from xbt.training import TrainArgs

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path):
    files = {}
    for name, dim in (("old", 8), ("new", 16)):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(tiny.open_clip_config(dim=dim, layers=1, context_length=40)))
    quick = TrainArgs(steps=3, batch_size=16, warmup_steps=1, eval_every=2, checkpoint_every=2)
    return DemoConfig(
        old_model=str(files["old"]), new_model=str(files["new"]), old_training=quick, new_training=quick,
        stage1=quick, stage2=quick, output_dir=str(tmp_path / "demo"), old_scenes=60, new_scenes=60,
        captions=60, pairs=40, test_scenes=20, queries=3, top_k=2,
    )  # fmt: skip


def test_the_whole_path_ends_in_a_table_and_pictures(config, capsys):
    report = run_demo(config)
    shown = capsys.readouterr().out
    names = [cell.name for cell in report.cells]
    assert names == ["old/old", "new/old (stage 1)", "new/old (stage 1+2)", "new/new"]
    assert all(name in shown for name in names)
    assert "criterion" in shown
    assert "R@1 on held-out pairs" in shown
    out = Path(config.output_dir)
    for picture in ("search.png", "recall.png"):
        assert min(Image.open(out / picture).size) > 200
    saved = json.loads((out / "evaluation/retrieval.json").read_text())
    assert saved["cells"][0]["n_images"] == 20
    assert (out / "stage2/compatible/config.json").is_file()
    # Everything is there: a second run trains nothing and gives the same cells.
    assert run_demo(config).to_dict() == report.to_dict()


def test_stage_2_says_what_it_gained_or_why_it_kept_its_start():
    history = [{"step": 0.0, "score": 0.5}, {"step": 20.0, "score": 0.25}, {"step": 40.0, "score": 0.5}]
    kept = stage2_verdict({"best_step": 0, "history": history})
    assert "keeps the weights of stage 1" in kept
    assert "50.0% before LoRA and at most 50.0% with it" in kept
    gained = stage2_verdict({"best_step": 60, "history": [*history, {"step": 60.0, "score": 0.75}]})
    assert "rises from 50.0% to 75.0%" in gained


def test_benchmark_over_seeds(config, tmp_path, monkeypatch, capsys):
    settings, target = tmp_path / "demo.yaml", tmp_path / "results" / "upgrade.json"
    settings.write_text(config_to_yaml(config), encoding="utf-8")
    argv = [
        "x.py", "--demo", str(settings), "--seeds", "[3, 4]", "--runs_dir", str(tmp_path / "runs"),
        "--results", str(target),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(ROOT / "recipes/benchmarks/upgrade_scenes.py"), run_name="__main__")
    result = json.loads(target.read_text())
    assert result["seeds"] == [3, 4]
    assert {"python", "torch", "cpu_cores"} <= result["versions"].keys()
    for seed, run in ((0, 3), (1, 4)):
        evaluated = json.loads((tmp_path / f"runs/seed_{run}/evaluation/retrieval.json").read_text())
        for cell in evaluated["cells"]:
            for direction in ("T2I", "I2T"):
                values = result["cells"][cell["name"]][direction]["R@1"]
                assert values["per_seed"][seed] == cell[direction]["R@1"]
                assert values["min"] <= values["mean"] <= values["max"]
        met = evaluated["criterion"]["new/old (stage 1)"]["T2I"]["R@1"]
        assert isinstance(met, bool)
    counts = result["criterion_met_in_seeds"]["new/old (stage 1)"]["T2I"]["R@1"]
    assert 0 <= counts <= 2
    table = target.with_suffix(".md").read_text()
    assert table.count("\n") == 8
    assert table.strip() in capsys.readouterr().out


def test_readmes_table_is_the_benchmarks():
    table = (ROOT / "recipes/benchmarks/results/upgrade_scenes.md").read_text(encoding="utf-8").strip()
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
