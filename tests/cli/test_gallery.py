"""``xbt gallery``: made, filled, emptied, described, checked and compacted."""

from __future__ import annotations

import numpy as np
import pytest
from backfills import COUNT, SCENES

from xbt.index import Gallery
from xbt.store import EmbeddingStore


def test_create_of_a_store(run, stores, specs, tmp_path):
    result = run("gallery", "create", tmp_path / "made", "--store", stores / "old_images", "--json")
    assert result.status == 0, result.err
    part = {"name": "old", "items": COUNT, "modality": "image", "dtype": "float16", "dim": 16,
            "model": specs[0], "revision": None}  # fmt: skip
    assert result.document == {
        "gallery": str(tmp_path / "made"), "items": COUNT, "fraction_backfilled": 0.0, "index": "Flat",
        "tuning": "", "merge": None, "bytes": result.document["bytes"], "parts": [part],
    }  # fmt: skip
    assert Gallery.open(tmp_path / "made").ids == SCENES.ids
    again = run("gallery", "create", tmp_path / "made", "--store", stores / "old_images")
    assert again.status == 2
    assert "already holds" in again.err


def test_create_an_empty_one_and_add(run, stores, specs, tmp_path):
    path = tmp_path / "made"
    result = run("gallery", "create", "--gallery", path, "--encoder", specs[0], "--dtype", "float32")
    assert result.status == 0, result.err
    result = run("gallery", "add", path, "--store", stores / "old_images", "--batch_size", "7", "--json")
    assert result.document == {
        "gallery": str(path), "added": COUNT, "replaced": 0, "skipped": 0, "items": COUNT
    }  # fmt: skip
    made = Gallery.open(path)
    expected = EmbeddingStore.open(stores / "old_images").read()
    assert made.ids == SCENES.ids
    assert np.array_equal(made.vectors(SCENES.ids), expected)
    assert made.metadata(SCENES.ids).column("number").to_pylist() == list(range(COUNT))


@pytest.mark.parametrize("existing", ["skip", "replace"])
def test_add_what_is_partly_there(run, gallery, old, stores, existing):
    store = EmbeddingStore.create(gallery.parent / "more", modality="image", space=old.space, dtype="float32")
    vectors = old.encode_texts(["one", "two", "three"]).numpy()
    store.append(vectors, [SCENES.ids[3], "new", SCENES.ids[5]], {"number": [-1, -2, -3]})
    refused = run("gallery", "add", gallery, "--store", store.path)
    assert refused.status == 2
    assert "2 of the 3 items" in refused.err
    assert SCENES.ids[3] in refused.err
    assert len(Gallery.open(gallery)) == COUNT
    result = run("gallery", "add", gallery, "--store", store.path, "--existing", existing, "--json")
    replaces = existing == "replace"
    assert result.document["added"] == (3 if replaces else 1)
    assert (result.document["replaced"], result.document["skipped"]) == ((2, 0) if replaces else (0, 2))
    assert result.document["items"] == len(Gallery.open(gallery)) == COUNT + 1
    number = Gallery.open(gallery).metadata([SCENES.ids[3]]).column("number").to_pylist()
    assert number == ([-1] if replaces else [3])


def test_add_vectors_of_another_space_is_refused(run, gallery, stores):
    result = run("gallery", "add", gallery, "--store", stores / "new_texts", "--json")
    assert result.status == 2
    assert result.document["error"]["kind"] == "SpaceMismatchError"
    assert len(Gallery.open(gallery)) == COUNT


@pytest.mark.parametrize("way", ["words", "file", "stdin"])
def test_remove(run, gallery, tmp_path, way):
    names = SCENES.ids[:2]
    (tmp_path / "ids.txt").write_text("\n".join(names))
    words = {"words": names, "file": ["--file", tmp_path / "ids.txt"], "stdin": ["--file", "-"]}[way]
    result = run("gallery", "remove", gallery, *words, "--json", stdin="\n".join(names))
    assert result.document == {"gallery": str(gallery), "removed": 2, "items": COUNT - 2}
    assert Gallery.open(gallery).ids == SCENES.ids[2:]


