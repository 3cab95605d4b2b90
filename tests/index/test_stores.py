"""Galleries over stores that are there already."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from galleries import as_items, assert_finds, make_space, names, unit

from xbt.errors import SpaceMismatchError, StoreError
from xbt.index import Gallery
from xbt.store import EmbeddingStore


def make_store(path, n=30):
    store = EmbeddingStore.create(path, modality="image", space=make_space(), dtype="float32")
    store.append(unit(n, 16), names(n), {"caption": [f"caption {i}" for i in range(n)]})
    return store


def bytes_below(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_store_that_is_there_is_searched_where_it_is(tmp_path):
    store = make_store(tmp_path / "s")
    before = bytes_below(tmp_path / "s")
    gallery = Gallery.create(tmp_path / "g", store=tmp_path / "s", dtype="float32")
    gallery.add(unit(5, 16, seed=1), names(5, start=30))
    gallery.remove(["image-0003", "image-0031"])
    gallery.add(unit(1, 16, seed=2), ["image-0003"])
    items = as_items(unit(30, 16), names(30)) | as_items(unit(5, 16, seed=1), names(5, start=30))
    del items["image-0003"], items["image-0031"]
    items["image-0003"] = unit(1, 16, seed=2)[0].numpy()
    for _ in range(2):
        for each in (gallery, Gallery.open(tmp_path / "g")):
            assert each.ids == list(items)
            assert_finds(each, items, unit(3, 16, seed=3))
            assert each.metadata(["image-0004"]).to_pydict() == {"caption": ["caption 4"]}
        gallery.compact()
    assert bytes_below(tmp_path / "s") == before
    store.append(unit(1, 16, seed=9), ["later"])
    assert "later" not in Gallery.open(tmp_path / "g")
    assert Gallery.create(tmp_path / "h", store=store).space.model == "old"


def test_a_clip_retrieval_folder_is_searched_where_it_is(tmp_path):
    (tmp_path / "cr" / "img_emb").mkdir(parents=True)
    np.save(tmp_path / "cr" / "img_emb" / "img_emb_0.npy", unit(20, 16).half().numpy())
    gallery = Gallery.create(tmp_path / "g", store=tmp_path / "cr", space=make_space())
    assert gallery.ids[:2] == ["row-0", "row-1"]
    assert_finds(gallery, as_items(unit(20, 16).half().float(), gallery.ids), unit(3, 16, seed=3), 5)
    gallery.add(unit(1, 16), ["x"])
    assert Gallery.open(tmp_path / "g").ids[-1] == "x"
    unknown = Gallery.create(tmp_path / "h", store=tmp_path / "cr")
    assert unknown.search(unit(1, 16), k=1).ids
    with pytest.raises(StoreError, match="is read-only, since the space of its vectors is unknown"):
        unknown.add(unit(1, 16), ["x"])


@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "NaN"), (np.inf, "NaN"), (3.0, "not of length 1"), (0.0, "not of length 1")]
)
def test_rows_that_cannot_be_searched_rightly_are_refused_by_file_and_row(tmp_path, value, what):
    (tmp_path / "cr" / "img_emb").mkdir(parents=True)
    rows = unit(20, 16).half().numpy()
    rows[17] = 0
    rows[17, 0] = value
    for number in range(2):
        np.save(tmp_path / "cr" / "img_emb" / f"img_emb_{number}.npy", rows[10 * number : 10 * number + 10])
    with pytest.raises(StoreError, match=rf"img_emb_1\.npy .*{what}.* row 7"):
        Gallery.create(tmp_path / "g", store=tmp_path / "cr", space=make_space())
    assert not (tmp_path / "g").exists()


def test_a_store_that_is_wholly_removed_is_let_go(tmp_path):
    make_store(tmp_path / "s")
    gallery = Gallery.create(tmp_path / "g", store=tmp_path / "s")
    gallery.add(unit(1, 16), ["x"])
    gallery.remove(names(30))
    gallery.compact()
    shutil.rmtree(tmp_path / "s")
    assert Gallery.open(tmp_path / "g").ids == ["x"]


def test_a_store_that_does_not_fit_is_refused(tmp_path):
    store = make_store(tmp_path / "s")
    with pytest.raises(SpaceMismatchError, match="'other'"):
        Gallery.create(tmp_path / "g", store=store, space=make_space("other", seed=1))
    Gallery.create(tmp_path / "g", store=store)
    shutil.rmtree(tmp_path / "s")
    make_store(tmp_path / "s", n=10)
    with pytest.raises(StoreError, match="has 10 rows, but the gallery was made of 30"):
        Gallery.open(tmp_path / "g")
