from __future__ import annotations

import gzip
import io
import json
import pickle
import unicodedata
import warnings

import datasets
import numpy as np
import pytest
from fuzzing import damaged, damaged_json, dump, fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from xbt.data import PairSource, load_pairs, make_scenes
from xbt.errors import ConfigError, DataError, ImageError

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(colour, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def colour_of(pairs, row):
    return pairs.image(row).getpixel((3, 3))


@pytest.fixture
def coco(tmp_path):
    """Four images in two folders; five, six, no and one captions; as in dataset_coco.json."""
    records = []
    plan = [
        ("train", "train2014", 5),
        ("restval", "val2014", 6),
        ("train", "train2014", 0),
        ("test", "val2014", 1),
    ]
    for i, (split, folder, count) in enumerate(plan):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{i}.png").write_bytes(png(COLOURS[i]))
        sentences = [
            {"tokens": ["caption"], "raw": f" Caption {k} of {i}.\n", "imgid": i, "sentid": 10 * i + k}
            for k in range(count)
        ]
        records.append(
            {
                "filepath": folder,
                "sentids": [s["sentid"] for s in sentences],
                "filename": f"{i}.png",
                "imgid": i,
                "split": split,
                "sentences": sentences,
                "cocoid": 100 + i,
            }
        )
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": records, "dataset": "coco"}))
    return path


def test_karpathy(coco):
    with pytest.warns(UserWarning, match=r"1 of 4 images .* have no caption .* first train2014/2\.png"):
        pairs = load_pairs(str(coco))
    assert pairs.ids == ["train2014/0.png", "val2014/1.png", "val2014/3.png"]
    assert [len(texts) for texts in pairs.captions] == [5, 6, 1]
    assert pairs.captions[2] == ["Caption 0 of 3."]
    assert [colour_of(pairs, row) for row in range(3)] == [COLOURS[0], COLOURS[1], COLOURS[3]]


def test_karpathy_splits_and_gzip(coco, tmp_path):
    packed = tmp_path / "elsewhere" / "dataset_coco.json.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(coco.read_bytes()))

    def ids(split):
        return load_pairs(PairSource(str(packed), image_root=str(tmp_path), split=split)).ids

    assert ids("test") == ["val2014/3.png"]
    assert ids("restval") == ["val2014/1.png"]
    with pytest.warns(UserWarning, match="1 of 2 images|1 of 3 images"):
        assert ids("train") == ["train2014/0.png"]
    with pytest.warns(UserWarning, match="1 of 2 images|1 of 3 images"):
        assert ids("train+restval") == ["train2014/0.png", "val2014/1.png"]
    with pytest.raises(DataError, match="no split 'val'; it has restval, test, train"):
        ids("val")
    with pytest.raises(
        DataError, match=r"4 of 4 image files are missing, first train2014/0\.png.*image_root"
    ):
        load_pairs(str(packed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[2].pop("filename"), "record 2 of 'images' lacks the key 'filename'"),
        (lambda r: r[1].pop("split"), "record 1 of 'images' lacks the key 'split'"),
        (lambda r: r[1].pop("sentences"), "record 1 of 'images' lacks the key 'sentences'"),
        (lambda r: r[1]["sentences"][4].pop("raw"), "record 1 of 'images', sentence 4 lacks the key 'raw'"),
        (lambda r: r[0].update(sentences="no"), "a str under 'sentences' instead of a list"),
        (lambda r: r.insert(0, None), "record 0 of 'images' lacks the key 'filename'"),
        (lambda r: r.clear(), "is empty"),
        (lambda r: r.append(r[0]), r"id 'train2014/0\.png' occurs more than once"),
        (lambda r: [x["sentences"].clear() for x in r], "none of the 4 images .* has a caption"),
    ],
)
def test_malformed_karpathy(coco, change, message):
    content = json.loads(coco.read_text())
    change(content["images"])
    coco.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=message):
            load_pairs(str(coco))


