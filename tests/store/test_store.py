from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import xbt
from xbt.errors import DataError, SpaceMismatchError, StoreError
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore, StoreBuilder

IDS = ["a", "b", "Bär", "日本.jpg", "with space", "with\nnewline", "🙂"]


def fill(path, space, unit_rows, counts=(3, 1, 7), dtype="float16"):
    """A store with one shard per count; returns it with the rows as numpy keeps them."""
    store = EmbeddingStore.create(path, modality="image", space=space, dtype=dtype)
    parts = []
    for number, count in enumerate(counts):
        parts.append(unit_rows(count, seed=number))
        ids = [f"{number}-{row}" for row in range(count)]
        store.append(parts[-1], ids, {"image_path": [f"/{name}.jpg" for name in ids]})
    return store, np.concatenate(parts).astype(dtype).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_read(tmp_path, space, unit_rows, dtype):
    _, rows = fill(tmp_path / "s", space, unit_rows, dtype=dtype)
    store = xbt.EmbeddingStore.open(tmp_path / "s")
    assert (len(store), store.dim, store.dtype, store.modality) == (11, 8, dtype, "image")
    assert store.space.same_as(space)
    assert store.read().dtype == np.float32
    np.testing.assert_array_equal(store.read(), rows)
    np.testing.assert_array_equal(store.read(2, 5), rows[2:5])
    for size in (1, 4, 11, 50):
        batches = list(store.batches(size))
        np.testing.assert_array_equal(np.concatenate(batches), rows)
        assert {len(batch) for batch in batches[:-1]} <= {size}
    assert store.ids == [f"{n}-{row}" for n, count in enumerate((3, 1, 7)) for row in range(count)]
    assert store.read_ids(2, 5) == ["0-2", "1-0", "2-0"]
    assert store.metadata(["image_path"], 2, 4)["image_path"].to_pylist() == ["/0-2.jpg", "/1-0.jpg"]


def test_random_rows_agree_with_numpy(tmp_path, space, unit_rows):
    store, rows = fill(tmp_path / "s", space, unit_rows, counts=(5, 1, 40, 3))
    generator = np.random.default_rng(0)
    for count in (1, 2, 7, 300):
        indices = generator.integers(0, len(rows), count)
        np.testing.assert_array_equal(store.rows(indices), rows[indices])
    np.testing.assert_array_equal(store.rows(list(range(49))), rows)
    np.testing.assert_array_equal(store.rows(torch.arange(48, -1, -1)), rows[::-1])
    assert store.rows([]).shape == (0, 8)


def test_the_files_are_what_numpy_and_pyarrow_read(tmp_path, space, unit_rows):
    rows = unit_rows(7)
    store = EmbeddingStore.create(tmp_path / "s", modality="text", space=space)
    store.append(torch.from_numpy(rows), IDS, pa.table({"caption": IDS, "length": range(7)}))
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    (shard,) = manifest["shards"]
    array = np.load(tmp_path / "s" / f"text_emb/text_emb_{shard['name']}.npy", allow_pickle=False)
    np.testing.assert_array_equal(array, rows.astype(np.float16))
    table = pq.read_table(tmp_path / "s" / f"metadata/metadata_{shard['name']}.parquet")
    assert table.to_pydict() == {"id": IDS, "caption": IDS, "length": list(range(7))}
    assert len(shard["files"]) == 2
    for name, file in shard["files"].items():
        data = (tmp_path / "s" / name).read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert EmbeddingSpace.from_dict(manifest["space"]).same_as(space)
    assert (manifest["format"], manifest["version"], manifest["count"]) == ("xbt-store", 1, 7)
    assert store.ids == IDS


def test_columns_may_differ_between_shards(tmp_path, space, unit_rows):
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=space)
    store.append(unit_rows(2), ["a", "b"], {"caption": ["x", "y"], "width": [1, 2]})
    store.append(unit_rows(1, 1), ["c"], {"width": [3.5]})
    store.append(unit_rows(1, 2), ["d"])
    assert store.columns == ["caption", "width"]
    assert store.metadata(["caption", "width"]).to_pydict() == {
        "caption": ["x", "y", None, None], "width": [1, 2, 3.5, None],
    }  # fmt: skip
    assert store.metadata(["width"], 3, 4).to_pydict() == {"width": [None]}
    with pytest.raises(StoreError, match=r"no column 'size'; it has caption, width"):
        store.metadata(["size"])


