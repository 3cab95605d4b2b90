"""Approximate indexes: against bare FAISS, and against exact search where they are exhaustive."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import warnings

import faiss
import numpy as np
import pytest
from galleries import as_items, assert_finds, brute_force, make_space, names, unit

from xbt.errors import ConfigError, DataError
from xbt.index import Gallery, RawMerge, faiss_index, views

N, DIM = 3000, 16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes at which an index is worth it in a test."""
    monkeypatch.setattr(faiss_index, "ROWS_PER_CENTROID", 40)
    monkeypatch.setattr(faiss_index, "LEAST_TAIL", 100)


def make(tmp_path, index, tuning="", n=N):
    gallery = Gallery.create(tmp_path / "g", space=make_space(), dtype="float32", index=index, tuning=tuning)
    gallery.add(unit(n, DIM), names(n))
    return gallery


def recall(found, exact):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, exact, strict=True)])


@pytest.mark.parametrize(
    ("index", "tuning", "least"),
    [
        ("IVF16,Flat", "nprobe=16", 1.0),
        ("IVF16,Flat", "", 0.6),
        ("HNSW16", "efSearch=200", 0.98),
        ("IVF16,PQ8x4", "nprobe=16", 0.9),
        ("PQ8x4", "", 0.9),
        ("PCAR12,IVF16,SQ8", "nprobe=16", 0.7),
        ("SQfp16", "", 1.0),
    ],
)
def test_what_is_found_is_scored_exactly(tmp_path, index, tuning, least):
    gallery = make(tmp_path, index, tuning)
    queries = unit(50, DIM, seed=1)
    found = gallery.search(queries, 10)
    exact, scores = brute_force(unit(N, DIM), names(N), queries, 10)
    assert recall(found.ids, exact) >= least
    products = np.einsum("qd,qkd->qk", queries, [gallery.vectors(row) for row in found.ids])
    np.testing.assert_allclose(found.scores, products, atol=1e-6)
    assert (np.diff(found.scores) <= 0).all()
    if least == 1:
        assert found.ids == exact
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)


def test_an_inverted_file_finds_what_bare_faiss_finds(tmp_path):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=3")
    vectors, queries = unit(N, DIM).numpy(), unit(20, DIM, seed=1).numpy()
    bare = faiss.index_factory(DIM, "IVF16,Flat", faiss.METRIC_INNER_PRODUCT)
    bare.train(vectors)
    bare.add(vectors)
    bare.nprobe = 3
    scores, rows = bare.search(queries, 10)
    found = gallery.search(queries, 10)
    assert found.ids == [[names(N)[i] for i in row] for row in rows]
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)


@pytest.mark.parametrize("index", ["IVF16,Flat", "HNSW16"])
def test_removed_items_are_never_found_and_later_ones_are(tmp_path, index):
    gallery = make(tmp_path, index, "nprobe=16" if index.startswith("IVF") else "efSearch=4000")
    gallery.prepare()
    items = as_items(unit(N, DIM), names(N))
    near = brute_force(unit(N, DIM), names(N), unit(1, DIM, seed=1), 400)[0][0]
    gallery.remove(near)
    items = {name: vector for name, vector in items.items() if name not in set(near)}
    gallery.add(unit(50, DIM, seed=5), names(50, start=N))
    items |= as_items(unit(50, DIM, seed=5), names(50, start=N))
    for each in (gallery, Gallery.open(gallery.path)):
        found = each.search(unit(20, DIM, seed=1), 10)
        exact = brute_force(np.stack(list(items.values())), list(items), unit(20, DIM, seed=1), 10)[0]
        assert not set(near) & {name for row in found.ids for name in row}
        assert recall(found.ids, exact) == 1 if index.startswith("IVF") else recall(found.ids, exact) > 0.97
    # Most rows are removed: the index is made again.
    gallery.remove(list(items)[: len(items) - 1000])
    items = dict(list(items.items())[-1000:])
    assert_finds(gallery, items, unit(5, DIM, seed=2), 10)


def test_a_query_for_which_the_index_finds_too_few_is_searched_exactly(tmp_path):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=1")
    items = as_items(unit(N, DIM), names(N))
    assert_finds(gallery, items, unit(3, DIM, seed=1), N)
    assert_finds(gallery, items, unit(3, DIM, seed=1), 1500)


