"""Images by their ids, in any order, wherever they are."""

from __future__ import annotations

import io
from pathlib import Path

import PIL.Image
import pytest
from backfills import SCENES
from entries import picture, samples, write_tar

from xbt.backfill.embed import ItemsById
from xbt.data.image_collection import ImageCollection, open_images
from xbt.data.items import Item
from xbt.errors import ConfigError, DataError


def open_items(collection):
    return ItemsById(open_images(collection))


def test_a_folder(tmp_path):
    for name in ("b.png", "a/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    items = open_items(ImageCollection(str(tmp_path)))
    assert len(items) == 2
    assert items["a/c.png"] == str(tmp_path / "a/c.png")
    assert "c.png" not in items


def test_scenes():
    items = open_items(ImageCollection("scenes", limit=60, seed=5, split="test"))
    for row in (59, 0, 31):
        assert items[SCENES.ids[row]].tobytes() == SCENES.image(row).tobytes()


def test_a_hub_data_set_is_read_row_by_row(tmp_path):
    from datasets import Dataset, Features, Image, Value

    images = [{"bytes": picture(n), "path": None} for n in range(5)]
    rows = {"image": images, "name": [f"n{n}" for n in range(5)]}
    features = Features({"image": Image(), "name": Value("string")})
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / "train-0.parquet")
    items = open_items(ImageCollection(f"hf:{tmp_path / 'data'}", split="train", id_column="name"))
    listed = open_images(ImageCollection(f"hf:{tmp_path / 'data'}", split="train", id_column="name"))
    entries = {entry.id: entry.value for entry in listed.parts[0].read()}
    assert sorted(entries) == [f"n{n}" for n in range(5)]
    assert as_bytes(items["n3"]) == as_bytes(entries["n3"])


def as_bytes(source):
    if isinstance(source, PIL.Image.Image):
        return source.tobytes()
    return PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).tobytes()


def test_tars_in_any_order(tmp_path):
    write_tar(tmp_path / "a" / "000.tar", [("__meta__.txt", b"x"), *samples(4)])
    extra = [
        ("d/0009.one.png", picture(9)),
        ("0010.png", picture(10)),
        ("0010.jpg", picture(11)),
        (".png", b"x"),
    ]
    write_tar(tmp_path / "a" / "001.tar", [*samples(2, first=4), *extra, ("0012.txt", b"no image")])
    source = ImageCollection(f"{tmp_path}/a/*.tar")
    items = open_items(source)
    entries = [entry for part in open_images(source).parts for entry in part.read()]
    expected = {entry.id: entry.value for entry in entries if isinstance(entry, Item)}
    assert len(items) == len(expected) == 7
    assert {name: items[name] for name in reversed(list(expected))} == expected


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (
            "x.tar.gz",
            ConfigError,
            "x.tar.gz cannot be read in any order; give uncompressed tars",
        ),
        ("x.tar", DataError, "x.tar cannot be read .*; fix it, or leave it out"),
    ],
)
def test_tars_that_will_not_do(tmp_path, monkeypatch, source, error, words):
    monkeypatch.chdir(tmp_path)
    Path(source).write_bytes(b"no tar" * 200)
    with pytest.raises(error, match=words):
        open_items(ImageCollection(source))


def test_a_stream_will_not_do(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"image": ["a.png"]}).to_parquet(tmp_path / "train-0.parquet")
    source = ImageCollection(f"hf:{tmp_path}", split="train", streaming=True)
    with pytest.raises(ConfigError, match="is a stream, which can only be read in its own order; leave out"):
        open_items(source)


def test_a_tar_that_is_lost_on_the_way(tmp_path):
    path = write_tar(tmp_path / "000.tar", samples(2))
    items = open_items(ImageCollection(str(path)))
    path.unlink()
    with pytest.raises(DataError, match=r"000\.tar is gone since the job began"):
        _ = items["000/0001"]