def test_a_range_in_which_no_shard_has_a_column_reads_null(tmp_path, space, unit_rows):
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=space)
    store.append(unit_rows(2), ["a", "b"], {"year": [1999, 2000]})
    store.append(unit_rows(1), ["c"], {"place": ["x"]})
    assert store.metadata(["year", "place"], 2, 3).to_pydict() == {"year": [None], "place": ["x"]}


def test_readers_see_what_they_opened_until_they_reload(tmp_path, space, unit_rows):
    writer, rows = fill(tmp_path / "s", space, unit_rows, counts=(3,))
    reader = EmbeddingStore.open(tmp_path / "s")
    assert len(reader.ids) == 3
    writer.append(unit_rows(2, 9), ["x", "y"])
    assert len(reader) == 3
    np.testing.assert_array_equal(reader.read(), rows)
    reader.reload()
    assert reader.ids[3:] == ["x", "y"]
    np.testing.assert_array_equal(reader.read(3), unit_rows(2, 9).astype(np.float16))


def test_a_second_writer_goes_on_where_the_first_ended(tmp_path, space, unit_rows):
    first, _ = fill(tmp_path / "s", space, unit_rows, counts=(1,))
    second = EmbeddingStore.open(tmp_path / "s")
    second.append(unit_rows(1, 1), ["x"])
    first.append(unit_rows(1, 2), ["y"])
    assert first.ids == ["0-0", "x", "y"]
    with pytest.raises(StoreError, match="the id 'x' is already in"):
        first.append(unit_rows(1), ["x"])


def test_a_store_travels_to_worker_processes(tmp_path, space, unit_rows):
    store, rows = fill(tmp_path / "s", space, unit_rows)
    store.rows([0, 10])
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.rows([10, 0]), rows[[10, 0]])


def test_ids_that_collide_in_their_hash_are_distinct(tmp_path, space, unit_rows, monkeypatch):
    monkeypatch.setattr("xbt.store.metadata.hashes_of", lambda names: np.array([len(n) for n in names]))
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=space)
    store.append(unit_rows(3), ["ab", "c", "de"])
    store.append(unit_rows(2, 1), ["cd", "e"])
    with pytest.raises(StoreError, match="the id 'cd' is already"):
        store.append(unit_rows(2, 2), ["xy", "cd"])
    assert len(store) == 5


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ids": ["a", "b"]}, StoreError, r"3 vectors but 2 ids"),
        ({"ids": ["a", "b", "a"]}, StoreError, r"the id 'a' is there twice"),
        ({"ids": ["a", 7, "c"]}, StoreError, r"the id of row 1 is 7, a int; ids are strings"),
        ({"ids": ["a", "b", "half \ud800"]}, StoreError, r"column 'id' cannot be stored"),
        ({"metadata": {"id": [1, 2, 3]}}, StoreError, r"column 'id', which is reserved; rename it"),
        ({"metadata": {"caption": ["x"]}}, StoreError, r"column 'caption' has 1 values for 3 rows"),
        ({"metadata": {"caption": [object()] * 3}}, StoreError, r"column 'caption' cannot be stored"),
        ({"vectors": np.zeros((0, 8), np.float32), "ids": []}, DataError, r"there are 0 rows to append"),
        ({"vectors": np.full((3, 8), np.nan, np.float32)}, DataError, r"NaN or infinite.* in 3 of 3 rows"),
        ({"vectors": np.full((3, 8), 1e6, np.float32)}, DataError, r"up to 1e\+06 do not fit into float16"),
        ({"vectors": np.zeros((3, 9), np.float32)}, SpaceMismatchError, r"has dimension 9, but 8 is needed"),
        ({"vectors": np.zeros((3, 8), np.int64)}, DataError, r"must be floating point"),
    ],
)  # fmt: skip
def test_what_cannot_be_appended_is_refused_and_changes_nothing(
    tmp_path, space, unit_rows, change, error, words
):
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=space)
    store.append(unit_rows(1, 5), ["old"])
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(error, match=words):
        store.append(**{"vectors": unit_rows(3), "ids": ["a", "b", "c"], **change})
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert EmbeddingStore.open(tmp_path / "s").ids == ["old"]


def test_foreign_spaces_are_refused(tmp_path, space, other_space, unit_rows):
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=space)
    store.append(unit_rows(1), ["a"], space=space)
    with pytest.raises(SpaceMismatchError, match=r"'model-b'.*'model-a'"):
        store.append(unit_rows(1), ["b"], space=other_space)
    with pytest.raises(SpaceMismatchError, match=r"'model-a'.*'model-b'"):
        EmbeddingStore.open(tmp_path / "s", space=other_space)
    with pytest.raises(StoreError, match="a store of image vectors, not of 'text'"):
        EmbeddingStore.open(tmp_path / "s", modality="text")


