"""Galleries whose writers are really killed while others search: nothing acknowledged is lost."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from galleries import make_space, quiet, start, unit

from xbt.index import Gallery, RawMerge

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")
OLD, NEW = make_space("old", dim=8), make_space("new", dim=12, seed=1)
ROWS = 6


def vector_of(name, dim):
    """An item's vector follows from its name alone."""
    seed = [ord(letter) for letter in name]
    row = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return row / np.linalg.norm(row)


def vectors_of(ids, dim):
    return np.stack([vector_of(name, dim) for name in ids])


def write_for_ever(path, round_, log):
    """Adds, moves, removes and updates items, and reports every step before it and after it."""
    quiet()
    draw = np.random.default_rng(round_)
    gallery = Gallery.open(path)
    for step in range(100_000):
        old, new = gallery.ids_of("old"), gallery.ids_of("new")
        what = draw.choice(["add", "add new", "backfill", "remove", "update", "compact"],
                           p=[0.3, 0.15, 0.25, 0.15, 0.1, 0.05])  # fmt: skip
        fresh = [f"{round_}/{step}/{row}" for row in range(ROWS)]
        some = [str(name) for name in draw.permutation(old)[:3]]
        gone = [str(name) for name in draw.permutation([*old, *new])[:3]]
        if what == "add":
            act(log, "add", fresh, gallery.add, vectors_of(fresh, 8), fresh, OLD)
        elif what == "add new":
            act(log, "add", fresh, gallery.add, vectors_of(fresh, 12), fresh, NEW)
        elif what == "backfill" and some:
            act(log, "backfill", some, gallery.backfill, vectors_of(some, 12), some)
        elif what in ("remove", "update") and gone:
            act(log, "remove", gone, gallery.remove, gone)
            if what == "update":
                act(log, "add", gone, gallery.add, vectors_of(gone, 8), gone, OLD)
        elif what == "compact" and old:  # an old part that is empty would be dropped
            act(log, "compact", [], gallery.compact)


def act(log, what, ids, run, *arguments):
    log.send(("begin", time.monotonic(), what, ids))
    run(*arguments)
    log.send(("end", time.monotonic(), what, ids))


def search_for_ever(path, log):
    """Reloads and searches everything, and reports what was found and when the search began."""
    quiet()
    gallery = Gallery.open(path, read_only=True)
    queries = unit(1, 8, seed=1), unit(1, 12, seed=1)
    while True:
        began = time.monotonic()
        gallery.reload()
        count = len(gallery)
        if count:
            found = gallery.search_mixed(*queries, count, RawMerge()).ids[0]
            log.send((began, time.monotonic(), found))


def drain(pipe):
    messages = []
    try:
        while pipe.poll():
            messages.append(pipe.recv())
    except (EOFError, OSError):
        pass
    return messages


class Ledger:
    """What must be in the gallery, by the writer's own account."""

    def __init__(self):
        self.there, self.unsure = {}, {}
        self.added, self.removed = {}, {}

    def follow(self, log):
        for kind, when, what, ids in log:
            if kind == "begin":
                self.unsure = {"what": what, "ids": ids}
                for name in ids if what == "add" else ():
                    self.added.setdefault(name, []).append(when)
            else:
                self.unsure = {}
                for name in ids:
                    if what == "add":
                        self.there[name] = None
                    elif what == "remove":
                        self.there.pop(name)
                        self.removed.setdefault(name, []).append(when)

    def check(self, gallery):
        """What was acknowledged is there once; what was on its way is there wholly or not at all."""
        found = gallery.ids
        assert len(found) == len(set(found)) == len(gallery)
        there, expected = set(found), set(self.there)
        if self.unsure.get("what") == "add":
            assert there in (expected, expected | set(self.unsure["ids"]))
        elif self.unsure.get("what") == "remove":
            assert there in (expected, expected - set(self.unsure["ids"]))
        else:
            assert there == expected
        self.there = dict.fromkeys(found)
        for part, dim in (("old", 8), ("new", 12)):
            ids = gallery.ids_of(part)
            if ids:
                np.testing.assert_array_equal(gallery.vectors(ids), vectors_of(ids, dim))

    def check_search(self, began, ended, found):
        """Nobody was found who had not been added by then, or whose removal was acknowledged before."""
        assert len(found) == len(set(found))
        for name in found:
            assert any(when <= ended for when in self.added.get(name, ())), f"{name} was never added"
            gone = [when for when in self.removed.get(name, ()) if when < began]
            again = [when for when in self.added[name] if gone and when > gone[-1]]
            assert not gone or any(when <= ended for when in again), f"{name} had been removed"


def kill_and_check(tmp_path, kills):
    path = tmp_path / "g"
    gallery = Gallery.create(path, space=OLD, dtype="float32")
    gallery.begin_part(NEW)
    ledger, searches = Ledger(), 0
    for number in range(kills):
        writer, written = start(write_for_ever, path, number)
        reader, found = start(search_for_ever, path)
        assert written.poll(60)
        assert found.poll(60) or not number
        log, results = [], []
        end = time.monotonic() + 0.05 + 0.013 * (number % 40)
        while time.monotonic() < end:
            log += drain(written)
            results += drain(found)
            time.sleep(0.002)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        log += drain(written)
        ledger.follow(log)
        os.kill(reader.pid, signal.SIGKILL)
        reader.join()
        results += drain(found)
        for result in results:
            ledger.check_search(*result)
        searches += len(results)
        opened = Gallery.open(path)
        ledger.check(opened)
        assert opened.verify() == []
        opened.close()
    gallery.reload()
    ledger.check(gallery)
    gallery.add(vectors_of(["last"], 8), ["last"], OLD)
    gallery.remove(["last"])  # so that there is something to be compacted
    gallery.compact()
    ledger.check(gallery)
    assert len(list((path / "segments").iterdir())) == sum(
        len(part.segments) for part in gallery._state.parts
    )
    assert not list(path.rglob("*.partial"))
    return searches


def test_writers_killed_at_any_moment(tmp_path):
    assert kill_and_check(tmp_path, 5) > 0


@pytest.mark.slow
def test_two_hundred_writers_killed_at_any_moment(tmp_path):
    assert kill_and_check(tmp_path, 200) > 200