def test_sources_that_are_not_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.json").write_text('{"annotations": [], "images": []}')
    (tmp_path / "a.xml").write_text("a")
    with pytest.raises(DataError, match="give a Karpathy split file"):
        load_pairs(str(tmp_path / "a.xml"))
    with pytest.raises(DataError, match="names no image: captions alone are no pairs"):
        load_pairs(str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match=r"neither in Karpathy's format .* nor in COCO's"):
        load_pairs(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match="is a directory"):
        load_pairs(str(tmp_path))
    with pytest.raises(ConfigError, match="only hf: sources have subsets"):
        load_pairs(PairSource(str(tmp_path / "a.json"), subset="en"))
    with pytest.raises(ConfigError, match="limit is -1"):
        PairSource("scenes", limit=-1)


def hub_dataset(captions):
    rows = [{"bytes": png(colour), "path": None} for colour in COLOURS[:2]]
    rows.append({"bytes": png(COLOURS[2])[:40], "path": "broken.png"})
    rows.append({"bytes": b"just words", "path": None})
    data = datasets.Dataset.from_dict({"image": rows, "caption": captions})
    return data.cast_column("image", datasets.Image(decode=False)).cast_column("image", datasets.Image())


def test_saved_dataset_with_corrupt_images(tmp_path):
    hub_dataset(["a", "b", "c", "d"]).save_to_disk(tmp_path / "saved")
    pairs = load_pairs(f"hf:{tmp_path / 'saved'}")
    assert pairs.captions == [["a"], ["b"], ["c"], ["d"]]
    assert colour_of(pairs, 1) == COLOURS[1]
    with pytest.raises(ImageError, match="row-2"):
        pairs.image(2)
    kept, rejected = pairs.drop_unreadable()
    assert kept.ids == ["row-0", "row-1"]
    assert [item.id for item in rejected] == ["row-2", "row-3"]
    assert "row-3 cannot be decoded" in rejected[1].reason
    assert colour_of(pickle.loads(pickle.dumps(kept)), 0) == COLOURS[0]


def test_parquet_directory_with_lists_and_splits(tmp_path):
    data = hub_dataset([["a", "A"], ["b"], [" "], ["d", ""]])
    (tmp_path / "data").mkdir()
    data.rename_columns({"image": "jpg", "caption": "text"}).to_parquet(tmp_path / "data" / "test-0.parquet")
    source = PairSource(f"hf:{tmp_path}", image_column="jpg", caption_column="text", split="test")
    with pytest.warns(UserWarning, match="1 of 4 images"):
        pairs = load_pairs(source)
    assert pairs.ids == ["row-0", "row-1", "row-3"]
    assert pairs.captions == [["a", "A"], ["b"], ["d"]]
    assert colour_of(pairs, 0) == COLOURS[0]
    with pytest.raises(DataError, match="no column 'image'; it has jpg, text"):
        load_pairs(PairSource(f"hf:{tmp_path}", image_column="image"))
    with pytest.raises(DataError, match="no column 'caption'; it has jpg, text"):
        load_pairs(PairSource(f"hf:{tmp_path}", caption_column="caption"))
    with pytest.raises(DataError, match="no split 'val'"):
        load_pairs(PairSource(f"hf:{tmp_path}", split="val"))


def test_dataset_of_paths(tmp_path):
    (tmp_path / "0.png").write_bytes(png(COLOURS[2]))
    data = {"image": ["0.png", "gone.png", None], "caption": ["a", "b", "c"], "n": [1, 2, 3]}
    datasets.Dataset.from_dict(data).save_to_disk(tmp_path / "saved")
    pairs = load_pairs(PairSource(f"hf:{tmp_path / 'saved'}", image_root=str(tmp_path)))
    assert colour_of(pairs, 0) == COLOURS[2]
    kept, rejected = pairs.drop_unreadable()
    assert len(kept) == 1
    assert [item.id for item in rejected] == ["row-1", "row-2"]
    with pytest.raises(DataError, match="the column 'n' holds"):
        load_pairs(PairSource(f"hf:{tmp_path / 'saved'}", image_column="n"))


def test_scenes_and_limit(coco):
    pairs = load_pairs(PairSource("scenes", limit=7, seed=2, split="test", image_size=16))
    same = make_scenes(7, seed=2, split="test", image_size=16)
    assert pairs.captions == same.captions
    assert np.array_equal(np.asarray(pairs.image(3)), np.asarray(same.image(3)))
    with pytest.warns(UserWarning, match="have no caption"):
        some = load_pairs(PairSource(str(coco), limit=2, seed=0))
    assert len(some) == 2
    assert some.ids == sorted(some.ids)


