"""Galleries whose files are damaged, gone, or not galleries at all: each is said in one sentence."""

from __future__ import annotations

import json
import shutil
import sqlite3

import numpy as np
import pytest
from galleries import assert_finds, make_space, names, unit

from xbt.errors import DataError, SpaceMismatchError, StoreError
from xbt.index import Gallery
from xbt.index.parts import Parts
from xbt.index.storage import DATABASE


@pytest.fixture
def gallery(tmp_path):
    made = Gallery.create(tmp_path / "g", space=make_space(), dtype="float32")
    made.add(unit(50, 16), names(50))
    made.remove(names(3))
    made.remove(names(3, start=10))
    return made


def sql(path, *statements):
    """Alters a gallery's database behind its back, as a stranger could."""
    db = sqlite3.connect(path / DATABASE, isolation_level=None)
    for statement in statements:
        db.execute(*([statement] if isinstance(statement, str) else statement))
    db.close()


def file_of(path):
    return next((path / "segments").glob("*.npy"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda g: (g / DATABASE).unlink(), r"holds no gallery: there is no gallery\.sqlite; check the path"),
        (lambda g: (g / DATABASE).write_bytes(b""), r"gallery\.sqlite is damaged or not a gallery"),
        (lambda g: (g / DATABASE).write_bytes(b"x" * 5000), r"gallery\.sqlite is damaged .*not a database"),
        (lambda g: (g / DATABASE).write_bytes((g / DATABASE).read_bytes()[:9000]), "is damaged"),
        (lambda g: sql(g, "PRAGMA user_version=99"), "has format version 99, but this xbt reads version 4"),
        (lambda g: sql(g, "PRAGMA application_id=1"), "it is not the database of a gallery"),
        (lambda g: sql(g, "CREATE TABLE more (x)"), "its schema differs in 'more'"),
        (lambda g: sql(g, "CREATE VIEW v AS SELECT 1"), "its schema differs in 'v'"),
        (
            lambda g: sql(g, "CREATE TRIGGER t AFTER INSERT ON segment BEGIN DELETE FROM part; END"),
            "its schema differs in 't'",
        ),
        (lambda g: sql(g, "DROP TABLE change"), "its schema differs in 'change'"),
        (lambda g: sql(g, "DELETE FROM setting WHERE key = 'identity'"), "its settings are"),
        (lambda g: sql(g, "UPDATE setting SET value = '../x' WHERE key = 'generation'"), "its settings are"),
        (lambda g: sql(g, "DELETE FROM part"), r"segment 1 has the part 1|its parts are \[\]"),
        (lambda g: sql(g, "UPDATE part SET name = '../../victim/photos'"), "victim/photos' cannot"),
        (lambda g: sql(g, "UPDATE part SET dim = 'x'"), "its part 'old' cannot be read"),
        (lambda g: sql(g, "UPDATE part SET space = '{}'"), "its part 'old' cannot be read"),
        (lambda g: sql(g, "UPDATE part SET space = NULL, dim = 8"), "has 3328 bytes instead of"),
        (lambda g: sql(g, "UPDATE segment SET count = 1 << 61"), r"has 3328 bytes instead of"),
        (lambda g: sql(g, "UPDATE segment SET count = -1"), "-1 rows"),
        (lambda g: sql(g, "UPDATE segment SET part = 7"), "has the part 7"),
        (lambda g: sql(g, "UPDATE segment SET ids = '[1]'"), "the ids of a segment cannot be read"),
        (lambda g: sql(g, ("UPDATE segment SET ids = ?", (b"[" * 100_000,))), "the ids of a segment cannot"),
        (lambda g: sql(g, ("UPDATE segment SET ids = ?", (b"[1]",))), "does not have one string id per row"),
        (lambda g: sql(g, "UPDATE segment SET store = '{}'"), "the store of a segment cannot be read"),
        (
            lambda g: sql(g, ("UPDATE segment SET store = ?", (
                '{"path": "/x", "nearby": "../../secret", "digest": "' + "0" * 64 + '"}',))),
            "leaves its folder",
        ),
        (lambda g: sql(g, ("UPDATE change SET rows = ?", (b"1234567",))), "its change 1 cannot be read"),
        (
            lambda g: sql(g, ("UPDATE change SET rows = ?", (b"\xff" * 8,))),
            "a change names rows that segment 1 does not have",
        ),
        (lambda g: shutil.rmtree(g / "segments"), r"00000001\.npy with 50 rows of the gallery is missing"),
        (lambda g: file_of(g).write_bytes(b"x"), r"00000001\.npy has 1 bytes instead of"),
        (
            lambda g: file_of(g).write_bytes(b"y" + file_of(g).read_bytes()[1:]),
            r"00000001\.npy has a wrong header",
        ),
    ],
)  # fmt: skip
def test_opening_names_what_is_damaged_or_altered(gallery, damage, message):
    damage(gallery.path)
    with pytest.raises(StoreError, match=message):
        Gallery.open(gallery.path)
    assert not (gallery.path.parent / "victim").exists()


