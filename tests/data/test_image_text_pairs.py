from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from xbt.data import ImageTextPairs, make_scenes
from xbt.errors import ConfigError, DataError, ImageError


def flat(value):
    return Image.new("RGB", (4, 4), (value, value, value))


@pytest.fixture
def pairs():
    captions = [["a0"], ["b0", "b1", "b2"], ["c0", "c1"]]
    return ImageTextPairs(["a", "b", "c"], [flat(0), flat(1), flat(2)], captions)


def test_relevance(pairs):
    assert pairs.texts == ["a0", "b0", "b1", "b2", "c0", "c1"]
    assert pairs.text_image == [0, 1, 1, 1, 2, 2]
    assert pairs.positives_t2i == [[0], [1], [1], [1], [2], [2]]
    assert pairs.positives_i2t == [[0], [1, 2, 3], [4, 5]]


def test_select_keeps_images_and_captions_together(pairs):
    some = pairs.select([2, 0]).select([1, 0]).select([0])
    assert some.ids == ["a"]
    assert some.captions == [["a0"]]
    assert some.image(0).getpixel((0, 0)) == (0, 0, 0)
    assert pairs.select([2, 0]).positives_i2t == [[0, 1], [2]]
    assert len(pairs.select([2, 0]).images[:1]) == 1
    for bad in ([3], [-1], [], [0, 0]):
        with pytest.raises(DataError):
            pairs.select(bad)


def test_selecting_reads_no_image():
    class Untouchable(list):
        def __getitem__(self, index):
            raise AssertionError("an image was read")

    lazy = ImageTextPairs(["a", "b"], Untouchable([1, 2]), [["x"], ["y"]])
    assert len(lazy.select([1])) == 1
    assert len(lazy.split(0.5)[1]) == 1


@pytest.mark.parametrize(("fraction", "held_out"), [(0.1, 10), (0.001, 1), (0.999, 99)])
def test_split_is_disjoint_and_complete(fraction, held_out):
    pairs = ImageTextPairs([str(i) for i in range(100)], [flat(0)] * 100, [[f"c{i}"] for i in range(100)])
    rest, out = pairs.split(fraction, seed=5)
    assert len(out) == held_out
    assert not set(rest.ids) & set(out.ids)
    assert len(rest) + len(out) == 100
    assert [f"c{name}" for name in out.ids] == out.texts
    assert out.ids == pairs.split(fraction, seed=5)[1].ids
    assert fraction != 0.1 or out.ids != pairs.split(fraction, seed=6)[1].ids


def test_split_errors(pairs):
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="fraction"):
            pairs.split(fraction)
    with pytest.raises(DataError, match="at least two"):
        pairs.select([0]).split(0.5)
    with pytest.raises(ConfigError, match="seed"):
        pairs.split(0.5, seed=-1)


def test_construction_errors():
    with pytest.raises(DataError, match="2 ids, 1 images, 1 captions"):
        ImageTextPairs(["a", "b"], [flat(0)], [["x"]])
    with pytest.raises(DataError, match="'a' occurs more than once"):
        ImageTextPairs(["b", "a", "a"], [flat(0)] * 3, [["x"]] * 3)
    with pytest.raises(DataError, match="captions of image 'b'"):
        ImageTextPairs(["a", "b"], [flat(0)] * 2, [["x"], []])
    with pytest.raises(DataError, match="captions of image 'a'"):
        ImageTextPairs(["a"], [flat(0)], ["x"])
    with pytest.raises(DataError, match="no image–text pairs"):
        ImageTextPairs([], [], [])


def damaged_images(folder):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    contents = {
        "good.jpg": jpeg,
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "zero.jpg": b"",
        "text.jpg": b"<html>404 not found</html>",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [*contents, "missing.jpg"]


def test_drop_unreadable_names_each(tmp_path):
    names = damaged_images(tmp_path)
    pairs = ImageTextPairs(names, [tmp_path / name for name in names], [[name] for name in names])
    with pytest.raises(ImageError, match=r"truncated\.jpg"):
        pairs.image(1)
    kept, rejected = pairs.drop_unreadable(workers=2)
    assert kept.ids == ["good.jpg"]
    assert kept.texts == ["good.jpg"]
    assert [item.id for item in rejected] == names[1:]
    assert all(item.id in item.reason for item in rejected)
    assert kept.drop_unreadable() == (kept, [])
    with pytest.raises(DataError, match=r"none of the 4 images can be read; .*truncated\.jpg"):
        pairs.select([1, 2, 3, 4]).drop_unreadable()
    with pytest.raises(ConfigError, match="workers"):
        pairs.drop_unreadable(workers=0)


class Pixels(Dataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, row):
        return int(np.asarray(self.pairs.image(row)).astype(int).sum())


def test_pickle_and_loader_workers():
    pairs = make_scenes(6).select([5, 1, 3])
    expected = [Pixels(pairs)[row] for row in range(3)]
    copy = pickle.loads(pickle.dumps(pairs))
    assert copy.captions == pairs.captions
    assert [Pixels(copy)[row] for row in range(3)] == expected
    loader = DataLoader(Pixels(pairs), batch_size=2, num_workers=1)
    assert [value for batch in loader for value in batch.tolist()] == expected
