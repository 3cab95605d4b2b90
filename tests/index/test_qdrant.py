"""A collection of Qdrant in its local mode, against brute force and against our own gallery."""

from __future__ import annotations

import subprocess
import sys
import uuid

import faiss
import numpy as np
import pytest
import tiny
from qdrant_rest import RestServer
from upgrades import TEXTS, parts

from xbt.compatible import CompatibleEncoder
from xbt.errors import ConfigError, DataError, SpaceMismatchError, StoreError, XbtError
from xbt.index import Gallery, QdrantIndex, VectorIndex, qdrant_client
from xbt.index.mixed import AffineMerge, RankMerge, RawMerge
from xbt.store import EmbeddingStore


def names(count):
    return [f"photos/{number:05d}.jpg" for number in range(count)]


@pytest.fixture
def index(rows, old_space):
    """300 items with their vectors ``old``."""
    made = QdrantIndex.create(":memory:", "photos", space=old_space)
    made.add(rows(300, seed=1), names(300), old_space, {"number": list(range(300))})
    return made


@pytest.fixture
def mixed(index, rows, new_space):
    """The same, of which every third item is backfilled."""
    index.add_vector("new", new_space)
    index.backfill(rows(300, 24, 2)[::3], names(300)[::3], new_space)
    return index


def first(scores, k):
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def test_ten_thousand_items_are_found_as_by_the_gallery_and_by_faiss(tmp_path, rows):
    new, projection, old = parts(
        {"new": tiny.tiny_transformers_clip(tmp_path / "new"), "old": tiny.tiny_open_clip(tmp_path / "old")},
        "new",
    )
    upgraded = CompatibleEncoder(new, projection)
    vectors, ids = rows(10_000, seed=3), names(10_000)
    qdrant = QdrantIndex.create(":memory:", "photos", space=old.space)
    qdrant.add(vectors, ids, old.space)
    found = qdrant.search_texts(upgraded, TEXTS, 10)
    queries = upgraded.encode_texts(TEXTS)
    wanted = Gallery.build(vectors, ids, old.space).search(queries, 10, upgraded.space)
    assert found.ids == wanted.ids
    assert np.abs(found.scores - wanted.scores).max() <= 1e-5
    index = faiss.IndexFlatIP(16)
    index.add(vectors)
    scores, places = index.search(queries.numpy(), 10)
    assert found.ids == [[ids[place] for place in row] for row in places]
    assert np.abs(found.scores - scores).max() <= 1e-5


@pytest.mark.parametrize("distance", ["dot", "cosine"])
def test_scores_are_those_of_the_distance(rows, old_space, distance):
    made = QdrantIndex.create(":memory:", "photos", space=old_space, distance=distance)
    vectors, queries = rows(50, seed=5) * np.linspace(0.5, 2, 50, dtype=np.float32)[:, None], rows(4, seed=6)
    made.add(vectors, names(50))
    lengths = np.linalg.norm(vectors, axis=1) if distance == "cosine" else 1
    order, scores = first(queries @ vectors.T / lengths, 7)
    found = made.search(queries, 7)
    assert found.ids == [[names(50)[item] for item in row] for row in order]
    assert np.abs(found.scores - scores).max() <= 1e-6


def test_a_single_query_counts_and_membership(index, rows, old_space):
    assert index.search(rows(1, seed=1)[0], 1, old_space).ids == [["photos/00000.jpg"]]
    assert len(index) == 300
    assert "photos/00299.jpg" in index
    assert "photos/00300.jpg" not in index
    assert 7 not in index


def test_points_are_found_again_by_their_ids(index):
    point = str(uuid.uuid5(qdrant_client.NAMESPACE, "photos/00007.jpg"))
    (record,) = index.client.retrieve("photos", [point], with_payload=True)
    assert record.payload == {"id": "photos/00007.jpg", "number": 7}


def test_a_store_is_uploaded_and_an_upload_can_be_run_again(store, old_space):
    made = QdrantIndex.create(":memory:", "photos", space=old_space)
    made.add(store.rows([3, 5]), [store.ids[3], store.ids[5]], old_space)
    assert made.upload(store) == 58
    assert made.upload(store) == 0
    assert len(made) == 60
    found = made.search(store.read(), 1, old_space)
    assert [row[0] for row in found.ids] == store.ids
    assert np.abs(found.scores - 1).max() <= 1e-6


