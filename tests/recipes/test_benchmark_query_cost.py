"""The benchmark of a query's cost at a tiny size: it compares the same, and what it writes is complete."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import open_clip
import pytest
import tiny
import torch

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "query_cost.py"
WAYS = [
    "linear, folded",
    "linear",
    "MLP (hidden 24)",
    "linear + midpoint, old vectors given",
    "linear + tuned on pairs, old vectors given",
    "linear + confidence, old vectors given",
    "linear + midpoint, old tower",
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    config = tiny.open_clip_config(context_length=77)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-arch", config)

    def call(*flags):
        argv = [SCRIPT.name, "--model", "tiny-arch", "--results", str(tmp_path / "r"), "--threads", "1",
                "--hidden_dim", "24", "--rounds", "2", "--repeats", "3", *flags]  # fmt: skip
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out

    return call


def test_every_way_and_batch_size(run, tmp_path):
    result, printed = run("--batch_sizes", "[1, 3]")
    assert [(row["query"], row["batch"]) for row in result["rows"]] == [(w, b) for b in (1, 3) for w in WAYS]
    assert printed == (tmp_path / "r.md").read_text()
    assert "16 → 16" in printed
    for row in result["rows"]:
        seconds = result["seconds"][f"batch of {row['batch']}"]
        tower, whole = seconds["tower"]["rounds"], seconds[row["query"]]["rounds"]
        expected = [100 * (a - b) / b for a, b in zip(whole, tower, strict=True)]
        assert row["difference, % of the tower's"]["rounds"] == pytest.approx(expected)
        own = row["own time, % of the tower's"]
        if row["query"] == WAYS[0]:
            assert own == "0, by construction"
            assert f"{row['query']}, alone" not in seconds
        else:
            alone, own = seconds[f"{row['query']}, alone"]["rounds"], own["rounds"]
            assert own == pytest.approx([100 * a / b for a, b in zip(alone, tower, strict=True)])


def test_the_ways_agree_on_what_they_compute():
    module = runpy.run_path(str(SCRIPT))
    config = module["QueryCostBenchmark"](hidden_dim=24)
    new, old = (
        module["OpenClipEncoder"].create(tiny.open_clip_config(), name=name) for name in ("a:n", "a:o")
    )
    texts = module["queries"](5, 0)
    assert len(set(texts)) == 5
    ways = module["ways"](config, new, old, texts)
    vectors = new.encode_texts(texts)
    with torch.no_grad():
        found = {name: (whole(texts), added and added(vectors)) for name, (whole, added) in ways.items()}
    torch.testing.assert_close(found["linear, folded"][0], found["linear"][0], atol=1e-5, rtol=0)
    for name, (whole, added) in found.items():
        if added is not None:
            torch.testing.assert_close(whole, added, atol=1e-5, rtol=0, msg=name)
    midpoint, tuned, confidence, with_tower = (found[name][0] for name in WAYS[3:])
    torch.testing.assert_close(midpoint, with_tower, atol=1e-5, rtol=0)
    for other in (tuned, confidence):
        assert (midpoint - other).abs().max() > 1e-3


def test_wrong_options(run):
    with pytest.raises(SystemExit) as caught:
        run("--batch_sizes", "[0]")
    assert caught.value.code == 2
