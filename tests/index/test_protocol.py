"""The index protocol: every implementation behaves alike, and mixed search and backfill work on each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from serving import NEW_DIM, unit_rows

from xbt.backfill.curve import Questions, measure
from xbt.errors import DataError, SpaceMismatchError
from xbt.index import AffineMerge, Gallery, QdrantIndex, RankMerge, RawMerge, VectorIndex, search_mixed
from xbt.index.mixed import next_vector_name
from xbt.index.target import (
    backfill_present,
    begin,
    fingerprints,
    is_complete,
    pending,
    read_vectors,
    vector_names,
)

COUNT = 90
IDS = [f"photos/{row:03d}.jpg" for row in range(COUNT)]
OLD, NEW = unit_rows(COUNT, seed=1), unit_rows(COUNT, NEW_DIM, seed=2)
MOVED = np.arange(COUNT) % 3 == 0


@pytest.fixture(params=["memory", "disk", "qdrant"])
def index(request, tmp_path, old_space):
    """An index of 90 items with their old vectors."""
    if request.param == "memory":
        return Gallery.build(OLD, IDS, old_space)
    if request.param == "disk":
        made = Gallery.create(tmp_path / "gallery", space=old_space, dtype="float32")
    else:
        made = QdrantIndex.create(":memory:", "photos", space=old_space)
    made.add(OLD, IDS, old_space)
    return made


@pytest.fixture
def mixed(index, new_space):
    """The same, of which every third item is backfilled."""
    index.add_vector("new", new_space)
    index.upsert([name for name, moved in zip(IDS, MOVED, strict=True) if moved], NEW[MOVED], "new")
    return index


def brute_force(scores, k):
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [[IDS[row] for row in line] for line in order], np.take_along_axis(scores, order, axis=1)


def assert_hits(hits, scores, k):
    ids, values = brute_force(scores, k)
    assert hits.ids == ids
    assert hits.scores.dtype == np.float32
    assert np.abs(hits.scores - values).max() <= 1e-6


def test_info_scan_and_fetch(mixed, old_space, new_space):
    assert isinstance(mixed, VectorIndex)
    info = mixed.info()
    assert (info.dim, info.metric, info.count) == (16, "dot", COUNT)
    assert [(name, about.dim, about.count) for name, about in info.vectors.items()] == [
        ("old", 16, COUNT),
        ("new", 24, 30),
    ]
    assert info.vectors["old"].space.same_as(old_space)
    assert info.vectors["new"].space.same_as(new_space)
    left = list(mixed.scan(missing="new", vectors="old", batch_size=25))
    assert [len(batch.ids) for batch in left] == [25, 25, 10]
    names = [name for batch in left for name in batch.ids]
    assert sorted(names) == [name for name, moved in zip(IDS, MOVED, strict=True) if not moved]
    rows = [IDS.index(name) for name in names]
    assert np.abs(np.concatenate([batch.vectors for batch in left]) - OLD[rows]).max() <= 1e-6
    assert sorted(name for batch in mixed.scan() for name in batch.ids) == IDS
    assert np.abs(mixed.fetch([IDS[6], IDS[3]], "new") - NEW[[6, 3]]).max() <= 1e-6
    assert np.abs(mixed.fetch([IDS[6], IDS[4]], "old") - OLD[[6, 4]]).max() <= 1e-6
    for call in (
        lambda: mixed.fetch([IDS[1]], "new"),
        lambda: mixed.fetch(["nobody"], "old"),
        lambda: mixed.fetch([IDS[1]], "newest"),
        lambda: list(mixed.scan(missing="newest")),
        lambda: list(mixed.scan(vectors="newest")),
    ):
        with pytest.raises(DataError):
            call()


def test_search_of_one_vector(mixed):
    old, new = unit_rows(4, seed=3), unit_rows(4, NEW_DIM, 4)
    assert_hits(mixed.search(old, 7, using="old"), old @ OLD.T, 7)
    assert_hits(mixed.search(new, 7, using="new"), np.where(MOVED, new @ NEW.T, -9), 7)
    assert_hits(mixed.search(old, 7, using="old", without="new"), np.where(MOVED, -9, old @ OLD.T), 7)
    assert mixed.search(old.tolist(), 7, using="old").ids == mixed.search(old, 7, using="old").ids
    assert mixed.search(old[0], 7, using="old").ids == mixed.search(old[:1], 7, using="old").ids
    short = mixed.search(new, 50, using="new")
    assert [len(ids) for ids in short.ids] == [30] * 4
    for call in (
        lambda: mixed.search(old, 0, using="old"),
        lambda: mixed.search(old, 5, using="newest"),
        lambda: mixed.search(old * np.nan, 5, using="old"),
    ):
        with pytest.raises(DataError):
            call()
    with pytest.raises(SpaceMismatchError):
        mixed.search(new, 5, using="old")


@pytest.mark.parametrize("merge", [RawMerge(), AffineMerge(0.5, 0.2)], ids=lambda merge: merge.kind)
def test_mixed_search_is_brute_force(mixed, old_space, new_space, merge):
    old, new = unit_rows(5, seed=3), unit_rows(5, NEW_DIM, 4)
    new_scores = merge.calibrate("new", (new @ NEW.T).astype(np.float32))
    scores = np.where(MOVED, new_scores, old @ OLD.T)
    assert_hits(search_mixed(mixed, old, new, 12, merge, old_space, new_space), scores, 12)
    assert_hits(mixed.search_mixed(old, new, 12, merge, old_space, new_space), scores, 12)
    assert [len(ids) for ids in search_mixed(mixed, old, new, 500, merge).ids] == [COUNT] * 5
    with pytest.raises(SpaceMismatchError, match="model-new"):
        search_mixed(mixed, old, new, 12, merge, new_space, new_space)
    with pytest.raises(DataError, match="5 old queries and 4 new ones"):
        search_mixed(mixed, old, new[:4], 12, merge)


def test_mixed_search_before_and_after_a_backfill(index, new_space):
    old, new = unit_rows(5, seed=3), unit_rows(5, NEW_DIM, 4)
    for merge in (RawMerge(), RankMerge()):
        assert_hits(search_mixed(index, old, new, 9, merge), old @ OLD.T, 9)
    index.add_vector("new", new_space)
    assert_hits(search_mixed(index, old, new, 9, RankMerge()), old @ OLD.T, 9)
    index.upsert(IDS, NEW, "new")
    assert_hits(search_mixed(index, old, new, 9, RankMerge()), new @ NEW.T, 9)


def test_upsert_is_idempotent_and_a_backfill_is_rolled_back(mixed, new_space, other_space):
    again = unit_rows(2, NEW_DIM, 9)
    for _ in range(2):
        mixed.upsert([IDS[3], IDS[4]], again, "new")
    assert np.abs(mixed.fetch([IDS[4], IDS[3]], "new") - again[::-1]).max() <= 1e-6
    assert mixed.info().vectors["new"].count == 31
    for ids, vectors, name in (
        ([IDS[5], "nobody"], again, "new"),
        ([IDS[5]], again[:1] * np.nan, "new"),
        ([IDS[5]], again[:1], "newest"),
    ):
        with pytest.raises(DataError):
            mixed.upsert(ids, vectors, name)
    with pytest.raises(SpaceMismatchError):
        mixed.upsert([IDS[5]], OLD[:1], "new")
    assert mixed.info().vectors["new"].count == 31
    mixed.add_vector("new", new_space)
    with pytest.raises(SpaceMismatchError, match="model-other"):
        mixed.add_vector("new", other_space)
    with pytest.raises(DataError):
        mixed.drop_vector("old")  # most items have no other
    mixed.drop_vector("new")
    assert list(mixed.info().vectors) == ["old"]
    queries = unit_rows(5, seed=3)
    assert_hits(mixed.search(queries, 9, using="old"), queries @ OLD.T, 9)
    with pytest.raises(DataError):
        mixed.drop_vector("old")


def test_a_backfill_on_any_index(index, old_space, new_space, other_space):
    names = vector_names(index)
    assert names == ("old", "new")
    assert not is_complete(index, new_space)
    assert is_complete(index, old_space)
    begin(index, "new", new_space)
    begin(index, "new", new_space)
    before = fingerprints(index, "old", "new")
    with pytest.raises(SpaceMismatchError, match="that the part 'new' is to be filled with"):
        is_complete(index, other_space)
    assert sorted(pending(index, "new")) == IDS
    index.remove([IDS[1], IDS[2]])
    index.add(unit_rows(1, seed=8), [IDS[2]], old_space)  # replaced since
    assert backfill_present(index, NEW[:4], IDS[:4], names, before) == 2
    assert sorted(pending(index, "new")) == sorted({*IDS} - {IDS[0], IDS[1], IDS[3]})
    assert index.info().fraction_backfilled == index.fraction_backfilled == pytest.approx(2 / 89)
    assert np.abs(read_vectors(index, [IDS[3], IDS[0]], "new") - NEW[[3, 0]]).max() <= 1e-6
    assert backfill_present(index, NEW[:0], [], names, before) == 0


def test_recall_is_measured_on_any_index(mixed, old_space, new_space):
    queries = torch.from_numpy(OLD), torch.from_numpy(NEW)
    questions = Questions(*queries, IDS, torch.arange(COUNT), old_space, new_space)
    point = measure(mixed, questions, RawMerge(), 30, 1.5)
    assert (point.position, point.fraction, point.recall[1]) == (30, 1 / 3, 1.0)


def test_names_of_vectors_never_come_back():
    assert [next_vector_name(name) for name in ("old", "image", "new", "new2", "new9")] == [
        "new",
        "new",
        "new2",
        "new3",
        "new10",
    ]
