"""Galleries on disk: what is written is found again, by whoever opens them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from galleries import as_items, assert_finds, make_space, names, unit

from xbt.errors import DataError, StoreError
from xbt.index import Gallery, exact_search


@pytest.fixture
def gallery(tmp_path):
    made = Gallery.create(tmp_path / "g", space=make_space(), dtype="float32")
    made.add(unit(50, 16), names(50))
    return made


def test_what_was_added_is_found_by_whoever_opens_it(gallery):
    items = as_items(unit(50, 16), names(50))
    for each in (gallery, Gallery.open(gallery.path), Gallery.open(gallery.path, read_only=True)):
        assert (len(each), each.ids, each.dim) == (50, names(50), 16)
        assert "image-0007" in each
        assert "image-0050" not in each
        assert 7 not in each
        assert_finds(each, items, unit(5, 16, seed=1), 10, space=make_space())
        assert each.verify() == []
        assert [(part.name, part.count, part.dim) for part in each.parts] == [("old", 50, 16)]
        assert each.space.model == "old"
        np.testing.assert_array_equal(each.vectors(["image-0009", "image-0002"]), unit(50, 16)[[9, 2]])


def test_half_precision_is_searched_as_it_is_on_disk(tmp_path):
    gallery = Gallery.create(tmp_path / "g", space=make_space())
    gallery.add(unit(50, 16), names(50))
    stored = unit(50, 16).half().float()
    np.testing.assert_array_equal(gallery.vectors(names(50)), stored)
    assert_finds(gallery, as_items(stored, names(50)), unit(5, 16, seed=1), 50)


def test_a_fresh_process_finds_the_same(gallery, tmp_path):
    queries = unit(6, 16, seed=4)
    np.save(tmp_path / "queries.npy", queries.numpy())
    expected = gallery.search(queries, k=5)
    code = (
        "import json, sys, numpy as np; from xbt.index import Gallery; g = Gallery.open(sys.argv[1]);"
        "assert 'faiss' not in sys.modules; r = g.search(np.load(sys.argv[2]), k=5);"
        "print(json.dumps([r.ids, r.scores.tolist(), g.space.model]))"
    )
    command = [sys.executable, "-c", code, str(gallery.path), str(tmp_path / "queries.npy")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # though nobody has closed it
    assert json.loads(done.stdout) == [expected.ids, expected.scores.tolist(), "old"]


def test_it_grows_shrinks_and_is_updated_like_a_dictionary(tmp_path, monkeypatch):
    """Random operations against a plain dictionary, with many small blocks; reopened now and then."""
    monkeypatch.setattr(exact_search, "BLOCK_NUMBERS", 16 * 64)
    monkeypatch.setattr(exact_search, "HOLES", 4)
    draw = np.random.default_rng(0)
    gallery = Gallery.create(tmp_path / "g", space=make_space(), dtype="float32")
    reader = Gallery.open(tmp_path / "g", read_only=True)
    items, made = {}, 0
    for step in range(60):
        what = draw.choice(["add", "remove", "update", "compact"], p=[0.45, 0.3, 0.2, 0.05])
        some = [str(name) for name in draw.permutation(list(items) or ["none"])[: draw.integers(1, 20)]]
        vectors = unit(20, 16, seed=1000 + step).numpy()
        if what == "add" or not items:
            new = names(int(draw.integers(1, 20)), start=made)
            made += len(new)
            gallery.add(vectors[: len(new)], new)
            items |= as_items(vectors[: len(new)], new)
        elif what == "compact":
            gallery.compact()
        else:
            gallery.remove(some)
            for name in some:
                del items[name]
            if what == "update":
                gallery.add(vectors[: len(some)], some)
                items |= as_items(vectors[: len(some)], some)
        reader.reload()
        for each in (gallery, reader, Gallery.open(tmp_path / "g")) if step % 10 == 0 else (gallery, reader):
            assert each.ids == list(items)
            assert len(each) == len(items)
            if items:
                assert_finds(each, items, unit(3, 16, seed=step), int(draw.integers(1, len(items) + 1)))
    assert gallery.verify() == []
    ids = list(items)
    np.testing.assert_array_equal(gallery.vectors(ids), np.stack(list(items.values())))


def test_equal_vectors_stand_in_the_order_of_the_gallery(tmp_path, monkeypatch):
    monkeypatch.setattr(exact_search, "BLOCK_NUMBERS", 16 * 30)
    gallery = Gallery.create(tmp_path / "g", space=make_space(), dtype="float32")
    for start in range(0, 100, 20):
        gallery.add(np.repeat(unit(1, 16).numpy(), 20, axis=0), names(20, start))
    gallery.remove(names(3, start=10))
    there = [name for name in names(100) if name not in names(3, start=10)]
    for each in (gallery, Gallery.open(gallery.path)):
        for k in (1, 12, 97):
            assert each.search(unit(2, 16, seed=1), k).ids == [there[:k]] * 2


def test_metadata_stays_with_the_items(tmp_path):
    gallery = Gallery.create(tmp_path / "g", space=make_space())
    gallery.add(unit(3, 16), ["a", "b", "c"], metadata={"caption": ["A", "B", "C"]})
    gallery.add(unit(2, 16), ["d", "e"], metadata=pa.table({"caption": ["D", "E"], "year": [4, 5]}))
    gallery.remove(["b"])
    for _ in range(2):
        table = gallery.metadata(["e", "a", "d"])
        assert table.to_pydict() == {"caption": ["E", "A", "D"], "year": [5, None, 4]}
        gallery.compact()
    assert Gallery.build(unit(2, 16), ["a", "b"]).metadata(["a"]) is None


def test_reload_shows_what_another_object_has_written(gallery):
    reader = Gallery.open(gallery.path, read_only=True)
    gallery.add(unit(5, 16, seed=2), names(5, start=50))
    gallery.remove(["image-0000"])
    assert len(reader) == 50
    assert "image-0000" in reader
    reader.reload()
    assert reader.ids == names(55)[1:]
    # A writer looks by itself before it writes.
    other = Gallery.open(gallery.path)
    gallery.add(unit(1, 16, seed=3), ["x"])
    with pytest.raises(DataError, match="'x' is already in the gallery"):
        other.add(unit(1, 16, seed=3), ["x"])
    other.add(unit(1, 16, seed=3), ["y"])
    assert other.ids == [*names(55)[1:], "x", "y"]


def test_compacting_leaves_open_readers_their_files(gallery):
    gallery.remove(names(25))
    reader = Gallery.open(gallery.path, read_only=True)
    gallery.compact()
    # Nothing has been read yet: the old files must still be there.
    old = as_items(unit(50, 16)[25:], names(25, start=25))
    assert_finds(reader, old, unit(2, 16, seed=1), 25)
    segments = gallery.path / "segments"
    assert len(list(segments.iterdir())) == 1  # what the reader has mapped stays readable
    reader.reload()
    assert_finds(reader, old, unit(2, 16, seed=1), 25)
    gallery.add(unit(1, 16, seed=8), ["x"])
    gallery.remove(["x"])
    gallery.compact()
    assert reader.ids == names(25, start=25)
    del reader
    gallery.remove(["image-0030"])
    gallery.compact()
    assert len(list(segments.iterdir())) == 1
    assert gallery.verify() == []


def test_compacting_makes_few_large_files_and_forgets_what_was_removed(gallery):
    for number in range(20):
        gallery.add(unit(2, 16, seed=number), [f"{number}/a", f"{number}/b"])
    size = sum(path.stat().st_size for path in gallery.path.rglob("*.npy"))
    gallery.remove(names(50))
    gallery.compact()
    files = list(gallery.path.rglob("*.npy"))
    assert len(files) == 1
    assert files[0].stat().st_size < size / 2
    ids = [f"{number}/{letter}" for number in range(20) for letter in "ab"]
    assert gallery.ids == Gallery.open(gallery.path).ids == ids
    before = {path: path.stat().st_ino for path in gallery.path.rglob("*") if path.is_file()}
    gallery.compact()  # there is nothing to do
    assert before == {path: path.stat().st_ino for path in gallery.path.rglob("*") if path.is_file()}


def test_an_empty_gallery_grows(tmp_path):
    gallery = Gallery.create(tmp_path / "g", space=make_space(), modality="text")
    assert (len(gallery), gallery.ids, gallery.verify()) == (0, [], [])
    assert gallery.metadata([]) is None
    assert gallery.vectors([]).shape == (0, 16)
    gallery.compact()
    with pytest.raises(DataError, match="the gallery is empty; add items"):
        gallery.search(unit(1, 16), k=1)
    gallery.add(unit(1, 16), ["a"])
    gallery.remove(["a"])
    with pytest.raises(DataError, match="the gallery is empty"):
        gallery.search(unit(1, 16), k=1)
    gallery.compact()
    gallery.add(unit(1, 16), ["a"])
    assert gallery.search(unit(1, 16), k=1).ids == [["a"]]


def test_closing(gallery):
    with Gallery.open(gallery.path) as other:
        assert len(other) == 50
    with pytest.raises(DataError, match="is closed; open it again"):
        other.search(unit(1, 16))
    other.reload()
    assert len(other) == 50


def test_saving_what_is_in_memory(tmp_path):
    gallery = Gallery.build(unit(50, 16), names(50), make_space())
    gallery.remove(["image-0001"])
    saved = gallery.save(tmp_path / "deep" / "g")
    assert Gallery.open(tmp_path / "deep" / "g").ids == saved.ids == gallery.ids
    queries = unit(3, 16, seed=1)
    assert np.array_equal(saved.search(queries).scores, gallery.search(queries).scores)
    with pytest.raises(StoreError, match=r"already holds gallery\.sqlite"):
        gallery.save(tmp_path / "deep" / "g")
    with pytest.raises(DataError, match="needs a space"):
        Gallery.build(unit(2, 4), names(2)).save(tmp_path / "unknown")


def test_describes_itself(gallery):
    assert repr(gallery) == f"Gallery('{gallery.path}', 50 items, space='old' (16-d))"
    assert os.fspath(gallery.path) in repr(Gallery.open(gallery.path))
