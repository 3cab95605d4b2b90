"""The backfill benchmark at a tiny size: every order and merge runs, and what is written adds up."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.evaluation import recall_at_k

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path):
    def call(*flags):
        name = "backfill_orders.py"
        monkeypatch.setattr(sys, "argv", [name, *flags, "--results", str(tmp_path / "r")])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return json.loads((tmp_path / "r.json").read_text()), json.loads(
            (tmp_path / "r_merges.json").read_text()
        )

    return call


def test_every_order_and_merge(run, tmp_path, capsys):
    world = make_vector_world(*WORLDS["much better"], n_corpus=300, n_support=1, n_test=80)
    test = {name: rows.numpy() for name, rows in world.test.items()}
    pair = {f"val_{name.removesuffix('s')}": rows for name, rows in test.items() if name != "image_of_text"}
    np.savez(
        tmp_path / "pair.npz",
        **pair,
        corpus_new_text=world.corpus_new.numpy(),
        corpus_old_text=world.corpus_old.numpy(),
    )
    by_order, by_merge = run(
        "--flickr8k", str(tmp_path / "pair.npz"), "--scenes.seeds", "[]", "--seeds", "[0, 1]",
        "--sample_queries", "100", "--step", "10",
    )  # fmt: skip
    assert [row["order"] for row in by_order["rows"]] == [
        "random", "oldest first", "query log", "distance to cluster mean", "distance to mean of all",
        "fastfill", "rehearsed (ours)",
    ]  # fmt: skip
    assert [row["merge"] for row in by_merge["rows"]] == ["affine", "isotonic", "rank", "raw"]
    assert by_order["rows"][-1]["ours minus it, flickr8k"] == ""
    split = by_order["splits"]["flickr8k_0"]
    assert split["merge"]["chosen"] in ("affine", "isotonic", "rank", "raw")
    # An independent number: everything is backfilled, so that new queries search new images.
    owners = [[row // 5] for row in range(200)]
    full = np.mean(list(recall_at_k(test["new_texts"][200:], test["new_images"][40:], owners).values()))
    starts = {found["recall"][0] for found in split["orders"].values()}
    assert len(starts) == 1, "every order starts at the same recall"
    for found in (*split["orders"].values(), *split["merges"].values()):
        assert found["recall"][-1] == pytest.approx(full)
        assert len(found["areas"]) == 2
        assert np.mean(found["recall"]) == pytest.approx(np.mean(found["areas"]))
    assert 0 <= split["stopping_point"]["random"]["items"] <= 40
    assert by_order["config"]["flickr8k"] == "pair.npz"
    assert "Area under the recall curve" in capsys.readouterr().out


def test_nothing_to_measure_on_is_one_sentence(run, capsys):
    with pytest.raises(SystemExit) as raised:
        run("--scenes.seeds", "[]")
    assert raised.value.code == 2
    assert "give --flickr8k, --others or scene seeds" in capsys.readouterr().err


def test_the_curves_begin_at_new_old_and_end_at_new_new(monkeypatch, tmp_path, capsys):
    world = make_vector_world(*WORLDS["much better"], n_corpus=300, n_support=1, n_test=80)
    test = {name: rows.numpy() for name, rows in world.test.items()}
    pair = {f"val_{name.removesuffix('s')}": rows for name, rows in test.items() if name != "image_of_text"}
    np.savez(
        tmp_path / "pair.npz",
        **pair,
        corpus_new_text=world.corpus_new.numpy(),
        corpus_old_text=world.corpus_old.numpy(),
    )
    flags = ["--flickr8k", str(tmp_path / "pair.npz"), "--scenes.seeds", "[]", "--sample_queries", "100"]
    monkeypatch.setattr(sys, "argv", ["backfill_curves.py", *flags, "--results", str(tmp_path / "r")])
    runpy.run_path(str(BENCHMARKS / "backfill_curves.py"), run_name="__main__")
    found = json.loads((tmp_path / "r.json").read_text())
    table = found["rows"]
    assert [row["backfilled"] for row in table] == [f"{tenth} %" for tenth in range(0, 101, 10)]
    for tenth in (0, 10):
        assert table[tenth]["flickr8k, random"] == table[tenth]["flickr8k, rehearsed (ours)"]
    # Independent numbers: everything is backfilled, so that new queries search new images, in either half.
    full = [
        np.mean(list(recall_at_k(test["new_texts"][texts], test["new_images"][images], owners).values()))
        for texts, images in ((slice(0, 200), slice(0, 40)), (slice(200, 400), slice(40, 80)))
        for owners in [[[row // 5] for row in range(200)]]
    ]
    assert table[10]["flickr8k, random"].startswith(f"{100 * np.mean(full):.1f} ")
    steps = found["steps"]["flickr8k"]["random"]["R@1"]
    assert len(steps) == 10
    assert all(low <= gain <= high for gain, low, high in steps)
    assert "have a paired interval that lies below zero" in found["notes"]
    assert (tmp_path / "r_flickr8k.png").stat().st_size > 10_000