@pytest.mark.parametrize("merge", [RawMerge(), RankMerge(), AffineMerge(0.5, 0.2)], ids=str)
def test_a_gallery_of_two_parts_is_uploaded_and_found_alike(rows, old_space, new_space, merge):
    ours = Gallery.build(rows(90, seed=1), names(90), old_space)
    made = QdrantIndex.create(":memory:", "photos", space=old_space, new_space=new_space)
    ours.begin_part(new_space)
    ours.backfill(rows(40, 24, 2), names(90)[::2][:40], new_space)
    assert made.upload(ours) == 90
    assert made.fraction_backfilled == ours.fraction_backfilled
    queries = rows(5, seed=3), rows(5, 24, 4)
    found, wanted = made.search_mixed(*queries, 20, merge), ours.search_mixed(*queries, 20, merge)
    assert found.ids == wanted.ids
    assert np.abs(found.scores - wanted.scores).max() <= 1e-6


@pytest.mark.parametrize("rest", [False, True])
def test_an_upload_goes_on_where_a_backfill_has_come_to(rows, old_space, new_space, rest):
    ours = Gallery.build(rows(600, seed=1), names(600), old_space)
    ours.begin_part(new_space)
    where = RestServer().client() if rest else ":memory:"
    made = QdrantIndex.create(where, "photos", space=old_space, new_space=new_space)
    ours.backfill(rows(600, 24, 2)[:150], names(600)[:150], new_space)
    assert made.upload(ours) == 600
    ours.backfill(rows(600, 24, 2)[150:450], names(600)[150:450], new_space)
    assert made.upload(ours) == 300
    assert made.upload(ours) == 0
    assert (len(made), made.fraction_backfilled) == (600, 0.75)
    queries = rows(5, seed=3), rows(5, 24, 4)
    assert made.search_mixed(*queries, 20, RawMerge()).ids == ours.search_mixed(*queries, 20, RawMerge()).ids
    ours.backfill(rows(600, 24, 2)[450:], names(600)[450:], new_space)
    ours.compact()  # one part is left, and it is the new one
    assert made.upload(ours) == 150
    assert made.fraction_backfilled == 1
    assert made.search(queries[1], 20, new_space, using="new").ids == ours.search(queries[1], 20).ids


def test_an_upload_after_a_backfill_keeps_the_new_vectors(store, old_space, new_space, rows):
    made = QdrantIndex.create(":memory:", "photos", space=old_space, new_space=new_space)
    made.upload(store)
    made.backfill(rows(10, 24), store.ids[:10], new_space)
    made.remove([store.ids[0], store.ids[59]])
    assert made.upload(store) == 2
    assert made.fraction_backfilled == 9 / 60


def test_remove_and_add_again(index, rows, old_space):
    index.remove(["photos/00003.jpg", "never there"])
    assert len(index) == 299
    index.add(rows(1, seed=9), ["photos/00003.jpg"], old_space)
    assert index.search(rows(1, seed=9), 1).ids == [["photos/00003.jpg"]]


def test_backfilled_items_are_searched_in_the_new_space(mixed, rows, new_space):
    vectors, queries = rows(300, 24, 2)[::3], rows(5, 24, 7)
    order, scores = first(queries @ vectors.T, 10)
    found = mixed.search(queries, 10, new_space, using="new")
    assert found.ids == [[names(300)[::3][item] for item in row] for row in order]
    assert np.abs(found.scores - scores).max() <= 1e-6
    assert mixed.fraction_backfilled == 1 / 3
    assert mixed.new_space.same_as(new_space)


