"""A job that was cut off continues in the same order, whatever happened to the gallery meanwhile."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from backfills import COUNT, SCENES, lines, order_of, scenes
from galleries import FORK, quiet

from xbt.backfill import run_backfill
from xbt.data import PairSource
from xbt.errors import ConfigError, DataError, StoreError
from xbt.index import Gallery
from xbt.store.lock import WriterLock


def run_and_die(config, number):
    """Kills itself before the n-th file is synchronised or renamed, which is when files come into being."""
    quiet()
    count = 0

    def counting(real):
        def call(*arguments):
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*arguments)

        return call

    os.fsync, Path.replace = counting(os.fsync), counting(Path.replace)
    run_backfill(config)
    os._exit(7)


def state(gallery, out):
    """All that must not depend on kills."""
    made = Gallery.open(gallery, read_only=True)
    assert made.verify() == []
    ids = made.ids_of("new")
    curve = [{**point, "seconds": 0} for point in lines(out / "curve.jsonl")]
    rejected = lines(out / "rejected.jsonl")
    return made.ids, ids, made.vectors(ids, part="new"), made.vectors(made.ids_of("old")), curve, rejected


@pytest.mark.skipif(FORK is None, reason="needs fork and SIGKILL")
def test_killed_at_every_stage_and_continued(config, photos, tmp_path):
    where = {"evaluation": PairSource(photos["images"].source, photos["images"].image_root)}
    (tmp_path / "photos" / "030.png").touch()  # pairs want their files; this one is empty then
    run_backfill(config(**photos, **where, evaluate_every=20, output_dir=str(tmp_path / "whole")))
    whole = state(photos["gallery"], tmp_path / "whole")
    assert [each["id"] for each in whole[-1]] == [name for name in order_of(tmp_path / "whole")
                                                  if name in ("007.png", "030.png")]  # fmt: skip
    met = 0
    for number in range(3, 200, 8):
        path = tmp_path / f"gallery_{number}"
        source = Gallery.open(photos["gallery"])
        made = Gallery.create(path, space=source.parts[0].space, dtype="float32")
        names = [f"{row:03d}.png" for row in range(COUNT)]
        made.add(source.vectors(names, part="old"), names)
        made.close()
        options = {**photos, **where, "gallery": str(path), "evaluate_every": 20}
        job = config(**options, output_dir=str(tmp_path / f"out_{number}"))
        child = FORK.Process(target=run_and_die, args=(job, number))
        child.start()
        child.join(60)
        if child.exitcode == 7:
            break
        assert child.exitcode == -signal.SIGKILL
        met += 1
        run_backfill(job)
        for mine, expected in zip(state(path, tmp_path / f"out_{number}"), whole, strict=True):
            same = np.abs(mine - expected).max() <= 1e-6 if isinstance(mine, np.ndarray) else mine == expected
            assert same
    assert met >= 4


def test_items_that_are_added_come_last(config, gallery, old, tmp_path):
    run_backfill(config(max_items=10))
    made = Gallery.open(gallery)
    made.add(old.encode_images([SCENES.image(0)]), ["stranger"], old.space)
    made.remove([order_of(tmp_path / "out")[30]])
    before = order_of(tmp_path / "out")
    result = run_backfill(config())
    assert order_of(tmp_path / "out") == [*before, "stranger"]
    assert (result.items, result.total) == (COUNT - 11, COUNT + 1)
    assert lines(tmp_path / "out" / "rejected.jsonl") == [
        {"id": "stranger", "reason": "there is no such image in scenes"}
    ]
    made.reload()
    assert made.ids_of("old") == ["stranger"]
    assert made.ids_of("new") == [name for name in before if name != before[30]]


def test_items_that_are_removed_while_they_are_embedded(config, gallery, monkeypatch, tmp_path):
    from xbt.backfill import job

    real = job.backfill_present

    def removing(opened, vectors, ids, *rest):
        monkeypatch.undo()
        Gallery.open(gallery).remove(ids[:3])
        return real(opened, vectors, ids, *rest)

    monkeypatch.setattr(job, "backfill_present", removing)
    result = run_backfill(config())
    assert (result.items, result.fraction) == (COUNT - 3, 1.0)
    assert Gallery.open(gallery).ids_of("new") == order_of(tmp_path / "out")[3:]


@pytest.mark.parametrize("compacted", [False, True])
def test_items_that_are_replaced_meanwhile(config, gallery, old, monkeypatch, tmp_path, compacted):
    """The vectors are of images that their items no longer have: the next run takes them up."""
    from xbt.backfill import job

    real = job.backfill_present

    def replacing(opened, vectors, ids, *rest):
        monkeypatch.undo()
        made = Gallery.open(gallery)
        made.remove(ids[:3])
        made.add(old.encode_images([SCENES.image(0)]).numpy()[[0, 0]] * [[1], [-1]], ids[:2], old.space)
        if compacted:
            made.compact()
        return real(opened, vectors, ids, *rest)

    monkeypatch.setattr(job, "backfill_present", replacing)
    result = run_backfill(config())
    order = order_of(tmp_path / "out")
    assert (result.items, result.fraction) == (COUNT - 3, (COUNT - 3) / (COUNT - 1))
    made = Gallery.open(gallery)
    assert (made.ids_of("old"), made.ids_of("new")) == (order[:2], order[3:])
    assert run_backfill(config()).items == 2
    made.reload()
    assert made.ids_of("new") == [*order[3:], *order[:2]]


def test_nothing_left_to_do(config, gallery, old, tmp_path):
    run_backfill(config())
    files = {path: path.read_bytes() for path in gallery.rglob("*.npy")}
    again = run_backfill(config())
    assert (again.items, again.position, again.why) == (0, COUNT, "nothing is left to do")
    Gallery.open(gallery).compact()
    result = run_backfill(config())
    assert (result.items, result.fraction, result.total) == (0, 1.0, COUNT)
    assert files


def test_a_new_order_in_the_same_directory(config, gallery, tmp_path):
    run_backfill(config(max_items=20))
    first = order_of(tmp_path / "out")
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        run_backfill(config(seed=1))
    run_backfill(config(seed=1, overwrite=True))
    second = order_of(tmp_path / "out")
    assert sorted(second) == sorted(first[20:])
    assert Gallery.open(gallery).ids_of("new") == first[:20] + second


def test_another_writer_is_waited_for(config, gallery, monkeypatch):
    from xbt.index import target

    slept = []
    lock = WriterLock(gallery)

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            lock.release()

    real = target.backfill_present

    def busy(*arguments):
        monkeypatch.undo()
        monkeypatch.setattr(target.time, "sleep", sleep)
        lock.acquire()
        return real(*arguments)

    monkeypatch.setattr("xbt.backfill.job.backfill_present", busy)
    assert run_backfill(config(max_items=10)).items == 10
    assert slept == [0.05, 0.1, 0.2]
    monkeypatch.setattr(target, "LOCK_TIMEOUT", 0.0)
    with WriterLock(gallery), pytest.raises(StoreError, match="gallery is being written by process"):
        run_backfill(config())


def test_two_jobs_in_one_directory(config, tmp_path):
    (tmp_path / "out").mkdir()
    with WriterLock(tmp_path / "out"), pytest.raises(StoreError, match="out is being written by process"):
        run_backfill(config())


def test_lines_that_were_damaged(config, tmp_path):
    run_backfill(config(max_items=10, evaluation=scenes()))
    curve = tmp_path / "out" / "curve.jsonl"
    whole = curve.read_bytes()
    curve.write_bytes(whole + whole[:50])  # a kill amid a line
    run_backfill(config(max_items=20, evaluation=scenes()))
    assert [point["position"] for point in lines(curve)] == [0, 10, 20]
    curve.write_bytes(b"no json\n" + whole)
    with pytest.raises(DataError, match=r"curve\.jsonl, line 1, is no JSON; restore the file"):
        run_backfill(config(evaluation=scenes()))
