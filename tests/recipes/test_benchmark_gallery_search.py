"""The benchmark of searching a gallery, at a size at which it takes seconds."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from xbt.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "gallery_search.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def config(script, tmp_path):
    return script["GallerySearchBenchmark"](
        rows=2000, dim=16, batches=[1, 7], removed=30, index="IVF16,Flat", folder=str(tmp_path / "g"),
        rounds=2, threads=1, results=str(tmp_path / "out"),
    )  # fmt: skip


def test_galleries_are_made_and_found_again(script, config):
    made = script["open_galleries"](config)
    assert [len(gallery) for gallery in made.values()] == [2000, 1970, 2000]
    files = {path: path.stat().st_mtime_ns for path in Path(config.folder).rglob("*.npy")}
    again = script["open_galleries"](config)
    assert [gallery.ids for gallery in again.values()] == [gallery.ids for gallery in made.values()]
    assert files == {path: path.stat().st_mtime_ns for path in Path(config.folder).rglob("*.npy")}
    assert len([path for path in files if "img_emb" in path.name]) == 1  # all of them read the same vectors


def test_the_whole_script(config, tmp_path):
    flags = {"rows": 2000, "dim": 16, "batches": "[1,7]", "removed": 30, "index": "IVF16,Flat",
             "folder": config.folder, "rounds": 2, "threads": 1, "results": tmp_path / "out.v1"}  # fmt: skip
    command = [sys.executable, str(SCRIPT), *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    report = json.loads((tmp_path / "out.v1.json").read_text())
    assert [(row[""], row["queries at once"]) for row in report["rows"]] == [
        (name, batch)
        for batch in (1, 7)
        for name in ("bare FAISS", "gallery", "gallery, removals", "IVF16,Flat")
    ]
    exact = [row["of the true first k"] for row in report["rows"] if row[""].startswith("gallery")]
    assert exact == ["100.00 %"] * 4
    assert report["rows"][1]["times as long as bare FAISS"]["median"] > 0


def test_refusals(script, config):
    config.k = 1971
    with pytest.raises(ConfigError, match="--k must be from 1 to the items that are left, 1970, got 1971"):
        script["main"](config)
    config.batches = [0]
    with pytest.raises(ConfigError, match=r"--batches must be sizes of at least 1, got \[0\]"):
        script["main"](config)
