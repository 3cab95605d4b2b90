"""A hundred hostile files among good ones: each is embedded or recorded as rejected, and none does harm."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from jobs import config, on_record
from pictures import write_hostile_files

from xbt import images
from xbt.embedding import embed
from xbt.errors import DataError
from xbt.store import StoreBuilder


@pytest.mark.timeout(60)  # opening a FIFO could wait forever
def test_a_hundred_hostile_files_among_good_ones(spec, encoder, folder, tmp_path, capfd):
    usable = write_hostile_files(folder)
    plain = [f"{number // 10}/{number:03d}.png" for number in range(47)]
    out = tmp_path / "out"
    store = embed(config(spec, out, folder))
    rejected, notes = on_record(out, "rejected.jsonl"), on_record(out, "notes.jsonl")

    names = [*plain, *usable]
    by_id = {name.encode("utf-8", "backslashreplace").decode(): name for name in names}
    assert sorted(store.ids) == sorted(by_id)
    paths = [folder / by_id[each] for each in store.ids]
    assert np.abs(store.read() - encoder.encode_images(paths).numpy()).max() <= 1e-6
    # Every file is either in the store or recorded as rejected.
    every = [path for path in folder.rglob("*") if path.suffix.lower() != ""]
    assert len(every) == 147
    assert len(rejected) == len({each["id"] for each in rejected}) == 147 - len(store)
    assert not {each["id"] for each in rejected} & set(store.ids)
    reasons = {each["id"]: each["reason"] for each in rejected}
    assert all(reasons.values())
    for name, words in {
        "pipe.jpg": "it is a pipe",
        "folder.jpg": "it is a directory",
        "dangling.jpg": "does not exist",
        "empty.jpg": "zero bytes",
        "small_bomb.png": "more than the 89478485 that are accepted",
        "thin.png": "must not exceed 100 times",
        "deep_gray.png": "more than 8 bits per pixel",
        "svg.jpg": "in no format that Pillow reads",
        "cut_20.jpg": "truncated",
    }.items():
        assert words in reasons[name], reasons[name]
    note_of = {record["id"]: record["note"] for record in notes}
    assert note_of.keys() <= set(store.ids)
    assert note_of["cmyk.jpg"] == "CMYK converted to RGB"
    assert "first of 2 frames" in note_of["animated.webp"]
    assert "UPPER.JPG" not in note_of
    assert "Warning" not in capfd.readouterr().err
    store.verify()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_that_goes_away_costs_nothing(spec, folder, tmp_path, monkeypatch, num_workers):
    """Once the folder is back, the same command embeds all of its images."""
    write, out = StoreBuilder.write, tmp_path / "out"

    def lose(self, *arguments, **options):
        write(self, *arguments, **options)
        if folder.exists():
            folder.rename(tmp_path / "away")

    with monkeypatch.context() as patch:
        patch.setattr(StoreBuilder, "write", lose)
        with pytest.raises(DataError, match=f"the folder {folder} is gone or empty; put it back"):
            embed(config(spec, out, folder, num_workers=num_workers, batch_size=1))
    (tmp_path / "away").rename(folder)
    assert len(embed(config(spec, out, folder, num_workers=num_workers, batch_size=1))) == 47
    assert on_record(out, "rejected.jsonl") == []


def test_a_failing_disk_costs_nothing(spec, folder, tmp_path, monkeypatch):
    failing = {str(path) for path in sorted(folder.rglob("*.png"))[20:40]}
    status = os.stat

    def fail(path, *arguments, **options):
        if str(path) in failing:
            raise OSError(errno.EIO, "Input/output error")
        return status(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(images.os, "stat", fail)
        with pytest.raises(DataError, match=r"020\.png cannot be read: Input/output error"):
            embed(config(spec, tmp_path / "out", folder))
    assert len(embed(config(spec, tmp_path / "out", folder))) == 47
    assert on_record(tmp_path / "out", "rejected.jsonl") == []


def test_one_file_that_vanished_is_rejected(spec, folder, tmp_path, monkeypatch):
    real = images._open

    def vanish(source):
        (folder / "3/033.png").unlink(missing_ok=True)
        return real(source)

    monkeypatch.setattr(images, "_open", vanish)
    assert len(embed(config(spec, tmp_path / "out", folder))) == 46
    (rejected,) = on_record(tmp_path / "out", "rejected.jsonl")
    assert rejected["id"] == "3/033.png"
    assert "does not exist" in rejected["reason"]