@pytest.mark.parametrize("index", ["IVF16,Flat", "HNSW16"])
def test_a_part_that_becomes_small_is_searched_exactly(tmp_path, index):
    """As the old one does in a backfill, until nothing of it is left."""
    gallery = make(tmp_path, index)
    gallery.prepare()
    gallery.begin_part(make_space("new", seed=1))
    left = as_items(unit(N, DIM), names(N))
    for start, stop in ((0, 2900), (2900, N)):
        gallery.backfill(unit(N, DIM, seed=9)[start:stop], names(stop - start, start))
        left = dict(list(left.items())[stop - start :])
        if left and index.startswith("IVF"):
            assert_finds(gallery, left, unit(3, DIM, seed=1), 10, part="old")
        for mmap in {False, index.startswith("IVF")}:
            each = Gallery.open(gallery.path, read_only=True, mmap=mmap)
            found = each.search_mixed(unit(3, DIM, seed=1), unit(3, DIM, seed=2), 10, RawMerge())
            assert found.scores.shape == (3, 10)
    gallery.compact()
    assert len(gallery) == N


def test_a_small_part_is_searched_exactly(tmp_path):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=1", n=600)
    assert_finds(gallery, as_items(unit(600, DIM), names(600)), unit(9, DIM, seed=1), 10)
    assert not (gallery.path / "index").exists()


@pytest.mark.parametrize(
    ("index", "rows"),
    [("HNSW16", 1), ("IVF64,Flat", 64 * 40), ("IVF64,PQ8", 256 * 40), ("OPQ8,IVF64,PQ8x4", 256 * 40),
     ("PQ8x4", 16 * 40), ("SQ8", 40), ("PCA8,IVF4,Flat", 160), ("IVF4,Flat,RFlat", 160)],
)  # fmt: skip
def test_from_how_many_rows_on_an_index_is_made(index, rows):
    assert faiss_index.IndexPlan(index).fewest_rows(DIM) == rows


def test_in_memory_too(monkeypatch):
    gallery = Gallery.build(unit(N, DIM), names(N), index="IVF16,Flat", tuning="nprobe=16")
    gallery.add(unit(10, DIM, seed=3), names(10, start=N))
    gallery.remove(["image-0000"])
    items = as_items(unit(N, DIM), names(N)) | as_items(unit(10, DIM, seed=3), names(10, start=N))
    del items["image-0000"]
    assert_finds(gallery, items, unit(5, DIM, seed=1), 10)


# -- the cache -----------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """Counts how often an index is made."""
    made, train = [], faiss_index.train

    def counting(*arguments):
        made.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(faiss_index, "train", counting)
    return made


def test_an_index_is_kept_on_disk(tmp_path, trained):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=4")
    before = gallery.search(unit(9, DIM, seed=1), 10)
    assert len(trained) == 1
    files = sorted(path.suffix for path in (gallery.path / "index").iterdir())
    assert files == [".faiss", ".json", ".rows"]
    for options in ({}, {"read_only": True}, {"mmap": True}, {"read_only": True, "mmap": True}):
        after = Gallery.open(gallery.path, **options).search(unit(9, DIM, seed=1), 10)
        assert after.ids == before.ids
        assert np.array_equal(after.scores, before.scores)
    assert len(trained) == 1
    gallery.add(unit(900, DIM, seed=3), names(900, start=N))
    gallery.prepare()
    assert len(trained) == 2
    assert len(list((gallery.path / "index").iterdir())) == 3
    assert gallery.verify() == []


@pytest.mark.parametrize("mmap", [False, True])
def test_a_damaged_or_missing_index_is_made_again(tmp_path, trained, mmap):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=16")
    items = as_items(unit(N, DIM), names(N))
    gallery.prepare()

    def file(suffix):
        return next((gallery.path / "index").glob(f"*{suffix}"))

    def spoil(path):
        path.write_bytes(path.read_bytes()[:-100])

    damages = [
        lambda: spoil(file(".faiss")),
        lambda: spoil(file(".rows")),
        lambda: file(".faiss").unlink(),
        lambda: file(".json").write_text("{"),
        lambda: file(".json").write_text("{}"),
        lambda: file(".json").write_text('{"index": "IVF16,Flat", "upto": 7, "segments": 3}'),
        lambda: shutil.rmtree(gallery.path / "index"),
    ]
    for number, damage in enumerate(damages):
        damage()
        if number < 3:
            assert "is missing or damaged: remove" in gallery.verify()[0]
        assert_finds(Gallery.open(gallery.path, mmap=mmap), items, unit(5, DIM, seed=1), 10)
        assert len(trained) == number + 2
        assert gallery.verify() == []


