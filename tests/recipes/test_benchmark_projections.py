"""The benchmarks of projections and of auto at a tiny size: all methods run, and what is written adds up."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from xbt.data.vector_worlds import WORLDS, make_vector_world
from xbt.evaluation import recall_at_k

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # where the scripts find what they share

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *flags, "--results", str(tmp_path / "r")])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return json.loads((tmp_path / "r.json").read_text())

    return call


@pytest.fixture
def files(tmp_path):
    """Files with the keys of the real ones: a pair of encoders, and class names with exemplars."""
    world = make_vector_world(*WORLDS["much better"], n_corpus=300, n_support=1, n_test=80)
    test = {name: rows.numpy() for name, rows in world.test.items()}
    pair = {f"val_{name.removesuffix('s')}": rows for name, rows in test.items() if name != "image_of_text"}
    corpus = {"corpus_new_text": world.corpus_new.numpy(), "corpus_old_text": world.corpus_old.numpy()}
    np.savez(tmp_path / "pair.npz", **pair, **corpus)
    classes = {
        "old_text": test["old_texts"][::5],
        "new_text": test["new_texts"][::5],
        "old_image": test["old_images"],
    }
    np.savez(tmp_path / "classes.npz", name=np.array(["a"] * 80), **classes)
    return str(tmp_path / "pair.npz"), str(tmp_path / "classes.npz"), test


@pytest.mark.slow
def test_every_method_on_every_split(run, files, tmp_path, capsys):
    pair, classes, test = files
    record = run(
        "projections.py",
        "--flickr8k",
        pair,
        "--lvis",
        classes,
        "--scenes.seeds",
        "[]",
        "--trained_steps",
        "3",
    )
    rows = {row["method"]: row for row in record["rows"]}
    assert {"old/old", "new/new", "procrustes", "xbt, pairs", "tuned on pairs", "auto"} <= set(rows)
    assert set(rows["auto"]) == {"method", "flickr8k T2I", "flickr8k I2T", "lvis T2I"}
    assert rows["xbt, pairs"]["lvis T2I"] == "", "class names have no images under the new model"
    # An independent number: the second half of the images, searched by the old model.
    owners = [[row // 5] for row in range(200)]
    expected = recall_at_k(test["old_texts"][200:], test["old_images"][40:], owners, (1, 5, 10))
    cell = json.loads((tmp_path / "r/flickr8k_0/old_old.json").read_text())["T2I"]
    assert cell["recall"] == {f"R@{k}": value for k, value in expected.items()}
    assert cell["better_than_old"] == [0, 0, 0]
    decision = json.loads((tmp_path / "r/lvis_4/auto_decision.json").read_text())
    assert decision["n_images"] == 64
    assert set(record["auto_minus_midpoint"]) == {"flickr8k", "lvis"}
    assert "auto beats procrustes + midpoint by" in capsys.readouterr().out


def test_auto_cells(run, files):
    pair, _, _ = files
    record = run(
        "auto_cells.py", "--flickr8k", pair, "--seeds", "[0]", "--corpus_sizes", "[200]", "--support", "40",
        "--test", "30",
    )  # fmt: skip
    assert [row["rule"] for row in record["rows"]][-1] == "auto"
    counts = record["counts"]
    assert set(counts) == {f"new model {name}" for name in WORLDS} | {"flickr8k"}
    assert counts["new model worse"]["procrustes"]["cells"] == 6
    assert counts["flickr8k"]["auto"]["cells"] == 12
    assert counts["new model worse"]["procrustes"]["worse"] >= 5
    assert counts["new model worse"]["auto"]["worse"] <= 1
    total = sum(each["auto"]["cells"] for each in counts.values())
    assert f"/{total} (" in record["rows"][-1]["all"]
    assert record["config"]["flickr8k"] == "pair.npz"


def test_nothing_to_measure_on_is_one_sentence(run, capsys):
    with pytest.raises(SystemExit) as raised:
        run("projections.py", "--scenes.seeds", "[]")
    assert raised.value.code == 2
    assert "give --flickr8k, --lvis, --others or scene seeds" in capsys.readouterr().err


def test_a_file_that_is_no_npz_is_named(run, tmp_path, capsys):
    path = tmp_path / "broken.npz"
    path.write_bytes(b"PK not a zip")
    with pytest.raises(SystemExit) as raised:
        run("projections.py", "--flickr8k", str(path), "--scenes.seeds", "[]")
    assert raised.value.code == 2
    assert "broken.npz cannot be read as an .npz file" in capsys.readouterr().err
