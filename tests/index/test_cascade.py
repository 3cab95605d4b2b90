"""The cascade: candidates ordered by the new model, which embeds each once, against a numpy oracle."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from galleries import quiet, start
from PIL import Image
from serving import NEW_DIM, make_space, unit_rows

from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, SpaceMismatchError, StoreError
from xbt.index import Cascade, Gallery, QdrantIndex, cascaded_search
from xbt.index.cascade import reranked
from xbt.index.on_demand import Originals, UnavailableOriginal

COUNT, DEPTH = 90, 12
IDS = [f"photos/{row:03d}.png" for row in range(COUNT)]
OLD, NEW = unit_rows(COUNT, seed=1), unit_rows(COUNT, NEW_DIM, seed=2)
OLD_QUERIES, NEW_QUERIES = unit_rows(6, seed=3), unit_rows(6, NEW_DIM, seed=4)


class ByColour:
    """A model for images of one colour, which names their row; it counts what it embeds."""

    def __init__(self, space):
        self.space, self.seen, self.batches = space, Counter(), []

    def encode_images(self, images):
        rows = [image.getpixel((0, 0))[0] for image in images]
        self.seen.update(rows)
        self.batches.append(len(rows))
        return torch.from_numpy(NEW[rows])


def picture(row):
    return Image.new("RGB", (4, 4), (row, 0, 0))


def row_of(item):
    return int(item[7:10])


def original(item):
    return picture(row_of(item))


@pytest.fixture
def new(new_space):
    return ByColour(new_space)


@pytest.fixture(params=["memory", "disk", "qdrant"])
def index(request, tmp_path, old_space):
    """An index of 90 items with their old vectors."""
    if request.param == "memory":
        return Gallery.build(OLD, IDS, old_space)
    return filled(request.param, tmp_path, old_space)


@pytest.fixture
def gallery(tmp_path, old_space):
    return filled("disk", tmp_path, old_space)


def filled(kind, path, space):
    if kind == "disk":
        made = Gallery.create(path / "gallery", space=space, dtype="float32")
    else:
        made = QdrantIndex.create(":memory:", "photos", space=space)
    made.add(OLD, IDS, space)
    return made


def backfill(index, rows, space):
    index.add_vector("new", space)
    if len(rows):
        index.upsert([IDS[row] for row in rows], NEW[rows], "new")


def expected(query, k, with_vector, depth=DEPTH):
    """The results of one query, by slots: rows without a vector keep theirs, the others fill the rest."""
    first = np.argsort(-(OLD.astype(np.float64) @ OLD_QUERIES[query])).tolist()
    scores = NEW.astype(np.float64) @ NEW_QUERIES[query]
    others = sorted(with_vector, key=lambda row: -scores[row])[:k]
    pool = sorted({*first[:depth], *others} & set(with_vector), key=lambda row: -scores[row])
    fixed = {place: row for place, row in enumerate(first[:depth]) if row not in with_vector}
    line, rest = [], iter(pool)
    for place in range(len(pool) + len(fixed)):
        line.append(fixed[place] if place in fixed else next(rest))
    return (line + [row for row in first[depth:] if row not in line])[:k]


def heads(depth=DEPTH):
    return np.argsort(-(OLD.astype(np.float64) @ OLD_QUERIES.T.astype(np.float64)), axis=0)[:depth].T


def assert_expected(hits, k, with_vector, depth=DEPTH):
    for query in range(len(OLD_QUERIES)):
        rows = expected(query, k, with_vector, depth)
        assert [row_of(item) for item in hits.ids[query]] == rows
        scores = hits.scores[query]
        assert (np.diff(scores) <= 0).all()
        known = [place for place, row in enumerate(rows) if row in with_vector]
        true = NEW[[rows[place] for place in known]].astype(np.float64) @ NEW_QUERIES[query]
        assert np.abs(scores[known] - true).max() <= 1e-6


@pytest.mark.parametrize("backfilled", ["nothing", "a third", "everything"])
@pytest.mark.parametrize("k", [5, 30])
def test_results_are_those_of_the_oracle(index, new, k, backfilled, old_space, new_space):
    rows = {"nothing": [], "a third": range(0, COUNT, 3), "everything": range(COUNT)}[backfilled]
    if backfilled != "nothing":
        backfill(index, list(rows), new_space)
    with Cascade(new, original, depth=DEPTH) as cascade:
        hits = index.search(OLD_QUERIES, k, old_space, rerank=cascade, new_queries=NEW_QUERIES)
        candidates = {int(row) for row in heads().ravel()}
        assert_expected(hits, k, candidates | set(rows))
        if backfilled == "everything":
            alone = np.argsort(-(NEW @ NEW_QUERIES.T), axis=0)[:k].T
            assert [[row_of(item) for item in line] for line in hits.ids] == alone.tolist()
        assert set(new.seen) == candidates - set(rows)
        again = index.search(OLD_QUERIES, k, old_space, rerank=cascade, new_queries=NEW_QUERIES)
        assert again.ids == hits.ids
        assert set(new.seen.values()) <= {1}
        counts = cascade.statistics
        assert counts.queries == 12
        assert counts.candidates == 12 * DEPTH
        present = sum(int(row) in rows for row in heads().ravel())
        assert counts.hits == present + 6 * DEPTH
        assert counts.embedded == len(new.seen)
        assert counts.hit_rate == counts.hits / counts.candidates
        assert counts.embedded_per_query == len(new.seen) / 12
    assert np.abs(index.fetch([IDS[row] for row in candidates], "new") - NEW[list(candidates)]).max() <= 1e-6


def test_old_vectors_are_found_however_items_moved(gallery, new_space):
    """Moved rows are searched in groups, which grow and lose rows."""
    gallery.add_vector("new", new_space)
    draw, there = np.random.default_rng(0), dict(enumerate(OLD))
    order = draw.permutation(COUNT)
    for place in range(0, 60, 4):
        backfill(gallery, order[place : place + 4], new_space)
        if place % 12 == 8:
            gone = int(order[place - 3])
            gallery.remove([IDS[gone]])
            del there[gone]
        found = gallery.search(OLD_QUERIES, COUNT, using="old")
        rows = np.array(sorted(there))
        best = rows[np.argsort(-(OLD[rows] @ OLD_QUERIES.T), axis=0).T]
        assert [[row_of(item) for item in line] for line in found.ids] == best.tolist()


def test_missing_and_broken_originals_keep_their_place(index, new, new_space):
    asked = Counter()
    contents = {item: encoded(row) for row, item in enumerate(IDS)}
    for row in range(0, COUNT, 5):
        del contents[IDS[row]]
    for row in range(1, COUNT, 5):
        contents[IDS[row]] = b"no image"

    def find(item):
        asked[item] += 1
        return contents[item]

    candidates = {int(row) for row in heads().ravel()}
    usable = {row for row in candidates if row % 5 > 1}
    with Cascade(new, find, depth=DEPTH) as cascade:
        for _ in range(2):
            hits = cascaded_search(index, OLD_QUERIES, NEW_QUERIES, 20, cascade)
            assert_expected(hits, 20, usable)
        assert set(asked.values()) == {1}
        counts = cascade.statistics
        assert counts.missing == 2 * sum(row % 5 == 0 for row in heads().ravel())
        assert counts.broken == 2 * sum(row % 5 == 1 for row in heads().ravel())
        assert counts.late == 0
        contents.update((item, encoded(row)) for row, item in enumerate(IDS))
        cascade.refresh()
        hits = cascaded_search(index, OLD_QUERIES, NEW_QUERIES, 20, cascade)
        assert_expected(hits, 20, candidates)
        assert set(new.seen.values()) == {1}


def encoded(row):
    buffer = io.BytesIO()
    picture(row).save(buffer, "PNG")
    return buffer.getvalue()


def test_slow_originals_are_late_and_stored_afterwards(gallery, new, new_space):
    ready = threading.Event()
    slow = int(heads()[0][0])
    backfill(gallery, heads()[0][1:], new_space)

    def find(item):
        if row_of(item) == slow:
            ready.wait(30)
        return original(item)

    query = OLD_QUERIES[:1], NEW_QUERIES[:1]
    head = {int(row) for row in heads()[0]}
    with Cascade(new, find, depth=DEPTH, time_limit=0.05) as cascade:
        hits = cascaded_search(gallery, *query, 10, cascade)
        assert [row_of(item) for item in hits.ids[0]] == expected(0, 10, head - {slow})
        assert hits.ids[0][0] == IDS[slow]  # the first place is kept
        assert hits.scores[0, 0] == hits.scores[0, 1]
        assert cascade.statistics.late == 1
        ready.set()
        wait_until(lambda: IDS[slow] in gallery.ids_of("new"))
        hits = cascaded_search(gallery, *query, 10, cascade)
        assert [row_of(item) for item in hits.ids[0]] == expected(0, 10, head)
        assert new.seen[slow] == 1


def test_originals_that_nobody_has_begun_are_left_for_later(gallery, new):
    ready, asked = threading.Event(), []

    def find(item):
        asked.append(item)
        ready.wait(30)
        return original(item)

    with Cascade(new, find, depth=DEPTH, time_limit=0.05, workers=1) as cascade:
        hits = cascaded_search(gallery, OLD_QUERIES[:1], NEW_QUERIES[:1], 10, cascade)
        first = gallery.search(OLD_QUERIES[:1], 10, using="old")
        assert hits.ids == first.ids
        np.testing.assert_array_equal(hits.scores, first.scores)  # no result has a new vector
        ready.set()
    assert asked == first.ids[0][: min(len(asked), 1)]  # none at all where the thread has not started yet
    assert gallery.ids_of("new") == asked


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_eight_threads_embed_every_item_once(gallery, new):
    barrier, found, errors = threading.Barrier(8), {}, []

    def find(item):
        time.sleep(0.002)
        return original(item)

    def search(number, cascade):
        try:
            barrier.wait()
            for turn in range(12):
                query = (number + turn) % 6
                some = slice(query, query + 1)
                hits = cascaded_search(gallery, OLD_QUERIES[some], NEW_QUERIES[some], 5, cascade)
                found.setdefault(query, []).append(hits.ids[0])
        except Exception as error:
            errors.append(error)

    with Cascade(new, find, depth=DEPTH) as cascade:
        threads = [threading.Thread(target=search, args=(number, cascade)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert set(new.seen.values()) == {1}
        assert set(new.seen) == {int(row) for row in heads().ravel()}
        last = cascaded_search(gallery, OLD_QUERIES, NEW_QUERIES, 5, cascade)
        assert [[row_of(item) for item in line] for line in last.ids] == [
            expected(query, 5, set(new.seen)) for query in range(6)
        ]
        assert cascade.statistics.embedded == len(new.seen)
        assert cascade.statistics.queries == 8 * 12 + 6
    for lines in found.values():  # the candidates of a query are always ranked completely
        assert len(lines) == 16


needs_fork = pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")


def search_for_ever(path, space, log):
    quiet()
    gallery = Gallery.open(path)
    draw = np.random.default_rng(0)
    cascade = Cascade(ByColour(space), original, depth=3, batch_size=2)
    while True:
        queries = [draw.standard_normal((1, dim)).astype(np.float32) for dim in (16, NEW_DIM)]
        head = gallery.search(queries[0], 3, using="old").ids[0]
        log.send(("begin", head))
        gallery.search(queries[0], 3, rerank=cascade, new_queries=queries[1])
        log.send(("end", head))


@needs_fork
@pytest.mark.parametrize("after", [1, 6, 15])
def test_a_kill_in_the_middle_of_a_search_loses_nothing_that_was_stored(gallery, new, new_space, after):
    child, log = start(search_for_ever, gallery.path, new_space)
    done = []
    while len(done) < after:
        what, head = log.recv()
        if what == "end":
            done.append(head)
    while log.recv()[0] != "begin":
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    acknowledged = sorted({item for head in done for item in head})
    after_kill = Gallery.open(gallery.path)
    assert after_kill.verify() == []
    stored = after_kill.ids_of("new")
    assert set(acknowledged) <= set(stored)
    rows = [row_of(item) for item in stored]
    np.testing.assert_array_equal(after_kill.fetch(stored, "new"), NEW[rows])
    with Cascade(new, original, depth=DEPTH) as cascade:
        hits = after_kill.search(OLD_QUERIES, 10, rerank=cascade, new_queries=NEW_QUERIES)
    assert_expected(hits, 10, {int(row) for row in heads().ravel()} | set(rows))
    assert not set(new.seen) & set(rows)


def write_candidates(path, space, log):
    quiet()
    other = Gallery.open(path)
    backfill(other, heads()[0], space)
    log.send("written")


@needs_fork
def test_vectors_of_another_process_are_seen(gallery, new, new_space):
    with Cascade(new, original, depth=DEPTH) as cascade:
        cascaded_search(gallery, OLD_QUERIES[1:2], NEW_QUERIES[1:2], 5, cascade)
        own = set(new.seen)
        child, log = start(write_candidates, gallery.path, new_space)
        assert log.recv() == "written"
        child.join()
        hits = cascaded_search(gallery, OLD_QUERIES[:1], NEW_QUERIES[:1], 5, cascade)
    assert set(new.seen) == own
    rows = own | {int(row) for row in heads()[0]}
    assert [row_of(item) for item in hits.ids[0]] == expected(0, 5, rows)


def test_an_item_that_is_replaced_meanwhile_gets_no_vector_of_its_former_image(gallery, new, old_space):
    first, second = IDS[int(heads()[0][0])], IDS[int(heads()[0][1])]
    replaced = []

    def find(item):
        if item == first and not replaced:
            replaced.append(item)
            gallery.remove([item])
            gallery.add(OLD[[row_of(item)]] * 0.999, [item], old_space)
        return original(item)

    query = OLD_QUERIES[:1], NEW_QUERIES[:1]
    head = {int(row) for row in heads()[0]}
    with Cascade(new, find, depth=DEPTH) as cascade:
        hits = cascaded_search(gallery, *query, 10, cascade)
        assert hits.ids[0][0] == first
        assert first not in gallery.ids_of("new")
        hits = cascaded_search(gallery, *query, 10, cascade)
        assert [row_of(item) for item in hits.ids[0]] == expected(0, 10, head)
        gallery.remove([second])  # after it was stored: its new vector is gone as well
        gallery.add(OLD[[row_of(second)]], [second], old_space)
        hits = cascaded_search(gallery, *query, 10, cascade)
        assert [row_of(item) for item in hits.ids[0]] == expected(0, 10, head)
        assert (new.seen[row_of(first)], new.seen[row_of(second)]) == (2, 2)


def test_prewarming_embeds_what_most_queries_ask_for(index, new):
    log = OLD_QUERIES[[0, 0, 0, 1, 1, 2]]
    with Cascade(new, original, depth=DEPTH) as cascade:
        asked = Counter(int(row) for query in (0, 0, 0, 1, 1, 2) for row in heads()[query])
        assert cascade.prewarm(index, log, budget=10) == 10
        least = min(asked[row] for row in new.seen)
        assert len(new.seen) == 10
        assert all(row in new.seen for row, times in asked.items() if times > least)
        assert cascade.prewarm(index, log) == len(asked) - 10
        assert cascade.prewarm(index, log) == 0
        assert cascade.statistics.queries == 0
        cascaded_search(index, OLD_QUERIES[:3], NEW_QUERIES[:3], 5, cascade)
        assert cascade.statistics.hit_rate == 1
        assert cascade.statistics.embedded == len(asked)
    assert set(new.seen.values()) == {1}


def test_another_first_stage_a_filter_and_a_single_query(new, old_space):
    from qdrant_client import models

    index = QdrantIndex.create(":memory:", "photos", space=old_space)
    index.add(OLD, IDS, old_space, {"number": list(range(COUNT))})
    even = models.Filter(must=[models.FieldCondition(key="number", range=models.Range(lt=30))])
    with Cascade(new, original, depth=DEPTH) as cascade:
        hits = index.search(OLD_QUERIES[0], 5, rerank=cascade, new_queries=NEW_QUERIES[0], filter=even)
        first = np.argsort(-(OLD[:30] @ OLD_QUERIES[0]))[:DEPTH]
        best = first[np.argsort(-(NEW[first] @ NEW_QUERIES[0]))][:5]
        assert [row_of(item) for item in hits.ids[0]] == best.tolist()
        assert set(new.seen) == set(first.tolist())
        other = index.search(-OLD_QUERIES[:1], DEPTH)
        hits = cascaded_search(index, OLD_QUERIES[:1], NEW_QUERIES[:1], 5, cascade, first=other)
        rows = [row_of(item) for item in other.ids[0]]
        assert set(rows) <= set(new.seen)
        pool = np.array(sorted(new.seen))
        best = pool[np.argsort(-(NEW[pool] @ NEW_QUERIES[0]))][:5]
        assert [row_of(item) for item in hits.ids[0]] == best.tolist()


def test_a_complete_index_is_searched_by_the_new_model_alone(gallery, new, new_space):
    backfill(gallery, np.arange(COUNT), new_space)
    gallery.compact()
    with Cascade(new, original) as cascade:
        hits = cascaded_search(gallery, OLD_QUERIES, NEW_QUERIES, 5, cascade)
        assert cascade.prewarm(gallery, OLD_QUERIES) == 0
    assert hits.ids == gallery.search(NEW_QUERIES, 5).ids


def test_a_closed_cascade_starts_again(gallery, new):
    cascade = Cascade(new, original, depth=DEPTH)
    for query in range(3):
        with cascade:
            some = slice(query, query + 1)
            cascaded_search(gallery, OLD_QUERIES[some], NEW_QUERIES[some], 5, cascade)
    assert cascade.statistics.queries == 3
    assert cascade.statistics.embedded == len(new.seen) == len(gallery.ids_of("new"))
    assert set(new.seen.values()) == {1}


def test_texts_are_embedded_by_the_text_tower(tmp_path, old_space):
    encoder = load_encoder(tiny.tiny_open_clip(tmp_path / "model"))
    texts = {f"caption-{row}": f"a photo of {row} dogs" for row in range(20)}
    ids = list(texts)
    texts["caption-3"] = " "
    index = Gallery.build(OLD[:20], ids, old_space)
    with Cascade(encoder, texts, depth=20, modality="text") as cascade:
        hits = cascaded_search(index, OLD_QUERIES, encoder.encode_texts(["dogs"] * 6), 20, cascade)
        assert cascade.statistics.broken == 6
        assert cascade.statistics.embedded == 19
    assert [line.index("caption-3") for line in hits.ids] == [
        np.argsort(-(OLD[:20] @ query)).tolist().index(3) for query in OLD_QUERIES
    ]
    kept = [item for item in ids if item != "caption-3"]
    vectors = encoder.encode_texts([texts[item] for item in kept])
    np.testing.assert_allclose(index.fetch(kept, "new"), vectors, atol=1e-5)


def test_a_real_encoder_reads_a_folder_of_images(tmp_path, old_space):
    encoder = load_encoder(tiny.tiny_open_clip(tmp_path / "model"))
    (tmp_path / "images/photos").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for item in IDS[:10]:
        pixels = draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / item)
    (tmp_path / "images" / IDS[4]).write_bytes(b"no image")
    index = Gallery.build(OLD[:12], [*IDS[:10], "../model/open_clip_config.json", IDS[11]], old_space)
    queries = encoder.encode_texts(["a dog"])
    with Cascade(encoder, tmp_path / "images", depth=12) as cascade:
        cascaded_search(index, OLD_QUERIES[:1], queries, 12, cascade)
        counts = cascade.statistics
    assert (counts.embedded, counts.broken, counts.missing) == (9, 2, 1)
    kept = [item for item in IDS[:10] if item != IDS[4]]
    vectors = encoder.encode_images([tmp_path / "images" / item for item in kept])
    np.testing.assert_allclose(index.fetch(kept, "new"), vectors, atol=1e-5)


def test_failures_of_the_system_are_not_remembered(gallery, new):
    fails = True

    def find(item):
        if fails:
            raise ConnectionError("no route to host")
        return original(item)

    with Cascade(new, find, depth=DEPTH) as cascade:
        hits = cascaded_search(gallery, OLD_QUERIES, NEW_QUERIES, 5, cascade)
        assert hits.ids == gallery.search(OLD_QUERIES, 5, using="old").ids
        fails = False
        hits = cascaded_search(gallery, OLD_QUERIES, NEW_QUERIES, 5, cascade)
        assert_expected(hits, 5, {int(row) for row in heads().ravel()})
    with pytest.raises(UnavailableOriginal, match="no route"):
        Originals(lambda item: (_ for _ in ()).throw(OSError("no route"))).read("a")


def test_a_model_that_fails_fails_the_search_and_stores_nothing(gallery, new):
    def encode(images):
        raise DataError("the model gives NaN")

    working, new.encode_images = new.encode_images, encode
    with Cascade(new, original, depth=DEPTH) as cascade:
        with pytest.raises(DataError, match="gives NaN"):
            cascaded_search(gallery, OLD_QUERIES, NEW_QUERIES, 5, cascade)
        assert gallery.ids_of("new") == []
        new.encode_images = working
        hits = cascaded_search(gallery, OLD_QUERIES, NEW_QUERIES, 5, cascade)
        assert_expected(hits, 5, {int(row) for row in heads().ravel()})


def test_wrong_arguments(gallery, new, old_space, other_space, tmp_path):
    for options in ({"depth": 0}, {"workers": True}, {"batch_size": 0}, {"time_limit": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Cascade(new, original, **options)
    for source, options in (
        (tmp_path / "nothing", {}),
        (tmp_path, {"modality": "text"}),
        (3, {}),
        (original, {"modality": "sound"}),
    ):
        with pytest.raises(ConfigError):
            Cascade(new, source, **options)
    with Cascade(new, original) as cascade:
        pair = OLD_QUERIES, NEW_QUERIES
        with pytest.raises(ConfigError, match="new_queries= is missing"):
            gallery.search(OLD_QUERIES, 5, rerank=cascade)
        with pytest.raises(ConfigError, match="using= was given"):
            gallery.search(OLD_QUERIES, 5, using="old", rerank=cascade, new_queries=NEW_QUERIES)
        with pytest.raises(SpaceMismatchError, match="the old queries"):
            cascaded_search(gallery, *pair, 5, cascade, old_space=other_space)
        with pytest.raises(SpaceMismatchError, match="the new queries"):
            cascaded_search(gallery, *pair, 5, cascade, new_space=other_space)
        with pytest.raises(SpaceMismatchError):
            cascaded_search(gallery, OLD_QUERIES, OLD_QUERIES, 5, cascade)
        with pytest.raises(DataError, match="6 old queries and 5 new"):
            cascaded_search(gallery, OLD_QUERIES, NEW_QUERIES[:5], 5, cascade)
        with pytest.raises(DataError, match="k is 0"):
            cascaded_search(gallery, *pair, 0, cascade)
        with pytest.raises(DataError, match="empty"):
            cascaded_search(Gallery.create(tmp_path / "empty", space=old_space), *pair, 5, cascade)
        cascaded_search(gallery, *pair, 5, cascade)
        with pytest.raises(ConfigError, match="another index"):
            cascaded_search(Gallery.build(OLD, IDS, old_space), *pair, 5, cascade)
    other = ByColour(make_space("model-third", NEW_DIM, 104))
    with pytest.raises(SpaceMismatchError), Cascade(other, original) as cascade:
        cascaded_search(gallery, *pair, 5, cascade)
    other = Gallery.create(tmp_path / "other", space=old_space)
    other.add(OLD, IDS)
    with Cascade(new, original) as cascade, pytest.raises(StoreError, match="read-only"):
        cascaded_search(Gallery.open(tmp_path / "other", read_only=True), *pair, 5, cascade)


@pytest.mark.parametrize("seed", range(20))
def test_places_of_any_mixture_of_candidates(seed):
    draw = np.random.default_rng(seed)
    names = [str(number) for number in range(30)]
    first = [str(name) for name in draw.permutation(names)[:20]]
    scores = {str(name): float(draw.integers(5)) for name in draw.permutation(names)[: draw.integers(30)]}
    others = sorted(scores, key=lambda name: -scores[name])[: draw.integers(10)]
    line = reranked(first, others, scores, 8)
    assert sorted(line) == sorted({*first, *others})
    for place, name in enumerate(first[:8]):
        assert name in scores or line[place] == name
    ranked = [name for name in line if name in {*first[:8], *others} and name in scores]
    assert [scores[name] for name in ranked] == sorted((scores[name] for name in ranked), reverse=True)
    rest = [name for name in first[8:] if name not in ranked]
    assert line[len(line) - len(rest) :] == rest
