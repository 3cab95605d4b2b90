"""Sources of a job: ids, order, resuming, and rejected entries."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from entries import entries, ids, picture, samples, value, write_tar

from xbt.data import CaptionSource, ImageTextPairs, make_scenes, read_captions
from xbt.data.image_collection import ImageCollection, open_captions, open_images
from xbt.data.items import Item, Rejected
from xbt.errors import ConfigError, DataError

# Folders


def test_a_folder_is_searched_recursively(tmp_path):
    for name in ("b.JPG", "a/2.png", "a/10.jpeg", "a/deep/x.WebP", "notes.txt", ".hidden.png", "Z.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    source = open_images(ImageCollection(str(tmp_path), include_hidden=True))
    found = entries(source)
    assert ids(found) == [".hidden.png", "Z.gif", "a/10.jpeg", "a/2.png", "a/deep/x.WebP", "b.JPG"]
    assert source.length == 6
    assert all(item.metadata == {"image_path": str(tmp_path / item.id)} for item in found)
    assert all(Path(item.value).is_file() for item in found)
    assert ids(entries(source, start=2, stop=4)) == ["a/10.jpeg", "a/2.png"]


def test_every_name_with_an_image_suffix_is_listed(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg/in.png").write_bytes(picture(1))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    found = entries(open_images(ImageCollection(str(tmp_path))))
    assert ids(found) == ["dangling.png", "folder.jpg", "folder.jpg/in.png", "pipe.png"]


@pytest.mark.parametrize("suffix", ["jpe", "jfif", "JPE", "heic", "heif", "hif", "avif", "jxl"])
def test_rare_suffixes(tmp_path, suffix):
    """Formats that need a plugin are listed, so that they are recorded as rejected."""
    (tmp_path / f"a.{suffix}").write_bytes(picture(1))
    write_tar(tmp_path / "t.tar", [(f"a.{suffix}", picture(1))])
    assert ids(entries(open_images(ImageCollection(str(tmp_path))))) == [f"a.{suffix}"]
    (item,) = entries(open_images(ImageCollection(str(tmp_path / "t.tar"))))
    assert item.value == picture(1)


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "data/real").mkdir(parents=True)
    (tmp_path / "data/real/a.png").write_bytes(picture(1))
    (tmp_path / "data/link").symlink_to("real")
    (tmp_path / "data/real/up").symlink_to("..")  # an endless path
    (tmp_path / "data/self").symlink_to("self")
    found = ids(entries(open_images(ImageCollection(str(tmp_path / "data")))))
    assert {"real/a.png", "link/a.png"} <= set(found)
    assert len(found) < 10


def test_names_that_are_not_utf8_get_readable_ids(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(3))
    (item,) = entries(open_images(ImageCollection(str(tmp_path))))
    assert item.id == "caf\\udce9.png"
    assert json.loads(json.dumps(item.metadata)) == {"image_path": f"{tmp_path}/caf\\udce9.png"}
    assert value(item) == picture(3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), r"holds no image.*\*\.tar"),
        (lambda path: path.write_text("x"), "images cannot be listed from"),
    ],
)
def test_a_source_without_images(tmp_path, make, words):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=words):
        open_images(ImageCollection(str(tmp_path / "data")))


def test_the_digest_depends_on_the_ids(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture(1))
    first = open_images(ImageCollection(str(tmp_path))).digest()
    assert open_images(ImageCollection(str(tmp_path))).digest() == first
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert open_images(ImageCollection(str(tmp_path))).digest() != first


# Karpathy's files and scenes


def karpathy(path, names):
    images = [
        {
            "filename": name,
            "filepath": "val2014",
            "split": "test",
            "sentences": [{"raw": f"one {name}"}, {"raw": " "}],
        }
        for name in names
    ]
    path.write_text(json.dumps({"images": images}), encoding="utf-8")
    return str(path)


def test_karpathy_images_and_captions_share_their_names(tmp_path):
    file = karpathy(tmp_path / "dataset_coco.json", ["a.jpg", "b.jpg"])
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014/b.jpg").write_bytes(picture(1))
    images = entries(open_images(ImageCollection(file)))
    assert ids(images) == [
        "val2014/a.jpg",
        "val2014/b.jpg",
    ]  # a.jpg is missing, which only reading shows
    assert images[1].value == str(tmp_path / "val2014/b.jpg")
    captions = entries(open_captions(CaptionSource(file)))
    assert ids(captions) == ["val2014/a.jpg#0", "val2014/a.jpg#1", "val2014/b.jpg#0", "val2014/b.jpg#1"]
    assert [type(entry) for entry in captions] == [Item, Rejected, Item, Rejected]


def test_karpathy_without_any_image(tmp_path):
    file = karpathy(tmp_path / "dataset_coco.json", ["a.jpg", "b.jpg"])
    with pytest.raises(DataError, match=r"none of the 2 image files is there, first val2014/a\.jpg"):
        open_images(ImageCollection(file))


def test_scenes_and_a_limit(tmp_path):
    scenes = make_scenes(5, seed=3, split="val")
    found = entries(open_images(ImageCollection("scenes", split="val", seed=3, limit=5)))
    assert ids(found) == scenes.ids
    assert [item.value.tobytes() for item in found] == [image.tobytes() for image in scenes.images]
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    chosen = ids(entries(open_images(ImageCollection(str(tmp_path), limit=4, seed=1))))
    assert len(chosen) == 4
    assert chosen == sorted(chosen)
    assert chosen != ids(entries(open_images(ImageCollection(str(tmp_path), limit=4, seed=2))))


# Captions


def test_ids_of_captions(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n three \n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"caption": "x"}\n\n{"caption": ["y", "z"]}\n', encoding="utf-8")
    coco = {"images": [], "annotations": [{"id": 77, "caption": "q"}, {"caption": "r"}]}
    (tmp_path / "c.json").write_text(json.dumps(coco), encoding="utf-8")
    rows = {
        name: [
            (entry.id, getattr(entry, "value", None)) for entry in entries(open_captions(CaptionSource(file)))
        ]
        for name, file in [(each, str(tmp_path / each)) for each in ("a.txt", "a.jsonl", "c.json")]
    }
    assert rows == {
        "a.txt": [("row-0", "one"), ("row-1", None), ("row-2", "three")],
        "a.jsonl": [("row-0", "x"), ("row-1#0", "y"), ("row-1#1", "z")],
        "c.json": [("77", "q"), ("row-1", "r")],
    }


def test_the_captions_are_those_that_stage_1_reads(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f" caption {n} " if n % 3 else "" for n in range(60)))
    for source in (
        CaptionSource(str(tmp_path / "a.txt")),
        CaptionSource(str(tmp_path / "a.txt"), limit=7, seed=5),
        CaptionSource("scenes", limit=9, seed=2),
    ):
        captions = [entry.value for entry in entries(open_captions(source)) if isinstance(entry, Item)]
        assert captions == read_captions(source)


def test_a_caption_that_is_not_unicode_is_rejected(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"caption": "good"}\n{"caption": "bad \\ud800"}\n', encoding="utf-8")
    good, bad = entries(open_captions(CaptionSource(str(tmp_path / "a.jsonl"))))
    assert isinstance(good, Item)
    assert bad == Rejected("row-1", "the caption is not valid Unicode: 'bad \\\\ud800'")


def test_the_digest_depends_on_the_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    first = open_captions(CaptionSource(str(tmp_path / "a.txt"))).digest()
    (tmp_path / "a.txt").write_text("one\nthree\n")
    assert open_captions(CaptionSource(str(tmp_path / "a.txt"))).digest() != first


# Hugging Face data sets


@pytest.fixture
def parquet(tmp_path):
    """A data set of 10 images in three parquet files, one image missing."""
    rows = [{"bytes": picture(n), "path": None} if n != 4 else None for n in range(10)]
    features = datasets.Features({"image": datasets.Image(), "name": datasets.Value("string")})
    whole = datasets.Dataset.from_dict(
        {"image": rows, "name": [f"n{n}" for n in range(10)]}, features=features
    )
    for number in range(3):
        part = whole.shard(3, number, contiguous=True)
        (tmp_path / "data").mkdir(exist_ok=True)
        part.to_parquet(str(tmp_path / f"data/train-{number}.parquet"))
    return f"hf:{tmp_path / 'data'}"


def test_a_data_set_in_any_order_and_as_a_stream(parquet):
    listed = open_images(ImageCollection(parquet, id_column="name"))
    streamed = open_images(ImageCollection(parquet, id_column="name", streaming=True))
    assert (len(listed.parts), listed.length, len(streamed.parts), streamed.length) == (1, 10, 3, None)
    whole = entries(listed)
    assert ids(whole) == [f"n{n}" for n in range(10)]
    assert [item.value for item in whole] == [picture(n) if n != 4 else b"" for n in range(10)]
    parts = [item for part in range(3) for item in entries(streamed, part)]
    assert parts == whole
    assert entries(streamed, 1, start=2) == entries(streamed, 1)[2:]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_a_table_that_does_not_call_them_so(tmp_path, streaming):
    """pandas and polars write the structure of the Image type without its name."""
    cells = [{"bytes": picture(0), "path": None}, {"bytes": None, "path": "x/1.png"}, None]
    plain = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    (tmp_path / "d").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.table({"image": pyarrow.array(cells, plain)}), tmp_path / "d/train.parquet"
    )
    source = ImageCollection(f"hf:{tmp_path / 'd'}", image_root="/photos", streaming=streaming)
    assert [item.value for item in entries(open_images(source))] == [picture(0), "/photos/x/1.png", b""]


def test_a_stream_whose_files_were_replaced_is_another_source(parquet, tmp_path):
    streamed = ImageCollection(parquet, streaming=True)
    begun = open_images(streamed).digest()
    assert open_images(streamed).digest() == begun
    path = tmp_path / "data/train-1.parquet"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert open_images(streamed).digest() != begun


def test_ids_without_a_column(parquet):
    assert ids(entries(open_images(ImageCollection(parquet))))[:2] == ["row-0", "row-1"]
    streamed = open_images(ImageCollection(parquet, streaming=True))
    assert ids(entries(streamed, 2)) == ["shard-2/row-0", "shard-2/row-1", "shard-2/row-2"]
    assert ids(entries(streamed, 2, start=1)) == ["shard-2/row-1", "shard-2/row-2"]


def test_an_id_column_that_is_not_unique_or_has_gaps(tmp_path):
    for name, names in (("twice", ["a", "b", "a"]), ("gap", ["a", None, "c"])):
        datasets.Dataset.from_dict({"image": ["x.png"] * 3, "name": names}).save_to_disk(tmp_path / name)
    with pytest.raises(DataError, match="id 'a' occurs more than once"):
        open_images(ImageCollection(f"hf:{tmp_path / 'twice'}", id_column="name"))
    with pytest.raises(DataError, match="row 1: no id in the column 'name'"):
        open_images(ImageCollection(f"hf:{tmp_path / 'gap'}", id_column="name"))
    with pytest.raises(DataError, match="made by save_to_disk and cannot be streamed"):
        open_images(ImageCollection(f"hf:{tmp_path / 'gap'}", streaming=True))


def test_captions_of_a_data_set_take_its_ids(tmp_path):
    table = {"caption": [["a", "b"], ["c", "d"]], "name": ["x", "y"]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "d")
    source = CaptionSource(f"hf:{tmp_path / 'd'}", id_column="name")
    assert ids(entries(open_captions(source))) == ["x#0", "x#1", "y#0", "y#1"]


def test_a_stream_that_breaks_off_stops_the_job(parquet, tmp_path):
    source = open_images(ImageCollection(parquet, streaming=True))
    (tmp_path / "data/train-1.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"shard-1 cannot be read beyond row 0 .* run the same command again"):
        entries(source, 1)
    assert len(entries(source, 2)) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "test"}, "no split 'test'; it has train"),
        ({"image_column": "picture"}, "no column 'picture'; it has"),
        ({"id_column": "key"}, "no column 'key'; it has"),
        ({"image_column": "name", "source": "hf:./nowhere"}, "does not exist"),
    ],
)
def test_a_missing_stream(parquet, options, words):
    with pytest.raises(DataError, match=words):
        open_images(ImageCollection(**{"source": parquet, "streaming": True, **options}))


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"source": "photos", "split": "test"},
            "split 'test' was given with photos, which is of the kind 'folder'",
        ),
        ({"source": "a.tar", "limit": 3}, "limit 3 was given with a.tar"),
        ({"source": "a.json", "streaming": True}, "streaming True was given with a.json"),
        ({"source": "hf:x", "streaming": True, "limit": 3}, "the length of a stream is not known"),
        ({"source": "hf:x", "image_size": 64}, "image_size 64 was given with hf:x"),
        ({"source": " "}, "source is empty"),
        ({"source": "photos", "limit": 0}, "limit is 0"),
    ],
)
def test_options_that_do_not_apply(options, words):
    with pytest.raises(ConfigError, match=words):
        ImageCollection(**options)


def test_options_of_captions_that_do_not_apply(tmp_path):
    write_tar(tmp_path / "a.tar", samples(1))
    with pytest.raises(ConfigError, match=r"limit 3 was given with .*, but tars have no such option"):
        open_captions(CaptionSource(str(tmp_path / "a.tar"), limit=3))
    with pytest.raises(
        ConfigError, match="id_column 'name' was given with scenes, but only hf: sources have"
    ):
        read_captions(CaptionSource("scenes", id_column="name"))


def test_a_url_of_the_hub_is_not_a_data_set():
    assert ImageCollection("hf://datasets/clip-benchmark/wds_flickr30k/test/0.tar").kind == "tars"
    assert ImageCollection("hf:nlphuji/flickr30k").kind == "hf"
    assert isinstance(make_scenes(1), ImageTextPairs)
