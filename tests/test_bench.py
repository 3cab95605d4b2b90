"""Timing side by side."""

from __future__ import annotations

import json
import time

import pytest

from xbt.bench import Spread, ratio, side_by_side, write_report
from xbt.errors import ConfigError


def test_contenders_take_turns_and_start_in_turn():
    ran = []
    timings = side_by_side({name: lambda name=name: ran.append(name) for name in "abc"}, rounds=3, warmup=1)
    rounds = ["".join(ran[start : start + 3]) for start in range(0, len(ran), 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]
    assert {name: len(spread.values) for name, spread in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_seconds_are_those_of_the_clock():
    timings = side_by_side(
        {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.05)}, rounds=3, warmup=0
    )
    assert timings["short"].min >= 0.01
    assert 0.05 <= timings["long"].min < 0.5
    assert ratio(timings, "long", "short").median > 1.5


def test_ratios_are_taken_round_by_round():
    timings = {"old": Spread((2.0, 8.0, 3.0)), "new": Spread((1.0, 2.0, 3.0))}
    found = ratio(timings, "old", "new")
    assert found.values == (2.0, 4.0, 1.0)
    assert (found.min, found.median, found.max) == (1.0, 2.0, 4.0)
    assert str(found) == "2.00 [1.00, 4.00]"
    assert timings["old"].minus(timings["new"]).values == (1.0, 6.0, 0.0)


def test_a_report_is_json_and_markdown(tmp_path):
    spread = Spread((1.5, 2.5))
    rows = [{"way": "old", "rate": spread, "loss": 0.000123456}, {"way": "new", "rate": 7, "loss": 0.5}]
    written = write_report(
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


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to time"):
        side_by_side({})
    with pytest.raises(ConfigError, match="rounds is 0"):
        side_by_side({"a": print}, rounds=0)
    with pytest.raises(ConfigError, match="warmup -1"):
        side_by_side({"a": print}, warmup=-1)
    with pytest.raises(ConfigError, match="no results to write"):
        write_report(tmp_path / "x", "Nothing", [])