def test_an_index_of_other_files_is_not_used(tmp_path, trained):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=16")
    gallery.prepare()
    gallery.remove(names(1000))
    gallery.compact()
    items = dict(list(as_items(unit(N, DIM), names(N)).items())[1000:])
    assert_finds(gallery, items, unit(5, DIM, seed=1), 10)
    assert len(trained) == 2


def test_a_reader_writes_nothing(tmp_path):
    gallery = make(tmp_path, "IVF16,Flat")
    for mmap in (False, True):
        Gallery.open(gallery.path, read_only=True, mmap=mmap).search(unit(1, DIM), 3)
        assert not (gallery.path / "index").exists()


def test_a_reader_that_maps_searches_exactly_until_there_is_an_index(tmp_path, monkeypatch):
    """Block by block, with nothing kept in memory: throughout a backfill, and after compacting."""
    monkeypatch.setattr(views, "ROWS_AT_ONCE", 256)
    gallery, (old, new) = make(tmp_path, "IVF16,Flat", "nprobe=1"), (make_space(), make_space("new", seed=1))
    gallery.begin_part(new)
    reader = Gallery.open(gallery.path, read_only=True, mmap=True)
    olds, news = as_items(unit(N, DIM), names(N)), {}
    for start, stop in ((0, 500), (500, 800), (800, 2000)):  # from 640 rows on an index is wanted
        some = as_items(unit(stop - start, DIM, seed=stop), names(stop - start, start))
        gallery.backfill(np.stack(list(some.values())), list(some), new)
        news |= some
        olds = {name: vector for name, vector in olds.items() if name not in some}
        reader.reload()
        assert_finds(reader, olds, unit(9, DIM, seed=1), 10, part="old", space=old)
        assert_finds(reader, news, unit(9, DIM, seed=1), 10, part="new", space=new)
    seen = reader._state.views()
    assert [view.exact for view in seen] == [None, None]
    gallery.prepare_index()
    reader.reload()  # no row has come, but the index has
    assert [len(view.index.rows) for view in reader._state.views()] == [1000, 2000]
    gallery.remove([next(iter(news))])  # otherwise the new part, and with it the index, stays as it is
    del news[next(iter(news))]
    gallery.compact()
    reader.reload()
    assert_finds(reader, olds, unit(9, DIM, seed=1), 10, part="old", space=old)
    again = Gallery.open(gallery.path, read_only=True, mmap=True)
    assert_finds(again, news, unit(9, DIM, seed=1), 10, part="new", space=new)


def test_there_is_no_index_of_a_gallery_that_compares_every_row(tmp_path):
    gallery = make(tmp_path, "Flat", n=30)
    gallery.prepare_index()
    assert gallery._state._views is None  # nothing was read


def test_nobody_waits_while_an_index_is_made(tmp_path, monkeypatch):
    """Other threads search the index that was there, and what has come since."""
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=16")
    items, real, seen = as_items(unit(N, DIM), names(N)), faiss_index.train, []

    def meanwhile():
        assert_finds(gallery, items, unit(3, DIM, seed=1), 10)
        seen.append(len(gallery))

    def training(*arguments):
        if not seen or seen[-1] != len(items):
            other = threading.Thread(target=meanwhile)
            other.start()
            other.join(10)
        return real(*arguments)

    monkeypatch.setattr(faiss_index, "train", training)
    gallery.prepare()
    assert seen == [N]
    items |= as_items(unit(1200, DIM, seed=3), names(1200, start=N))
    gallery.add(unit(1200, DIM, seed=3), names(1200, start=N))
    gallery.prepare()
    assert seen == [N, N + 1200]
    assert len(gallery._state.views()[0].index.rows) == N + 1200
    assert_finds(gallery, items, unit(3, DIM, seed=1), 10)


def test_an_index_that_was_made_while_the_gallery_was_compacted_is_dropped(tmp_path, monkeypatch):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=16")
    real, writer = faiss_index.train, Gallery.open(gallery.path)

    def training(*arguments):
        monkeypatch.setattr(faiss_index, "train", real)
        made = real(*arguments)
        writer.remove(names(1000))
        writer.compact()
        writer.prepare()
        gallery.reload()
        return made

    monkeypatch.setattr(faiss_index, "train", training)
    gallery.prepare()
    items = dict(list(as_items(unit(N, DIM), names(N)).items())[1000:])
    monkeypatch.delattr(faiss_index, "train")  # the writer's is read, and has not been replaced
    for each in (gallery, Gallery.open(gallery.path, read_only=True, mmap=True)):
        assert_finds(each, items, unit(5, DIM, seed=1), 10)
        assert len(each._state.views()[0].index.rows) == 2000
    assert gallery.verify() == []