@pytest.mark.parametrize("merge", [RawMerge(), AffineMerge(0.5, 0.2)], ids=str)
def test_mixed_search_is_brute_force_over_both_parts(mixed, rows, merge):
    old_queries, new_queries = rows(6, seed=8), rows(6, 24, 9)
    moved = np.arange(300) % 3 == 0
    new_scores = new_queries @ rows(300, 24, 2).T
    if isinstance(merge, AffineMerge):
        new_scores = 0.5 * new_scores + 0.2
    scores = np.where(moved, new_scores, old_queries @ rows(300, seed=1).T)
    order, wanted = first(scores, 12)
    found = mixed.search_mixed(old_queries, new_queries, 12, merge)
    assert found.ids == [[names(300)[item] for item in row] for row in order]
    assert np.abs(found.scores - wanted).max() <= 1e-6


@pytest.mark.parametrize("merge", [RawMerge(), RankMerge(), AffineMerge(0.5, 0.2)], ids=str)
def test_with_one_part_empty_the_other_alone_counts(index, rows, new_space, merge):
    old_queries, new_queries = rows(6, seed=8), rows(6, 24, 9)
    index.begin_part(new_space)
    wanted = index.search(old_queries, 300).ids
    assert index.search_mixed(old_queries, new_queries, 300, merge).ids == wanted
    index.backfill(rows(300, 24, 2), names(300))
    wanted = index.search(new_queries, 300, using="new").ids
    assert index.search_mixed(old_queries, new_queries, 300, merge).ids == wanted


def test_what_is_backfilled_during_a_mixed_search_is_found_once(mixed, rows, monkeypatch):
    nearest = qdrant_client.nearest

    def interrupted(client, collection, queries, k, using, *options):
        found = nearest(client, collection, queries, k, using, *options)
        if using == "old":
            monkeypatch.setattr(qdrant_client, "nearest", nearest)
            mixed.backfill(rows(300, 24, 2), names(300))
        return found

    monkeypatch.setattr(qdrant_client, "nearest", interrupted)
    found = mixed.search_mixed(rows(5, seed=8), rows(5, 24, 9), 200, RawMerge())
    assert all(len(set(row)) == 200 for row in found.ids)


def test_an_alias_is_switched_in_one_step_and_open_galleries_stay(index, rows, old_space, other_space):
    reembedded = QdrantIndex.create(index.client, "photos-2", space=other_space)
    reembedded.add(rows(20, seed=11), names(20), other_space)
    assert index.switch("search") is None
    serving = QdrantIndex.open(index.client, "search")
    assert (serving.collection, len(serving)) == ("photos", 300)
    assert reembedded.switch("search") == "photos"
    assert serving.search(rows(1), 1, old_space).ids
    serving.reload()
    assert (serving.collection, len(serving)) == ("photos-2", 20)
    with pytest.raises(SpaceMismatchError, match="model-old"):
        serving.search(rows(1), 1, old_space)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_spaces_are_kept(tmp_path, rows, old_space, new_space, where):
    location = tmp_path / "qdrant" if where == "folder" else ":memory:"
    made = QdrantIndex.create(location, "photos", space=old_space)
    made.add(rows(5), names(5), old_space)
    made.begin_part(new_space)
    made.backfill(rows(2, 24), names(2), new_space)
    if where == "folder":
        made.close()
        again = QdrantIndex.open(location, "photos")
    else:
        again = QdrantIndex.open(made.client, "photos")
    assert again.space.compare(old_space).verified
    assert again.new_space.compare(new_space).verified
    assert again.fraction_backfilled == 0.4
    again.begin_part(new_space)
    assert again.search(rows(1), 5, old_space).ids
    again.close()


