"""Every public format of retrieval data gives the same pairs; its own tools are the oracles."""

from __future__ import annotations

import errno
import gzip
import io
import json
import pickle
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import fsspec
import pytest
import webdataset
from huggingface_hub import constants
from PIL import Image, ImageChops
from pycocotools.coco import COCO
from retrieval_formats import (
    of_split,
    photos,
    table,
    write_coco_captions,
    write_image_lines,
    write_images,
    write_karpathy,
    write_parquet,
    write_wds,
)

from xbt.data import CaptionSource, PairSource, load_pairs, read_captions
from xbt.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def hub_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def made():
    return photos()


def check(pairs, expected):
    """Check that the pairs are these photos in this order, with all captions and the right images."""
    assert pairs.captions == [photo.captions for photo in expected]
    for row, photo in enumerate(expected):
        assert ImageChops.difference(pairs.image(row), picture(photo)).getbbox() is None


def picture(photo):
    return Image.open(io.BytesIO(photo.jpeg)).convert("RGB")


def test_karpathy_in_all_its_splits(made, tmp_path):
    path = write_karpathy(tmp_path, made)
    check(load_pairs(PairSource(str(path), split="test")), of_split(made, "test"))
    check(load_pairs(PairSource(str(path), split="val+restval")), of_split(made, "val", "restval"))
    for everything in ("all", "train+restval+val+test", None):
        check(load_pairs(PairSource(str(path), split=everything)), made)
    assert read_captions(CaptionSource(str(path), split="all")) == [t for each in made for t in each.captions]
    with pytest.raises(DataError, match="no split 'dev'; it has restval, test, train, val"):
        load_pairs(PairSource(str(path), split="test+dev"))


def test_coco_images_are_found_where_people_unpack_them(made, tmp_path):
    karpathy = write_karpathy(tmp_path / "a", made)
    official = write_coco_captions(tmp_path / "b", made)
    for path, root in (
        (karpathy, tmp_path / "b"),
        (karpathy, tmp_path / "a/val2014"),
        (official, tmp_path / "a"),
    ):
        check(load_pairs(PairSource(str(path), image_root=str(root))), made)
    (tmp_path / "b" / made[2].name).unlink()
    with pytest.raises(DataError, match=rf"1 of 6 image files are missing, first {made[2].name}"):
        load_pairs(PairSource(str(official)))


def test_image_lines(made, tmp_path):
    path = write_image_lines(tmp_path, made)
    check(load_pairs(str(path)), made)
    packed = tmp_path / "packed.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    check(load_pairs(str(packed)), made)


