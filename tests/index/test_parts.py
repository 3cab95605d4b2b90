"""Two parts: a backfill that moves item after item from the old space to the new one."""

from __future__ import annotations

import numpy as np
import pytest
from galleries import as_items, assert_finds, brute_force, make_space, names, unit

from xbt.errors import ConfigError, DataError, SpaceMismatchError, StoreError
from xbt.index import AffineMerge, Gallery, RankMerge, RawMerge
from xbt.index.calibration import mixed_ranks
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

OLD, NEW = make_space("old"), make_space("new", dim=24, seed=1)


@pytest.fixture(params=["disk", "memory"])
def gallery(request, tmp_path):
    """A hundred items; the new part is open and empty."""
    made = Gallery.build(unit(100, 16), names(100), OLD)
    if request.param == "disk":
        made = made.save(tmp_path / "g")
    made.begin_part(NEW)
    return made


def new_vectors():
    return unit(100, 24, seed=7)


def affine(old, new, scale, shift):
    """The oracle: both parts' scores on one scale, all of them sorted; new before old at equal scores."""
    ids = [*new, *old]
    return lambda old_queries, new_queries, k: brute_force(
        np.eye(len(ids)),
        ids,
        np.concatenate(
            [
                scale * np.asarray(new_queries, np.float64) @ np.stack(list(new.values())).T + shift,
                np.asarray(old_queries, np.float64) @ np.stack(list(old.values())).T,
            ],
            axis=1,
        ),
        k,
    )


def test_an_item_that_is_backfilled_is_searched_in_the_new_part(gallery):
    moved = [3, 50, 99, 0]
    ids = [names(100)[i] for i in moved]
    assert gallery.fraction_backfilled == 0
    gallery.backfill(new_vectors()[moved], ids, space=NEW)
    old = as_items(unit(100, 16), names(100))
    new = as_items(new_vectors()[moved], ids)
    left = {name: vector for name, vector in old.items() if name not in new}
    same = [gallery] if gallery.path is None else [gallery, Gallery.open(gallery.path)]
    for each in same:
        assert each.ids == [*left, *new]
        assert each.ids_of("old") == list(left)
        assert each.ids_of("new") == list(new)
        assert (len(each), each.fraction_backfilled) == (100, 0.04)
        assert [(part.name, part.count) for part in each.parts] == [("old", 96), ("new", 4)]
        assert_finds(each, left, unit(3, 16, seed=2), part="old", space=OLD)
        assert_finds(each, new, unit(3, 24, seed=2), part="new", space=NEW)
        np.testing.assert_array_equal(each.vectors(ids), new_vectors()[moved])
        np.testing.assert_array_equal(each.vectors(ids, part="old"), unit(100, 16)[moved])
        assert each.space.model == "old"
        assert each.verify() == []


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.5, 0.3), (2.0, -0.5)])
def test_both_parts_are_searched_and_merged(gallery, k, scale, shift):
    moved = list(range(0, 100, 3))
    ids = [names(100)[i] for i in moved]
    gallery.backfill(new_vectors()[moved], ids)
    left = {n: v for n, v in as_items(unit(100, 16), names(100)).items() if n not in ids}
    oracle = affine(left, as_items(new_vectors()[moved], ids), scale, shift)
    queries = unit(5, 16, seed=2), unit(5, 24, seed=3)
    found = gallery.search_mixed(*queries, k, AffineMerge(scale, shift), OLD, NEW)
    expected_ids, scores = oracle(*queries, k)
    assert found.ids == expected_ids
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    assert found.scores.dtype == np.float32


@pytest.mark.parametrize("merge", [RawMerge(), RankMerge(), AffineMerge(0.6, 0.2)])
def test_a_search_ranks_items_as_the_evaluation_counts_them(gallery, merge):
    moved = list(range(0, 100, 3))
    gallery.backfill(new_vectors()[moved], [names(100)[i] for i in moved])
    queries = unit(40, 16, seed=2), unit(40, 24, seed=3)
    positives = [[int(i)] for i in np.random.default_rng(0).permutation(100)[:40]]
    backfilled = np.isin(np.arange(100), moved)
    ranks = mixed_ranks(*queries, unit(100, 16), new_vectors(), positives, backfilled, merge)
    found = gallery.search_mixed(*queries, 100, merge).ids
    places = [ids.index(names(100)[own]) for ids, (own,) in zip(found, positives, strict=True)]
    if merge.by_rank:  # at equal places the evaluation counts ties against us, and a search has to decide
        assert np.abs(ranks.numpy() - places).max() <= 1
    else:
        assert ranks.tolist() == places