def test_a_server_is_spoken_to_in_rest(rows, old_space, new_space):
    server = RestServer()
    made = QdrantIndex.create(server.client(), "photos", space=old_space)
    made.add(rows(300, seed=1), names(300), old_space, {"number": list(range(300))})
    made.begin_part(new_space)
    made.backfill(rows(300, 24, 2)[::3], names(300)[::3], new_space)
    made.remove(names(3))
    assert made.switch("search") is None
    serving = QdrantIndex.open(server.client(), "search")
    assert (serving.collection, len(serving), serving.fraction_backfilled) == ("photos", 297, 99 / 297)
    assert serving.new_space.compare(new_space).verified
    ours = Gallery.build(rows(300, seed=1)[3:], names(300)[3:], old_space)
    queries = rows(70, seed=5)
    found, wanted = serving.search(queries, 10, old_space, exact=True), ours.search(queries, 10)
    assert found.ids == wanted.ids
    assert np.abs(found.scores - wanted.scores).max() <= 1e-5
    ours.begin_part(new_space)
    ours.backfill(rows(300, 24, 2)[3::3], names(300)[3::3])
    both = queries, rows(70, 24, 6)
    assert serving.search_mixed(*both, 10, RawMerge()).ids == ours.search_mixed(*both, 10, RawMerge()).ids
    searches = [body["searches"] for _, path, body in server.requests if path.endswith("/query/batch")]
    assert [len(each) for each in searches[:2]] == [64, 6]
    assert [each[0].get("params") for each in searches[1:3]] == [{"exact": True}, None]
    with pytest.raises(StoreError, match="Collection photos already exists"):
        serving.switch("photos")


def test_texts_are_encoded_and_searched(open_clip_spec, transformers_spec):
    from xbt.encoders import load_encoder

    encoder = load_encoder(open_clip_spec)
    texts = ["a red circle", "a blue square", "a green star"]
    made = QdrantIndex.create(":memory:", "texts", space=encoder.space)
    made.add(encoder.encode_texts(texts), texts, encoder.space)
    assert [row[0] for row in made.search_texts(encoder, texts, 1).ids] == texts
    with pytest.raises(SpaceMismatchError, match="the encoder of queries for 'old'"):
        made.search_texts(load_encoder(transformers_spec), texts)


def test_it_is_a_vector_index(mixed, rows, new_space):
    assert isinstance(mixed, VectorIndex)
    info = mixed.info()
    assert (info.dim, info.metric, info.count) == (16, "dot", 300)
    assert [(name, about.dim, about.count) for name, about in info.vectors.items()] == [
        ("old", 16, 300),
        ("new", 24, 100),
    ]
    stored, moved = dict(zip(names(300), rows(300, seed=1), strict=True)), names(300)[::3]
    batches = list(mixed.scan(missing="new", vectors="old", batch_size=64))
    assert [len(batch.ids) for batch in batches] == [64, 64, 64, 8]
    assert sorted(item for batch in batches for item in batch.ids) == sorted(set(stored) - set(moved))
    for batch in batches:
        assert np.abs(batch.vectors - [stored[item] for item in batch.ids]).max() <= 1e-6
    assert sorted(item for batch in mixed.scan() for item in batch.ids) == names(300)
    assert all(batch.vectors is None for batch in mixed.scan())
    asked = [names(300)[row] for row in (6, 3, 9)]
    assert np.abs(mixed.fetch(asked, "new") - rows(300, 24, 2)[[6, 3, 9]]).max() <= 1e-6
    mixed.upsert(asked, rows(3, 24, 5), "new")
    mixed.upsert(asked, rows(3, 24, 5), "new")
    assert np.abs(mixed.fetch(asked, "new") - rows(3, 24, 5)).max() <= 1e-6
    mixed.add_vector("new", new_space)
    mixed.drop_vector("new")
    assert mixed.new_space is None
    assert list(mixed.info().vectors) == ["old"]
    assert mixed.search_mixed(rows(2), rows(2, 24), 5, RawMerge()).ids == mixed.search(rows(2), 5).ids


def test_the_old_vector_is_dropped_when_all_is_backfilled(index, rows, new_space, other_space):
    index.begin_part(new_space)
    index.backfill(rows(300, 24, 2), names(300), new_space)
    index.drop_vector("old")
    assert index.space.same_as(new_space)
    assert list(index.info().vectors) == ["new"]
    assert index.search(rows(300, 24, 2)[:4], 1, new_space).ids == [[name] for name in names(4)]
    index.begin_part(other_space)
    assert list(index.info().vectors) == ["new", "new2"]


