"""Timing side by side."""

from __future__ import annotations

import time

import pytest

from xbt.errors import ConfigError
from xbt.report.cost import side_by_side


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
    assert timings["long"].over(timings["short"]).median > 1.5


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="nothing to time"):
        side_by_side({})
    with pytest.raises(ConfigError, match="rounds is 0"):
        side_by_side({"a": print}, rounds=0)
    with pytest.raises(ConfigError, match="warmup -1"):
        side_by_side({"a": print}, warmup=-1)