def test_remove_all_or_none(run, gallery):
    result = run("gallery", "remove", gallery, SCENES.ids[0], "nobody")
    assert result.status == 2
    assert "'nobody'" in result.err
    assert len(Gallery.open(gallery)) == COUNT
    assert "no items to remove" in run("gallery", "remove", gallery).err


def test_verify_finds_damage(run, gallery, stores):
    assert run("gallery", "verify", gallery, "--json").document == {
        "gallery": str(gallery), "whole": True, "faults": []
    }  # fmt: skip
    assert run("gallery", "verify", stores / "old_images").status == 0
    (file,) = (stores / "old_images").rglob("*.npy")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    for path in (gallery, stores / "old_images"):
        result = run("gallery", "verify", path)
        assert result.status == 1
        assert file.name in result.out
        assert result.err == ""
        assert run("gallery", "verify", path, "--json").document["whole"] is False


@pytest.mark.parametrize("kept", [0, 5000])
def test_verify_of_a_gallery_that_cannot_be_opened(run, gallery, kept):
    database = gallery / "gallery.sqlite"
    database.write_bytes(database.read_bytes()[:kept] + b"no database")
    result = run("gallery", "verify", gallery, "--json")
    assert result.status == 1
    assert database.name in result.document["faults"][0]


@pytest.mark.parametrize("command", ["verify", "info", "compact"])
def test_where_no_gallery_is(run, tmp_path, command):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        result = run("gallery", command, path)
        assert (result.status, result.out) == (2, "")
        assert str(path) in result.err
    result = run("gallery", command)
    assert result.status == 2
    assert "gallery" in result.err


def test_compact_frees_disk_space(run, specs, stores, tmp_path):
    run("gallery", "create", tmp_path / "made", "--encoder", specs[0])
    run("gallery", "add", tmp_path / "made", "--store", stores / "old_images")
    run("gallery", "remove", tmp_path / "made", *SCENES.ids[:50])
    result = run("gallery", "compact", tmp_path / "made", "--json")
    assert result.status == 0
    assert result.document["bytes"] < result.document["bytes_before"]
    assert Gallery.open(tmp_path / "made").ids == SCENES.ids[50:]


def test_info_for_people_and_of_two_parts(run, gallery, stores, new, specs):
    made = Gallery.open(gallery)
    made.begin_part(new.space)
    made.backfill(new.encode_images([SCENES.image(row) for row in range(15)]), SCENES.ids[:15])
    made.close()
    document = run("gallery", "info", gallery, "--json").document
    assert [(part["name"], part["items"], part["model"]) for part in document["parts"]] == [
        ("old", 45, specs[0]), ("new", 15, specs[1])
    ]  # fmt: skip
    assert document["fraction_backfilled"] == 0.25
    text = run("gallery", "info", gallery).out
    assert "25.0 %" in text
    for spec in specs:
        assert spec in text
    about = run("gallery", "info", stores / "old_images", "--json").document
    assert (about["items"], about["columns"], about["model"]) == (COUNT, ["number"], specs[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "made"], "give --store, or --encoder"),
        (["create", "made", "--store", "nowhere"], "no store at"),
        (
            ["add", "made", "--store", "nowhere", "--batch_size", "0"],
            "--batch_size must be at least 1, got 0",
        ),
        (["add", "nowhere", "--store", "nowhere"], "nowhere"),
        (["add", "nowhere", "--store", "x", "--existing", "maybe"], "maybe"),
        (["remove", "nowhere", "a", "--fil", "x"], "fil"),
        (["verify", "nowhere", "more"], "more"),
    ],
)
def test_wrong_input_is_one_sentence(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    result = run("gallery", *words)
    assert (result.status, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1