def official(names):
    return {
        "images": [{"id": row, "file_name": name} for row, name in enumerate(names)],
        "annotations": [{"image_id": row, "caption": f"Caption {row}."} for row in range(len(names))],
    }


def split_file(names):
    return {
        "images": [
            {"filename": name, "split": "test", "sentences": [{"raw": f"Caption {row}."}]}
            for row, name in enumerate(names)
        ]
    }


def test_captions_that_are_not_unicode_are_left_out_with_one_warning(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(COLOURS[0]))
    content = split_file(["a.png", "b.png"])
    content["images"][0]["sentences"] += [{"raw": "half \ud83d"}, {"raw": " "}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    message = (
        r"1 of the captions .* blank .*; 1 of the captions .*, first one of 'a\.png', are not valid Unicode"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        assert load_pairs(str(tmp_path / "a.json")).captions == [["Caption 0."], ["Caption 1."]]
    assert len(caught) == 1
    content["images"][1]["sentences"] = [{"raw": "\ude00"}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"1 of 2 images .* have no caption and are left out, first b\.png"):
        assert load_pairs(str(tmp_path / "a.json")).ids == ["a.png"]


@pytest.mark.parametrize("make", [official, split_file])
def test_image_names_in_any_normal_form(tmp_path, make):
    names = [unicodedata.normalize(form, f"Fotos é/{form} ñ.png") for form in ("NFC", "NFD")]
    for name, form in zip(names, ("NFD", "NFC"), strict=True):
        path = tmp_path / unicodedata.normalize(form, name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(COLOURS[0]))
    (tmp_path / "a.json").write_text(json.dumps(make(names)))
    pairs = load_pairs(str(tmp_path / "a.json"))
    assert pairs.ids == names
    assert pairs.image(1).size == (8, 6)


@pytest.mark.parametrize("make", [official, split_file])
@pytest.mark.parametrize("name", ["../b.png", "c/../../b.png", "/{}/b.png"])
def test_names_that_leave_the_image_root_are_refused(tmp_path, make, name):
    (tmp_path / "b.png").write_bytes(png(COLOURS[0]))
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.png").write_bytes(png(COLOURS[0]))
    (root / "a.json").write_text(json.dumps(make(["a.png", name.format(tmp_path)])))
    with pytest.raises(DataError, match=r"record 1 of 'images' names the file .*, which lies outside of the"):
        load_pairs(str(root / "a.json"))
    inside = make([str(root / "a.png")])
    (root / "a.json").write_text(json.dumps(inside))
    assert len(load_pairs(str(root / "a.json"))) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), True, None])
def test_coco_ids_that_are_not_numbers_are_refused(tmp_path, number):
    content = official(["a.png"])
    content["images"][0]["id"] = number
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"record 0 of 'images' has the image id .* where a number should be"):
        load_pairs(str(tmp_path / "a.json"))


def fuzz_pairs(path, content):
    path.write_bytes(content)
    (path.parent / "a.png").write_bytes(png(COLOURS[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loads_or_refuses(lambda: load_pairs(str(path)), len(content))


@pytest.mark.parametrize("make", [official, split_file])
@fuzzed
@given(data=st.data())
def test_fuzz_pair_json(tmp_path_factory, make, data):
    content = data.draw(damaged_json(make(["a.png"])).map(dump))
    fuzz_pairs(tmp_path_factory.getbasetemp() / "fuzzed.json", content)


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("txt", b'image,caption\na.png,One .\na.png,"Two, ""three"" ."\n'),
        ("token", b"a.png#0\tOne .\na.png#1\tTwo .\n"),
        ("csv", b"image_name| comment_number| comment\na.png| 0| One .\na.png| 1| Two .\n"),
    ],
)
@fuzzed
@given(data=st.data())
def test_fuzz_pair_text(tmp_path_factory, suffix, text, data):
    fuzz_pairs(tmp_path_factory.getbasetemp() / f"fuzzed.{suffix}", data.draw(damaged(text)))
