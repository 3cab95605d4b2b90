"""Writers that are really killed, really disturb each other, and readers beside them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time

import numpy as np
import pytest

from xbt.errors import StoreError
from xbt.store import EmbeddingStore, StoreBuilder
from xbt.store.lock import WriterLock

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")
FORK = multiprocessing.get_context("fork") if os.name != "nt" else None


def rows_of(number, count=40):
    rows = np.random.default_rng(number).standard_normal((count, 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ids_of(number, count=40):
    return [f"{number}/{row}" for row in range(count)]


def append_for_ever(path, acknowledged):
    store = EmbeddingStore.open(path)
    for number in range(len(store.shards), 10_000):
        store.append(rows_of(number), ids_of(number), {"caption": ids_of(number)})
        acknowledged.send(number)


def build_for_ever(path, space, acknowledged):
    builder = StoreBuilder(path, modality="image", space=space, dtype="float32")
    for number in range(len(builder.committed()), 10_000):
        builder.write(str(number), rows_of(number), ids_of(number), {"caption": ids_of(number)})
        acknowledged.send(number)


def start(target, *arguments):
    """Runs a writer; returns its process and the pipe it reports to, which ends when the writer does."""
    here, there = FORK.Pipe(duplex=False)
    child = FORK.Process(target=target, args=(*arguments, there))
    child.start()
    there.close()
    return child, here


def kill_after(target, arguments, seconds):
    """Runs a writer, kills it, and returns the last number that it reported done."""
    child, here = start(target, *arguments)
    done = -1
    if here.poll(30):
        done = here.recv()
    time.sleep(seconds)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    try:
        while here.poll():
            done = here.recv()
    except EOFError:
        pass
    return done


def assert_holds(store, shards):
    assert len(store) == 40 * shards
    assert store.ids == [name for number in range(shards) for name in ids_of(number)]
    expected = np.concatenate([rows_of(number) for number in range(shards)])
    np.testing.assert_array_equal(store.read(), expected)


def test_an_append_killed_at_any_moment_leaves_a_clean_store(tmp_path, space):
    EmbeddingStore.create(tmp_path, modality="image", space=space, dtype="float32")
    for attempt in range(0, 20, 2):
        done = kill_after(append_for_ever, (tmp_path,), 0.0007 * attempt)
        store = EmbeddingStore.open(tmp_path)
        # What was acknowledged is there; at most the one on its way may be there too, and then whole.
        assert done + 1 <= len(store.shards) <= done + 2
        assert_holds(store, len(store.shards))
    store.verify()
    store.append(rows_of(len(store.shards)), ids_of(len(store.shards)))
    assert not list(tmp_path.rglob("*.partial"))
    assert len(list((tmp_path / "img_emb").iterdir())) == len(store.shards)


def test_a_build_killed_at_any_moment_goes_on(tmp_path, space):
    builder = StoreBuilder(tmp_path, modality="image", space=space, dtype="float32")
    for attempt in range(0, 20, 2):
        builder.prepare()
        done = kill_after(build_for_ever, (tmp_path, space), 0.0007 * attempt)
        assert done + 1 <= len(builder.committed()) <= done + 2
    builder.prepare()
    assert not list(tmp_path.rglob("*.partial"))
    shards = len(builder.committed())
    store = builder.finish(map(str, range(shards)))
    store.verify()
    assert_holds(store, shards)


def hold_the_lock(path, ready):
    with WriterLock(path):
        ready.send(os.getpid())
        time.sleep(60)


def test_a_second_writer_is_refused_and_takes_over_from_a_dead_one(tmp_path, space):
    store = EmbeddingStore.create(tmp_path, modality="image", space=space)
    child, here = start(hold_the_lock, tmp_path)
    holder = here.recv()
    words = rf"is being written by process {holder} on {socket.gethostname()}; wait until it is done"
    with pytest.raises(StoreError, match=words):
        store.append(rows_of(0), ids_of(0))
    assert len(EmbeddingStore.open(tmp_path)) == 0  # reading needs no lock
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    store.append(rows_of(0), ids_of(0))
    assert len(store) == 40


def test_two_jobs_do_not_build_the_same_store(tmp_path, space):
    tmp_path.joinpath("s").mkdir()
    child, here = start(hold_the_lock, tmp_path / "s")
    holder = here.recv()
    builder = StoreBuilder(tmp_path / "s", modality="image", space=space)
    with pytest.raises(StoreError, match=rf"is being written by process {holder} on"):
        builder.prepare()
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    builder.prepare()
    StoreBuilder(tmp_path / "s", modality="image", space=space).prepare()  # the same process may ask again


def test_threads_take_turns(tmp_path, space):
    store = EmbeddingStore.create(tmp_path, modality="image", space=space)
    with WriterLock(tmp_path), pytest.raises(StoreError, match=rf"written by process {os.getpid()} on"):
        store.append(rows_of(0), ids_of(0))


def test_a_lock_file_with_nonsense_in_it_is_no_obstacle(tmp_path, space):
    store = EmbeddingStore.create(tmp_path, modality="image", space=space)
    (tmp_path / ".lock").write_text("nonsense")
    store.append(rows_of(0), ids_of(0))
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_reading_goes_on_during_appends(tmp_path, space):
    EmbeddingStore.create(tmp_path, modality="image", space=space, dtype="float32")
    child, here = start(append_for_ever, tmp_path)
    here.recv()
    sizes = set()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        store = EmbeddingStore.open(tmp_path)
        first = len(store.shards)
        sizes.add(first)
        assert_holds(store, first)
        store.reload()
        assert len(store.shards) >= first
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(sizes) > 3  # it did grow meanwhile