def test_a_filter_and_a_short_result(mixed, rows):
    from qdrant_client import models

    few = models.Filter(must=[models.FieldCondition(key="number", range=models.Range(lt=6))])
    hits = mixed.search(rows(2, seed=8), 10, filter=few)
    assert [sorted(ids) for ids in hits.ids] == [names(6), names(6)]
    assert mixed.search(rows(2, seed=8), 10, without="new", filter=few).scores.shape == (2, 4)
    both = mixed.search_mixed(rows(2, seed=8), rows(2, 24, 9), 5, RawMerge(), filter=few)
    assert all(set(ids) < set(names(6)) and len(set(ids)) == 5 for ids in both.ids)


def test_it_is_imported_without_models_and_clients():
    code = (
        "import sys; from xbt.index import QdrantIndex; "
        "heavy = {'qdrant_client', 'onnx', 'onnxruntime', 'faiss', 'open_clip', 'transformers'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def bad_rows(rows):
    vectors = rows(2)
    vectors[1, 3] = np.nan
    return vectors


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda g, r, s: g.search(r(1), 1, s), SpaceMismatchError, "'model-other' at main (16-d), but '"),
        (lambda g, r, s: g.search(r(1, 8), 1), SpaceMismatchError, "has dimension 8, but 16 is needed"),
        (lambda g, r, s: g.search(bad_rows(r), 1), DataError, "NaN or infinite values in 1 of 2 rows"),
        (lambda g, r, s: g.search(r(1), 0), DataError, "k is 0"),
        (lambda g, r, s: g.search(r(1), True), DataError, "k is True"),
        (lambda g, r, s: g.search(r(1), 1, using="new"), DataError, "no vectors 'new', only 'old'"),
        (lambda g, r, s: g.search(r(1), 1, without="new"), DataError, "call add_vector with"),
        (lambda g, r, s: list(g.scan(missing="new")), DataError, "no vectors 'new', only 'old'"),
        (lambda g, r, s: g.fetch(["x"], "new"), DataError, "no vectors 'new', only 'old'"),
        (lambda g, r, s: g.fetch(["photos/00001.jpg", "x"], "old"), DataError, "no item 'x' with a vector"),
        (lambda g, r, s: g.upsert(["x"], r(1), "old"), DataError, "there is no item 'x' in 'photos'"),
        (lambda g, r, s: g.drop_vector("new"), DataError, "no vectors 'new', only 'old'"),
        (lambda g, r, s: g.drop_vector("old"), DataError, "has no vectors but 'old'; keep them"),
        (lambda g, r, s: g.backfill(r(1, 24), ["photos/00000.jpg"]), DataError, "call add_vector with"),
        (lambda g, r, s: g.add(r(1), ["x"], s), SpaceMismatchError, "the vectors to add is 'model-other'"),
        (lambda g, r, s: g.add(r(1), ["photos/00009.jpg"]), DataError, "'photos/00009.jpg' is already in"),
        (lambda g, r, s: g.add(r(2), ["x", "x"]), DataError, "ids has 'x' twice"),
        (lambda g, r, s: g.add(r(2), ["x", 3]), DataError, "ids[1] is 3; ids must be strings"),
        (lambda g, r, s: g.fetch(["\ud800"], "old"), DataError, "not valid Unicode text"),
        (lambda g, r, s: "\ud800" in g, DataError, "not valid Unicode text"),
        (lambda g, r, s: g.remove([3]), DataError, "ids must be strings"),
        (lambda g, r, s: list(g.scan(batch_size=0)), ConfigError, "batch_size is 0"),
        (lambda g, r, s: g.search(r(1), 1, filter={"a": 1}), ConfigError, "give a qdrant_client.models.F"),
        (lambda g, r, s: g.add_vector("a/b", s), StoreError, "made of letters, digits and underscores"),
        (lambda g, r, s: g.search(r(1) * np.float32(1e30), 1), DataError, "scores would overflow"),
        (lambda g, r, s: g.add(r(2), ["x"]), DataError, "ids has 1 entries for 2 vectors"),
        (lambda g, r, s: g.add(r(1), ["x"], None, {"a": [1, 2]}), StoreError, "column 'a' has 2 values"),
        (lambda g, r, s: g.add(r(1), ["x"], None, {"id": ["y"]}), StoreError, "column 'id'"),
        (lambda g, r, s: g.add(r(1), ["x"], None, {"a": [b"\xff"]}), StoreError, "the metadata are plain"),
        (lambda g, r, s: g.upload([1]), ConfigError, "give an EmbeddingStore or a Gallery, not a list"),
        (lambda g, r, s: g.switch("photos"), StoreError, "Collection photos already exists"),
        (lambda g, r, s: QdrantIndex.open(g.client, "pictures"), StoreError, "'pictures', it has 'photos'"),
        (lambda g, r, s: QdrantIndex.open(g.client, "x", timeout=3), StoreError, "timeout cannot be given"),
        (lambda g, r, s: QdrantIndex.create(g.client, "photos", space=s), StoreError, "'photos' already"),
        (lambda g, r, s: QdrantIndex.create(g.client, "a/b", space=s), StoreError, "cannot contain '/'"),
        (lambda g, r, s: QdrantIndex.create(g.client, "x", space=s, distance="l2"), ConfigError, "'l2'"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(index, rows, other_space, call, kind, words):
    with pytest.raises(kind) as caught:
        call(index, rows, other_space)
    assert words in str(caught.value)
    assert len(index) == 300


def test_wrong_input_to_a_mixed_collection(mixed, rows, old_space, other_space):
    with pytest.raises(DataError, match="there is no item 'x' in 'photos'; add it first"):
        mixed.backfill(rows(2, 24), ["photos/00001.jpg", "x"])
    with pytest.raises(SpaceMismatchError, match="model-old"):
        mixed.backfill(rows(1, 16), ["photos/00001.jpg"], old_space)
    with pytest.raises(SpaceMismatchError, match="the vector 'new' to add is 'model-other'"):
        mixed.begin_part(other_space)
    with pytest.raises(DataError, match="2 old queries and 3 new ones"):
        mixed.search_mixed(rows(2), rows(3, 24), 1, RawMerge())
    with pytest.raises(DataError, match="200 items of 'photos' have no vector but 'old'; backfill or remove"):
        mixed.drop_vector("old")
    assert mixed.fraction_backfilled == 1 / 3


def test_a_store_of_another_space_is_refused(tmp_path, rows, old_space, other_space):
    foreign = EmbeddingStore.create(tmp_path / "foreign", modality="image", space=other_space)
    made = QdrantIndex.create(":memory:", "photos", space=old_space)
    with pytest.raises(StoreError, match="has no items"):
        made.upload(foreign)
    foreign.append(rows(3), list("abc"))
    with pytest.raises(SpaceMismatchError, match="the vectors to upload is 'model-other'"):
        made.upload(foreign)
    assert len(made) == 0
    assert made.search(rows(2), 1).ids == [[], []]


def test_a_collection_that_says_no_spaces_is_refused(old_space):
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    client.create_collection("photos", models.VectorParams(size=16, distance=models.Distance.DOT))
    with pytest.raises(StoreError, match="'photos' does not say which models made its vectors"):
        QdrantIndex.open(client, "photos")
    vectors = [{"name": "old", "space": {"model": "x"}}]
    client.update_collection("photos", metadata={"xbt_format": 2, "xbt_vectors": vectors})
    with pytest.raises(StoreError, match="the spaces in the metadata of the collection 'photos' are damaged"):
        QdrantIndex.open(client, "photos")


def test_a_server_that_is_not_there_and_a_folder_in_use(tmp_path, old_space):
    with pytest.raises(StoreError, match="Qdrant could not"):
        QdrantIndex.create("http://127.0.0.1:9", "photos", space=old_space, check_compatibility=False)
    made = QdrantIndex.create(tmp_path / "qdrant", "photos", space=old_space)
    with pytest.raises(StoreError, match="already accessed by another instance"):
        QdrantIndex.open(tmp_path / "qdrant", "photos")
    made.close()
    with pytest.raises(XbtError, match="closed"):
        len(made)


def test_a_missing_client_is_refused_with_a_hint(monkeypatch, old_space):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(ConfigError, match=r"qdrant_client is not installed, .* pip install 'xbt\[serve\]'"):
        QdrantIndex.create(":memory:", "photos", space=old_space)
