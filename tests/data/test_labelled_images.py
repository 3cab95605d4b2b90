from __future__ import annotations

import io
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from xbt.data import LabelledImages, LabelledSource, load_labelled
from xbt.errors import ConfigError, DataError, ImageError


def flat(value, size=4):
    return Image.new("RGB", (size, size), (value, value, value))


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_split(directory, split, columns, features):
    directory.mkdir(parents=True, exist_ok=True)
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    dataset.to_parquet(str(directory / f"{split}-00000-of-00001.parquet"))


def write_cifar100(root, n_train=60, n_test=20):
    """The public format: img, fine_label of 100 classes, coarse_label of 20, a parquet file per split."""
    features = {
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=[f"fine {i:02d}" for i in range(100)]),
        "coarse_label": datasets.ClassLabel(names=[f"coarse {i}" for i in range(20)]),
    }
    for split, count in (("train", n_train), ("test", n_test)):
        fine = [(7 * row) % 100 for row in range(count)]
        columns = {
            "img": [encoded(flat(label, 32)) for label in fine],
            "fine_label": fine,
            "coarse_label": [label // 5 for label in fine],
        }
        write_split(root / "cifar100", split, columns, features)
    return root


def write_imagenet(root):
    """The public format: image and label of 1,000 classes; the test split's labels are -1."""
    names = [f"n{i:08d}, some animal" for i in range(1000)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    for split, labels in {"train": [0, 1, 999, 500, 1], "validation": [3, 4], "test": [-1, -1]}.items():
        images = [encoded(flat(row)) for row in range(len(labels))]
        write_split(root / "data", split, {"image": images, "label": labels}, features)
    return root


def write_folders(root, classes=("cat", "dog", "owl"), count=4, empty=()):
    for number, name in enumerate(classes):
        (root / name / "deep").mkdir(parents=True)
        for row in range(count):
            flat(10 * number + row).save(root / name / ("deep" if row == 0 else ".") / f"{row}.png")
    for name in empty:
        (root / name).mkdir()
    return root


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory):
    return write_cifar100(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("imagenet"))


def grey(images):
    return [images.image(row).getpixel((0, 0))[0] for row in range(len(images))]


def test_cifar100_in_its_public_format(cifar100):
    images = load_labelled(LabelledSource("cifar100", root=str(cifar100), split="train"))
    assert len(images) == 60
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == grey(images) == [(7 * row) % 100 for row in range(60)]
    assert images.ids[:2] == ["row-0", "row-1"]
    assert (images.n_classes, images.total_classes) == (100, 100)
    assert images.class_names[7] == "fine 07"
    assert images.image(0).size == (32, 32)


def test_the_other_labels_of_cifar100(cifar100):
    source = LabelledSource("cifar100", root=str(cifar100), split="test", label_column="coarse_label")
    images = load_labelled(source)
    assert images.total_classes == 20
    assert images.labels.tolist() == [value // 5 for value in grey(images)]


def test_first_classes_keep_all_names(cifar100):
    half = load_labelled(LabelledSource("cifar100", root=str(cifar100), split="train", classes=50))
    whole = load_labelled(LabelledSource("cifar100", root=str(cifar100), split="train"))
    assert half.n_classes == 50
    assert half.total_classes == 100
    assert half.class_names == whole.class_names
    assert half.labels.tolist() == [label for label in whole.labels.tolist() if label < 50] == grey(half)
    assert half.ids == [name for name, label in zip(whole.ids, whole.labels, strict=True) if label < 50]


def test_imagenet_in_its_public_format(imagenet):
    images = load_labelled(LabelledSource("imagenet-1k", root=str(imagenet), split="train", classes=500))
    assert images.labels.tolist() == [0, 1, 1]
    assert images.ids == ["row-0", "row-1", "row-4"]
    assert grey(images) == [0, 1, 4]
    assert (images.n_classes, images.total_classes) == (500, 1000)
    assert images.class_names[999] == "n00000999, some animal"


def test_a_split_without_labels_is_refused(imagenet):
    with pytest.raises(
        DataError, match=r"row 0: the class in the column 'label' is -1, but .* 0 to 999; read"
    ):
        load_labelled(LabelledSource("imagenet-1k", root=str(imagenet), split="test"))


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_columns_are_found_where_there_is_no_doubt(cifar100, imagenet, prefix):
    assert len(load_labelled(LabelledSource(f"{prefix}{imagenet}", split="validation"))) == 2
    with pytest.raises(
        DataError, match=r"columns fine_label, coarse_label for the label; choose .* label_column"
    ):
        load_labelled(LabelledSource(f"{prefix}{cifar100}", split="test"))
    chosen = LabelledSource(f"{prefix}{cifar100}", split="test", label_column="fine_label")
    assert len(load_labelled(chosen)) == 20


def test_a_preset_requests_its_hub_name(monkeypatch):
    asked = []

    def open_dataset(source, subset=None, split=None):
        asked.append((source, subset, split))
        raise DataError("offline")

    monkeypatch.setattr("xbt.data.labelled.open_dataset", open_dataset)
    for source in (LabelledSource("cifar100", split="test"), LabelledSource("imagenet-1k")):
        with pytest.raises(DataError, match="offline"):
            load_labelled(source)
    assert asked == [("hf:uoft-cs/cifar100", None, "test"), ("hf:ILSVRC/imagenet-1k", None, None)]


def test_splits_must_be_chosen(cifar100):
    with pytest.raises(DataError, match="has the splits train, test; choose one"):
        load_labelled(LabelledSource("cifar100", root=str(cifar100)))
    with pytest.raises(DataError, match="no split 'dev'"):
        load_labelled(LabelledSource("cifar100", root=str(cifar100), split="dev"))


def hub_directory(root, features=None, **columns):
    count = len(next(iter(columns.values())))
    columns = {"image": [encoded(flat(row)) for row in range(count)], **columns}
    kinds = {"image": datasets.Image(), **(features or {})}
    for name in columns:
        kinds.setdefault(name, datasets.Value("string" if isinstance(columns[name][0], str) else "int64"))
    write_split(root, "train", columns, kinds)
    return LabelledSource(str(root), label_column=list(columns)[-1])


def test_words_and_plain_numbers_as_labels(tmp_path):
    words = load_labelled(hub_directory(tmp_path / "a", animal=["owl", "cat", "owl", "dog"]))
    assert words.class_names == ["cat", "dog", "owl"]
    assert words.labels.tolist() == [2, 0, 2, 1]
    numbers = load_labelled(hub_directory(tmp_path / "b", number=[3, 0, 1]))
    assert numbers.class_names == ["0", "1", "2", "3"]
    assert numbers.labels.tolist() == [3, 0, 1]


def test_rows_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="row 1: no class in the column 'number'"):
        load_labelled(hub_directory(tmp_path / "a", number=[3, None, 1]))
    with pytest.raises(DataError, match="row 2: the class in the column 'number' is -5"):
        load_labelled(hub_directory(tmp_path / "b", number=[3, 1, -5]))
    floats = hub_directory(tmp_path / "c", {"number": datasets.Value("float32")}, number=[0.5, 1.0])
    with pytest.raises(DataError, match="holds float32, not classes"):
        load_labelled(floats)
    with pytest.raises(DataError, match="no column 'kind'; it has image, number"):
        load_labelled(LabelledSource(str(tmp_path / "c"), label_column="kind"))
    with pytest.raises(DataError, match=r"no such column among image, number for the label"):
        load_labelled(LabelledSource(str(tmp_path / "c")))


def test_damaged_image_of_a_data_set_is_named(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    cells = [encoded(flat(0)), {"bytes": b"no image", "path": None}, encoded(flat(2))]
    write_split(tmp_path, "train", {"image": cells, "label": [0, 1, 0]}, features)
    images = load_labelled(str(tmp_path))
    assert images.image(2).size == (4, 4)
    with pytest.raises(ImageError, match="image row-1 cannot be decoded"):
        images.image(1)


def test_class_folders(tmp_path):
    images = load_labelled(str(write_folders(tmp_path, empty=["ape"])))
    assert images.class_names == ["ape", "cat", "dog", "owl"]
    assert images.labels.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert sorted(images.ids)[0] == "cat/1.png"
    assert "cat/deep/0.png" in images.ids
    assert sorted(grey(images)) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    first = load_labelled(LabelledSource(str(tmp_path), classes=2))
    assert set(first.labels.tolist()) == {1}
    assert first.class_names == images.class_names


def test_class_folders_in_splits(tmp_path):
    write_folders(tmp_path / "train")
    write_folders(tmp_path / "val", count=2)
    assert len(load_labelled(LabelledSource(str(tmp_path), split="val"))) == 6
    with pytest.raises(DataError, match="has the splits train, val; choose one with split"):
        load_labelled(str(tmp_path))
    with pytest.raises(DataError, match="no folder 'test'; it has train, val"):
        load_labelled(LabelledSource(str(tmp_path), split="test"))


def test_class_folders_serve_as_a_preset(tmp_path):
    write_folders(tmp_path / "train", classes=("n01440764", "n01443537"))
    images = load_labelled(LabelledSource("imagenet-1k", root=str(tmp_path), split="train"))
    assert images.class_names == ["n01440764", "n01443537"]


def test_images_outside_class_folders(tmp_path):
    write_folders(tmp_path)
    (tmp_path / ".thumbnails").mkdir()
    flat(0).save(tmp_path / ".thumbnails" / "x.png")
    assert len(load_labelled(str(tmp_path))) == 12
    flat(0).save(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png lies in no class folder"):
        load_labelled(str(tmp_path))


def test_damaged_file_is_named(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "dog" / "bad.jpg").write_bytes(b"no image")
    images = load_labelled(str(tmp_path))
    with pytest.raises(ImageError, match=r"image dog/bad.jpg cannot be decoded"):
        images.image(images.ids.index("dog/bad.jpg"))


def test_fraction_is_stratified_and_nested(tmp_path):
    root = str(write_folders(tmp_path, count=20))
    whole = load_labelled(root)
    parts = {each: load_labelled(LabelledSource(root, fraction=each)) for each in (0.001, 0.25, 0.5, 1.0)}
    for fraction, part in parts.items():
        assert torch.bincount(part.labels).tolist() == [max(1, round(20 * fraction))] * 3
        assert part.ids == [name for name in whole.ids if name in set(part.ids)]
    assert set(parts[0.001].ids) < set(parts[0.25].ids) < set(parts[0.5].ids) < set(parts[1.0].ids)
    again = load_labelled(LabelledSource(root, fraction=0.5))
    assert again.ids == parts[0.5].ids
    assert load_labelled(LabelledSource(root, fraction=0.5, seed=1)).ids != again.ids
    # What is drawn of a class does not depend on how many classes there are.
    fewer = load_labelled(LabelledSource(root, fraction=0.5, classes=2))
    assert fewer.ids == [name for name in again.ids if not name.startswith("owl")]


def test_limit_applies_after_the_fraction(tmp_path):
    root = str(write_folders(tmp_path, count=20))
    some = load_labelled(LabelledSource(root, classes=2, fraction=0.5, limit=7))
    assert len(some) == 7
    assert some.n_classes == 2
    assert set(some.ids) < set(load_labelled(LabelledSource(root, classes=2, fraction=0.5)).ids)
    assert len(load_labelled(LabelledSource(root, limit=1000))) == 60


def test_select_and_pickle(tmp_path, cifar100):
    for source in (
        LabelledSource(str(write_folders(tmp_path))),
        LabelledSource("cifar100", str(cifar100), "train"),
    ):
        images = load_labelled(source)
        some = pickle.loads(pickle.dumps(images.select([5, 2])))
        assert some.ids == [images.ids[5], images.ids[2]]
        assert some.labels.tolist() == images.labels[[5, 2]].tolist()
        assert grey(some) == [grey(images)[5], grey(images)[2]]
        assert (some.n_classes, some.class_names) == (images.n_classes, images.class_names)
        for bad in ([len(images)], [-1], [], [0, 0]):
            with pytest.raises(DataError):
                images.select(bad)
    assert repr(some) == "LabelledImages(2 images of 100 of 100 classes)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": " "}, "source is empty"),
        ({"classes": 0}, "classes is 0"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"limit": 0}, "limit is 0"),
        ({"seed": -1}, "seed is -1"),
        (
            {"root": "x"},
            "root 'x' was given with photos/, but only cifar100 and imagenet-1k have",
        ),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        LabelledSource(**{"source": "photos/", **options})