def test_two_that_make_an_index_at_once_do_not_mix_their_files(tmp_path, monkeypatch):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=16")
    other, real = Gallery.open(gallery.path), faiss_index.write_record

    def interrupted(*arguments):
        monkeypatch.setattr(faiss_index, "write_record", real)
        other.prepare()
        return real(*arguments)

    monkeypatch.setattr(faiss_index, "write_record", interrupted)
    gallery.prepare()
    assert len(other._state.views()[0].index.rows) == N
    assert len(list((gallery.path / "index").iterdir())) == 3
    assert gallery.verify() == []


def test_the_rows_of_an_index_must_be_its_own(tmp_path, trained):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=16")
    gallery.prepare()
    items = as_items(unit(N, DIM), names(N))
    rows_file, record_file = (
        next((gallery.path / "index").glob(f"*.{ending}")) for ending in ("rows", "json")
    )
    rows = np.fromfile(rows_file, "<i8")
    for row in (10**9, -1, 4):
        rows[5] = row
        rows.tofile(rows_file)
        record = json.loads(record_file.read_text())
        record["files"][rows_file.name]["sha256"] = hashlib.sha256(rows_file.read_bytes()).hexdigest()
        record_file.write_text(json.dumps(record))
        assert_finds(Gallery.open(gallery.path, read_only=True), items, unit(5, DIM, seed=1), 10)
    assert len(trained) == 4


def test_an_index_that_cannot_be_kept_is_used_all_the_same(tmp_path, monkeypatch):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=16")
    (gallery.path / "index").write_text("in the way")
    with pytest.warns(UserWarning, match="the index cannot be saved"):
        assert_finds(gallery, as_items(unit(N, DIM), names(N)), unit(3, DIM, seed=1), 5)


def test_both_parts_have_their_index(tmp_path):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=16")
    gallery.begin_part(make_space("new", dim=24, seed=1))
    gallery.backfill(unit(1000, 24, seed=7), names(1000))
    gallery.prepare()
    assert {path.name.split("-")[0].split(".")[0] for path in (gallery.path / "index").iterdir()} == {
        "old",
        "new",
    }
    new = as_items(unit(1000, 24, seed=7), names(1000))
    assert_finds(gallery, new, unit(3, 24, seed=1), 10, part="new")


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["nonsense", "IVF16,Foo", ""])
def test_an_unknown_index_is_refused_before_anything_is_written(tmp_path, index):
    with pytest.raises(
        ConfigError, match=rf"the index '{index}' cannot be made for dimension 16 \(.*could not"
    ):
        Gallery.create(tmp_path / "g", space=make_space(), index=index)
    assert not (tmp_path / "g").exists()
    with pytest.raises(ConfigError, match="give a string of FAISS's index_factory"):
        Gallery.build(unit(3, 16), names(3), index=index)


@pytest.mark.parametrize("index", ["IDMap,Flat", "IDMap2,HNSW8", "PCA8,IDMap,Flat"])
def test_an_index_that_numbers_its_rows_itself_is_refused(tmp_path, index):
    with pytest.raises(ConfigError, match=f"the index '{index}' .* leave IDMap out"):
        Gallery.create(tmp_path / "g", space=make_space(), index=index)


@pytest.mark.parametrize(
    ("index", "tuning"), [("IVF16,Flat", "efSearch=3"), ("HNSW16", "nonsense"), ("Flat", "nprobe=3")]
)
def test_a_tuning_that_does_not_fit_is_refused(tmp_path, index, tuning):
    with pytest.raises(ConfigError, match=f"the tuning '{tuning}'"):
        Gallery.create(tmp_path / "g", space=make_space(), index=index, tuning=tuning)


@pytest.mark.parametrize("index", ["Flat", "HNSW16"])
def test_only_inverted_files_are_mapped(tmp_path, index):
    Gallery.create(tmp_path / "g", space=make_space(), index=index)
    with pytest.raises(ConfigError, match=f"the index '{index}' cannot be mapped"):
        Gallery.open(tmp_path / "g", mmap=True)


def test_k_is_limited_by_what_is_there(tmp_path):
    gallery = make(tmp_path, "IVF16,Flat", "nprobe=1")
    with pytest.raises(DataError, match="k is 3001, but the gallery has 3000"):
        gallery.search(unit(1, DIM), 3001)


def test_faiss_is_silent(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(tmp_path, "IVF16,PQ8x4").search(unit(1, DIM), 5)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert Gallery.open(tmp_path / "g").plan.factory == "IVF16,PQ8x4"
