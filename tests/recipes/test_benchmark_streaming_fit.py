"""The benchmark of closed forms over stores, at a size at which it takes seconds."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from xbt.errors import ConfigError
from xbt.store import EmbeddingStore

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "streaming_fit.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def config(script, tmp_path):
    return script["StreamingFitBenchmark"](
        rows=2500, new_dim=12, old_dim=8, folder=str(tmp_path / "stores"), threads=1
    )


def test_stores_hold_a_hidden_rotation_and_are_continued(script, config, monkeypatch):
    names = script["make_stores"].__globals__
    monkeypatch.setitem(names, "SHARD_ROWS", 1000)
    script["make_stores"](config)
    new, old = (EmbeddingStore.open(Path(config.folder) / side) for side in ("new", "old"))
    assert (len(new), len(old), new.dim, old.dim, new.dtype) == (2500, 2500, 12, 8, "float16")
    assert new.ids == old.ids
    rotation = script["hidden_rotation"](config).numpy()
    cosines = (new.read() @ rotation * old.read()).sum(1) / np.linalg.norm(new.read() @ rotation, axis=1)
    assert 0.75 < cosines.mean() < 0.95
    files = {path: path.stat().st_mtime_ns for path in Path(config.folder).rglob("*.npy")}
    script["make_stores"](config)
    assert files == {path: path.stat().st_mtime_ns for path in Path(config.folder).rglob("*.npy")}
    config.rows = 2000
    with pytest.raises(ConfigError, match="has 2500 rows of dimension 12"):
        script["make_stores"](config)


def test_what_is_measured(script, config):
    script["make_stores"](config)
    new = EmbeddingStore.open(Path(config.folder) / "new")
    blocks = torch.cat(list(script["bare_blocks"](new)))
    np.testing.assert_array_equal(blocks.numpy(), new.read())
    for name in (script["BARE"], script["PROCRUSTES"], script["RIDGE"]):
        found = script["measure"](name, config)
        assert found.seconds > 0
        assert found.peak_mib > 50
        assert (found.error is not None) == (name == script["PROCRUSTES"])
    assert script["measure"](script["PROCRUSTES"], config).error < 0.1


@pytest.mark.slow
def test_the_whole_script(config, tmp_path):
    flags = {"rows": 500, "new_dim": 12, "old_dim": 8, "folder": config.folder, "rounds": 1, "threads": 1}
    command = [sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(
        [*command, f"--results={tmp_path / 'out.v1'}"], check=True, capture_output=True, text=True
    )
    assert "| ridge |" in done.stdout
    report = json.loads((tmp_path / "out.v1.json").read_text())
    assert [row[""] for row in report["rows"]] == ["reading + one product", "procrustes", "ridge"]
    assert all(float(row["peak MiB"]) < 1024 for row in report["rows"])


def test_refusals(script, config):
    config.old_dim = 13
    with pytest.raises(ConfigError, match="--old_dim must be from 1 to --new_dim 12, got 13"):
        script["main"](config)