def test_refuses_sources_that_do_not_fit(tmp_path, cifar100):
    root = str(write_folders(tmp_path))
    with pytest.raises(DataError, match=r"classes is 4, but .* has only 3"):
        load_labelled(LabelledSource(root, classes=4))
    for option in ("subset", "image_column", "label_column"):
        with pytest.raises(ConfigError, match=f"{option} 'x' was given with .* class folders"):
            load_labelled(LabelledSource(root, **{option: "x"}))
    with pytest.raises(DataError, match="nowhere is no directory; give a directory of class folders"):
        load_labelled(str(tmp_path / "nowhere"))
    (tmp_path / "ape").mkdir()
    with pytest.raises(DataError, match="holds no image of its first 1 classes"):
        load_labelled(LabelledSource(root, classes=1))


@pytest.mark.parametrize(
    ("ids", "labels", "options", "message"),
    [
        (["a"], [0, 1], {}, "1 ids, 2 images, 2 labels"),
        ([], [], {}, "no labelled images"),
        (["a", "a"], [0, 1], {}, "labelled images: the id 'a' occurs more"),
        (["a", "b"], [0, 2], {}, "image 'b' has the label 2, but labels go from 0 to 1"),
        (["a", "b"], [0, 1], {"n_classes": 1}, "image 'b' has the label 1"),
        (["a", "b"], [0, -1], {}, "image 'b' has the label -1"),
        (["a", "b"], [0.0, 1.0], {}, "one integer per image"),
        (["a", "b"], [0, 1], {"n_classes": 3}, "n_classes is 3, but there are 2 class names"),
    ],
)
def test_refuses_mismatched_arguments(ids, labels, options, message):
    with pytest.raises(DataError, match=message):
        LabelledImages(ids, [flat(0)] * len(labels), labels, ["x", "y"], **options)


def test_nothing_is_decoded_before_access(cifar100, monkeypatch):
    def refuse(*_):
        raise AssertionError("an image was read")

    monkeypatch.setattr("xbt.data.huggingface.HubImages.__getitem__", refuse)
    source = LabelledSource("cifar100", root=str(cifar100), split="train", classes=50, fraction=0.5, limit=9)
    assert len(load_labelled(source).select([0, 1])) == 2


def test_labels_are_independent_of_numpy(tmp_path):
    images = LabelledImages(["a", "b"], [flat(0), flat(1)], np.array([1, 0], dtype=np.int32), ["x", "y"])
    assert images.labels.tolist() == [1, 0]
    assert images.labels.dtype == torch.int64


def test_a_column_of_huge_numbers_is_no_column_of_classes(tmp_path):
    table = datasets.Dataset.from_dict({"image": [b"x"], "label": [2**40]})
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 0: the class in the column 'label' is 1099511627776"):
        load_labelled(f"hf:{tmp_path}")