def test_paths_that_hold_no_store(tmp_path, space, unit_rows):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, words in (
        ("", "path is empty"),
        (tmp_path / "file", "is a file, but a store is a directory"),
        (tmp_path / "none", "there is no store at"),
        (tmp_path / "empty", "holds no store: there is neither a manifest.json nor"),
    ):
        with pytest.raises(StoreError, match=words):
            EmbeddingStore.open(path)
    fill(tmp_path / "s", space, unit_rows)
    with pytest.raises(StoreError, match=r"already holds manifest.json; open that store"):
        EmbeddingStore.create(tmp_path / "s", modality="image", space=space)
    with pytest.raises(StoreError, match="'image' or 'text', got 'audio'"):
        EmbeddingStore.create(tmp_path / "t", modality="audio", space=space)
    with pytest.raises(StoreError, match="'float16' or 'float32', got 'int8'"):
        EmbeddingStore.create(tmp_path / "t", modality="text", space=space, dtype="int8")


def test_numbers_outside_the_store_are_refused(tmp_path, space, unit_rows):
    store, _ = fill(tmp_path / "s", space, unit_rows)
    for indices in ([11], [0, -1]):
        with pytest.raises(StoreError, match=rf"has rows 0 to 10, there is no row {indices[-1]}"):
            store.rows(indices)
    with pytest.raises(StoreError, match="row numbers must be a list of integers"):
        store.rows([0.5])
    with pytest.raises(StoreError, match="3 to 12 is not a range"):
        store.read(3, 12)
    with pytest.raises(StoreError, match="at least 1, got 0"):
        store.batches(0)


def test_an_empty_store_can_be_opened(tmp_path, space):
    EmbeddingStore.create(tmp_path / "s", modality="text", space=space)
    store = EmbeddingStore.open(tmp_path / "s")
    assert (len(store), store.ids, store.columns, list(store.batches(5))) == (0, [], [], [])
    assert store.read().shape == (0, 8)
    store.verify()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_unwritable_place_is_named(tmp_path, space):
    (tmp_path / "s").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        EmbeddingStore.create(tmp_path / "s", modality="text", space=space)


def test_a_place_below_a_file_cannot_be_written(tmp_path, space):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"file/s cannot be written \(Not a directory\)"):
        EmbeddingStore.create(tmp_path / "file" / "s", modality="text", space=space)


def append_under_a_limit(path, rows, answers):
    # A real failure of write(2): the system refuses files above the limit as it refuses them on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))
    store = EmbeddingStore.open(path)
    try:
        store.append(rows, [str(row) for row in range(len(rows))])
    except StoreError as error:
        answers.put(str(error))


def test_a_full_disk_loses_nothing(tmp_path, space, unit_rows):
    _, rows = fill(tmp_path / "s", space, unit_rows)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=append_under_a_limit, args=(tmp_path / "s", unit_rows(1000), answers))
    child.start()
    message = answers.get(timeout=60)
    child.join()
    assert "16128 bytes are needed for" in message
    assert "File too large" in message
    assert "free some space" in message
    assert not list(tmp_path.rglob(".*.partial"))
    store = EmbeddingStore.open(tmp_path / "s")
    store.verify()
    np.testing.assert_array_equal(store.read(), rows)
    store.append(unit_rows(1000), [str(row) for row in range(1000)])
    assert len(store) == 1011


def test_shards_can_be_mapped_as_they_stand_on_disk(tmp_path, space, unit_rows):
    builder = StoreBuilder(tmp_path / "s", modality="image", space=space)
    builder.prepare()
    rows = unit_rows(7)
    builder.write("0", rows[:4], list("abcd"))
    builder.write("1", np.zeros((0, space.dim), np.float32), [])
    builder.write("2", rows[4:], list("efg"))
    maps = builder.finish(["0", "1", "2"]).memory_maps()
    assert [each.shape for each in maps] == [(4, space.dim), (0, space.dim), (3, space.dim)]
    assert all(each.dtype == np.float16 for each in maps)
    assert isinstance(maps[0], np.memmap)
    assert not maps[0].flags.writeable
    assert np.array_equal(np.concatenate(maps), rows.astype(np.float16))


