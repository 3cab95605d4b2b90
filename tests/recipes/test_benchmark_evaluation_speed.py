"""The benchmark of the evaluation, at a size at which it takes seconds."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from xbt.errors import ConfigError, DataError

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
SCRIPT = BENCHMARKS / "evaluation_speed.py"


@pytest.fixture
def script(monkeypatch):
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def config(script):
    return script["EvaluationSpeedBenchmark"](images=50, texts=253, dim=16, noise=2.0, threads=1, rounds=1)


def test_contenders_are_given_the_same_and_find_the_same(script, config, tmp_path):
    texts, images = script["draw"](config)
    owners = script["owners_of"](config)
    assert (texts.shape, images.shape, texts.dtype, images.dtype) == (
        (253, 16),
        (50, 16),
        "float32",
        "float32",
    )
    assert np.bincount(owners).tolist() == [6] * 3 + [5] * 47
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-6)
    np.save(tmp_path / "texts", texts)
    np.save(tmp_path / "images", images)
    found = {
        name: script["measure"](name, str(tmp_path), config)
        for name in (script["OURS"], script["WHOLE"], script["SCORING"])
    }
    scores = texts.astype(np.float64) @ images.T.astype(np.float64)
    ranks = (scores > scores[np.arange(253), owners][:, None]).sum(axis=1)
    expected = [float((ranks < k).mean()) for k in config.ks]
    assert 0.1 < expected[0] < expected[-1] < 1
    for run in found.values():
        assert run.seconds > 0
        assert run.recalls["T2I"] == pytest.approx(expected, abs=1e-6)
        assert run.recalls["I2T"] == pytest.approx(found["xbt"].recalls["I2T"], abs=1e-6)
        assert script["counted_otherwise"](config, [run], found["xbt"]) == 0
    wrong = found["xbt"]._replace(recalls={**found["xbt"].recalls, "I2T": [0.0, 0.0, 0.0]})
    with pytest.raises(DataError, match="queries are counted otherwise"):
        script["counted_otherwise"](config, [wrong], found["xbt"])


@pytest.mark.slow
def test_the_whole_script(script, monkeypatch, tmp_path, capsys):
    # Large enough for its memory to show: CLIP_benchmark holds every score at once, and as many flags.
    flags = {"images": 600, "texts": 3000, "dim": 8, "ks": "[1,5]", "rounds": 1, "threads": 1}
    monkeypatch.setattr(
        sys,
        "argv",
        [
            str(SCRIPT),
            *(f"--{name}={value}" for name, value in flags.items()),
            f"--results={tmp_path / 'out'}",
        ],
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "| CLIP_benchmark, scoring alone |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row[""] for row in report["rows"]] == ["xbt", "CLIP_benchmark", "CLIP_benchmark, scoring alone"]
    assert all(row["queries counted otherwise"] == 0 for row in report["rows"])
    assert report["rows"][0]["times as long"]["rounds"] == [1.0]
    assert report["rows"][2]["peak MiB above the vectors"]["min"] > 600 * 3000 * 5 / 2**20 / 2
    assert set(report["recalls"]) == {"xbt", "CLIP_benchmark", "CLIP_benchmark, scoring alone"}


def test_refusals(script, config):
    config.texts = 49
    with pytest.raises(ConfigError, match="--texts must be at least --images 50, got 49"):
        script["main"](config)
    config.texts, config.ks = 60, [1, 51]
    with pytest.raises(ConfigError, match=r"--ks must be cut-offs from 1 to --images 50, got \[1, 51\]"):
        script["main"](config)
