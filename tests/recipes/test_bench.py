"""Reports of benchmarks."""

from __future__ import annotations

import importlib
import json

import pytest

from xbt.errors import ConfigError
from xbt.report.cost import Spread


@pytest.fixture
def bench():
    return importlib.import_module("bench")


def test_ratios_are_taken_round_by_round(bench):
    timings = {"old": Spread((2.0, 8.0, 3.0)), "new": Spread((1.0, 2.0, 3.0))}
    ratios = bench.ratio(timings, "old", "new")
    assert ratios.values == (2.0, 4.0, 1.0)
    assert (ratios.min, ratios.median, ratios.max) == (1.0, 2.0, 4.0)
    assert str(ratios) == "2.00 [1.00, 4.00]"
    assert timings["old"].minus(timings["new"]).values == (1.0, 6.0, 0.0)


def test_a_report_is_json_and_markdown(bench, tmp_path):
    spread = Spread((1.5, 2.5))
    rows = [{"way": "old", "rate": spread, "loss": 0.000123456}, {"way": "new", "rate": 7, "loss": 0.5}]
    written = bench.write_report(
        tmp_path / "new" / "v1.5", "Rates", rows, "Measured here.", seed=3, all={"x": spread}
    )
    assert written == tmp_path / "new" / "v1.5.json"
    data = json.loads(written.read_text())
    assert data["rows"][0]["rate"] == {"min": 1.5, "median": 2.0, "max": 2.5, "rounds": [1.5, 2.5]}
    assert data["all"]["x"]["rounds"] == [1.5, 2.5]
    assert data["seed"] == 3
    assert {"torch", "cpu_cores"} <= data["versions"].keys()
    assert (tmp_path / "new" / "v1.5.md").read_text() == (
        "# Rates\n\n| way | rate | loss |\n|---|---|---|\n"
        "| old | 2.00 [1.50, 2.50] | 0.000123 |\n| new | 7 | 0.5 |\n\nMeasured here.\n"
    )


def test_an_empty_report_is_refused(bench, tmp_path):
    with pytest.raises(ConfigError, match="no results to write"):
        bench.write_report(tmp_path / "x", "Nothing", [])
