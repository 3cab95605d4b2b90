"""Threads that search a gallery while others write to it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from galleries import make_space, names, unit

from xbt.index import Gallery, faiss_index


@pytest.fixture(params=["Flat", "IVF2,Flat"])
def gallery(tmp_path, request, monkeypatch):
    """An exact gallery, and one whose index is made again all the time and finds everything."""
    monkeypatch.setattr(faiss_index, "ROWS_PER_CENTROID", 10)
    monkeypatch.setattr(faiss_index, "LEAST_TAIL", 5)
    tuning = "" if request.param == "Flat" else "nprobe=2"
    made = Gallery.create(
        tmp_path / "g", space=make_space(), dtype="float32", index=request.param, tuning=tuning
    )
    made.add(unit(50, 16), names(50))
    return made


def test_threads_search_while_one_writes(gallery):
    """Every result must be that of one moment: a block of ten items is there wholly or not at all."""
    probe = unit(1, 16, seed=50).numpy()
    problems, stop = [], threading.Event()

    def search():
        while not stop.is_set():
            try:
                found = gallery.search(probe, 10).ids[0]
            except Exception as error:
                problems.append(error)
                return
            if (
                len({name.split("/")[0] for name in found if "/" in name}) > 1
                or 0 < sum("/" in name for name in found) < 10
            ):
                problems.append(found)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(30):
        ids = [f"{number}/{i}" for i in range(10)]
        gallery.add(np.repeat(probe, 10, axis=0), ids)
        gallery.remove(ids)
        if number % 10 == 9:
            gallery.compact()
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(gallery) == 50


def test_threads_that_write_take_turns(gallery):
    def write(number):
        for i in range(5):
            gallery.add(unit(2, 16, seed=number), [f"{number}/{i}/a", f"{number}/{i}/b"])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gallery) == len(set(gallery.ids)) == 90
    assert Gallery.open(gallery.path).ids == gallery.ids