def test_a_caption_may_contain_the_delimiter(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("image,caption\na.jpg,see b.jpg, which is larger\na.jpg,two\n")
    assert load_pairs(str(tmp_path / "a.txt")).captions == [["see b.jpg, which is larger", "two"]]


def test_coco_captions_as_pycocotools_reads_them(made, tmp_path):
    path = write_coco_captions(tmp_path, made)
    pairs = load_pairs(str(path))
    check(pairs, made)
    theirs = COCO(str(path))
    for texts, number in zip(pairs.captions, sorted(theirs.imgs), strict=True):
        assert texts == [annotation["caption"] for annotation in theirs.loadAnns(theirs.getAnnIds(number))]


def test_wds_folder_as_webdataset_reads_it(made, tmp_path):
    root = write_wds(tmp_path / "wds_flickr30k", made)
    pairs = load_pairs(str(root))
    check(pairs, made)
    assert pairs.ids[:3] == ["test/0/s0000000", "test/0/s0000001", "test/1/s0000002"]
    shards = webdataset.WebDataset(str(root / "test/{0..2}.tar"), shardshuffle=False)
    theirs = list(shards.to_tuple("jpg", "txt").map_tuple(bytes, lambda text: text.decode().splitlines()))
    assert theirs == [(pairs.images[row], pairs.captions[row]) for row in range(len(pairs))]
    copy = pickle.loads(pickle.dumps(pairs.select([4, 1])))
    check(copy, [made[4], made[1]])


def test_wds_folder_on_another_file_system(made, tmp_path):
    write_wds(tmp_path, made)
    fsspec.filesystem("memory").put(str(tmp_path), "/wds", recursive=True)
    check(load_pairs(PairSource("memory://wds", split="test")), made)
    with pytest.raises(DataError, match=r"memory://nothing is a directory without a split"):
        load_pairs("memory://nothing")
    with pytest.raises(DataError, match=r"nosuch://x cannot be opened"):
        load_pairs("nosuch://x")


def cached_repository(cache: Path, made) -> Path:
    """Write a Hub data set in the cache layout of huggingface_hub."""
    repository = cache / "datasets--clip-benchmark--wds_flickr30k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    write_wds(snapshot, of_split(made, "train"), split="train")
    return write_wds(snapshot, of_split(made, "test"))


def test_wds_folder_of_the_hub(made, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached_repository(tmp_path, made)
    url = "hf://datasets/clip-benchmark/wds_flickr30k"
    check(load_pairs(PairSource(url, split="test")), of_split(made, "test"))
    check(
        load_pairs(PairSource(f"{url}@main", split="all")),
        [*of_split(made, "test"), *of_split(made, "train")],
    )
    with pytest.raises(DataError, match="has the splits test, train; choose one with split"):
        load_pairs(url)
    with pytest.raises(DataError, match="has no split 'val'; it has test, train"):
        load_pairs(PairSource(url, split="val"))
    with pytest.raises(DataError, match="clip-benchmark/nothing at revision v2 cannot be fetched"):
        load_pairs(PairSource("hf://datasets/clip-benchmark/nothing@v2", split="test"))


def captions_of(made):
    return [photo.captions for photo in made]


def sentences(photo, imgid):
    return [
        {"tokens": caption.split(), "raw": caption, "imgid": imgid, "sentid": 10 * imgid + k}
        for k, caption in enumerate(photo.captions)
    ]


def test_lists_of_captions_under_each_known_name(made, tmp_path):
    tables = {
        "umaru97": {"caption": captions_of(made), "filename": [photo.name for photo in made]},
        "royokong": {"text": captions_of(made)},
        "anymodal": {"alt_text": [["rewritten"]] * len(made), "original_alt_text": captions_of(made)},
        "alone": {"alt_text": captions_of(made)},
        "yerevann": {"sentences_raw": captions_of(made), "sentences_tokens": [[["a"]]] * len(made)},
        "karpathy": {"sentences": [sentences(photo, row) for row, photo in enumerate(made)]},
        "packed": {"sentences": [{"raw": photo.captions, "sentid": [0]} for photo in made]},
        "nlphuji": {"caption": [json.dumps(photo.captions) for photo in made]},
    }
    for name, columns in tables.items():
        root = write_parquet(tmp_path / name, test=table(made, **columns))
        check(load_pairs(PairSource(f"hf:{root}", split="test")), made)


def test_one_row_per_caption(made, tmp_path):
    """As in bitmind/MS-COCO; the rows of an image are not adjacent."""
    rows = sorted(
        ((photo, caption) for photo in made for caption in photo.captions), key=lambda row: len(row[1])
    )
    data = table(
        [photo for photo, _ in rows],
        sentences=[
            {"tokens": caption.split(), "raw": caption, "imgid": 0, "sentid": 0} for _, caption in rows
        ],
        cocoid=[photo.number for photo, _ in rows],
    )
    root = write_parquet(tmp_path, test=data)
    with pytest.warns(UserWarning, match=r"the 31 rows of .* are joined to 6 images by the column 'cocoid'"):
        pairs = load_pairs(f"hf:{root}")
    named = load_pairs(PairSource(f"hf:{root}", id_column="cocoid"))
    by_id = {str(photo.number): sorted(photo.captions) for photo in made}
    for loaded in (pairs, named):
        assert {name: sorted(texts) for name, texts in zip(loaded.ids, loaded.captions, strict=True)} == by_id
        first = next(photo for photo in made if str(photo.number) == loaded.ids[0])
        assert ImageChops.difference(loaded.image(0), picture(first)).getbbox() is None
    assert read_captions(CaptionSource(f"hf:{root}", column="sentences")) == [caption for _, caption in rows]


def test_splits_as_a_column(made, tmp_path):
    """As in nlphuji/flickr30k: one split, called test, with every image in it."""
    data = table(made, caption=captions_of(made), split=[photo.split for photo in made])
    root = write_parquet(tmp_path / "a", test=data)
    check(load_pairs(PairSource(f"hf:{root}", split="test")), of_split(made, "test"))
    check(load_pairs(PairSource(f"hf:{root}", split="val+restval")), of_split(made, "val", "restval"))
    check(load_pairs(PairSource(f"hf:{root}", split="all")), made)
    check(load_pairs(f"hf:{root}"), made)
    with pytest.raises(DataError, match="'split', has no split 'dev'; it has restval, test, train, val"):
        load_pairs(PairSource(f"hf:{root}", split="dev"))
    parts = data.rename_column("split", "part")
    several = write_parquet(tmp_path / "b", train=parts.select(range(3)), test=parts.select(range(3, 6)))
    pairs = load_pairs(PairSource(f"hf:{several}", split="val+test", split_column="part"))
    check(pairs, of_split(made, "val", "test"))
    with pytest.raises(DataError, match="no column 'section'; it has"):
        load_pairs(PairSource(f"hf:{several}", split="val", split_column="section"))


def test_splits_of_the_data_set_are_joined(made, tmp_path):
    parts = {name: of_split(made, name) for name in ("train", "restval", "test")}
    root = write_parquet(
        tmp_path, **{name: table(part, caption=captions_of(part)) for name, part in parts.items()}
    )
    pairs = load_pairs(PairSource(f"hf:{root}", split="restval+test"))
    assert sorted(pairs.captions) == sorted(captions_of(parts["restval"] + parts["test"]))
    assert len(load_pairs(PairSource(f"hf:{root}", split="all"))) == 5
    with pytest.raises(DataError, match=r"has the splits .*; choose one with split"):
        load_pairs(f"hf:{root}")


def test_columns_that_cannot_be_guessed(made, tmp_path):
    two = write_parquet(tmp_path / "two", test=table(made, caption=captions_of(made), text=captions_of(made)))
    with pytest.raises(DataError, match="the columns caption and text, any of which may be the caption"):
        load_pairs(f"hf:{two}")
    check(load_pairs(PairSource(f"hf:{two}", caption_column="text")), made)
    none = write_parquet(tmp_path / "none", test=table(made, words=captions_of(made)))
    with pytest.raises(DataError, match="no column known as the caption; it has image, words: choose with"):
        load_pairs(f"hf:{none}")
    tars = datasets.Dataset.from_dict({"__key__": ["s0"], "jpg": [b""], "txt": ["a\nb"]})
    root = write_parquet(tmp_path / "tars", test=tars)
    with pytest.raises(DataError, match="is a WebDataset, one caption a line in 'txt'; write hf://datasets/"):
        load_pairs(f"hf:{root}")


def test_duplicates_of_an_image(made, tmp_path):
    twice = [*made, made[2]]
    data = table(twice, caption=captions_of(twice), img_id=[photo.number for photo in twice])
    root = write_parquet(tmp_path, test=data)
    with pytest.raises(DataError, match=rf"'{made[2].number}' occurs more than once, in the rows 2 and 6"):
        load_pairs(PairSource(f"hf:{root}", id_column="img_id"))
    with pytest.raises(DataError, match=r"occurs more than once"):
        load_pairs(str(write_karpathy(tmp_path / "karpathy", twice)))
    with pytest.raises(DataError, match=r"record 6 of 'images': the image id .* occurs more than once"):
        load_pairs(str(write_coco_captions(tmp_path / "coco", twice)))


def test_blank_captions_are_left_out_and_counted(tmp_path):
    write_images(tmp_path, some := photos(3, captions=2))
    lines = [f"{photo.name},{caption}" for photo in some for caption in (" x ", " ", "y")]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match=r"^3 of the captions of .*a\.txt are blank and are left out$"):
        assert load_pairs(str(tmp_path / "a.txt")).captions == [["x", "y"]] * 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "test/2.tar").unlink(),
            r"says 3 tars, but 1 of them are missing, first 2\.tar",
        ),
        (lambda root: (root / "test/3.tar").write_bytes(b"x"), "says 3 tars, but 4 exist"),
        (
            lambda root: (root / "test/nshards.txt").write_text("many"),
            "says 'many', which is not a number of tars",
        ),
        (lambda root: shards(root, 30_000_000), r"says 30000000 tars, but 29999997 .* missing, first 3\.tar"),
        (lambda root: shards(root, 10**12), r"says 1000000000000 tars, but 999999999997 of them are missing"),
        (lambda root: shards(root, "9" * 5000), "says '9{40}', which is not a number of tars"),
        (lambda root: shards(root, "²"), "says '²', which is not a number of tars"),
        (lambda root: (root / "test/01.tar").write_bytes(b"x"), "says 3 tars, but 4 exist"),
        (lambda root: (root / "test/nshards.txt").unlink(), "is a directory without a split"),
        (lambda root: (root / "dataset_type.txt").write_text("classification"), "type 'classification'"),
        (lambda root: cut(root / "test/1.tar"), "cannot be read to its end"),
        (lambda root: (root / "test/1.tar").write_bytes(gzip.compress(b"x")), r"compressed \(gzip\)"),
        (lambda root: retar(root, ("s0.txt", b"a")), "sample s0: a caption file without an image"),
        (lambda root: retar(root, ("s0.jpg", b"x"), ("s0.png", b"x"), ("s0.txt", b"a")), "key of an earlier"),
        (lambda root: retar(root, ("s0.jpg", b"x"), ("s0.txt", b"\xff")), r"s0\.txt is not UTF-8"),
    ],
)
def test_damaged_wds_folders(made, tmp_path, damage, message):
    root = write_wds(tmp_path, made)
    damage(root)
    with pytest.raises(DataError, match=message):
        load_pairs(str(root))


