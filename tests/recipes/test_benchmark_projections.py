"""The benchmarks of projections and of auto at a tiny size: all methods run, and what is written adds up."""

from __future__ import annotations

import importlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.errors import DataError
from xbt.evaluation import recall_at_k
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path):
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


@pytest.fixture
def stores(files, tmp_path):
    """The vectors of the pair of encoders in stores: the new model's in another order, images in ids."""
    data = np.load(files[0])
    images, texts = (
        [f"photos/{row}.jpg" for row in range(80)],
        [f"photos/{row // 5}.jpg#{row}" for row in range(400)],
    )
    order = np.random.default_rng(0).permutation
    for model, shuffled in (("old", False), ("new", True)):
        for what, key, ids in (
            ("images", f"val_{model}_image", images),
            ("texts", f"val_{model}_text", texts),
            ("corpus", f"corpus_{model}_text", [f"text {row}" for row in range(300)]),
        ):
            rows = order(len(ids)) if shuffled else np.arange(len(ids))
            space = EmbeddingSpace(model, data[key].shape[1])
            modality = "image" if what == "images" else "text"
            store = EmbeddingStore.create(
                tmp_path / "mine" / f"{model}_{what}", modality=modality, space=space, dtype="float32"
            )
            captions = {"caption": [f"caption of {ids[row]}" for row in rows]} if what != "images" else None
            store.append(data[key][rows], [ids[row] for row in rows], captions)
    return tmp_path / "mine"


def test_stores_give_what_their_arrays_give(files, stores, run):
    splits = importlib.import_module("projection_splits")
    for given, wanted in zip(
        splits.halves(str(stores), "mine"), splits.halves(files[0], "pair"), strict=True
    ):
        assert given.number == wanted.number
        for side in (0, 1):
            torch.testing.assert_close(given.corpus[side], wanted.corpus[side], atol=1e-6, rtol=0)
        for direction in ("T2I", "I2T"):
            ours, theirs = given.asked[direction], wanted.asked[direction]
            assert (ours.answers, ours.groups.tolist()) == (theirs.answers, theirs.groups.tolist())
            for name in ("new", "old", "gallery", "new_gallery"):
                torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-6, rtol=0)