def test_by_rank_each_part_keeps_its_order(gallery):
    moved = list(range(50))
    gallery.backfill(new_vectors()[moved], names(50))
    queries = unit(4, 16, seed=2), unit(4, 24, seed=3)
    found = gallery.search_mixed(*queries, 100, RankMerge())
    alone = [gallery.search(q, 50, part=p).ids for q, p in zip(queries, ("old", "new"), strict=True)]
    for row in range(4):
        # Both parts have fifty items: they take turns, and the new one begins.
        assert found.ids[row][0::2] == alone[1][row]
        assert found.ids[row][1::2] == alone[0][row]
        assert (np.diff(found.scores[row]) < 0).all()


@pytest.mark.parametrize("merge", [RawMerge(), RankMerge(), AffineMerge(0.1, 5.0)])
def test_at_both_ends_the_result_is_that_of_one_part_alone(gallery, merge):
    queries = unit(5, 16, seed=2), unit(5, 24, seed=3)
    before, none = gallery.search(queries[0], 100), gallery.search_mixed(*queries, 100, merge)
    assert none.ids == before.ids == Gallery.build(unit(100, 16), names(100)).search(queries[0], 100).ids
    assert np.array_equal(none.scores, before.scores)
    for start in range(0, 100, 20):
        gallery.backfill(new_vectors()[start : start + 20], names(20, start))
    fresh = Gallery.build(new_vectors(), names(100)).search(queries[1], 100)
    for _ in range(2):
        found = gallery.search(queries[1], 100, space=NEW)
        assert found.ids == fresh.ids
        assert np.array_equal(found.scores, fresh.scores)
        if len(gallery.parts) == 2:
            everything = gallery.search_mixed(*queries, 100, merge)
            assert everything.ids == fresh.ids
            assert np.array_equal(everything.scores, fresh.scores)
            assert gallery.fraction_backfilled == 1
        assert (gallery.space.model, gallery.dim, gallery.ids) == ("new", 24, names(100))
        gallery.compact()
    assert [part.name for part in gallery.parts] == ["new"]
    gallery.begin_part(make_space("newer", dim=8, seed=3), "newer")
    assert len(gallery.parts) == 2


def test_once_the_old_part_is_dropped_the_new_queries_are_asked(gallery):
    """Whoever serves with search_mixed goes on as before, after a reload and in another process."""
    third = make_space("third", dim=16, seed=5)  # of the old dimension, so that nothing else would tell
    gallery.backfill(new_vectors(), names(100))
    gallery.compact()
    gallery.begin_part(third)
    gallery.backfill(unit(100, 16, seed=8), names(100))
    queries = unit(5, 24, seed=3), unit(5, 16, seed=2)
    reader = gallery if gallery.path is None else Gallery.open(gallery.path, read_only=True)
    before = reader.search_mixed(*queries, 7, RawMerge(), NEW, third)
    gallery.compact()
    reader.reload()
    for each in (gallery, reader, *([] if gallery.path is None else [Gallery.open(gallery.path)])):
        for spaces in ((NEW, third), (None, None)):
            found = each.search_mixed(*queries, 7, RawMerge(), *spaces)
            assert found.ids == before.ids
            assert np.array_equal(found.scores, before.scores)
        assert each.fraction_backfilled == 1
        with pytest.raises(SpaceMismatchError, match="the new query vectors"):
            each.search_mixed(*queries, 7, RawMerge(), NEW, OLD)
        with pytest.raises(DataError, match="5 old queries and 4 new"):
            each.search_mixed(queries[0], queries[1][:4], 7, RawMerge())


def test_a_part_gets_a_name_that_is_free(gallery):
    for expected, dim in (("new", 24), ("new2", 16), ("new3", 24)):
        if expected != "new":
            gallery.begin_part(make_space(expected, dim=dim, seed=len(expected) + dim))
        assert [part.name for part in gallery.parts][1:] == [expected]
        gallery.backfill(unit(100, dim, seed=7), names(100))
        gallery.compact()
        assert [part.name for part in gallery.parts] == [expected]
    with pytest.raises(DataError, match="a part 'new3' already; give another name="):
        gallery.begin_part(OLD, "new3")
    with pytest.raises(
        DataError, match="the name 'old' is reserved for the first part of a gallery; give another name="
    ):
        gallery.begin_part(OLD, "old")


