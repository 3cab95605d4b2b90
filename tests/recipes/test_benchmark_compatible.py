"""The benchmark of compatible backbones at a tiny size: every part runs, and what is written adds up."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import labelled
import pytest

from xbt.config import run_recipe
from xbt.evaluation import over_seeds

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
OFF = {
    "worlds": ["--worlds.seeds", "[]"],
    "images": ["--images.seeds", "[]"],
    "clips": ["--clips.seeds", "[]"],
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    return importlib.import_module("compatible_backbones")


@pytest.fixture
def run(benchmark, monkeypatch, tmp_path):
    def call(part, *flags):
        off = [flag for name, given in OFF.items() if name != part for flag in given]
        results = ["--results", str(tmp_path / "r")]
        monkeypatch.setattr(sys, "argv", ["compatible_backbones.py", *off, *flags, *results])
        run_recipe(benchmark.main, benchmark.CompatibleBackbonesBenchmark)

    return call


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_worlds(run, tmp_path):
    run(
        "worlds",
        "--worlds.seeds",
        "[0, 1]",
        "--worlds.epochs",
        "1",
        "--worlds.dim",
        "16",
        "--worlds.extra_dims",
        "4",
    )
    one = read(tmp_path / "r_worlds.json")
    names = [row["method"] for row in one["rows"]]
    assert names[:2] == ["old/old", "independent"]
    assert {"BCT", "BT²", "OCA", "OCA without T", "procrustes", "lambda_orthogonal"} <= set(names)
    values = [one["cells"][seed]["OCA"]["mAP new/old"] for seed in ("0", "1")]
    shown = next(row for row in one["rows"] if row["method"] == "OCA")["mAP new/old"]
    assert shown == str(over_seeds(values))
    met = sum(
        one["cells"][seed]["OCA"]["mAP old/old"] < one["cells"][seed]["OCA"]["mAP new/old"]
        for seed in ("0", "1")
    )
    assert next(row for row in one["rows"] if row["method"] == "OCA")["criterion (mAP)"] == f"{met}/2"
    assert len(read(tmp_path / "r_sweep.json")["rows"]) == 4  # old/old, 0, 4, 16
    chain = read(tmp_path / "r_chain.json")
    assert [row["method"] for row in chain["rows"]] == ["independent", "BCT", "BT²", "OCA"]
    assert all(row["AC"].endswith("/6") for row in chain["rows"])
    for name in ("worlds", "sweep", "chain"):
        assert (tmp_path / f"r_{name}.md").is_file()


def test_images(run, tmp_path):
    labelled.write_folders(tmp_path / "photos")
    flags = [
        "--images.source", str(tmp_path / "photos"), "--images.seeds", "[0, 1]", "--images.old_classes", "2",
        "--images.image_size", "16", "--images.dim", "8", "--images.extra_dims", "2", "--images.epochs", "1",
        "--images.batch_size", "8", "--images.runs_dir", str(tmp_path / "runs"),
    ]  # fmt: skip
    run("images", *flags)
    found = read(tmp_path / "r_images.json")
    assert {"independent", "BCT", "BT², λ1 = 5", "OCA", "procrustes"} <= {
        row["method"] for row in found["rows"]
    }
    assert found["config"]["images"]["source"] == "photos"  # no folder of this machine
    run("images", *flags)
    assert read(tmp_path / "r_images.json")["cells"] == found["cells"]  # what is trained is used


def test_clips_are_put_together(run, benchmark, monkeypatch, tmp_path):
    def fake(config, seed):
        return {
            "old/old": {"T2I R@1": 0.1 * seed, "I2T R@1": 0.2},
            "new/old (OCA)": {"T2I R@1": 0.3, "I2T R@1": 0.4},
        }

    monkeypatch.setattr(benchmark, "clip_cells", fake)
    run("clips", "--clips.seeds", "[1, 3]")
    rows = read(tmp_path / "r_clips.json")["rows"]
    assert rows[0]["query/gallery"] == "old/old"
    assert rows[0]["T2I R@1"].startswith("20.0 [")


def test_nothing_to_run(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("nothing")
    assert stopped.value.code == 2
    assert "nothing is left to run" in capsys.readouterr().err
