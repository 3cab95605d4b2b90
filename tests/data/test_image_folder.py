"""Folders of images: hidden files, names in any normal form, names that leave the folder."""

from __future__ import annotations

import json
import os
import unicodedata

import pytest
from fuzzing import fuzzed, loads_or_refuses
from hypothesis import given
from hypothesis import strategies as st
from pictures import SCENES, encoded

from xbt.data.image_collection import ImageCollection, open_images
from xbt.data.image_folder import JoinedPaths, find_images, is_hidden
from xbt.data.labelled import LabelledImages, load_labelled
from xbt.data.load_pairs import PairSource, load_pairs
from xbt.data.pairs import ImageTextPairs
from xbt.encoders.image_batching import as_images
from xbt.errors import DataError, ImageError
from xbt.images import read_image

HIDDEN = [
    *(
        "._a.png",
        ".b.png",
        ".thumbnails/c.png",
        "x/@eaDir/d.png",
        "__MACOSX/e.png",
        ".ipynb_checkpoints/f.png",
    ),
    *("#recycle/g.png", "$RECYCLE.BIN/h.png"),
]


def write(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(SCENES.image(0), "PNG"))


def items(images):
    return [item for part in open_images(images).parts for item in part.read()]


def test_hidden_files_are_left_out_and_counted(tmp_path):
    write(tmp_path, [*HIDDEN, "a.png", "x/b.png", "a..b/c.png"])
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"8 hidden files of .* are left out, first "):
        assert [item.id for item in items(ImageCollection(str(tmp_path)))] == [
            "a..b/c.png",
            "a.png",
            "x/b.png",
        ]
    assert len(items(ImageCollection(str(tmp_path), include_hidden=True))) == 11
    assert all(map(is_hidden, HIDDEN))
    assert not is_hidden("../a.png")


def test_hidden_folders_are_no_classes(tmp_path):
    write(tmp_path, ["cat/a.png", "@eaDir/a.png", "dog/.b.png", "dog/c.png"])
    with pytest.warns(UserWarning, match="2 hidden files"):
        assert load_labelled(str(tmp_path)).ids == ["cat/a.png", "dog/c.png"]


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("named", ["NFC", "NFD", "NFKC"])
def test_a_name_in_any_normal_form_finds_its_file(tmp_path, on_disk, named):
    name = "\u00fcber/\u00e9t\u00e9 \u1e69.png"
    write(tmp_path, [unicodedata.normalize(on_disk, name)])
    images = [{"filename": unicodedata.normalize(named, name), "split": "test", "sentences": [{"raw": "a"}]}]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    size = SCENES.image(0).size
    assert load_pairs(str(tmp_path / "k.json")).image(0).size == size
    (item,) = items(ImageCollection(str(tmp_path / "k.json")))
    assert read_image(item.value).image.size == size


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "{root}/a.png"])
def test_names_that_leave_the_folder(tmp_path, name):
    name = name.format(root=tmp_path)
    write(tmp_path, ["a.png", "in/b.png"])
    images = [{"filename": each, "split": "test", "sentences": [{"raw": "a"}]} for each in ("b.png", name)]
    (tmp_path / "in/k.json").write_text(json.dumps({"images": images}))
    with pytest.raises(DataError, match="outside of the folder"):
        load_pairs(PairSource(str(tmp_path / "in/k.json")))
    with pytest.raises(DataError, match="outside of the folder"):
        items(ImageCollection(str(tmp_path / "in/k.json")))
    with pytest.raises(ImageError, match="lies outside of the folder"):
        read_image(JoinedPaths(tmp_path / "in", [name])[0])


def test_urls_are_no_names(tmp_path):
    with pytest.raises(DataError, match=r"URLs, first http://h/a.png.*img2dataset"):
        find_images(["http://h/a.png"], tmp_path)
    with pytest.raises(ImageError, match=r"ftp://h/a.png .* is a URL"):
        read_image("ftp://h/a.png")


class Endless:
    """A Dataset that never raises an IndexError."""

    def __getitem__(self, row):
        return f"{row}"


class TooShort(Endless):
    def __len__(self):
        return 2


class TooLong(TooShort):
    def __getitem__(self, row):
        return ["a", "b"][:1][row]


def test_data_sets_without_an_end():
    for images in (Endless(), TooLong()):
        with pytest.raises(DataError, match="length"):
            as_images(images)
    assert as_images(TooShort()) == ["0", "1"]
    image = SCENES.image(0)
    for ids, images, captions in (
        (Endless(), [image], [["a"]]),
        (["a"], Endless(), [["a"]]),
        (TooShort(), [image] * 2, [["a"]] * 2),
        (["a", "b"], [image] * 2, TooShort()),
    ):
        with pytest.raises(DataError, match="length"):
            ImageTextPairs(ids, images, captions)
    with pytest.raises(DataError, match="no entry 1"):
        ImageTextPairs(["a", "b"], TooLong(), [["a"], ["b"]]).image(1)
    with pytest.raises(DataError, match="length"):
        LabelledImages(["a"], Endless(), [0], ["x"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("folder")
    write(made, ["a.png", "\u00e9/b.png"])
    os.mkfifo(made / "pipe.png")
    return made


odd = st.one_of(
    st.text(max_size=20),
    st.lists(
        st.sampled_from(["..", ".", "a.png", "\u00e9", "e\u0301", "b.png", "", "~", "pipe.png", "\0"])
    ).map("/".join),
)


@fuzzed
@given(odd)
def test_fuzz_names(folder, name):
    loads_or_refuses(lambda: find_images([name], folder))
    images = [
        {"filename": name, "split": "test", "sentences": [{"raw": "a"}]},
        {"filename": "a.png", "split": "test"},
    ]
    (folder / "k.json").write_text(json.dumps({"images": images}))
    for item in loads_or_refuses(lambda: items(ImageCollection(str(folder / "k.json")))) or []:
        loads_or_refuses(lambda item=item: read_image(item.value))