def test_metadata_is_read_in_steps_without_looking_at_every_shard_each_time(
    tmp_path, space, unit_rows, monkeypatch
):
    fill(tmp_path / "s", space, unit_rows, counts=(2, 3, 1, 4, 2, 5))
    whole = EmbeddingStore.open(tmp_path / "s").metadata(["image_path"])["image_path"].to_pylist()
    opened = []
    kept = xbt.store.metadata.pq.ParquetFile
    monkeypatch.setattr("xbt.store.metadata.pq.ParquetFile", lambda path: opened.append(path) or kept(path))
    store = EmbeddingStore.open(tmp_path / "s")
    listed = [
        store.metadata(["image_path"], start, min(start + 2, 17))["image_path"].to_pylist()
        for start in range(0, 17, 2)
    ]
    assert [path for part in listed for path in part] == whole
    # Once for its column names, once for its rows.
    assert max(opened.count(path) for path in opened) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_that_outlives_its_writer_does_not_keep_the_lock(tmp_path, space):
    """The job is killed, its forked workers are not yet gone, and the same command is given again."""
    ready, report = os.pipe()
    writer = os.fork()
    if writer == 0:
        builder = StoreBuilder(tmp_path / "s", modality="image", space=space)
        builder.prepare()
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        os.write(report, str(worker).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(ready, 32))
    try:
        with pytest.raises(StoreError, match=f"is being written by process {writer}"):
            StoreBuilder(tmp_path / "s", modality="image", space=space).prepare()
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        StoreBuilder(tmp_path / "s", modality="image", space=space).prepare()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_files_of_the_user_s_own_stay(tmp_path, space, unit_rows):
    store, _ = fill(tmp_path / "s", space, unit_rows, counts=(2,))
    own = ["metadata/my_labels.parquet", "img_emb/pca_mean.npy", "img_emb/img_emb_mean.npy",
           "metadata/.mine.partial", "img_emb/notes_0.npy"]  # fmt: skip
    stray = ["img_emb/img_emb_000007.npy", "metadata/metadata_0_3.parquet",
             "metadata/.metadata_1.parquet.some-host-12-0badcafe.partial"]  # fmt: skip
    for name in (*own, *stray):
        (tmp_path / "s" / name).write_bytes(b"x")
    store.append(unit_rows(2, 1), ["c", "d"])
    assert [name for name in (*own, *stray) if (tmp_path / "s" / name).is_file()] == own
    EmbeddingStore.open(tmp_path / "s").verify()


@pytest.mark.parametrize(
    ("there", "comes"),
    [([1], ["x"]), (["x"], [1]), ([2**53 + 1], [0.5]), ([0.5], [2**53 + 1]), ([[1]], [{"a": 1}])],
)
def test_a_column_that_could_never_be_read_again_is_refused(tmp_path, space, unit_rows, there, comes):
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=space)
    store.append(unit_rows(1), ["a"], {"w": there})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=r"shard '000001' of .*: column 'w' is .* does not go together with"):
        store.append(unit_rows(1), ["b"], {"w": comes})
    assert sorted(tmp_path.rglob("*")) == before
    EmbeddingStore.open(tmp_path / "s").append(unit_rows(1), ["b"], {"w": [None], "other": comes})
    store.append(unit_rows(1), ["c"], {"w": there})  # what was refused has left no trace
    assert store.metadata(["w"])["w"].to_pylist() == [*there, None, *there]
    store.verify()


def test_ids_may_come_from_a_generator(tmp_path, space, unit_rows):
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=space)
    store.append(unit_rows(3), (f"item {row}" for row in range(3)))
    assert store.ids == ["item 0", "item 1", "item 2"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ids": None}, StoreError, "give a list of strings"),
        ({"ids": "ab"}, StoreError, "give a list of strings"),
        ({"ids": ["a", "\udcff"]}, StoreError, "column 'id' cannot be stored"),
        ({"metadata": 5}, StoreError, "give columns by name"),
        ({"metadata": {3: ["x", "y"]}}, StoreError, "3 cannot name a column"),
        ({"metadata": pa.table([["a", "b"]] * 2, names=["n", "n"])}, StoreError, "'n' cannot name a column"),
        ({"vectors": np.eye(2, 8) * 1.01}, DataError, "row 0 has 1.01; normalise"),
        ({"vectors": [[1.0] * 8, None]}, DataError, "must be a torch tensor or a numpy array"),
    ],
)
def test_what_is_no_column_of_strings_or_unit_rows_is_refused(tmp_path, space, change, error, words):
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=space)
    with pytest.raises(error, match=words):
        store.append(**{"vectors": np.eye(2, 8), "ids": ["a", "b"], **change})
    assert len(EmbeddingStore.open(tmp_path / "s")) == 0
