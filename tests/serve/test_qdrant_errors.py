"""What a collection of Qdrant refuses, in one sentence each."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from xbt.errors import ConfigError, DataError, SpaceMismatchError, StoreError, XbtError
from xbt.gallery.merge import RawMerge
from xbt.serve import QdrantGallery
from xbt.store import EmbeddingStore


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
        (lambda g, r, s: g.search(r(1), 301), DataError, "k is 301, but there are only 300 items of"),
        (lambda g, r, s: g.search(r(1), 0), DataError, "k is 0"),
        (lambda g, r, s: g.search(r(1), True), DataError, "k is True"),
        (lambda g, r, s: g.search(r(1), 1, using="new"), SpaceMismatchError, "no vectors 'new', only 'old'"),
        (lambda g, r, s: g.search_mixed(r(1), r(1, 24), 1, RawMerge()), SpaceMismatchError, "begin_part"),
        (lambda g, r, s: g.backfill(r(1, 24), ["photos/00000.jpg"]), SpaceMismatchError, "call begin_part"),
        (lambda g, r, s: g.add(r(1), ["x"], s), SpaceMismatchError, "the vectors to add is 'model-other'"),
        (lambda g, r, s: g.add(r(1), ["photos/00009.jpg"]), DataError, "'photos/00009.jpg' is already in"),
        (lambda g, r, s: g.add(r(2), ["x", "x"]), StoreError, "the id 'x' is there twice"),
        (lambda g, r, s: g.add(r(2), ["x", 3]), StoreError, "the id of row 1 is 3, a int"),
        (lambda g, r, s: g.add(r(2), ["x"]), StoreError, "2 vectors but 1 ids"),
        (lambda g, r, s: g.add(r(1), ["x"], None, {"a": [1, 2]}), StoreError, "column 'a' has 2 values"),
        (lambda g, r, s: g.add(r(1), ["x"], None, {"id": ["y"]}), StoreError, "column 'id'"),
        (lambda g, r, s: g.add(r(1), ["x"], None, {"a": [b"\xff"]}), StoreError, "the metadata are plain"),
        (lambda g, r, s: g.upload([1]), ConfigError, "give an EmbeddingStore or a Gallery, not a list"),
        (lambda g, r, s: g.switch("photos"), StoreError, "Collection photos already exists"),
        (lambda g, r, s: QdrantGallery.open(g.client, "pictures"), StoreError, "'pictures', it has 'photos'"),
        (lambda g, r, s: QdrantGallery.open(g.client, "x", timeout=3), StoreError, "timeout cannot be given"),
        (lambda g, r, s: QdrantGallery.create(g.client, "photos", space=s), StoreError, "'photos' already"),
        (lambda g, r, s: QdrantGallery.create(g.client, "a/b", space=s), StoreError, "cannot contain '/'"),
        (lambda g, r, s: QdrantGallery.create(g.client, "x", space=s, distance="l2"), ConfigError, "'l2'"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(gallery, rows, other_space, call, kind, words):
    with pytest.raises(kind) as caught:
        call(gallery, rows, other_space)
    assert words in str(caught.value)
    assert len(gallery) == 300


def test_wrong_input_to_a_mixed_collection(mixed, rows, old_space, other_space):
    with pytest.raises(DataError, match="there is no item 'x' in 'photos' to backfill"):
        mixed.backfill(rows(2, 24), ["photos/00001.jpg", "x"])
    with pytest.raises(SpaceMismatchError, match="model-old"):
        mixed.backfill(rows(1, 16), ["photos/00001.jpg"], old_space)
    with pytest.raises(SpaceMismatchError, match="the part to begin is 'model-other'"):
        mixed.begin_part(other_space)
    with pytest.raises(DataError, match="2 old and 3 new query vectors"):
        mixed.search_mixed(rows(2), rows(3, 24), 1, RawMerge())
    with pytest.raises(DataError, match="only 100 items of 'photos' with a vector 'new'"):
        mixed.search(rows(1, 24), 101, using="new")
    assert mixed.fraction_backfilled == 1 / 3


def test_a_store_of_another_space_is_refused(tmp_path, rows, old_space, other_space):
    foreign = EmbeddingStore.create(tmp_path / "foreign", modality="image", space=other_space)
    made = QdrantGallery.create(":memory:", "photos", space=old_space)
    with pytest.raises(StoreError, match="has no items"):
        made.upload(foreign)
    foreign.append(rows(3), list("abc"))
    with pytest.raises(SpaceMismatchError, match="the vectors to upload is 'model-other'"):
        made.upload(foreign)
    assert len(made) == 0
    with pytest.raises(DataError, match="only 0 items"):
        made.search(rows(1), 1)


def test_a_collection_that_says_no_spaces_is_refused(old_space):
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    client.create_collection("photos", models.VectorParams(size=16, distance=models.Distance.DOT))
    with pytest.raises(StoreError, match="'photos' does not say which models made its vectors"):
        QdrantGallery.open(client, "photos")
    client.update_collection("photos", metadata={"xbt_format": 1, "xbt_old_space": {"model": "x"}})
    with pytest.raises(StoreError, match="the spaces in the metadata of the collection 'photos' are damaged"):
        QdrantGallery.open(client, "photos")


def test_a_server_that_is_not_there_and_a_folder_in_use(tmp_path, old_space):
    with pytest.raises(StoreError, match="Qdrant could not"):
        QdrantGallery.create("http://127.0.0.1:9", "photos", space=old_space, check_compatibility=False)
    made = QdrantGallery.create(tmp_path / "qdrant", "photos", space=old_space)
    with pytest.raises(StoreError, match="already accessed by another instance"):
        QdrantGallery.open(tmp_path / "qdrant", "photos")
    made.close()
    with pytest.raises(XbtError, match="closed"):
        len(made)


def test_without_the_client_one_is_told_how_to_get_it(monkeypatch, old_space):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(ConfigError, match=r"qdrant_client is not installed, .* pip install 'xbt\[serve\]'"):
        QdrantGallery.create(":memory:", "photos", space=old_space)
