"""The benchmark of the cascade, on made-up vectors and with two tiny models on scenes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "cascade.py"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    def call(*flags):
        argv = [SCRIPT.name, "--results", str(tmp_path / "r"), "--queries", "40", "--windows", "[10,20]",
                "--prewarm", "10", *flags]  # fmt: skip
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out

    return call


def unit(count, dim, seed):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def test_vectors(run, tmp_path):
    np.savez(
        tmp_path / "pair.npz", old_image=unit(50, 8, 1), new_image=unit(50, 12, 2), old_text=unit(30, 8, 3),
        new_text=unit(30, 12, 4), pairs=np.stack([np.arange(20), np.arange(20)[::-1]], 1), captions=["a"],
    )  # fmt: skip
    result, printed = run("--vectors", str(tmp_path / "pair.npz"), "--depths", "[50]")
    assert result["curve"]["recommended"] == 50
    rows = result["rows"]
    assert [row["queries"] for row in rows] == ["1–10", "11–20", "21–40"] * 2
    cold, warm = rows[:3], rows[3:]
    assert cold[-1]["embedded so far, %"] >= cold[0]["embedded so far, %"]
    assert warm[0]["of these by the log, %"] == pytest.approx(100)  # a depth of 50 are all items
    assert sum(row["images embedded a query"] for row in warm) == 0
    assert [row["R@1 of new/new, %"] for row in cold] == [row["R@1 of new/new, %"] for row in warm]
    assert result["deployed"]["recall"] == result["deployed"]["new"]
    assert "recommended depth: 50" in printed


def test_models_and_photos(run, tmp_path):
    old = tiny.tiny_open_clip(tmp_path / "old", context_length=77)
    new = tiny.tiny_open_clip(tmp_path / "new", seed=1, dim=24, context_length=77)
    result, _ = run("--old", old, "--new", new, "--pairs.limit", "20", "--depth", "3", "--prewarm", "0")
    rows = result["rows"]
    assert len(rows) == 3
    embedded = 10 * rows[0]["images embedded a query"] + 10 * rows[1]["images embedded a query"]
    embedded += 20 * rows[2]["images embedded a query"]
    assert 100 * embedded / 20 == pytest.approx(rows[-1]["embedded so far, %"])


def test_wrong_options(run):
    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 2