def test_a_change_of_a_row_that_is_not_a_number_is_refused(gallery):
    sql(gallery.path, "UPDATE change SET segment = 'x'")
    assert len(Gallery.open(gallery.path)) == 50  # it is of no segment of the gallery


def test_nan_in_a_file_is_named_by_its_row(gallery):
    path = file_of(gallery.path)
    content = bytearray(path.read_bytes())
    content[128 + 4 * 16 * 31 : 128 + 4 * 16 * 31 + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    opened = Gallery.open(gallery.path)
    with pytest.raises(StoreError, match=r"00000001\.npy has NaN or infinite values in row 31"):
        opened.search(unit(1, 16), 3)
    assert "has other bytes than were written" in opened.verify()[0]


def test_ids_that_were_altered_are_found(gallery):
    ids = json.dumps([f"other-{row}" for row in range(50)]).encode()
    sql(gallery.path, ("UPDATE segment SET ids = ?", (ids,)))
    assert "has other ids or metadata of 00000001.npy" in Gallery.open(gallery.path).verify()[0]


def test_a_folder_that_is_a_link_is_not_written_through(gallery, tmp_path):
    (gallery.path / "segments").rename(tmp_path / "outside")
    (gallery.path / "segments").symlink_to(tmp_path / "outside")
    before = sorted(path.name for path in (tmp_path / "outside").iterdir())
    opened = Gallery.open(gallery.path)
    with pytest.raises(StoreError, match="is a link, and links are not followed"):
        opened.add(unit(1, 16), ["x"])
    with pytest.raises(StoreError, match="is a link, and links are not followed"):
        opened.compact()
    assert sorted(path.name for path in (tmp_path / "outside").iterdir()) == before


def test_a_gallery_that_vanishes_while_it_is_open(gallery):
    readers = [Gallery.open(gallery.path, read_only=True) for _ in range(2)]
    items = dict(zip(names(50), unit(50, 16).numpy(), strict=True))
    items = {name: vector for name, vector in items.items() if name in readers[0]}
    readers[0].prepare()
    shutil.rmtree(gallery.path)
    for each in readers:  # it is in memory, or its files are mapped
        assert_finds(each, items, unit(2, 16, seed=1), 44)
        with pytest.raises(StoreError, match="holds no gallery"):
            each.reload()
    with pytest.raises(StoreError, match=r"cannot be written|holds no gallery"):
        gallery.add(unit(1, 16), ["x"])


def test_a_reload_that_fails_in_the_middle_forgets_nothing(gallery, monkeypatch):
    reader = Gallery.open(gallery.path, read_only=True)
    gallery.begin_part(make_space("new", seed=1))
    gallery.add(unit(5, 16, seed=1), names(5, start=60), space=make_space())
    gallery.backfill(unit(2, 16, seed=2), ["image-0020", "image-0061"])
    gallery.remove(["image-0060"])

    def fail(*_):
        raise StoreError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "mask", fail)
        with pytest.raises(StoreError, match="away"):
            reader.reload()
        with pytest.raises(StoreError, match="away"):
            reader.search(unit(1, 16))
    assert reader.ids == gallery.ids
    assert len(gallery) == 48


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
        with pytest.raises(StoreError, match="was opened read-only; open it without read_only to write"):
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
