from __future__ import annotations

import json

import labelled
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from xbt.backbones import ImagePreprocessing
from xbt.batches import Draw, SeededBatches
from xbt.data import LabelledSource, load_labelled
from xbt.errors import DataError
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore
from xbt.training.batches import LabelledBatches, leave_out_unreadable

AUGMENTED = ImagePreprocessing(16, augmentation="crop_flip")


@pytest.fixture
def images(tmp_path):
    labelled.write_folders(tmp_path / "data")
    return load_labelled(LabelledSource(str(tmp_path / "data"), split="train"))


def store(path, rows, dim=3):
    made = EmbeddingStore.create(
        path, modality="image", space=EmbeddingSpace("teacher", dim, normalisation="none"), dtype="float32"
    )
    vectors = np.arange(rows * dim, dtype=np.float32).reshape(rows, dim)
    made.append(vectors, [str(row) for row in range(rows)])
    return made, vectors


def test_rows_labels_and_teachers_go_together(images, tmp_path):
    teacher, vectors = store(tmp_path / "store", len(images))
    batches = LabelledBatches(images, ImagePreprocessing(16), 0, {"old": teacher})
    rows = [7, 40, 7, 0]
    batch = batches.__getitems__([Draw(3, position, row) for position, row in enumerate(rows)])
    assert batch["rows"].tolist() == rows
    assert batch["labels"].tolist() == [row // 12 for row in rows]
    assert torch.equal(batch["old"], torch.from_numpy(vectors[rows]))
    plain = ImagePreprocessing(16).evaluation()
    expected = torch.stack([plain(images.image(row)) for row in rows])
    assert torch.equal(batch["pixels"], expected)
    assert set(batch) == {"pixels", "labels", "rows", "old"}


def test_augmentation_depends_on_seed_step_and_position_alone(images):
    batches = LabelledBatches(images, AUGMENTED, 5)
    draws = next(iter(SeededBatches(len(images), 8, 5, 2, 3)))
    whole = batches.__getitems__(draws)["pixels"]
    in_parts = torch.cat(
        [batches.__getitems__(draws[4:])["pixels"], batches.__getitems__(draws[:4])["pixels"]]
    )
    assert torch.equal(whole, torch.cat([in_parts[4:], in_parts[:4]]))
    again = LabelledBatches(images, AUGMENTED, 5).__getitems__(draws)["pixels"]
    assert torch.equal(whole, again)
    for other in (
        LabelledBatches(images, AUGMENTED, 6).__getitems__(draws),
        batches.__getitems__([draw._replace(step=3) for draw in draws]),
        batches.__getitems__([draw._replace(position=draw.position + 8) for draw in draws]),
    ):
        assert not torch.equal(whole, other["pixels"])


def test_vectors_of_other_images_are_refused(images, tmp_path):
    teacher, _ = store(tmp_path / "store", 5)
    with pytest.raises(
        DataError, match=r"the old vectors in .*store are 5, but there are 48 training images"
    ):
        LabelledBatches(images, AUGMENTED, 0, {"old": teacher})


def test_unreadable_images_are_named_counted_and_left_out(images, tmp_path, monkeypatch):
    folder = tmp_path / "data/train"
    (folder / "class_1/003.png").write_bytes(b"no picture")
    whole = (folder / "class_2/005.png").read_bytes()
    (folder / "class_2/005.png").write_bytes(whole[:100])
    accelerator, record = Accelerator(cpu=True), tmp_path / "run/train.json"
    with pytest.warns(UserWarning, match=r"skipped 2 of 48 training images: .*class_1/003.png.*class_2/005"):
        kept = leave_out_unreadable(accelerator, images, record, "training images")
    assert len(kept) == 46
    assert set(images.ids) - set(kept.ids) == {"class_1/003.png", "class_2/005.png"}
    assert kept.labels.tolist() == [images.labels[images.ids.index(name)] for name in kept.ids]
    assert set(json.loads(record.read_text())["unreadable"]) == {"class_1/003.png", "class_2/005.png"}

    monkeypatch.setattr(type(images), "image", lambda self, row: pytest.fail("looked again"))
    with pytest.warns(UserWarning, match="skipped 2 of 48"):
        again = leave_out_unreadable(accelerator, images, record, "training images")
    assert again.ids == kept.ids
    monkeypatch.undo()
    fewer = images.select(range(20))  # other images: what is on record does not count
    with pytest.warns(UserWarning, match="skipped 1 of 20"):
        assert len(leave_out_unreadable(accelerator, fewer, record, "training images")) == 19


def test_nothing_readable(images, tmp_path):
    for path in (tmp_path / "data/train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 48 test images can be read: .*class_0/000.png"):
        leave_out_unreadable(Accelerator(cpu=True), images, tmp_path / "r.json", "test images")