def test_before_a_second_part_there_is_only_the_old_one():
    gallery = Gallery.build(unit(100, 16), names(100), OLD)
    queries = unit(5, 16, seed=2), unit(5, 24, seed=3)
    found = gallery.search_mixed(*queries, 7, RawMerge())
    assert found.ids == gallery.search(queries[0], 7).ids
    assert gallery.fraction_backfilled == 0


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_old_part_that_never_had_items_is_dropped(tmp_path, on_disk):
    if on_disk:
        gallery = Gallery.create(tmp_path / "g", space=OLD)
    else:
        gallery = Gallery.build(unit(1, 16), ["a"], OLD)
        gallery.remove(["a"])
    gallery.begin_part(NEW)
    gallery.compact()
    assert [part.name for part in gallery.parts] == [
        "old",
        "new",
    ]  # neither has items
    gallery.add(unit(3, 24), ["a", "b", "c"], space=NEW)
    gallery.compact()
    assert [(part.name, part.count) for part in gallery.parts] == [("new", 3)]


def test_compacting_halfway_keeps_what_is_searched(gallery):
    gallery.backfill(new_vectors()[:30], names(30))
    gallery.remove([*names(2), *names(2, start=60)])
    queries, ids = (unit(5, 16, seed=2), unit(5, 24, seed=3)), gallery.ids
    before = gallery.search_mixed(*queries, 96, AffineMerge(0.5, 0.1))
    gallery.compact()
    assert gallery.ids == ids
    after = gallery.search_mixed(*queries, 96, AffineMerge(0.5, 0.1))
    assert after.ids == before.ids
    assert np.array_equal(after.scores, before.scores)
    with pytest.raises(DataError, match="'image-0005' is not in the part 'old'"):
        gallery.vectors(["image-0005"], part="old")
    gallery.backfill(new_vectors()[30:40], names(10, start=30))
    assert gallery.fraction_backfilled == pytest.approx(38 / 96)


def test_items_move_vanish_and_come_again(gallery):
    """Random operations against two dictionaries; on disk, a reader follows."""
    draw = np.random.default_rng(0)
    old, new, made = as_items(unit(100, 16), names(100)), {}, 100
    readers = [] if gallery.path is None else [Gallery.open(gallery.path, read_only=True)]
    for step in range(40):
        what = draw.choice(["old", "new", "backfill", "remove", "compact"], p=[0.2, 0.15, 0.3, 0.3, 0.05])
        count = int(draw.integers(1, 8))
        vectors = {dim: unit(8, dim, seed=100 + step).numpy()[:count] for dim in (16, 24)}
        fresh = [*names(count - 1, start=made), str(draw.choice(names(100)))]
        fresh = [name for name in fresh if name not in old and name not in new]
        made += count
        if what == "old" and fresh:
            gallery.add(vectors[16][: len(fresh)], fresh, space=OLD)
            old |= as_items(vectors[16][: len(fresh)], fresh)
        elif what == "new" and fresh:
            gallery.add(vectors[24][: len(fresh)], fresh, space=NEW)
            new |= as_items(vectors[24][: len(fresh)], fresh)
        elif what == "backfill":
            some = [str(name) for name in draw.permutation(list(old))[:count]]
            gallery.backfill(vectors[24][: len(some)], some)
            new |= as_items(vectors[24][: len(some)], some)
            old = {name: vector for name, vector in old.items() if name not in some}
        elif what == "remove":
            some = [str(name) for name in draw.permutation([*old, *new])[:count]]
            gallery.remove(some)
            old, new = ({n: v for n, v in part.items() if n not in some} for part in (old, new))
        elif what == "compact" and old:
            gallery.compact()
        for reader in readers:
            reader.reload()
        for each in (gallery, *readers):
            assert each.ids == [*old, *new]
            assert_finds(each, old, unit(2, 16, seed=step), part="old")
            if new:
                assert_finds(each, new, unit(2, 24, seed=step), part="new")
    assert gallery.verify() == []
    if gallery.path is not None:
        assert Gallery.open(gallery.path).ids == [*old, *new]


def test_an_item_that_was_backfilled_and_removed_can_come_again_as_an_old_one(tmp_path):
    gallery = Gallery.create(tmp_path / "g", space=OLD, dtype="float32")
    gallery.add(unit(3, 16), ["a", "b", "c"])
    gallery.begin_part(NEW)
    gallery.backfill(unit(1, 24), ["b"])
    gallery.remove(["b"])
    gallery.add(unit(1, 16, seed=4), ["b"], space=OLD)
    for each in (gallery, Gallery.open(tmp_path / "g")):
        assert (each.ids, each.ids_of("new")) == (["a", "c", "b"], [])
        np.testing.assert_array_equal(each.vectors(["b"]), unit(1, 16, seed=4))
    gallery.backfill(unit(1, 24, seed=5), ["b"])
    for each in (gallery, Gallery.open(tmp_path / "g")):
        assert (each.ids_of("old"), each.ids_of("new")) == (["a", "c"], ["b"])