def shards(root, count):
    (root / "test/nshards.txt").write_text(f"{count}\n")


def cut(path):
    path.write_bytes(path.read_bytes()[:2000])


def retar(root, *members):
    with tarfile.open(root / "test/1.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_a_picture_without_captions_is_left_out(made, tmp_path):
    root = write_wds(tmp_path, made)
    retar(root, ("s9.jpg", made[2].jpeg), ("s8.txt", b"one\\ncaption\ntwo"), ("s8.jpg", made[3].jpeg))
    with pytest.warns(
        UserWarning, match=r"1 of 6 images .* have no caption and are left out, first test/1/s9"
    ):
        pairs = load_pairs(str(root))
    assert pairs.captions[2] == ["one\ncaption", "two"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].append({"image_id": 5, "caption": "x"}), "a caption of the image 5"),
        (lambda c: c["annotations"][3].pop("caption"), "record 3 of 'annotations' lacks the key 'caption'"),
        (lambda c: c["images"][1].pop("file_name"), "record 1 of 'images' lacks the key 'file_name'"),
        (lambda c: c.pop("images"), "holds no list of 'images'"),
        (lambda c: c["annotations"].clear(), "holds no list of 'annotations'"),
        (
            lambda c: c["annotations"][0].update(caption=7),
            "a int .* where a caption should be; fix the record$",
        ),
        (lambda c: c["images"][2].update(id=[7]), r"record 2 of 'images' has the image id \[7\], a list"),
        (lambda c: c["images"][2].update(id={"a": 7}), "record 2 of 'images' has the image id .*, a dict"),
        (lambda c: c["images"][2].update(id=None), "record 2 of 'images' has the image id None"),
        (
            lambda c: c["annotations"][4].update(image_id=[7]),
            r"record 4 of 'annotations' has the image id \[7",
        ),
        (
            lambda c: c["images"][2].update(file_name=["a"]),
            "record 2 of 'images' has a list under 'file_name'",
        ),
        (
            lambda c: c["images"][2].update(file_name="x" * 5000),
            r"1 of 6 image files are missing, first x{100}… \(5,000 characters\), under",
        ),
    ],
)
def test_malformed_coco_captions(made, tmp_path, change, message):
    path = write_coco_captions(tmp_path, made)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_pairs(str(path))


