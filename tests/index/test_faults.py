"""Disks that fail at any write or sync, forks, pickles, and strangers' databases."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fuzzing import damaged, fuzzed, loads_or_refuses
from galleries import as_items, assert_finds, make_space, names, quiet, start, unit
from hypothesis import given
from hypothesis import strategies as st

from xbt.errors import StoreError
from xbt.index import Gallery, RankMerge, segments
from xbt.index import storage as storage_module
from xbt.index.storage import DATABASE

OLD, NEW = make_space("old", dim=8), make_space("new", dim=12, seed=1)
WRITES = {
    "add": lambda gallery: gallery.add(unit(3, 8, seed=4), ["x", "y", "z"], OLD),
    "remove": lambda gallery: gallery.remove(["image-0005", "image-0001"]),
    "backfill": lambda gallery: gallery.backfill(unit(2, 12, seed=5), ["image-0007", "image-0008"], NEW),
    "compact": lambda gallery: gallery.compact(),
}


def make(path):
    gallery = Gallery.create(path, space=OLD, dtype="float32")
    gallery.add(unit(10, 8), names(10), metadata={"caption": names(10)})
    gallery.remove(["image-0000"])
    gallery.begin_part(NEW)
    gallery.backfill(unit(2, 12, seed=3), ["image-0001", "image-0002"])
    return gallery


def state(path):
    with Gallery.open(path, read_only=True) as gallery:
        assert gallery.verify() == []
        return [gallery.ids_of(part.name) for part in gallery.parts]


# -- disks ---------------------------------------------------------------------------------------------


class Failing(sqlite3.Connection):
    """A connection whose statement or commit fails as SQLite's own do on a bad or full disk."""

    left, code = 10**9, "disk I/O error"

    def execute(self, statement, *values):
        if not statement.startswith(("SELECT", "PRAGMA", "ROLLBACK")):
            if Failing.left == 0:
                Failing.left = -1
                raise sqlite3.OperationalError(Failing.code)
            Failing.left -= 1
        return super().execute(statement, *values)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("name", WRITES)
def test_a_disk_that_fails_at_any_step_leaves_the_state_before_or_after(tmp_path, monkeypatch, name, code):
    make(tmp_path / "g").close()
    before = state(tmp_path / "g")
    shutil.copytree(tmp_path / "g", tmp_path / "after")
    WRITES[name](Gallery.open(tmp_path / "after"))
    after = state(tmp_path / "after")
    monkeypatch.setattr(
        storage_module.sqlite3, "connect", lambda *args, real=sqlite3.connect, **options: real(
            *args, **options, factory=Failing)
    )  # fmt: skip
    real, messages = {call: getattr(os, call) for call in ("fsync", "replace", "unlink")}, []
    messages = []
    for step in range(40):
        path = tmp_path / f"{step}"
        shutil.copytree(tmp_path / "g", path)
        Failing.left = 10**9
        gallery, left = Gallery.open(path), [step]

        def failing(call, left=left):
            def run(*arguments, **options):
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(code, os.strerror(code))
                return real[call](*arguments, **options)

            return run

        with monkeypatch.context() as patch:
            for call in real:
                patch.setattr(os, call, failing(call))
            Failing.left = step
            try:
                WRITES[name](gallery)
            except StoreError as error:
                messages.append(str(error))
            else:
                break
        Failing.left = 10**9
        assert state(path) in (before, after)
        gallery.add(unit(1, 8, seed=9), ["later"], OLD)  # the same object goes on
        gallery.remove(["later"])
        assert state(path) in (before, after)
    Failing.left = 10**9
    assert state(path) == after
    assert len(messages) >= 3
    assert not any("\n" in message for message in messages)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read there")
def test_what_is_acknowledged_was_synced_in_this_order(tmp_path, monkeypatch):
    """The file, its name, and only then the transaction; of a new gallery its own name, too."""
    log, real = [], os.fsync

    def fsync(handle):
        log.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        real(handle)

    class Recording(sqlite3.Connection):
        def execute(self, statement, *values):
            if statement == "COMMIT":
                log.append("COMMIT")
            return super().execute(statement, *values)

    connect = sqlite3.connect
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **o: connect(*a, **{"factory": Recording, **o}))
    gallery = Gallery.create(tmp_path / "deep" / "g", space=OLD)
    assert {tmp_path.name, "deep", "g"} <= set(log)
    log.clear()
    gallery.add(unit(5, 8), names(5))
    assert log.index("COMMIT") == len(log) - 1
    assert log[-2] == "segments"
    assert log[-3].startswith(".00000001.npy")
    with gallery.writing():
        (synchronous,) = gallery._state.storage._held.execute("PRAGMA synchronous").fetchone()
        assert synchronous in (2, 3)


