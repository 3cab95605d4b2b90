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
from xbt.errors import SpaceMismatchError, StoreError
from xbt.gallery import Gallery
from xbt.gallery.merge import AffineMerge, RankMerge, RawMerge
from xbt.serve import QdrantGallery


def names(count):
    return [f"photos/{number:05d}.jpg" for number in range(count)]


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
    qdrant = QdrantGallery.create(":memory:", "photos", space=old.space)
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
    made = QdrantGallery.create(":memory:", "photos", space=old_space, distance=distance)
    vectors, queries = rows(50, seed=5) * np.linspace(0.5, 2, 50, dtype=np.float32)[:, None], rows(4, seed=6)
    made.add(vectors, names(50))
    lengths = np.linalg.norm(vectors, axis=1) if distance == "cosine" else 1
    order, scores = first(queries @ vectors.T / lengths, 7)
    found = made.search(queries, 7)
    assert found.ids == [[names(50)[item] for item in row] for row in order]
    assert np.abs(found.scores - scores).max() <= 1e-6


def test_a_single_query_counts_and_membership(gallery, rows, old_space):
    assert gallery.search(rows(1, seed=1)[0], 1, old_space).ids == [["photos/00000.jpg"]]
    assert len(gallery) == 300
    assert "photos/00299.jpg" in gallery
    assert "photos/00300.jpg" not in gallery
    assert 7 not in gallery


def test_points_are_found_again_by_their_ids(gallery):
    from xbt.serve.qdrant_connection import NAMESPACE

    point = str(uuid.uuid5(NAMESPACE, "photos/00007.jpg"))
    (record,) = gallery.client.retrieve("photos", [point], with_payload=True)
    assert record.payload == {"id": "photos/00007.jpg", "number": 7}


def test_a_store_is_uploaded_and_an_upload_can_be_run_again(store, old_space):
    made = QdrantGallery.create(":memory:", "photos", space=old_space)
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
    made = QdrantGallery.create(":memory:", "photos", space=old_space, new_space=new_space)
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
    made = QdrantGallery.create(where, "photos", space=old_space, new_space=new_space)
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
    made = QdrantGallery.create(":memory:", "photos", space=old_space, new_space=new_space)
    made.upload(store)
    made.backfill(rows(10, 24), store.ids[:10], new_space)
    made.remove([store.ids[0], store.ids[59]])
    assert made.upload(store) == 2
    assert made.fraction_backfilled == 9 / 60


def test_remove_and_add_again(gallery, rows, old_space):
    gallery.remove(["photos/00003.jpg", "never there"])
    assert len(gallery) == 299
    gallery.add(rows(1, seed=9), ["photos/00003.jpg"], old_space)
    assert gallery.search(rows(1, seed=9), 1).ids == [["photos/00003.jpg"]]


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
def test_with_one_part_empty_the_other_alone_counts(gallery, rows, new_space, merge):
    old_queries, new_queries = rows(6, seed=8), rows(6, 24, 9)
    gallery.begin_part(new_space)
    wanted = gallery.search(old_queries, 300).ids
    assert gallery.search_mixed(old_queries, new_queries, 300, merge).ids == wanted
    gallery.backfill(rows(300, 24, 2), names(300))
    wanted = gallery.search(new_queries, 300, using="new").ids
    assert gallery.search_mixed(old_queries, new_queries, 300, merge).ids == wanted


def test_what_is_backfilled_during_a_mixed_search_is_found_once(mixed, rows, monkeypatch):
    from xbt.serve import qdrant_points

    nearest = qdrant_points.nearest

    def interrupted(client, collection, queries, k, using, **options):
        found = nearest(client, collection, queries, k, using, **options)
        if using == "old":
            monkeypatch.setattr(qdrant_points, "nearest", nearest)
            mixed.backfill(rows(300, 24, 2), names(300))
        return found

    monkeypatch.setattr(qdrant_points, "nearest", interrupted)
    found = mixed.search_mixed(rows(5, seed=8), rows(5, 24, 9), 200, RawMerge())
    assert all(len(set(row)) == 200 for row in found.ids)


def test_an_alias_is_switched_in_one_step_and_open_galleries_stay(gallery, rows, old_space, other_space):
    reembedded = QdrantGallery.create(gallery.client, "photos-2", space=other_space)
    reembedded.add(rows(20, seed=11), names(20), other_space)
    assert gallery.switch("search") is None
    serving = QdrantGallery.open(gallery.client, "search")
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
    made = QdrantGallery.create(location, "photos", space=old_space)
    made.add(rows(5), names(5), old_space)
    made.begin_part(new_space)
    made.backfill(rows(2, 24), names(2), new_space)
    if where == "folder":
        made.close()
        again = QdrantGallery.open(location, "photos")
    else:
        again = QdrantGallery.open(made.client, "photos")
    assert again.space.compare(old_space).verified
    assert again.new_space.compare(new_space).verified
    assert again.fraction_backfilled == 0.4
    again.begin_part(new_space)
    assert again.search(rows(1), 5, old_space).ids
    again.close()


def test_a_server_is_spoken_to_in_rest(rows, old_space, new_space):
    server = RestServer()
    made = QdrantGallery.create(server.client(), "photos", space=old_space)
    made.add(rows(300, seed=1), names(300), old_space, {"number": list(range(300))})
    made.begin_part(new_space)
    made.backfill(rows(300, 24, 2)[::3], names(300)[::3], new_space)
    made.remove(names(3))
    assert made.switch("search") is None
    serving = QdrantGallery.open(server.client(), "search")
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
    made = QdrantGallery.create(":memory:", "texts", space=encoder.space)
    made.add(encoder.encode_texts(texts), texts, encoder.space)
    assert [row[0] for row in made.search_texts(encoder, texts, 1).ids] == texts
    with pytest.raises(SpaceMismatchError, match="the encoder of queries for 'old'"):
        made.search_texts(load_encoder(transformers_spec), texts)


def test_the_room_is_entered_without_models_and_clients():
    code = (
        "import sys; from xbt.serve import QdrantGallery, export_pgvector; "
        "heavy = {'qdrant_client', 'onnx', 'onnxruntime', 'faiss', 'open_clip', 'transformers'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_of_the_room_is_there():
    import xbt.serve

    assert all(getattr(xbt.serve, name) for name in dir(xbt.serve))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = xbt.serve.nothing