def test_vectors_that_float16_cannot_hold_are_refused(tmp_path):
    gallery, exact = Gallery.create(tmp_path / "g", space=OLD), unit(3, 16)
    tiny = exact.numpy() * np.array([[1.0], [1.0], [1e-8]], np.float32)
    with pytest.raises(DataError, match=r"the vector of 'c' has length 1e-08, too short for float16"):
        gallery.add(tiny, list("abc"))
    gallery.add(exact * 1e-3, list("abc"))
    gallery.begin_part(NEW, dtype="float32")
    gallery.backfill(unit(1, 24) * 1e-8, ["a"])
    gallery.remove(["b"])
    with pytest.raises(DataError, match="make the gallery with dtype='float32'"):
        gallery.add(tiny[2:], ["b"], OLD)
    np.testing.assert_array_equal(gallery.vectors(["a"]), unit(1, 24) * 1e-8)
    with pytest.raises(DataError, match="do not fit into float16"):
        gallery.add(exact[:1] * 1e7, ["x"], OLD)


def test_metadata_moves_with_the_items(tmp_path):
    gallery = Gallery.create(tmp_path / "g", space=OLD)
    gallery.add(unit(4, 16), list("abcd"), metadata={"caption": list("ABCD")})
    gallery.begin_part(NEW)
    gallery.backfill(unit(2, 24), ["c", "a"])
    gallery.backfill(unit(1, 24), ["d"], metadata={"caption": ["other"]})
    assert gallery.metadata(["a", "d", "c"]).to_pydict() == {"caption": ["A", "other", "C"]}
    gallery.compact()
    assert gallery.metadata(["a", "d", "c"]).to_pydict() == {"caption": ["A", "other", "C"]}


def test_a_column_has_one_type_over_all_segments_of_a_part(gallery):
    gallery.compact()
    gallery.remove(["image-0000"])
    gallery.add(unit(2, 16), ["a", "b"], OLD, {"year": [1, 2]})
    gallery.remove(["a"])  # so that it comes into another segment
    before = gallery.ids
    with pytest.raises(StoreError, match="column 'year' is string, which does not go together with int64"):
        gallery.add(unit(1, 16), ["a"], OLD, {"year": ["x"]})
    gallery.add(unit(1, 16), ["a"], OLD, {"year": [2.5]})
    gallery.add(unit(1, 16), ["c"], OLD, {"colour": ["red"]})
    assert gallery.ids == [*before, "a", "c"]
    assert gallery.metadata(["c", "a", "b"])["year"].to_pylist() == [None, 2.5, 2.0]
    gallery.backfill(unit(2, 24), ["a", "b"])
    with pytest.raises(StoreError, match="column 'colour' is int64, which does not go together with string"):
        gallery.add(unit(1, 16), ["d"], OLD, {"colour": [7]})
    with pytest.raises(StoreError, match="column 'year' is string, which does not go together with double"):
        gallery.backfill(unit(1, 24), ["c"], metadata={"year": ["x"]})
    gallery.compact()
    assert gallery.metadata(["b", "a"])["year"].to_pylist() == [2.0, 2.5]
    assert len(gallery) == 102


def test_a_column_goes_together_with_that_of_a_store_elsewhere(tmp_path):
    store = EmbeddingStore.create(tmp_path / "s", modality="image", space=OLD)
    store.append(unit(2, 16), ["a", "b"], {"year": [1, 2]})
    gallery = Gallery.create(tmp_path / "g", store=store)
    with pytest.raises(StoreError, match="column 'year' is string, which does not go together with int64"):
        gallery.add(unit(1, 16), ["c"], metadata={"year": ["x"]})
    assert (gallery.ids, len(list((tmp_path / "g").glob("segments/*")))) == (["a", "b"], 0)
    gallery.add(unit(1, 16), ["c"], metadata={"year": [3]})
    assert gallery.metadata(["c", "a"]).to_pydict() == {"year": [3, 1]}