def test_on_a_network_disk_there_is_no_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "_file_system", lambda path: "nfs4")
    with pytest.warns(UserWarning, match=r"is on a network disk \(nfs4\): one machine at a time"):
        gallery = Gallery.create(tmp_path / "g", space=OLD)
    gallery.add(unit(5, 8), names(5))
    with gallery.writing():
        assert gallery._state.storage._held.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert Gallery.open(tmp_path / "g").ids == names(5)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_only_be_read(tmp_path):
    make(tmp_path / "g").close()
    (tmp_path / "g").chmod(0o500)
    try:
        gallery = Gallery.open(tmp_path / "g")
        assert gallery.search_mixed(unit(1, 8), unit(1, 12), 3, RankMerge()).ids
        with pytest.raises(StoreError, match="cannot be written"):
            gallery.add(unit(1, 8), ["x"], OLD)
    finally:
        (tmp_path / "g").chmod(0o700)


# -- processes -----------------------------------------------------------------------------------------


def write_in_child(gallery, answers):
    quiet()
    try:
        with gallery.writing():
            gallery.remove(["image-0003"])
        answers.send("written")
    except StoreError as error:
        answers.send(str(error))


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_a_child_forked_while_its_parent_writes_can_neither_write_nor_release(tmp_path):
    gallery = make(tmp_path / "g")
    with gallery.writing():
        gallery.add(unit(1, 8, seed=6), ["inside"], OLD)
        child, here = start(write_in_child, gallery)
        assert f"is being written by process {os.getpid()}" in here.recv()
        child.join(30)
        gallery.remove(["image-0004"])
        other, there = start(write_in_child, Gallery.open(tmp_path / "g"))
        assert "is being written by process" in there.recv()  # the first child has released nothing
        other.join(30)
    child, here = start(write_in_child, gallery)
    assert here.recv() == "written"
    child.join(30)
    gallery.reload()
    assert "inside" in gallery
    assert not {"image-0003", "image-0004"} & set(gallery.ids)
    assert gallery.verify() == []


def test_a_gallery_is_pickled_as_its_path_or_with_its_rows(tmp_path):
    gallery = make(tmp_path / "g")
    again = pickle.loads(pickle.dumps(gallery))
    assert again.ids == gallery.ids
    again.add(unit(1, 8, seed=6), ["x"], OLD)
    reader = pickle.loads(pickle.dumps(Gallery.open(tmp_path / "g", read_only=True)))
    with pytest.raises(StoreError, match="read-only"):
        reader.remove(["x"])
    memory = Gallery.build(unit(9, 8), names(9), OLD, index="HNSW4")
    memory.remove(["image-0002"])
    copy = pickle.loads(pickle.dumps(memory))
    items = {name: row for name, row in as_items(unit(9, 8), names(9)).items() if name != "image-0002"}
    assert_finds(copy, items, unit(2, 8, seed=1))
    assert copy.plan.factory == "HNSW4"


# -- strangers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "g"
    make(path).close()
    return path


def use(path):
    with Gallery.open(path, read_only=True) as gallery:
        gallery.verify()
        for part in gallery.parts:
            if part.count:
                gallery.search(unit(1, part.dim), 1, part=part.name)
                gallery.metadata(gallery.ids_of(part.name)[:1])


VALUES = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=20), st.binary(max_size=40),
    st.sampled_from(["../../x", b"[]", b"[[", "{}", "1e999", b"\xff" * 16]),
)  # fmt: skip
COLUMNS = [
    *((table, column) for table, columns in {
        "setting": ["key", "value"],
        "part": ["number", "name", "space", "dim", "modality", "dtype"],
        "segment": ["number", "part", "count", "sha256", "described", "store", "ids", "metadata"],
        "change": ["version", "segment", "moved", "rows"],
    }.items() for column in columns)
]  # fmt: skip


@fuzzed
@given(place=st.sampled_from(COLUMNS), value=VALUES)
def test_fuzz_a_database_with_an_altered_value(template, place, value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(template, Path(folder) / "g"))
        db = sqlite3.connect(path / DATABASE, isolation_level=None)
        try:
            db.execute(f"UPDATE OR IGNORE {place[0]} SET {place[1]} = ?", (value,))
        except sqlite3.Error:
            return
        finally:
            db.close()
        loads_or_refuses(lambda: use(path))


@fuzzed
@given(data=st.data())
def test_fuzz_a_database_with_damaged_bytes(template, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(template, Path(folder) / "g"))
        (path / DATABASE).write_bytes(data.draw(damaged((template / DATABASE).read_bytes())))
        loads_or_refuses(lambda: use(path))


@fuzzed
@given(data=st.data())
def test_fuzz_a_file_of_vectors_with_damaged_bytes(template, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(template, Path(folder) / "g"))
        file = path / "segments" / "00000001.npy"
        file.write_bytes(data.draw(damaged(file.read_bytes())))
        loads_or_refuses(lambda: use(path))


def test_columns_keep_their_types(tmp_path):
    table = pa.table({"t": pa.array([1, 2], pa.timestamp("us")), "l": [[1], [2, 3]], "f": [0.5, None]})
    gallery = Gallery.create(tmp_path / "g", space=OLD)
    gallery.add(unit(2, 8), ["a", "b"], metadata=table)
    assert Gallery.open(tmp_path / "g").metadata(["b", "a"]).equals(table.take([1, 0]))
    np.testing.assert_array_equal(gallery.vectors(["b"]), unit(2, 8)[1:].half().float())
