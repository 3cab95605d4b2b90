"""Untrusted local data sets: no file outside of the directory is read."""

from __future__ import annotations

import json
import os

import datasets
import pytest
import yaml
from fuzzing import EXAMPLES, damaged, damaged_json, dump, fuzzed, loads_or_refuses
from hypothesis import given, settings
from pictures import SCENES, encoded

from xbt.data.captions import CaptionSource, read_captions
from xbt.data.hf_folders import open_builder, translated
from xbt.data.image_collection import ImageCollection, open_images
from xbt.data.labelled import load_labelled
from xbt.data.load_pairs import load_pairs
from xbt.errors import DataError, ImageError
from xbt.images import read_image

CARD = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.jsonl"}]}]}


fewer = settings(fuzzed, max_examples=max(1, EXAMPLES // 3))
"""For loaders that take a tenth of a second."""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_folder(folder, card=None, name="README.md"):
    (folder / "data").mkdir(parents=True)
    (folder / "data/a.jsonl").write_text('{"caption": "inside"}\n')
    (folder.parent / "outside.jsonl").write_text('{"caption": "outside"}\n')
    if card is not None:
        text = yaml.safe_dump(card)
        (folder / name).write_text(f"---\n{text}---\n" if name == "README.md" else text)
    return f"hf:{folder}"


def with_files(files, **options):
    return {"configs": [{"config_name": "default", "data_files": files, **options}]}


@pytest.mark.parametrize("card", [None, CARD, with_files("data/a.jsonl"), with_files(["**/*.jsonl"])])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_card_that_names_files_inside_is_followed(tmp_path, card, streaming):
    source = write_folder(tmp_path / "set", card)
    assert read_captions(source) == ["inside"]
    with pytest.raises(DataError, match="no column 'image'; it has caption"):
        open_images(ImageCollection(source, streaming=streaming))


@pytest.mark.parametrize(
    "files",
    [
        "../outside.jsonl",
        "data/../../outside.jsonl",
        "ftp://localhost:9/a.jsonl",
        "http://localhost:9/a.jsonl",
        "zip://a.jsonl::http://localhost:9/a.zip",
        {"train": ["data/a.jsonl", "/etc/hostname"]},
        [{"split": "test", "path": ["hf://datasets/org/name/a.jsonl"]}],
        "~/a.jsonl",
        "data/*a*a*a*a*a*.jsonl",
    ],
)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_card_that_names_other_files_is_refused(tmp_path, files, name):
    source = write_folder(tmp_path / "set", with_files(files), name)
    with pytest.raises(DataError, match=rf"{name} names (the )?data files"):
        read_captions(source)
    with pytest.raises(DataError, match=rf"{name} names (the )?data files"):
        open_images(ImageCollection(source, streaming=True))


def test_a_card_with_a_folder_elsewhere(tmp_path):
    source = write_folder(tmp_path / "set", with_files("*.jsonl", data_dir="../"))
    with pytest.raises(DataError, match="lie outside"):
        read_captions(source)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"---\na: &a [x]\nb: [*a, *a]\n---\n", "YAML aliases"),
        (b"---\n" + b"\n" * 100_000, "blank lines"),
        (b"---\na: [\n---\n", "cannot be read"),
        (b"---\na: \xff\n---\n", "not UTF-8"),
        (b"#" * (2 << 20), "too many for a card"),
    ],
)
def test_invalid_cards(tmp_path, text, words):
    source = write_folder(tmp_path / "set")
    (tmp_path / "set/README.md").write_bytes(text)
    with pytest.raises(DataError, match=words):
        read_captions(source)


def test_links_and_pipes(tmp_path):
    source = write_folder(tmp_path / "set")
    os.mkfifo(tmp_path / "set/README.md")
    with pytest.raises(DataError, match="pipe or device"):
        read_captions(source)
    (tmp_path / "set/README.md").unlink()
    (tmp_path / "set/data/b.jsonl").symlink_to(tmp_path / "outside.jsonl")
    with pytest.raises(DataError, match="outside of"):
        read_captions(source)


def test_the_hubs_own_links_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "datasets--a--b/snapshots/0", tmp_path / "datasets--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text('{"caption": "x"}\n')
    (snapshot / "a.jsonl").symlink_to("../../blobs/1")
    assert read_captions(f"hf:{snapshot}") == ["x"]


@pytest.mark.parametrize("splits", [False, True])
def test_saved_data_sets_that_name_other_files(tmp_path, splits):
    rows = datasets.Dataset.from_dict({"caption": ["a"]})
    (datasets.DatasetDict({"train": rows}) if splits else rows).save_to_disk(tmp_path / "set")
    rows.save_to_disk(tmp_path / "other")
    assert read_captions(f"hf:{tmp_path / 'set'}") == ["a"]
    state = tmp_path / "set" / ("train/state.json" if splits else "state.json")
    said = json.loads(state.read_text())
    said["_data_files"] = [{"filename": str(tmp_path / "other/data-00000-of-00001.arrow")}]
    state.write_text(json.dumps(said))
    with pytest.raises(DataError, match="outside of"):
        read_captions(f"hf:{tmp_path / 'set'}")
    if splits:
        (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["../other"]}')
        with pytest.raises(DataError, match="is no folder in the directory"):
            read_captions(f"hf:{tmp_path / 'set'}")


