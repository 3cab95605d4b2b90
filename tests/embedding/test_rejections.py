"""Rejected items: trying them again, and the limit on their share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jobs import Interrupted, config, interrupt_after, on_record
from pictures import SCENES, write_tar

from xbt.data import CaptionSource
from xbt.embedding import embed, job, work
from xbt.embedding.rejected import RejectionLimit
from xbt.errors import ConfigError, DataError
from xbt.store import EmbeddingStore

LOST = ("1/011.png", "1/012.png", "3/037.png")


@pytest.fixture
def photos(folder):
    """A folder with three temporarily unreadable files and a permanently unreadable one."""
    for name in (*LOST, "bad.png"):
        (folder / name).write_bytes(b"")
    return folder


def repair(folder):
    """Restore two of the three files; one of them is not plain RGB."""
    SCENES.image(11).convert("CMYK").save(folder / LOST[0], "JPEG")
    SCENES.image(37).save(folder / LOST[2])


def assert_repaired(out, encoder, folder):
    store = EmbeddingStore.open(out)
    store.verify()
    expected = {str(path.relative_to(folder)) for path in folder.rglob("*.png")} - {LOST[1], "bad.png"}
    assert len(store) == len(expected) == 46
    assert set(store.ids) == expected
    vectors = encoder.encode_images([folder / name for name in store.ids]).numpy()
    assert np.abs(store.read() - vectors).max() <= 1e-6
    assert store.metadata(["image_path"])["image_path"].to_pylist() == [str(folder / n) for n in store.ids]
    assert [each["id"] for each in on_record(out, "rejected.jsonl")] == [LOST[1], "bad.png"]
    assert on_record(out, "notes.jsonl") == [{"id": LOST[0], "note": "CMYK converted to RGB"}]
    assert not (out / "retried").exists()
    return store


def test_rejected_items_of_a_finished_job_are_tried_again(spec, encoder, photos, tmp_path, capsys):
    old = embed(config(spec, tmp_path / "out", photos))
    assert len(old) == 44
    repair(photos)
    assert len(embed(config(spec, tmp_path / "out", photos))) == 44
    capsys.readouterr()
    seen = []
    real = work.ShardPlan.batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work.ShardPlan, "batches", lambda *a: (seen.append(b) or b for b in real(*a)))
        embed(config(spec, tmp_path / "out", photos, retry_rejected=True))
    assert [item.id for batch in seen for item in batch.items] == [*LOST, "bad.png"]
    assert "tried 4 rejected items again: 2 embedded, rejected 2" in capsys.readouterr().out
    store = assert_repaired(tmp_path / "out", encoder, photos)
    assert store.ids == [*old.ids, LOST[0], LOST[2]]  # rows keep their numbers
    with pytest.warns(UserWarning, match="none of 2 images could be embedded"):
        embed(config(spec, tmp_path / "out", photos, retry_rejected=True))
    assert_repaired(tmp_path / "out", encoder, photos)
    SCENES.image(12).save(photos / LOST[1])
    SCENES.image(13).save(photos / "bad.png")
    embed(config(spec, tmp_path / "out", photos, retry_rejected=True))
    assert len(EmbeddingStore.open(tmp_path / "out")) == 48
    assert on_record(tmp_path / "out", "rejected.jsonl") == []
    embed(config(spec, tmp_path / "out", photos, retry_rejected=True))
    assert "nothing is left to try again" in capsys.readouterr().out


@pytest.mark.parametrize("shards", [0, 2, 4])
def test_rejected_items_of_an_unfinished_job_are_tried_again(
    spec, encoder, photos, tmp_path, monkeypatch, shards
):
    with monkeypatch.context() as patch:
        interrupt_after(patch, shards)
        with pytest.raises(Interrupted):
            embed(config(spec, tmp_path / "out", photos))
    repair(photos)
    embed(config(spec, tmp_path / "out", photos, retry_rejected=True))
    assert_repaired(tmp_path / "out", encoder, photos)


class Killed(BaseException):
    pass


def test_a_kill_while_items_are_tried_again(spec, encoder, photos, tmp_path, monkeypatch):
    """Kill the job before each rename in turn; the same command continues."""
    embed(config(spec, tmp_path / "out", photos))
    repair(photos)
    rename, left, kills, ended = Path.replace, 0, 0, False

    def replace(self, target):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    while not ended:
        left = 2 + kills  # after the two that record the run
        try:
            embed(config(spec, tmp_path / "out", photos, retry_rejected=True))
            ended = True
        except Killed:
            kills += 1
        assert len(EmbeddingStore.open(tmp_path / "out")) in (44, 46)
    monkeypatch.undo()
    assert kills >= 5
    assert_repaired(tmp_path / "out", encoder, photos)


def test_a_half_removed_folder_does_no_harm(spec, encoder, photos, tmp_path):
    embed(config(spec, tmp_path / "out", photos))
    repair(photos)
    (tmp_path / "out/retried/img_emb").mkdir(parents=True)
    (tmp_path / "out/retried/img_emb/img_emb_0.npy").write_bytes(b"half")
    embed(config(spec, tmp_path / "out", photos, retry_rejected=True))
    assert_repaired(tmp_path / "out", encoder, photos)


@pytest.mark.filterwarnings("ignore:none of 1 texts")
def test_captions_are_tried_again(spec, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    source = CaptionSource(str(tmp_path / "a.txt"))
    store = embed(config(spec, tmp_path / "out", captions=source, retry_rejected=True))
    assert store.ids == ["row-0", "row-2"]
    assert "tried 1 rejected items again: 0 embedded, rejected 1" in capsys.readouterr().out
    assert [each["id"] for each in on_record(tmp_path / "out", "rejected.jsonl")] == ["row-1"]


def test_streams_are_not_tried_again(spec, tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", 0, 3)
    monkeypatch.setattr(job, "load_encoder", lambda *arguments: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=r"--retry_rejected cannot be used with .*tar: it is a stream"):
        embed(config(spec, tmp_path / "out", f"{tmp_path}/*.tar", retry_rejected=True))


# The limit


@pytest.fixture
def failing(tmp_path):
    """150 files; all from the 21st on are unreadable."""
    (tmp_path / "photos").mkdir()
    SCENES.image(0).save(tmp_path / "photos/000.png")
    for number in range(1, 150):
        path = tmp_path / f"photos/{number:03d}.png"
        path.write_bytes((tmp_path / "photos/000.png").read_bytes() if number < 20 else b"")
    return tmp_path / "photos"


def test_too_many_rejections_stop_a_job(spec, failing, tmp_path):
    words = r"80 of 100 items were rejected \(the last is 099.png: .*\), more than the share 0.5 of --max_rej"
    with pytest.raises(DataError, match=words):
        embed(config(spec, tmp_path / "out", failing, max_rejected=0.5, batch_size=5))
    assert len(list((tmp_path / "out/in_progress").glob("[0-9]*.json"))) == 9  # all but the current one
    for path in failing.iterdir():
        path.write_bytes((failing / "000.png").read_bytes())
    store = embed(config(spec, tmp_path / "out", failing, max_rejected=0.0, retry_rejected=True))
    assert sorted(store.ids) == [f"{number:03d}.png" for number in range(150)]
    assert on_record(tmp_path / "out", "rejected.jsonl") == []


def test_too_many_rejections_over_several_runs_stop_the_job(spec, failing, tmp_path, monkeypatch):
    for _ in range(2):  # no single run sees a hundred items
        with monkeypatch.context() as patch:
            interrupt_after(patch, 6)
            with pytest.raises(Interrupted):
                embed(config(spec, tmp_path / "out", failing, max_rejected=0.5))
    for _ in range(2):
        with pytest.raises(DataError, match=r"130 of 150 items were rejected \(rejected.jsonl says why\)"):
            embed(config(spec, tmp_path / "out", failing, max_rejected=0.5))
    assert len(embed(config(spec, tmp_path / "out", failing, max_rejected=0.9))) == 20


def test_too_many_rejections_on_retry(spec, failing, tmp_path):
    embed(config(spec, tmp_path / "out", failing))
    with (
        pytest.warns(UserWarning, match="none of 130"),
        pytest.raises(DataError, match=r"130 of 150 items were rejected \(rejected.jsonl says why\)"),
    ):
        embed(config(spec, tmp_path / "out", failing, max_rejected=0.5, retry_rejected=True))
    assert len(EmbeddingStore.open(tmp_path / "out")) == 20


def test_the_limit_needs_a_hundred_items(spec, failing, tmp_path):
    for number in range(99, 150):
        (failing / f"{number:03d}.png").unlink()
    assert len(embed(config(spec, tmp_path / "out", failing, max_rejected=0.0))) == 20
    limit = RejectionLimit(0.5, streams=True)
    limit.add(99, [("a", "x")] * 49)
    limit.add(1, [("b", "x")])
    with pytest.raises(
        DataError, match=r"51 of 100 items .* fix the source and start again with --overwrite"
    ):
        limit.add(0, [("c", "x")])


@pytest.mark.parametrize("share", [-0.1, 1.0, 50])
def test_a_share_is_below_one(share):
    with pytest.raises(ConfigError, match="--max_rejected is a share from 0 to below 1"):
        config("x", "y", "folder", max_rejected=share)
