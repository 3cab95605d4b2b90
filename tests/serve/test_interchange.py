"""npy and Parquet, read back by NumPy and pyarrow alone."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xbt.errors import ConfigError, DataError, StoreError
from xbt.index import Gallery
from xbt.serve import export_interchange
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore


def test_a_store_comes_back_whole(store, tmp_path, old_space):
    assert export_interchange(store, tmp_path / "out") == 60
    vectors = np.load(tmp_path / "out/vectors.npy", allow_pickle=False, mmap_mode="r")
    table = pq.read_table(tmp_path / "out/items.parquet")
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, store.read())
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 16)
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), store.read())
    assert table["id"].to_pylist() == store.ids
    assert table["caption"].to_pylist() == [f"the 'caption' of\n{name}" for name in store.ids]
    assert table["width"].to_pylist() == [*range(40), *[None] * 20]
    about = json.loads((tmp_path / "out/about.json").read_text())
    assert json.loads(table.schema.metadata[b"xbt"]) == about
    assert (about["count"], about["dim"], about["dtype"]) == (60, 16, "float32")
    assert EmbeddingSpace.from_dict(about["space"]).compare(old_space).verified
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "about.json",
        "items.parquet",
        "vectors.npy",
    ]


def test_batches_join_and_columns_keep_out_of_the_way(tmp_path, rows, old_space, monkeypatch):
    monkeypatch.setattr("xbt.index.items.Portion.batches.__defaults__", (7,))
    monkeypatch.setattr("xbt.index.items.AT_ONCE", 7)
    made = EmbeddingStore.create(tmp_path / "store", modality="text", space=old_space, dtype="float16")
    made.append(rows(20), [f"a{n}" for n in range(20)], {"vector": list(range(20))})
    made.append(rows(20, seed=1), [f"b{n}" for n in range(20)], {"vector": [n / 2 for n in range(20)]})
    export_interchange(made, tmp_path / "out")
    table = pq.read_table(tmp_path / "out/items.parquet")
    assert table.column_names == ["id", "vector", "metadata_vector"]
    assert table["metadata_vector"].to_pylist() == [*map(float, range(20)), *[n / 2 for n in range(20)]]
    assert table["id"].to_pylist() == made.ids
    assert np.array_equal(np.load(tmp_path / "out/vectors.npy"), made.read())


def test_parts_of_a_gallery(tmp_path, rows, old_space, new_space):
    gallery = Gallery.build(rows(9), list("abcdefghi"), old_space)
    export_interchange(gallery, tmp_path / "one")
    assert pq.read_table(tmp_path / "one/items.parquet").column_names == ["id", "vector"]
    assert np.array_equal(np.load(tmp_path / "one/vectors.npy"), rows(9))
    gallery.begin_part(new_space)
    gallery.backfill(rows(3, 24), list("beh"), new_space)
    with pytest.raises(DataError, match="has 6 items in 'old' and 3 items in 'new'; name one"):
        export_interchange(gallery, tmp_path / "two")
    with pytest.raises(DataError, match="got 'newest'"):
        export_interchange(gallery, tmp_path / "two", part="newest")
    assert not (tmp_path / "two").exists()
    assert export_interchange(gallery, tmp_path / "two", part="new") == 3
    assert pq.read_table(tmp_path / "two/items.parquet")["id"].to_pylist() == list("beh")
    assert np.array_equal(np.load(tmp_path / "two/vectors.npy"), rows(3, 24))
    assert json.loads((tmp_path / "two/about.json").read_text())["space"]["model"] == "model-new"


def test_a_space_that_nobody_knows_is_none(tmp_path, rows):
    export_interchange(Gallery.build(rows(2), ["a", "b"]), tmp_path / "out")
    assert json.loads((tmp_path / "out/about.json").read_text())["space"] is None


def test_a_source_that_breaks_leaves_nothing(store, tmp_path, monkeypatch):
    read = EmbeddingStore.read

    def breaking(self, start=0, stop=None):
        raise StoreError("the disk is gone")

    monkeypatch.setattr(EmbeddingStore, "read", breaking)
    with pytest.raises(StoreError, match="the disk is gone"):
        export_interchange(store, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr(EmbeddingStore, "read", read)
    export_interchange(store, tmp_path / "out")


def test_wrong_input_is_one_sentence(tmp_path, old_space, store):
    empty = EmbeddingStore.create(tmp_path / "empty", modality="image", space=old_space)
    with pytest.raises(StoreError, match="has no items; add some first"):
        export_interchange(empty, tmp_path / "out")
    with pytest.raises(ConfigError, match="give an EmbeddingStore or a Gallery, not a ndarray"):
        export_interchange(np.zeros((2, 2)), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        export_interchange(store, tmp_path / "file")