def test_paths_of_images_stay_in_their_folder(tmp_path):
    SCENES.image(0).save(tmp_path / "secret.png")
    rows = ["a.png", "../secret.png", str(tmp_path / "secret.png"), "https://host/a.png"]
    datasets.Dataset.from_dict({"image": rows}).save_to_disk(tmp_path / "set")
    SCENES.image(0).save(tmp_path / "set/a.png")
    source = ImageCollection(f"hf:{tmp_path / 'set'}")
    images = [item.value for item in open_images(source).parts[0].read()]
    assert read_image(images[0]).image.size == SCENES.image(0).size
    for image, words in zip(images[1:], ["lies outside", "lies outside", "a.png .* is a URL"], strict=True):
        with pytest.raises(ImageError, match=words):
            read_image(image)
    assert images[3] == rows[3]
    source = ImageCollection(f"hf:{tmp_path / 'set'}", image_root=str(tmp_path))
    images = [item.value for item in open_images(source).parts[0].read()]
    assert read_image(images[2]).image.size == SCENES.image(0).size


@pytest.mark.parametrize(
    "url", ["http://host/a.jpg", "HTTPS://host/a.jpg", "s3://bucket/a.jpg", " gs://b/a.jpg"]
)
def test_columns_of_urls_are_refused(tmp_path, url):
    rows = datasets.Dataset.from_dict({"url": [None, url], "text": ["a", "b"]})
    rows.to_parquet(tmp_path / "a.parquet")
    for refused in (
        lambda: open_images(ImageCollection(f"hf:{tmp_path}", image_column="url")),
        lambda: open_images(ImageCollection(f"hf:{tmp_path}")),
        lambda: load_pairs(f"hf:{tmp_path}"),
    ):
        with pytest.raises(DataError, match=r"'url'.*URLs.*download the images first.*img2dataset"):
            refused()


def test_fuzz_cards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "set"
    write_folder(folder)

    @fewer
    @given(damaged_json({**CARD, "dataset_info": {"features": [{"name": "caption", "dtype": "string"}]}}))
    def check(card):
        (folder / "README.md").write_bytes(b"---\n" + dump(card) + b"\n---\n")
        loads_or_refuses(lambda: _open_builder(folder))

    check()


def test_fuzz_saved_data_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "set"
    rows = [{"bytes": encoded(SCENES.image(n), "PNG"), "path": None} for n in range(2)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": rows, "caption": ["a", "b"]}, features=features).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    info = json.loads((folder / "dataset_info.json").read_text())
    arrow = next(folder.glob("*.arrow"))
    whole = arrow.read_bytes()

    @fewer
    @given(damaged_json({"state": state, "info": info}), damaged(whole))
    def check(records, data):
        both = isinstance(records, dict)
        (folder / "state.json").write_bytes(dump(records.get("state") if both else records))
        (folder / "dataset_info.json").write_bytes(dump(records.get("info") if both else records))
        loads_or_refuses(lambda: _read_all(f"hf:{folder}"))
        (folder / "state.json").write_bytes(dump(state))
        (folder / "dataset_info.json").write_bytes(dump(info))
        arrow.unlink()  # it may still be mapped into memory
        arrow.write_bytes(data)
        loads_or_refuses(lambda: _read_all(f"hf:{folder}"), len(whole))
        arrow.unlink()
        arrow.write_bytes(whole)

    check()


@pytest.mark.slow
def test_fuzz_parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    table = datasets.Dataset.from_dict(
        {
            "image": [encoded(SCENES.image(n), "PNG") for n in range(3)],
            "caption": ["a", "b", "c"],
            "label": [0, 1, 1],
        }
    )
    table.to_parquet(folder / "a.parquet")
    whole = (folder / "a.parquet").read_bytes()

    @fewer
    @given(damaged(whole))
    def check(data):
        (folder / "a.parquet").write_bytes(data)
        loads_or_refuses(lambda: _read_all(f"hf:{folder}"), len(data))
        loads_or_refuses(lambda: load_labelled(f"hf:{folder}"), len(data))

    check()


def _open_builder(folder):
    with translated(str(folder), "fix it"):
        open_builder(folder, None)


def _read_all(source):
    read_captions(CaptionSource(source))
    for item in open_images(ImageCollection(source)).parts[0].read():
        loads_or_refuses(lambda item=item: read_image(item.value))
