"""The benchmark of a gallery's rates, at a size at which it takes seconds."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from xbt.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
SCRIPT = BENCHMARKS / "gallery_throughput.py"


@pytest.fixture
def script(monkeypatch):
    return runpy.run_path(str(SCRIPT))


def test_the_whole_script(script, monkeypatch, tmp_path, capsys):
    flags = {
        "rows": 1200, "dim": 16, "new_dim": 24, "add_rows": 500, "backfill_rows": 100, "batches": "[1,7]",
        "indexes": '["Flat","IVF4,SQ8"]', "index_rows": 600, "order_rows": 200, "rounds": 2, "threads": 1,
        "encoder_rates": '{"a slow one": 50}', "sizes": "[10000000]", "folder": tmp_path / "g",
        "results": tmp_path / "out",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *(f"--{name}={value}" for name, value in flags.items())])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    report = json.loads((tmp_path / "out.json").read_text())
    names = [row[""] for row in report["rows"]]
    assert names[:4] == ["add", "first search", "search, 1 at once", "search, 7 at once"]
    assert "backfill, without the encoder" in names
    assert "search both parts, 50 % backfilled, 7 at once" in names
    assert all(row["measured"]["min"] > 0 for row in report["rows"])
    flat, quantised = report["indexes"]
    # The vector on disk is fp16 and the id is stored beside it; in memory the vector is fp32.
    assert flat["disk"] >= 2 * 16
    assert quantised["memory"] > 0
    sizing = json.loads((tmp_path / "out_sizing.json").read_text())["rows"]
    sizes = {row[""]: row["10,000,000 items"] for row in sizing}
    assert sizes["to backfill with a slow one at 50 images/s"] == "55.6 h"
    assert "GB memory" in sizes["index Flat"]
    assert "Sizing a gallery" in capsys.readouterr().out


def test_sizes_are_multiplied(script):
    sizing = sys.modules["gallery_sizing"]
    cost = sizing.IndexCost("Flat", 2100.0, 1100.0, 1.0)
    rates = [
        {"": "add", "s in all": 10.0, "measured": None},
        {"": "backfill, without the encoder", "s in all": 20.0, "measured": None},
        {"": "neighbours for order rehearsed, 1000 items", "s in all": "",
         "measured": sizing.Spread((2.0,))},
    ]  # fmt: skip
    rows = sizing.sizing_rows(rates, [cost], 1000, [10**3, 10**6], 1.0, {"fast": 1000.0})
    assert [row["1,000 items"] for row in rows[:2]] == ["10 s", "20 s"]
    assert {row[""]: row["1,000,000 items"] for row in rows} == {
        "to add": "2.8 h",
        "to write a backfill": "5.6 h",
        "to backfill with fast at 1000 images/s": "5.6 h",
        "for the neighbours of order rehearsed": "17.6 h",
        "index Flat": "2 GB memory = 3 × 1 GB; 1 GB disk",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": 0}, "--rows must be at least 1"),
        ({"order_rows": 1}, "--order_rows must be at least 1, and order_rows 2, got 1"),
        ({"k": 0}, "--k must be from 1 to --rows"),
        ({"encoder_rates": {"none": 0.0}}, "--encoder_rates are images per second above 0"),
    ],
)
def test_refusals(script, options, words):
    with pytest.raises(ConfigError, match=words):
        script["main"](script["GalleryThroughputBenchmark"](**options))
