"""Galleries over stores that are there already."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from galleries import as_items, assert_finds, make_space, names, unit

from xbt.errors import SpaceMismatchError, StoreError
from xbt.index import Gallery
from xbt.index.segments import StoredSegment
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


def test_a_reload_during_an_update_sees_the_item_at_most_once(tmp_path, monkeypatch):
    """The writer updates an item while the reader is between the journal and the rows."""
    make_store(tmp_path / "s")
    gallery = Gallery.create(tmp_path / "g", store=tmp_path / "s")
    gallery.add(unit(1, 16, seed=1), ["x"])
    reader, reload = Gallery.open(tmp_path / "g", read_only=True), StoredSegment.reload
    updates = []

    def interrupted(segment):
        if not updates:
            updates.append("image-0003")
            gallery.remove(updates)
            gallery.add(unit(1, 16, seed=2), updates)
        reload(segment)

    monkeypatch.setattr(StoredSegment, "reload", interrupted)
    reader.reload()
    assert updates
    assert len(reader) == len(set(reader.ids))
    assert reader.verify() == []
    reader.reload()
    assert reader.ids == gallery.ids


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
    with pytest.raises(StoreError, match="can only be read: nobody has said of which space"):
        unknown.add(unit(1, 16), ["x"])


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
