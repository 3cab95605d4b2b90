"""Writers that end at one chosen step: killed, refused, or out of disk space."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sqlite3
import time
from pathlib import Path

import pytest
from galleries import assert_finds, make_space, names, quiet, start, unit

from xbt.errors import StoreError
from xbt.index import Gallery
from xbt.store.lock import WriterLock

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")
OLD, NEW = make_space("old", dim=8), make_space("new", dim=12, seed=1)


def killed_before(step, path, write, _):
    """Kills itself before one of the moments at which something becomes visible or vanishes."""
    quiet()
    count = 0

    def counted(function):
        def run(*arguments, **options):
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*arguments, **options)

        return run

    for name in ("replace", "unlink", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    os.fsync = counted(os.fsync)

    class Connection(sqlite3.Connection):
        """Statements that write, and the end of a connection, are moments as well."""

        def execute(self, statement, *values):
            reads = statement.startswith(("SELECT", "PRAGMA"))
            return (super().execute if reads else counted(super().execute))(statement, *values)

        def close(self):
            counted(super().close)()

    real = sqlite3.connect
    sqlite3.connect = lambda *values, **options: real(*values, **options, factory=Connection)
    write(Gallery.open(path))


def rewrite(gallery):
    gallery.remove(names(5))
    gallery.add(unit(5, 8, seed=9), names(5), space=OLD)
    gallery.backfill(unit(5, 12, seed=9), names(5, start=5))
    gallery.compact()


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_before_a_step_leaves_one_of_the_states_between(tmp_path, stride):
    reached = set()
    for step in range(0, 400, stride):
        path = tmp_path / str(step)
        made = Gallery.create(path, space=OLD, dtype="float32")
        made.add(unit(20, 8), names(20))
        made.begin_part(NEW)
        made.close()
        child, _ = start(killed_before, step, path, rewrite)
        child.join(60)
        gallery = Gallery.open(path)
        state = state_of(gallery)
        reached.add(state)
        assert gallery.verify() == []
        finish(gallery, state)
        if child.exitcode == 0:
            break
    assert child.exitcode == 0, "there are more steps than were tried"
    assert reached == {"before", "removed", "added", "backfilled"}


def state_of(gallery):
    """Which of the writes has happened; every item must stand where that write has put it."""
    old, new = gallery.ids_of("old"), gallery.ids_of("new")
    states = {
        "before": (names(20), []),
        "removed": (names(15, start=5), []),
        "added": ([*names(15, start=5), *names(5)], []),
        "backfilled": ([*names(10, start=10), *names(5)], names(5, start=5)),
    }
    return next(name for name, parts in states.items() if parts == (old, new))


def finish(gallery, state):
    """Whoever comes next can write what the killed one has not."""
    order = ["before", "removed", "added", "backfilled"]
    steps = [
        lambda: gallery.remove(names(5)),
        lambda: gallery.add(unit(5, 8, seed=9), names(5), space=OLD),
        lambda: gallery.backfill(unit(5, 12, seed=9), names(5, start=5)),
    ]
    for step in steps[order.index(state) :]:
        step()
    gallery.compact()
    items = dict(zip(names(20), unit(20, 8).numpy(), strict=True)) | dict(
        zip(names(5), unit(5, 8, seed=9).numpy(), strict=True)
    )
    left = {name: items[name] for name in [*names(10, start=10), *names(5)]}
    assert_finds(gallery, left, unit(2, 8, seed=3), part="old")
    assert gallery.verify() == []
    assert len(list((gallery.path / "segments").iterdir())) == 2
    assert not list(gallery.path.rglob("*-wal"))


# -- one writer at a time ------------------------------------------------------------------------------


def hold_the_lock(path, ready):
    with WriterLock(path):
        ready.send(os.getpid())
        time.sleep(60)


def test_a_second_writer_is_refused_by_name_and_takes_over_from_a_dead_one(tmp_path):
    gallery = Gallery.create(tmp_path / "g", space=OLD)
    gallery.add(unit(20, 8), names(20))
    child, here = start(hold_the_lock, tmp_path / "g")
    holder = here.recv()
    words = rf"is being written by process {holder} on {socket.gethostname()}; wait until it is done"
    writes = [
        lambda: gallery.add(unit(1, 8), ["x"]),
        lambda: gallery.remove(["image-0001"]),
        lambda: gallery.begin_part(NEW),
        lambda: gallery.compact(),
    ]
    for write in writes:
        with pytest.raises(StoreError, match=words):
            write()
    assert len(Gallery.open(tmp_path / "g")) == 20  # reading needs no lock
    assert gallery.search(unit(1, 8), 20).ids
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    for write in writes:
        if write is not writes[0]:
            write()
    assert len(gallery) == 19


# -- a disk that is full -------------------------------------------------------------------------------


def write_under_a_limit(path, largest, write, answers):
    # A real failure of write(2): the system refuses files above the limit as it refuses them on a full disk.
    quiet()
    gallery = Gallery.open(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    try:
        write(gallery)
    except StoreError as error:
        answers.send((str(error), gallery.ids))


@pytest.mark.parametrize(
    ("largest", "write", "where"),
    [
        (62_000, lambda g: g.add(unit(2000, 8), names(2000, start=3000), space=OLD), "00000002.npy"),
        (62_000, lambda g: g.backfill(unit(1400, 12), names(1400, start=500)), "00000002.npy"),
        (8_000, lambda g: g.remove(names(1500, start=300)), "gallery.sqlite"),
        (62_000, lambda g: g.compact(), "00000002.npy"),
    ],
)
def test_a_full_disk_loses_nothing(tmp_path, largest, write, where):
    gallery = Gallery.create(tmp_path / "g", space=OLD, dtype="float32")
    gallery.add(unit(2000, 8), names(2000))
    gallery.begin_part(NEW)
    gallery.remove(names(10, start=100))
    ids = gallery.ids
    child, here = start(write_under_a_limit, tmp_path / "g", largest, write)
    assert here.poll(60)
    message, after = here.recv()
    child.join()
    assert (
        "bytes are needed for" in message
        or "cannot be read or written" in message
        or "disk is full" in message
    )
    assert where in message
    assert after == ids
    fresh = Gallery.open(tmp_path / "g")
    assert fresh.ids == ids
    assert fresh.verify() == []
    write(fresh)
    assert not list((tmp_path / "g").rglob(".*.partial"))
