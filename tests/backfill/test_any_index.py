"""A backfill of an index in a database: the job of a gallery, by the methods of the protocol alone."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from backfills import COUNT, SCENES, lines, order_of, others, scenes
from galleries import FORK, quiet
from qdrant_rest import RestServer

from xbt.backfill import load_merge, run_backfill, target
from xbt.errors import ConfigError, DataError, StoreError
from xbt.index import Gallery, QdrantIndex, VectorIndex
from xbt.index.target import pending


@pytest.fixture
def server():
    """A stand-in for a server."""
    return RestServer()


@pytest.fixture
def index(server, old, old_vectors):
    """A collection of 60 scenes that the old model has embedded."""
    made = QdrantIndex.create(server.client(), "photos", space=old.space)
    made.add(old_vectors, SCENES.ids, old.space)
    return made


def test_a_collection_of_qdrant(config, index, old, new, new_vectors, old_vectors, tmp_path):
    result = run_backfill(config(gallery="photos", evaluation=scenes(), support=others()), index)
    assert (result.items, result.fraction, result.why) == (COUNT, 1.0, "nothing is left to do")
    assert sorted(order_of(tmp_path / "out")) == sorted(SCENES.ids)
    assert np.abs(index.fetch(SCENES.ids, "new") - new_vectors.numpy()).max() <= 1e-6
    assert np.abs(index.fetch(SCENES.ids, "old") - old_vectors.numpy()).max() <= 1e-6
    assert index.search(new_vectors[:5], 1, new.space, using="new").ids == [[name] for name in SCENES.ids[:5]]
    merge = load_merge(tmp_path / "out", old.space, new.space)  # there is no gallery to keep it
    curve = lines(tmp_path / "out" / "curve.jsonl")
    assert [(point["position"], point["fraction"]) for point in curve] == [
        (0, 0), (20, 20 / COUNT), (40, 40 / COUNT), (60, 1)
    ]  # fmt: skip
    assert index.search_mixed(old_vectors[:2], new_vectors[:2], 1, merge).ids == [
        [name] for name in SCENES.ids[:2]
    ]


@pytest.mark.parametrize("order", ["oldest", "distance_to_mean"])
def test_the_order_and_the_result_are_those_of_a_gallery(config, gallery, index, tmp_path, order):
    """The collection lists its items in another order than the gallery."""
    options = {"order": order, "clusters": 4, "max_items": 30}
    run_backfill(config(**options, gallery="photos"), index)
    listed = [name for batch in index.scan() for name in batch.ids]
    copied = Gallery.create(tmp_path / "copied", space=index.space, dtype="float32")
    copied.add(index.fetch(listed, "old"), listed)
    run_backfill(config(**options, gallery=str(copied.path), output_dir=str(tmp_path / "of_gallery")))
    assert order_of(tmp_path / "out") == order_of(tmp_path / "of_gallery")
    copied.reload()
    moved = copied.ids_of("new")
    assert np.abs(copied.fetch(moved, "new") - index.fetch(moved, "new")).max() <= 1e-6
    assert index.info().vectors["new"].count == len(moved) == 30


def test_a_server_that_fails_amid_a_write_and_items_that_change(
    config, server, index, old, monkeypatch, tmp_path
):
    real, writes = QdrantIndex.upsert, []

    def failing(self, ids, vectors, name):
        writes.append(ids)
        if len(writes) == 3:
            real(self, ids[:4], vectors[:4], name)  # part of a chunk has arrived
            raise StoreError("Qdrant could not write: the connection is lost; run again")
        real(self, ids, vectors, name)

    monkeypatch.setattr(QdrantIndex, "upsert", failing)
    with pytest.raises(StoreError, match="the connection is lost"):
        run_backfill(config(gallery="photos"), index)
    monkeypatch.undo()
    assert index.info().vectors["new"].count == 24
    order = order_of(tmp_path / "out")
    index.remove([order[30]])
    index.add(old.encode_images([SCENES.image(0)]), ["stranger"], old.space)
    result = run_backfill(config(gallery="photos"), QdrantIndex.open(server.client(), "photos"))
    assert (result.items, result.rejected, result.total) == (COUNT - 25, 1, COUNT + 1)
    assert order_of(tmp_path / "out") == [*order, "stranger"]
    assert pending(index, "new") == ["stranger"]


def run_and_die(job, folder, write):
    quiet()
    real, writes = QdrantIndex.upsert, 0

    def counting(self, *arguments):
        nonlocal writes
        real(self, *arguments)
        writes += 1
        if writes == write:
            os.kill(os.getpid(), signal.SIGKILL)

    QdrantIndex.upsert = counting
    run_backfill(job, QdrantIndex.open(folder, "photos"))


@pytest.mark.skipif(FORK is None, reason="needs fork and SIGKILL")
def test_killed_and_continued(config, old, old_vectors, new_vectors, tmp_path):
    folder = str(tmp_path / "qdrant")
    made = QdrantIndex.create(folder, "photos", space=old.space)
    made.add(old_vectors, SCENES.ids, old.space)
    made.close()
    child = FORK.Process(target=run_and_die, args=(config(gallery=folder), folder, 3))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    index = QdrantIndex.open(folder, "photos")
    result = run_backfill(config(gallery=folder), index)
    assert (result.items, result.fraction) == (COUNT - 30, 1.0)
    assert np.abs(index.fetch(SCENES.ids, "new") - new_vectors.numpy()).max() <= 1e-6
    index.close()


def test_locations_of_indexes(config, server, index, monkeypatch, tmp_path):
    asked = []

    def opening(location, collection):
        asked.append((location, collection))
        return QdrantIndex(server.client(), collection)

    monkeypatch.setattr(target.QdrantIndex, "open", opening)
    assert run_backfill(config(gallery="qdrant://db:6333/photos", max_items=10)).items == 10
    assert asked == [("http://db:6333", "photos")]
    assert isinstance(index, VectorIndex)
    for location in ("qdrant://db:6333", "milvus://db/photos"):
        with pytest.raises(ConfigError, match=r"names no index; give the directory of a gallery, or qdrant:"):
            target.open_target(location)
    with pytest.raises(ConfigError, match=r"--store makes a gallery, but qdrant://db/photos is a database"):
        target.open_target("qdrant://db/photos", "store")


def test_an_index_of_the_new_model_alone(config, server, new, new_vectors):
    made = QdrantIndex.create(server.client(), "done", space=new.space)
    made.add(new_vectors, SCENES.ids)
    with pytest.raises(DataError, match=r"the gallery done is of the space of .* already"):
        run_backfill(config(gallery="done"), made)
