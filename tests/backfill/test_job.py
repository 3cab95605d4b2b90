"""A backfill from its first item to its last, and what ends it earlier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backfills import COUNT, SCENES, lines, order_of, others, scenes

from xbt.backfill import load_merge, run_backfill
from xbt.backfill.orders import distance_to_mean_order, query_log_order, random_order
from xbt.data import CaptionSource, read_captions
from xbt.errors import DataError
from xbt.evaluation import recall_at_k
from xbt.index import Gallery
from xbt.index.calibration import mixed_ranks


def test_every_item_is_moved_in_the_order(config, gallery, new_vectors, old_vectors, new, tmp_path):
    result = run_backfill(config(seed=3))
    ids = [SCENES.ids[row] for row in random_order(COUNT, 3)]
    assert order_of(tmp_path / "out") == ids
    made = Gallery.open(gallery, read_only=True)
    assert made.verify() == []
    assert (made.ids_of("old"), made.ids_of("new")) == ([], ids)
    assert np.abs(made.vectors(SCENES.ids, part="new") - new_vectors.numpy()).max() <= 1e-6
    assert np.array_equal(made.vectors(SCENES.ids, part="old"), old_vectors.numpy())
    assert made.metadata(SCENES.ids).column("number").to_pylist() == list(range(COUNT))
    assert made.search(new_vectors[:5], 1, new.space).ids == [[name] for name in SCENES.ids[:5]]
    assert (result.items, result.rejected, result.fraction, result.position) == (COUNT, 0, 1.0, COUNT)
    assert result.why == "nothing is left to do"
    assert "backfilled 60 items; 60 of the order's 60 are taken up" in str(result)


def test_all_backfilled_is_a_gallery_of_the_new_model(config, new, new_vectors, tmp_path):
    run_backfill(config(evaluation=scenes(), support=others()))
    curve = lines(tmp_path / "out" / "curve.jsonl")
    assert [point["position"] for point in curve] == [0, 20, 40, 60]
    assert [point["fraction"] for point in curve] == [0, 20 / 60, 40 / 60, 1]
    recall = recall_at_k(new.encode_texts(SCENES.texts), new_vectors, SCENES.positives_t2i, (1, 5, 10))
    assert {k: curve[-1][f"R@{k}"] for k in (1, 5, 10)} == pytest.approx(recall, abs=0)


def test_recall_on_the_way_is_that_of_the_exact_ranks(config, gallery, old, new, old_vectors, new_vectors,
                                                      tmp_path):  # fmt: skip
    run_backfill(config(evaluation=scenes(), support=others()))
    order, merge = order_of(tmp_path / "out"), load_merge(gallery)
    queries = old.encode_texts(SCENES.texts), new.encode_texts(SCENES.texts)
    for point in lines(tmp_path / "out" / "curve.jsonl"):
        moved = set(order[: point["position"]])
        mask = torch.tensor([name in moved for name in SCENES.ids])
        ranks = mixed_ranks(*queries, old_vectors, new_vectors, SCENES.positives_t2i, mask, merge)
        for k in (1, 5, 10):
            assert point[f"R@{k}"] == pytest.approx(float((ranks < k).double().mean()))
        assert point["interval"][0] <= point["mean"] <= point["interval"][1]
        hits = sum((ranks < k).int() for k in (1, 5, 10)).tolist()
        assert point["hits"] == "".join(map(str, hits))


@pytest.mark.parametrize("order", ["oldest", "query_log", "distance_to_mean", "fastfill", "rehearsed"])
def test_orders(config, gallery, old, old_vectors, tmp_path, order):
    log = CaptionSource("scenes", limit=50, seed=8)
    needs = {
        "query_log": {"query_log": log},
        "distance_to_mean": {"clusters": 4},
        "fastfill": {"support": others()},
        "rehearsed": {"support": others(), "query_log": log},
    }
    run_backfill(config(order=order, max_items=10, **needs.get(order, {})))
    found = order_of(tmp_path / "out")
    assert sorted(found) == sorted(SCENES.ids)
    known = {
        "oldest": lambda: torch.arange(COUNT),
        "query_log": lambda: query_log_order(old.encode_texts(read_captions(log)), old_vectors),
        "distance_to_mean": lambda: distance_to_mean_order(old_vectors, clusters=4),
    }
    if order in known:
        assert found == [SCENES.ids[row] for row in known[order]()]
    assert Gallery.open(gallery).ids_of("new") == found[:10]


def test_who_maps_the_index_finds_one(config, gallery, old, old_vectors, monkeypatch, tmp_path):
    """On the way and in the end, also of a job that measures nothing and so searches nothing."""
    from xbt.backfill import job

    real, indexed = job.backfill_present, []

    def looking(*arguments):
        reader = Gallery.open(tmp_path / "mapped", read_only=True, mmap=True)
        indexed.append([view.index is not None for view in reader._state.views()])
        return real(*arguments)

    monkeypatch.setattr(job, "backfill_present", looking)
    made = Gallery.create(tmp_path / "mapped", space=old.space, index="IVF1,Flat")
    made.add(old_vectors, SCENES.ids)
    run_backfill(config(gallery=str(made.path)))
    # A part is worth an index as long as it has 39 items, and every twenty items the job looks.
    none, old_only, new_only = [False, False], [True, False], [False, True]
    assert indexed == [none, none, old_only, none, new_only, new_only]


def test_a_budget_of_items_and_then_more(config, gallery, tmp_path):
    result = run_backfill(config(max_items=25))
    order = order_of(tmp_path / "out")
    assert (result.items, result.position, result.why) == (25, 25, "max_items 25 are taken up")
    assert Gallery.open(gallery).ids_of("new") == order[:25]
    assert run_backfill(config(max_items=25)).items == 0
    assert run_backfill(config(max_items=31)).items == 6
    result = run_backfill(config())
    assert (result.items, result.fraction) == (29, 1.0)
    assert Gallery.open(gallery).ids_of("new") == order == order_of(tmp_path / "out")


def test_a_budget_of_time(config, gallery, monkeypatch):
    clock = iter(range(0, 10**6, 900))  # a quarter of an hour between any two looks
    monkeypatch.setattr("xbt.backfill.job.time.monotonic", lambda: next(clock))
    result = run_backfill(config(max_hours=1.0))
    assert 0 < result.items < COUNT
    assert result.items % 10 == 0
    assert result.why == "max_hours 1 have passed"


def test_a_target_of_recall(config, tmp_path):
    least = {"evaluation": scenes(), "support": others()}
    low = run_backfill(config(**least, recall_target=0.001, output_dir=str(tmp_path / "low")))
    assert (low.items, low.why, len(low.curve)) == (0, "recall_target 0.001 is reached", 1)
    high = run_backfill(config(**least, recall_target=1.0))
    assert (high.items, high.why) == (COUNT, "nothing is left to do")


def test_it_stops_where_a_thousand_items_no_longer_pay(config, monkeypatch, tmp_path):
    # Random models find nothing: no gain is more than its error for long.
    monkeypatch.setattr("xbt.backfill.curve.NEXT", 20)
    result = run_backfill(config(evaluation=scenes(), support=others(), stop_when_flat=True))
    assert "items gained" in result.why
    assert result.position < COUNT
    assert result.stopping_position == result.position - 20
    again = run_backfill(config(evaluation=scenes(), support=others(), stop_when_flat=True))
    assert (again.items, again.curve) == (0, result.curve)
    rest = run_backfill(config(evaluation=scenes(), support=others()))
    assert rest.items == COUNT - result.items


def test_a_compatible_encoder_asks_the_old_part(config, gallery, models, old, new, tmp_path):
    from xbt.compatible import CompatibleEncoder
    from xbt.projections import fit_projection

    texts = SCENES.texts
    projection = fit_projection(
        new.encode_texts(texts), old.encode_texts(texts), method="procrustes",
        new_space=new.space, old_space=old.space,
    )  # fmt: skip
    CompatibleEncoder(new, projection).save_pretrained(tmp_path / "compatible")
    options = {"old": None, "compatible": str(tmp_path / "compatible"), "evaluation": scenes(20)}
    # Without the old encoder the support's old vectors are those of the gallery.
    with pytest.raises(DataError, match=r"the image 'scene-val-9-000000' of --support is not in the gallery"):
        run_backfill(config(**options, support=others()))
    with pytest.raises(DataError, match="images are both in --support and in --evaluation"):
        run_backfill(config(**options, support=scenes()))
    result = run_backfill(config(**options))
    assert result.fraction == 1
    assert [point.position for point in result.curve] == [0, 20, 40, 60]
