"""Galleries and stores in whose place others are put while they are open, or behind the gallery's back."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from galleries import as_items, assert_finds, make_space, names, unit

from xbt.errors import StoreError
from xbt.index import Gallery, maintenance
from xbt.index.storage import Storage
from xbt.store import EmbeddingStore

REPLACED = r"the gallery at .*g was replaced by another while it was open; open it again"


@pytest.fixture
def gallery(tmp_path):
    made = Gallery.create(tmp_path / "g", space=make_space(), dtype="float32")
    made.add(unit(10, 16), names(10))
    return made


def rebuild(path, how="move"):
    """What a nightly job does: another gallery, of other items, under the same path."""
    fresh = Gallery.create(path.with_name("n"), space=make_space(), dtype="float32")
    fresh.add(unit(15, 16, seed=99), [f"new-{row}" for row in range(15)])
    fresh.remove(["new-12"])
    fresh.close()
    if how == "move":
        shutil.rmtree(path)
        fresh.path.rename(path)
    else:  # file by file, into the files that are there
        shutil.copytree(fresh.path, path, dirs_exist_ok=True)
    items = as_items(unit(15, 16, seed=99), [f"new-{row}" for row in range(15)])
    del items["new-12"]
    return items


@pytest.mark.parametrize("how", ["move", "copy"])
@pytest.mark.parametrize("warm", [True, False])
def test_a_reader_of_a_gallery_that_was_replaced_begins_again(gallery, how, warm):
    reader = Gallery.open(gallery.path, read_only=True)
    if warm:
        reader.prepare()
    gallery.close()
    items = rebuild(gallery.path, how)
    if warm:
        reader.prepare()
        assert reader.ids == names(10)  # what it has open
    reader.reload()
    assert reader.ids == list(items)
    np.testing.assert_array_equal(reader.vectors(["new-3"]), unit(15, 16, seed=99)[3:4])
    assert_finds(reader, items, unit(2, 16, seed=1))
    assert reader.verify() == []


@pytest.mark.parametrize("how", ["move", "copy"])
def test_a_writer_to_a_gallery_that_was_replaced_is_refused_until_it_is_opened_again(gallery, how):
    items = rebuild(gallery.path, how)
    before = {path: path.read_bytes() for path in gallery.path.rglob("*") if path.is_file()}
    writes = [
        lambda: gallery.remove(["image-0001"]),
        lambda: gallery.add(unit(1, 16), ["x"]),
        lambda: gallery.begin_part(make_space("new", seed=1)),
        gallery.compact,
    ]
    for write in [*writes, *writes]:
        with pytest.raises(StoreError, match=REPLACED):
            write()
    after = {path: path.read_bytes() for path in gallery.path.rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if path.name != ".lock"} == {
        path: data for path, data in before.items() if path.name != ".lock"
    }
    again = Gallery.open(gallery.path)
    again.remove(["new-1"])
    del items["new-1"]
    assert_finds(again, items, unit(2, 16, seed=1))


@pytest.mark.parametrize(
    "write",
    [
        lambda g: g.remove(["image-0001"]),
        lambda g: g.add(unit(1, 16), ["x"]),
        lambda g: g.begin_part(make_space("new", seed=1)),
        lambda g: g.compact(),
    ],
)
def test_a_gallery_that_is_replaced_while_somebody_has_the_right_to_write(gallery, write):
    gallery.remove(["image-0004"])  # so that there is something to be compacted
    with gallery.writing():
        items = rebuild(gallery.path)
        with pytest.raises(StoreError, match=REPLACED):
            write(gallery)
    again = Gallery.open(gallery.path)
    assert again.verify() == []
    assert_finds(again, items, unit(2, 16, seed=1))


def test_a_gallery_that_is_put_back_is_the_same(gallery, tmp_path):
    shutil.copytree(gallery.path, tmp_path / "copy")
    gallery.remove(["image-0001"])
    shutil.rmtree(gallery.path)
    (tmp_path / "copy").rename(gallery.path)
    gallery.remove(["image-0002"])
    assert gallery.ids == Gallery.open(gallery.path).ids == ["image-0000", "image-0001", *names(7, start=3)]


def test_a_copy_that_is_put_back_while_somebody_has_the_right_to_write(gallery, tmp_path):
    shutil.copytree(gallery.path, tmp_path / "copy")
    gallery.remove(["image-0001"])
    with gallery.writing():
        shutil.rmtree(gallery.path)
        (tmp_path / "copy").rename(gallery.path)
        for write in (
            lambda: gallery.remove(["image-0002"]),
            lambda: gallery.add(unit(1, 16), ["image-0001"]),
        ):
            with pytest.raises(StoreError, match=REPLACED):
                write()
    again = Gallery.open(gallery.path)
    assert again.ids == names(10)
    assert again.verify() == []


def test_a_reader_that_has_searched_nothing_yet_goes_on_with_its_own_vectors(gallery):
    reader, items = Gallery.open(gallery.path, read_only=True), as_items(unit(10, 16), names(10))
    gallery.close()
    new = rebuild(gallery.path)
    assert_finds(reader, items, unit(2, 16, seed=1))
    assert "was replaced by another" in reader.verify()[0]
    reader.reload()
    assert_finds(reader, new, unit(2, 16, seed=1))


def test_a_reader_keeps_no_index_of_its_own_rows_in_another_gallery(tmp_path):
    for path, seed in (("a", 0), ("b", 99)):
        with Gallery.create(tmp_path / path, space=make_space(), index="HNSW4", dtype="float32") as made:
            made.add(unit(50, 16, seed), names(50))
    reader, items = Gallery.open(tmp_path / "a"), as_items(unit(50, 16, seed=99), names(50))
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b").rename(tmp_path / "a")
    reader.prepare()
    fresh = Gallery.open(tmp_path / "a")
    for each in (reader, fresh):
        each.reload()
        assert_finds(each, items, unit(2, 16, seed=1), 5)


@pytest.mark.parametrize("compacted", [False, True])
def test_a_reload_into_which_a_compaction_or_a_replacement_falls(gallery, monkeypatch, compacted):
    """The files that the reader is about to open are removed by another process."""
    reader, found = Gallery.open(gallery.path, read_only=True), []
    gallery.add(unit(1, 16, seed=5), ["x"])
    real = Storage._open_segment

    def interrupted(storage, parts, row):
        if not found:
            found.append(True)
            if compacted:
                gallery.remove(["image-0001"])
                gallery.compact()
            else:
                rebuild(gallery.path)
        return real(storage, parts, row)

    monkeypatch.setattr(Storage, "_open_segment", interrupted)
    reader.reload()
    monkeypatch.undo()
    assert reader.ids == Gallery.open(gallery.path).ids
    assert reader.search(unit(1, 16), len(reader)).ids


def test_two_galleries_made_in_one_place_at_the_same_time(tmp_path, monkeypatch):
    """Another process makes a gallery and adds to it after this one has seen that the place is empty."""
    make = maintenance.make_directory

    def late(path):
        monkeypatch.setattr(maintenance, "make_directory", make)
        with Gallery.create(tmp_path / "g", space=make_space()) as other:
            other.add(unit(10, 16), names(10))
        return make(path)

    monkeypatch.setattr(maintenance, "make_directory", late)
    with pytest.raises(StoreError, match=r"g already holds gallery\.sqlite; open that gallery, or choose"):
        Gallery.create(tmp_path / "g", space=make_space())
    assert Gallery.open(tmp_path / "g").ids == names(10)


# -- stores elsewhere ----------------------------------------------------------------------------------


def make_store(path, rows, ids=None):
    store = EmbeddingStore.create(path, modality="image", space=make_space(), dtype="float32")
    store.append(unit(20, 16)[rows], ids or [f"image-{row:04d}" for row in rows])
    return store


ANOTHER = r"the store at .*s is not the one that the gallery at .*g was made of: its first 4 rows are others"


def test_a_store_that_was_written_again_is_refused(tmp_path):
    make_store(tmp_path / "s", [0, 1, 2, 3])
    gallery = Gallery.create(tmp_path / "g", store=tmp_path / "s")
    gallery.remove(["image-0001"])
    shutil.rmtree(tmp_path / "s")
    make_store(tmp_path / "s", [0, 9, 1, 2, 3])
    with pytest.raises(StoreError, match=ANOTHER):
        Gallery.open(tmp_path / "g")
    with pytest.raises(StoreError, match="s was replaced by another store while it was open"):
        gallery.vectors(["image-0002"])
    assert "s was replaced by another store while it was open" in gallery.verify()[0]
    shutil.rmtree(tmp_path / "s")
    make_store(tmp_path / "s", [0, 1, 2, 4], names(4))  # other vectors of the same ids
    with pytest.raises(StoreError, match=ANOTHER):
        Gallery.open(tmp_path / "g")
    shutil.rmtree(tmp_path / "s")
    make_store(tmp_path / "s", [0, 1, 2, 3]).append(unit(1, 16, seed=5), ["later"])
    again = Gallery.open(tmp_path / "g")  # the same bytes, and more
    assert again.ids == ["image-0000", "image-0002", "image-0003"]
    assert again.verify() == []
    again.add(unit(1, 16), ["x"])
    again.compact()
    with_more = Gallery.open(tmp_path / "g")
    assert with_more.ids == ["image-0000", "image-0002", "image-0003", "x"]
    assert gallery.vectors(["image-0002"]).shape == (1, 16)  # the store is back


def test_a_store_that_grows_while_the_gallery_is_open_stays_readable(tmp_path):
    store = make_store(tmp_path / "s", [0, 1, 2, 3])
    gallery = Gallery.create(tmp_path / "g", store=tmp_path / "s")
    store.append(unit(1, 16, seed=5), ["later"])
    np.testing.assert_array_equal(gallery.vectors(["image-0002"]), unit(20, 16)[2:3])
    gallery.reload()
    assert gallery.ids == names(4)
    assert gallery.verify() == []


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_clip_retrieval_folder_that_was_written_again_is_refused(tmp_path, with_ids):
    import pandas as pd

    def write(rows, number=0):
        folder = tmp_path / "s"
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", unit(40, 16)[rows].half().numpy())
        if with_ids:
            table = pd.DataFrame({"image_path": [f"image-{row:04d}" for row in rows]})
            table.to_parquet(folder / "metadata" / f"metadata_{number}.parquet")

    write([0, 1, 2, 3])
    gallery = Gallery.create(tmp_path / "g", store=tmp_path / "s", space=make_space())
    gallery.close()
    write([4, 5], number=1)
    assert len(Gallery.open(tmp_path / "g")) == 4
    write([0, 9, 1, 2] if with_ids else [0, 9, 1, 2, 3, 4, 5])
    with pytest.raises(StoreError, match=ANOTHER):
        Gallery.open(tmp_path / "g")


def test_a_gallery_and_its_store_are_moved(tmp_path):
    (tmp_path / "a").mkdir()
    make_store(tmp_path / "a" / "s", [0, 1, 2, 3])
    Gallery.create(tmp_path / "a" / "g", store=tmp_path / "a" / "s").close()
    (tmp_path / "a").rename(tmp_path / "b")
    assert Gallery.open(tmp_path / "b" / "g").ids == names(4)  # together
    (tmp_path / "away").mkdir()
    (tmp_path / "b" / "g").rename(tmp_path / "away" / "g")
    was, now = str((tmp_path / "a" / "s").resolve()), str(tmp_path / "b" / "s")
    words = (
        rf"there is no store at {was}, but the gallery at .*away/g was made of it; put it back, or give "
        rf"its new path: Gallery\.open\(path, stores=\{{'{was}': 'its new path'\}}\)"
    )
    with pytest.raises(StoreError, match=words):
        Gallery.open(tmp_path / "away" / "g")
    with pytest.raises(
        StoreError, match=r"stores= names 'other', .* made of no such store; it was made of .*a/s"
    ):
        Gallery.open(tmp_path / "away" / "g", stores={"other": now})
    moved = Gallery.open(tmp_path / "away" / "g", stores={was: now})
    assert moved.ids == names(4)
    moved.reload()
    moved.add(unit(1, 16, seed=5), ["x"])  # from now on the gallery knows
    moved.close()
    assert Gallery.open(tmp_path / "away" / "g").ids == [*names(4), "x"]
    make_store(tmp_path / "t", [0, 9, 1, 2, 3])
    with pytest.raises(StoreError, match="is not the one that the gallery"):
        Gallery.open(tmp_path / "away" / "g", stores={now: tmp_path / "t"})


def test_a_gallery_that_is_moved_away_from_its_store_still_finds_it(tmp_path):
    (tmp_path / "a").mkdir()
    make_store(tmp_path / "a" / "s", [0, 1, 2, 3])
    Gallery.create(tmp_path / "a" / "g", store=tmp_path / "a" / "s").close()
    (tmp_path / "a" / "g").rename(tmp_path / "g")
    assert Gallery.open(tmp_path / "g").ids == names(4)