def test_stores_join_by_a_column_and_leave_out_what_is_not_for_them(stores, run):
    read_stores = importlib.import_module("projection_stores").read_stores
    texts = {model: EmbeddingStore.open(stores / f"{model}_texts") for model in ("old", "new")}
    chosen = [row for row in range(400) if row // 5 != 7]
    for model, store in texts.items():
        place = {name: row for row, name in enumerate(store.ids)}
        rows = [place[f"photos/{row // 5}.jpg#{row}"] for row in chosen]
        vectors, ids = store.rows(rows), [f"t{row}" for row in chosen]
        shutil.rmtree(store.path)
        columns = {"image_id": [f"photos/{row // 5}.jpg" for row in chosen], "caption": ids}
        EmbeddingStore.create(store.path, modality="text", space=store.space, dtype="float32").append(
            vectors, ids, columns
        )
        corpus = EmbeddingStore.open(stores / f"{model}_corpus")
        corpus.append(vectors[:3], ["same 0", "same 1", "same 2"], {"caption": ids[:3]})
    shutil.rmtree(stores / "new_images")
    pairs, corpus = read_stores(str(stores))
    assert (len(pairs), pairs.directions) == (79, ("T2I",))
    assert pairs.image_of_text.tolist() == [row for row in range(79) for _ in range(5)]
    assert len(corpus[0]) == len(corpus[1]) == 300
    for model in ("old", "new"):
        shutil.rmtree(stores / f"{model}_corpus")
    assert read_stores(str(stores))[1] is None
    EmbeddingStore.open(stores / "old_texts").append(
        np.eye(1, texts["old"].dim), ["more"], {"image_id": ["photos/1.jpg"], "caption": ["a"]}
    )
    with pytest.raises(
        DataError, match=r"new_texts and .*old_texts are not of the same items: 'more' is in one"
    ):
        read_stores(str(stores))
    EmbeddingStore.open(stores / "old_texts").append(
        np.eye(1, texts["old"].dim), ["x"], {"image_id": ["gone.jpg"], "caption": ["a"]}
    )
    with pytest.raises(
        DataError, match=r"the text 'x' of .*old_texts is of the image 'gone.jpg', which is not among"
    ):
        read_stores(str(stores))


def file_of(method):
    return method.replace(",", "").replace(" + ", " ").replace(" ", "_")


def cell_of(tmp_path, data, name):
    """The mean R@1 of T2I over both halves."""
    cells = (json.loads((tmp_path / f"r/{data}_{number}/{name}.json").read_text()) for number in (0, 1))
    return np.mean([cell["T2I"]["recall"]["R@1"] for cell in cells])


@pytest.mark.slow
def test_every_method_on_every_split(run, files, stores, tmp_path, capsys):
    pair, classes, test = files
    record = run(
        "projections.py",
        "--flickr8k",
        pair,
        "--lvis",
        classes,
        "--scenes.seeds",
        "[]",
        "--others",
        json.dumps([str(stores)]),
        "--trained_steps",
        "3",
    )
    rows = {row["method"]: row for row in record["rows"]}
    assert {"old/old", "new/new", "procrustes", "xbt, pairs", "tuned on pairs", "auto"} <= set(rows)
    cells = {"flickr8k T2I", "flickr8k I2T", "lvis T2I", "mine T2I", "mine I2T"}
    assert set(rows["auto"]) == {"method", *cells}
    assert record["config"]["others"] == ["mine"]
    assert rows["xbt, pairs"]["lvis T2I"] == "", "class names have no images under the new model"
    # An independent number: the second half of the images, searched by the old model.
    owners = [[row // 5] for row in range(200)]
    expected = recall_at_k(test["old_texts"][200:], test["old_images"][40:], owners, (1, 5, 10))
    cell = json.loads((tmp_path / "r/flickr8k_0/old_old.json").read_text())["T2I"]
    assert cell["recall"] == {f"R@{k}": value for k, value in expected.items()}
    assert cell["better_than_old"] == [0, 0, 0]
    decision = json.loads((tmp_path / "r/lvis_4/auto_decision.json").read_text())
    assert decision["n_images"] == 64
    assert set(record["auto_minus_midpoint"]) == {"flickr8k", "lvis", "mine"}
    tuned = record["tuned_minus_best_mixture"]["flickr8k"]["T2I"]
    assert tuned["mixture"].startswith("procrustes")
    recalls = [cell_of(tmp_path, "flickr8k", name) for name in ("tuned_on_pairs", file_of(tuned["mixture"]))]
    assert tuned["gain"][0] == pytest.approx(recalls[0] - recalls[1], abs=1e-9)
    out = capsys.readouterr().out
    assert "auto minus procrustes + midpoint is" in out
    assert "flickr8k T2I: tuned on pairs minus procrustes" in out


@pytest.mark.slow
def test_auto_cells(run, files):
    pair, classes, _ = files
    record = run(
        "auto_cells.py", "--flickr8k", pair, "--lvis", classes, "--seeds", "[0]", "--corpus_sizes", "[200]",
        "--support", "40", "--test", "30",
    )  # fmt: skip
    assert [row["rule"] for row in record["rows"]][-2:] == ["auto", "auto, no old query"]
    counts = record["counts"]
    assert set(counts) == {f"new model {name}" for name in WORLDS} | {"flickr8k", "lvis"}
    assert counts["lvis"]["auto"]["cells"] == 15, "five folds, three ks, text queries alone"
    assert counts["new model worse"]["procrustes"]["cells"] == 6
    assert counts["flickr8k"]["auto"]["cells"] == 12
    assert counts["new model worse"]["procrustes"]["worse"] >= 5
    assert counts["new model worse"]["auto"]["worse"] <= 1
    assert counts["new model worse"]["auto, no old query"]["better"] == 0
    assert counts["new model worse"]["auto, no old query"]["worse"] <= 1
    total = sum(each["auto"]["cells"] for each in counts.values())
    assert f"/{total} (" in record["rows"][-2]["all"]
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