def two_names(tmp_path, *names):
    """Write a Karpathy file with one image per name."""
    records = []
    for name in names:
        folder, _, base = name.rpartition("/")
        sentences = [{"raw": f"a picture called {name}", "tokens": []}]
        records.append({"filepath": folder, "filename": base, "split": "test", "sentences": sentences})
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": records, "dataset": "toy"}))
    return str(path)


@pytest.mark.parametrize(
    "names",
    [("val2014/a.jpg", "train2014/a.jpg"), ("a.jpg", "train2014/a.jpg"), ("val2014/a.jpg", "./a.jpg"),
     ("b/../a.jpg", "a.jpg")],
)  # fmt: skip
def test_two_names_of_one_picture_are_refused(tmp_path, names):
    (tmp_path / "b").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=rf"'{names[0]}' and '{names[1]}' are both found as "):
        load_pairs(two_names(tmp_path, *names))


def test_equal_names_in_two_folders_are_two_pictures(tmp_path):
    for folder in ("val2014", "train2014"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "a.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    assert len(load_pairs(two_names(tmp_path, "val2014/a.jpg", "train2014/a.jpg", "a.jpg"))) == 3


def test_a_folder_that_cannot_be_looked_into(made, tmp_path, monkeypatch):
    path = write_karpathy(tmp_path, made)

    def fail(self):
        if self.suffix == ".jpg":
            raise OSError(errno.EIO, "Input/output error")
        return True

    monkeypatch.setattr(Path, "is_file", fail)
    with pytest.raises(DataError, match=r"COCO_val2014_.*\.jpg cannot be looked up \(Input/output error\)"):
        load_pairs(str(path))


def test_options_that_do_not_apply(made, tmp_path):
    lines, wds = write_image_lines(tmp_path / "a", made), write_wds(tmp_path / "b", made)
    for source, message in (
        (PairSource(str(lines), split="test"), "has no splits; leave split out"),
        (PairSource(str(lines), id_column="x"), "only hf: sources have id_columns"),
        (PairSource(str(wds), image_root="x"), "whose tars hold the images"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_pairs(source)
    lines.write_text(lines.read_text() + "a line of words\n")
    with pytest.raises(DataError, match=r"line 33: 'a line of words' has 1 fields where the first"):
        load_pairs(str(lines))


def test_the_hint_depends_on_the_kind_of_source(made, tmp_path):
    silent = [replace(photo, captions=[" "]) for photo in made]
    for source in (write_karpathy(tmp_path / "a", silent), write_wds(tmp_path / "b", silent)):
        with pytest.raises(DataError, match=r"none of the 6 images .* has a caption; give a source that has"):
            load_pairs(str(source))
    root = write_parquet(tmp_path / "c", test=table(silent, caption=[[" "]] * len(silent)))
    with pytest.raises(DataError, match=r"has a caption; name the caption column"):
        load_pairs(f"hf:{root}")


def test_no_warning_for_valid_data(made, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pairs(str(write_karpathy(tmp_path, made)))