def test_vectors_go_to_the_part_that_is_known_to_be_of_their_space():
    """The old part's space is not known, and the dimensions are the same."""
    other = make_space("other", seed=5)
    gallery = Gallery.build(unit(3, 16), ["a", "b", "c"])
    gallery.begin_part(other)
    gallery.add(unit(1, 16), ["d"], space=other)
    assert gallery.ids_of("new") == ["d"]
    gallery.add(unit(1, 16), ["e"], space=OLD)  # whatever the old part is, it is not the new space
    assert gallery.ids_of("old") == ["a", "b", "c", "e"]
    nameless = EmbeddingSpace("renamed", 16)
    with pytest.raises(SpaceMismatchError, match=r"'renamed'.* could be .*'old' as well as of 'new'"):
        gallery.add(unit(1, 16), ["f"], space=nameless)
    assert len(gallery) == 5


def test_a_backfill_job_holds_the_right_to_write(gallery):
    with gallery.writing():
        for start in range(0, 100, 25):
            gallery.backfill(new_vectors()[start : start + 25], names(25, start))
            if gallery.path is not None:
                with pytest.raises(StoreError, match="is being written by process"):
                    Gallery.open(gallery.path).remove(["image-0001"])
    assert gallery.fraction_backfilled == 1


def test_refusals(gallery):
    with pytest.raises(DataError, match=r"100 items are in .*'old'|gallery has two parts"):
        gallery.add(unit(1, 24), ["x"])
    with pytest.raises(SpaceMismatchError, match=r"'third'.*'old'.*'new'"):
        gallery.add(unit(1, 16), ["x"], space=make_space("third", seed=5))
    with pytest.raises(SpaceMismatchError, match=r"'old'.*'new'"):
        gallery.backfill(unit(1, 24), ["image-0001"], space=OLD)
    with pytest.raises(SpaceMismatchError, match="dimension 16, but 24"):
        gallery.backfill(unit(1, 16), ["image-0001"])
    with pytest.raises(DataError, match="'nobody' is not in the gallery, so it cannot be backfilled"):
        gallery.backfill(unit(1, 24), ["nobody"])
    gallery.backfill(unit(1, 24), ["image-0001"])
    with pytest.raises(DataError, match="'image-0001' is in the part 'new' already"):
        gallery.backfill(unit(1, 24), ["image-0001"])
    with pytest.raises(DataError, match=r"'image-0001' is already in the gallery \(part 'new'\)"):
        gallery.add(unit(1, 16), ["image-0001"], space=OLD)
    with pytest.raises(
        DataError, match=r"being backfilled: 99 items .*'old' and 1 in 'new'; use search_mixed"
    ):
        gallery.search(unit(1, 16), 1)
    with pytest.raises(DataError, match="no part 'newest'; it has 'old' and 'new'"):
        gallery.search(unit(1, 16), 1, part="newest")
    with pytest.raises(DataError, match="'image-0002' is in the part 'old', but 'image-0001' in 'new'"):
        gallery.vectors(["image-0002", "image-0001"])
    with pytest.raises(DataError, match="two parts already, 'old' and 'new'"):
        gallery.begin_part(make_space("third", seed=5), "third")
    with pytest.raises(DataError, match="k is 101, but the gallery has 100"):
        gallery.search_mixed(unit(1, 16), unit(1, 24), 101, RawMerge())
    with pytest.raises(DataError, match="2 old queries and 1 new"):
        gallery.search_mixed(unit(2, 16), unit(1, 24), 1, RawMerge())
    with pytest.raises(SpaceMismatchError, match="the new query vectors"):
        gallery.search_mixed(unit(1, 16), unit(1, 24), 1, RawMerge(), OLD, OLD)
    with pytest.raises(DataError, match="two parts cannot be saved"):
        gallery.save("anywhere")
    assert len(gallery) == 100


def test_a_second_part_that_is_none_is_refused(tmp_path):
    gallery = Gallery.create(tmp_path / "g", space=OLD, index="PQ8x4")
    with pytest.raises(DataError, match="no new part to backfill; call begin_part"):
        gallery.backfill(unit(1, 24), ["a"])
    with pytest.raises(DataError, match=r"already has the space 'old' \(16-d\)"):
        gallery.begin_part(OLD)
    with pytest.raises(DataError, match="has a part 'old' already"):
        gallery.begin_part(NEW, "old")
    with pytest.raises(StoreError, match=r"letters, digits and underscores.*'a/b'"):
        gallery.begin_part(NEW, "a/b")
    with pytest.raises(ConfigError, match="'PQ8x4' cannot be made for dimension 9"):
        gallery.begin_part(make_space("odd", dim=9))
    assert len(Gallery.open(tmp_path / "g").parts) == 1
