"""Galleries whose files are damaged, gone, or not galleries at all: each is said in one sentence."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from galleries import assert_finds, make_space, names, unit
from xbt.index.contents import Contents

from xbt.errors import DataError, SpaceMismatchError, StoreError
from xbt.index import Gallery


@pytest.fixture
def gallery(tmp_path):
    made = Gallery.create(tmp_path / "g", space=make_space(), dtype="float32")
    made.add(unit(50, 16), names(50))
    made.remove(names(3))
    made.remove(names(3, start=10))
    return made


def journal(gallery):
    return next(gallery.path.glob("removals-*.log"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda g: (g / "gallery.json").unlink(),
            r"holds no gallery: there is no gallery\.json; check the path",
        ),
        (lambda g: (g / "gallery.json").write_text("{"), r"gallery\.json is not valid JSON"),
        (lambda g: (g / "gallery.json").write_text("[]"), r"gallery\.json is not a JSON object"),
        (lambda g: edit(g / "gallery.json", generation=7), "was edited or damaged: its own checksum"),
        (
            lambda g: edit(g / "gallery.json", version=99),
            "of format version 99, and this xbt reads version 3",
        ),
        (lambda g: (g / "gallery.json").write_text('{"format": 1, "dim": 16}'), "of format version 1"),
        (lambda g: (g / "removals-000000.log").unlink(), r"removals-000000\.log cannot be read"),
        (lambda g: shutil.rmtree(g / "segments"), r"there is no store at .*segments/old-000000; check"),
        (
            lambda g: next(g.rglob("*.npy")).write_bytes(b"x"),
            r"\.npy of shard '000000' has 1 bytes instead of",
        ),
        (lambda g: next(g.rglob("*.parquet")).unlink(), r"\.parquet of shard '000000' is missing"),
    ],
)
def test_opening_names_what_is_damaged(gallery, damage, message):
    damage(gallery.path)
    with pytest.raises(StoreError, match=message):
        Gallery.open(gallery.path)


def test_a_place_that_is_no_gallery(tmp_path):
    with pytest.raises(StoreError, match="nowhere holds no gallery"):
        Gallery.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="file is a file, but a store is a directory"):
        Gallery.create(tmp_path / "file", space=make_space())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"mine already holds notes\.txt; open that gallery, or choose"):
        Gallery.create(tmp_path / "mine", space=make_space())
    with pytest.raises(DataError, match="needs a space"):
        Gallery.create(tmp_path / "new")
    with pytest.raises(StoreError, match="dtype of a store is 'float16' or 'float32', got 'int8'"):
        Gallery.create(tmp_path / "new", space=make_space(), dtype="int8")
    with pytest.raises(StoreError, match="modality of a store is 'image' or 'text', got 'sound'"):
        Gallery.create(tmp_path / "new", space=make_space(), modality="sound")
    assert not (tmp_path / "new").exists()


def test_a_second_gallery_in_the_same_place_is_refused(gallery):
    with pytest.raises(StoreError, match="already holds"):
        Gallery.create(gallery.path, space=make_space())
    assert len(Gallery.open(gallery.path)) == 44


def test_a_flipped_bit_is_found(gallery):
    path = next(gallery.path.rglob("*.npy"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert [
        fault for fault in Gallery.open(gallery.path).verify() if "has other bytes than were written" in fault
    ]


def test_half_a_line_at_the_end_of_the_journal_is_a_kill(gallery):
    path = journal(gallery)
    content = path.read_bytes()
    for torn in (content[:-1], content[:-9], content + b"0000", content + bytes(7)):
        path.write_bytes(torn)
        opened = Gallery.open(gallery.path)
        assert len(opened) == (44 if len(torn) > len(content) else 47)
        assert opened.verify() == []
    opened.remove(["image-0040"])  # cuts off what is torn
    assert path.read_bytes()[: len(content)] == content
    assert len(Gallery.open(gallery.path)) == 43


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_whole_line_of_the_journal_that_is_damaged_is_never_taken_for_a_kill(gallery, line):
    path = journal(gallery)
    lines = path.read_bytes().splitlines(keepends=True)
    start = sum(map(len, lines[:line]))
    damaged = bytearray(path.read_bytes())
    damaged[start + 12] ^= 1
    path.write_bytes(damaged)
    words = (
        rf"removals-000000\.log is damaged at byte {start}: which items were removed there is not known; copy"
    )
    for read_only in (True, False):
        with pytest.raises(StoreError, match=words):
            Gallery.open(gallery.path, read_only=read_only)
    assert f"is damaged at byte {start}" in gallery.verify()[0]
    assert path.read_bytes() == damaged  # nobody has written over it


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_journal_that_has_lost_its_removals(gallery, kept):
    reader = Gallery.open(gallery.path, read_only=True)
    gallery.begin_part(make_space("new", seed=1))  # the record says how long the journal is by now
    path = journal(gallery)
    lines, size = path.read_bytes().splitlines(keepends=True), path.stat().st_size
    left = sum(map(len, lines[:kept]))
    with path.open("r+b") as file:
        file.truncate(left)
    words = rf"removals-000000\.log has {left} bytes, but {size} were written: removals are lost"
    with pytest.raises(StoreError, match=words):
        Gallery.open(gallery.path)
    for each in (gallery, reader):
        assert f"has {left} bytes, but {size} were written" in each.verify()[0]
        with pytest.raises(StoreError, match=words):
            each.reload()
    with pytest.raises(StoreError, match=words):
        gallery.remove(["image-0040"])


def test_an_emptied_journal_is_noticed_whatever_the_record_knows(gallery):
    journal(gallery).write_bytes(b"")
    with pytest.raises(StoreError, match=r"has 0 bytes, but .* were written: removals are lost"):
        Gallery.open(gallery.path)


def test_a_journal_of_another_gallery(gallery, tmp_path):
    other = Gallery.create(tmp_path / "h", space=make_space())
    shutil.copy(journal(other), journal(gallery))
    with pytest.raises(
        StoreError, match=r"removals-000000\.log is of another gallery; copy the gallery's files"
    ):
        Gallery.open(gallery.path)


def test_a_gallery_that_vanishes_while_it_is_open(gallery):
    warm, cold = (Gallery.open(gallery.path, read_only=True) for _ in range(2))
    items = dict(zip(names(50), unit(50, 16).numpy(), strict=True))
    items = {name: vector for name, vector in items.items() if name in warm}
    warm.prepare()
    shutil.rmtree(gallery.path)
    assert_finds(warm, items, unit(2, 16, seed=1), 44)  # it is in memory
    with pytest.raises(StoreError, match=r"\.npy cannot be read \(No such file"):
        cold.search(unit(1, 16))
    for each in (warm, cold):
        with pytest.raises(StoreError, match="holds no gallery"):
            each.reload()
    with pytest.raises(StoreError, match=r"cannot be written|holds no gallery"):
        gallery.add(unit(1, 16), ["x"])


def test_a_store_that_vanishes_while_the_gallery_is_open(gallery):
    store = gallery.path / "segments" / "old-000000"
    moved = store.rename(gallery.path.with_name("away"))
    with pytest.raises(
        StoreError, match=r"old-000000 has lost its manifest\.json while the gallery was open"
    ):
        gallery.reload()
    with pytest.raises(StoreError, match="old-000000"):
        gallery.add(unit(1, 16), ["x"])
    moved.rename(store)
    gallery.add(unit(1, 16), ["x"])
    assert len(gallery) == len(Gallery.open(gallery.path)) == 45
    np.testing.assert_array_equal(gallery.vectors(["image-0004"]), unit(50, 16)[4:5])


def test_a_reload_that_fails_in_the_middle_forgets_nothing(gallery, monkeypatch):
    reader = Gallery.open(gallery.path, read_only=True)
    gallery.begin_part(make_space("new", seed=1))
    gallery.add(unit(5, 16, seed=1), names(5, start=60), space=make_space())
    gallery.backfill(unit(2, 16, seed=2), ["image-0020", "image-0061"])
    gallery.remove(["image-0060"])

    def fail(*_):
        raise StoreError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(Contents, "remove", fail)
        with pytest.raises(StoreError, match="away"):
            reader.reload()
        with pytest.raises(StoreError, match="away"):
            reader.search(unit(1, 16))
    assert reader.ids == gallery.ids
    assert len(gallery) == 48


def test_a_reader_refuses_to_write(gallery):
    reader = Gallery.open(gallery.path, read_only=True)
    writes = [
        lambda: reader.add(unit(1, 16), ["x"]),
        lambda: reader.remove(["image-0020"]),
        lambda: reader.begin_part(make_space("new", seed=1)),
        lambda: reader.backfill(unit(1, 16), ["image-0020"]),
        reader.compact,
    ]
    for write in writes:
        with pytest.raises(
            StoreError, match="was opened to be read only; open it without read_only to write"
        ):
            write()


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [
        (unit(2, 16), ["x", "image-0007"], "'image-0007' is already in the gallery"),
        (unit(2, 16), ["x", "x"], "'x' twice"),
        (unit(2, 16), ["x"], "1 entries for 2 vectors"),
        (unit(2, 8), ["x", "y"], "dimension 8, but 16"),
        (np.full((1, 16), np.nan, np.float32), ["x"], "NaN or infinite"),
        (np.zeros((0, 16), np.float32), [], "is empty"),
    ],
)
def test_a_refused_add_leaves_the_gallery_as_it_was(gallery, vectors, ids, message):
    before = {path: path.stat().st_ino for path in gallery.path.rglob("*")}
    with pytest.raises((DataError, SpaceMismatchError), match=message):
        gallery.add(vectors, ids)
    assert {path: path.stat().st_ino for path in gallery.path.rglob("*")} == before
    assert len(gallery) == 44


def test_what_a_store_refuses_leaves_the_gallery_as_it_was(tmp_path):
    gallery = Gallery.create(tmp_path / "g", space=make_space())
    with pytest.raises(DataError, match="do not fit into float16"):
        gallery.add(np.full((1, 16), 1e5, np.float32), ["x"])
    with pytest.raises(StoreError, match="column 'caption' has 2 values for 1 rows"):
        gallery.add(unit(1, 16), ["x"], metadata={"caption": ["a", "b"]})
    with pytest.raises(StoreError, match="the metadata has a column 'id'"):
        gallery.add(unit(1, 16), ["x"], metadata={"id": ["a"]})
    assert len(gallery) == len(Gallery.open(tmp_path / "g")) == 0
    gallery.add(unit(1, 16), ["x"])
    assert gallery.ids == ["x"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["image-0020", "nobody"], "'nobody' is not in the gallery"),
        (["image-0020", "image-0000"], "'image-0000' is not in the gallery"),
        (["image-0020", "image-0020"], "'image-0020' twice"),
        ("image-0020", "is the string"),
    ],
)
def test_a_refused_removal_removes_nothing(gallery, ids, message):
    with pytest.raises(DataError, match=message):
        gallery.remove(ids)
    assert len(gallery) == len(Gallery.open(gallery.path)) == 44


def test_a_foreign_space_is_refused(gallery):
    foreign = make_space("new", seed=1)
    with pytest.raises(SpaceMismatchError, match=r"query vectors .*'new'.*'old'"):
        gallery.search(unit(1, 16), space=foreign)
    with pytest.raises(SpaceMismatchError, match=r"vectors to add .*'new'.*'old'"):
        gallery.add(unit(1, 16), ["x"], foreign)
    with pytest.raises(DataError, match="k is 45, but the gallery has 44"):
        gallery.search(unit(1, 16), 45)
    with pytest.raises(DataError, match="'image-0000' is not in the gallery"):
        gallery.vectors(["image-0000"])
