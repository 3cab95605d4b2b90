"""Writing durably: what a failing disk does, and what is synchronised before a write is acknowledged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from xbt.errors import StoreError
from xbt.files import sync_directory, write_bytes
from xbt.run_dir import write_json
from xbt.store import EmbeddingStore, StoreBuilder
from xbt.store.lock import WriterLock


@pytest.mark.parametrize("call", ["write", "ftruncate", "lseek"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_lock_whose_name_cannot_be_written_is_given_back(tmp_path, monkeypatch, call, code):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    lock = WriterLock(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StoreError, match=r"\.lock"):
            lock.acquire()
    assert not lock.held
    with (
        WriterLock(tmp_path),
        pytest.raises(StoreError, match=rf"is being written by process {os.getpid()}"),
    ):
        lock.acquire()


def test_a_directory_that_cannot_be_synchronised_is_one_sentence(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="cannot be written"):
        sync_directory(tmp_path)


@pytest.fixture
def synced(monkeypatch):
    """Directories and files in the order in which they are synchronised."""
    found, real = [], os.fsync

    def record(handle):
        found.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    monkeypatch.setattr(os, "fsync", record)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names open files by /proc")
def test_the_name_of_every_new_directory_is_synchronised(tmp_path, space, unit_rows, synced):
    store = EmbeddingStore.create(tmp_path / "a" / "b", modality="image", space=space)
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= set(synced)
    synced.clear()
    store.append(unit_rows(2), ["x", "y"])
    assert synced[-1] == str(tmp_path / "a" / "b")  # the manifest's name comes last
    assert str(tmp_path / "a" / "b") in synced[:-1]  # after the names of the folders that are new
    assert any(name.endswith(".partial") for name in synced)
    synced.clear()
    StoreBuilder(tmp_path / "c", modality="text", space=space).prepare()
    assert {str(tmp_path), str(tmp_path / "c"), str(tmp_path / "c" / "in_progress")} <= set(synced)
    synced.clear()
    write_json(tmp_path / "run" / "deep" / "x.json", {})
    assert {str(tmp_path), str(tmp_path / "run"), str(tmp_path / "run" / "deep")} <= set(synced)
    synced.clear()
    write_bytes(tmp_path / "run" / "y", b"1")
    assert str(tmp_path) not in synced  # nothing new there
