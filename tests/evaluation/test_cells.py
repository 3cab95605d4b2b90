from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from xbt.errors import DataError, SpaceMismatchError
from xbt.evaluation import (
    Cell,
    RetrievalReport,
    criterion,
    evaluate_cell,
    evaluate_retrieval,
    recall_at_k,
    recovered_gain,
)
from xbt.space import EmbeddingSpace


def cell(name, t2i, i2t, ks=(1, 5)):
    return Cell(
        name, dict(zip(ks, t2i, strict=True)), dict(zip(ks, i2t, strict=True)), n_images=10, n_texts=50
    )


OLD = cell("old/old", (0.25, 0.5), (0.5, 0.75))
UP = cell("new/old", (0.5, 0.5), (0.25, 1.0))
NEW = cell("new/new", (0.75, 0.75), (0.75, 0.75))


class FakePairs:
    """Three images with 1, 2 and 3 captions; counts how often an image is decoded."""

    def __init__(self):
        self.images = ["red", "green", "blue"]
        self.texts = ["red", "green", "lime", "blue", "navy", "sky"]
        self.positives_t2i = [[0], [1], [1], [2], [2], [2]]
        self.positives_i2t = [[0], [1, 2], [3, 4, 5]]
        self.decoded = [0, 0, 0]

    def __len__(self):
        return len(self.images)

    def image(self, index):
        self.decoded[index] += 1
        return Image.new("RGB", (2, 2), self.images[index])


class FakeEncoder:
    """Vectors by table: one per text, one per image colour."""

    def __init__(self, space, texts, images):
        self.space, self._texts, self._images = space, texts, images
        self.calls = []

    def encode_texts(self, texts, batch_size=256, progress=False):
        self.calls.append(("texts", list(texts), progress))
        return self._texts.clone()

    def encode_images(self, images, batch_size=64, progress=False):
        colours = [images[i].getpixel((0, 0)) for i in range(len(images))]
        self.calls.append(("images", colours, progress))
        return self._images.clone()


def space(model="old", dim=3):
    return EmbeddingSpace(model, dim, probe=None)


@pytest.fixture
def upgrade():
    owners = [0, 1, 1, 2, 2, 2]
    axes = torch.eye(3)
    confused = axes[[1, 2, 0, 1, 0, 2]]  # of the texts only the last finds its image
    old = FakeEncoder(space(), confused, axes)
    new = FakeEncoder(space("new", 5), torch.eye(5)[owners], torch.eye(5)[:3])
    better = FakeEncoder(space(), axes[owners], axes)
    return SimpleNamespace(pairs=FakePairs(), old=old, new=new, better=better)


def test_criterion_is_strict():
    assert criterion(UP, OLD) == {"T2I": {1: True, 5: False}, "I2T": {1: False, 5: True}}
    assert criterion(OLD, OLD) == {"T2I": {1: False, 5: False}, "I2T": {1: False, 5: False}}


def test_recovered_gain():
    assert recovered_gain(UP, OLD, NEW) == {"T2I": {1: 0.5, 5: 0.0}, "I2T": {1: -1.0, 5: None}}
    worse = cell("new/new", (0.0, 0.5), (0.5, 0.5))
    assert recovered_gain(UP, OLD, worse) == {"T2I": {1: None, 5: None}, "I2T": {1: None, 5: None}}


def test_evaluate_cell_searches_across_modalities_and_models():
    torch.manual_seed(0)
    texts, images, old_texts, old_images = (torch.randn(n, 4) for n in (6, 3, 6, 3))
    pairs = FakePairs()
    result = evaluate_cell(
        "x", texts, images, old_texts, old_images, pairs.positives_t2i, pairs.positives_i2t, (1, 2)
    )
    assert result.t2i == recall_at_k(texts, old_images, pairs.positives_t2i, (1, 2))
    assert result.i2t == recall_at_k(images, old_texts, pairs.positives_i2t, (1, 2))
    assert (result.n_images, result.n_texts) == (3, 6)


def test_report_judges_every_upgrade():
    second = cell("new/old (stage 2)", (0.5, 0.75), (0.75, 1.0))
    report = RetrievalReport([OLD, UP, second, NEW])
    assert report.verdicts == {"new/old": criterion(UP, OLD), "new/old (stage 2)": criterion(second, OLD)}
    assert report.gains["new/old (stage 2)"] == recovered_gain(second, OLD, NEW)
    assert report.meets_criterion("T2I", "new/old (stage 2)")
    assert report.meets_criterion("I2T", "new/old (stage 2)")
    assert not report.meets_criterion("T2I", "new/old")
    assert not report.meets_criterion("T2I")


def test_report_without_new_new_has_no_gain():
    report = RetrievalReport([OLD, UP])
    assert report.gains == {}
    assert report.to_dict()["recovered_gain"] == {}


def test_report_is_json_with_counts():
    report = json.loads(json.dumps(RetrievalReport([OLD, UP, NEW]).to_dict(), allow_nan=False))
    first = {"name": "old/old", "n_images": 10, "n_texts": 50}
    assert report["cells"][0] == first | {"T2I": {"R@1": 0.25, "R@5": 0.5}, "I2T": {"R@1": 0.5, "R@5": 0.75}}
    assert report["criterion"]["new/old"]["T2I"] == {"R@1": True, "R@5": False}
    assert report["recovered_gain"]["new/old"]["I2T"] == {"R@1": -1.0, "R@5": None}


def test_report_refuses_cells_that_cannot_be_compared():
    with pytest.raises(DataError, match="needs the cell 'old/old'"):
        RetrievalReport([UP])
    with pytest.raises(DataError, match="'new/old' occurs twice"):
        RetrievalReport([OLD, UP, UP])
    with pytest.raises(DataError, match=r"'new/old' has R@\[1, 10\]"):
        RetrievalReport([OLD, cell("new/old", (0.5, 0.5), (0.5, 0.5), ks=(1, 10))])


def test_report_refuses_what_it_does_not_hold():
    report = RetrievalReport([OLD, NEW])
    with pytest.raises(DataError, match="no cell 'new/old' to judge"):
        report.meets_criterion("T2I")
    with pytest.raises(DataError, match=r"no cell 'x'; there are \['old/old', 'new/new'\]"):
        report.cell("x")
    with pytest.raises(DataError, match="no direction 't2i'"):
        RetrievalReport([OLD, UP]).meets_criterion("t2i")


def test_evaluate_retrieval_fills_the_cells(upgrade):
    report = evaluate_retrieval(
        upgrade.pairs, upgrade.old, upgrade.new, {"stage 1": upgrade.better}, ks=(1, 3)
    )
    assert [c.name for c in report.cells] == ["old/old", "new/old", "new/new"]
    # Old texts: only "sky" scores its own image first; the other five stand behind another image, and so tie
    # with a third one: rank 2.
    assert report.cell("old/old").t2i == {1: 1 / 6, 3: 1.0}
    assert report.cell("new/old").t2i == {1: 1.0, 3: 1.0}
    assert report.cell("new/new").t2i == {1: 1.0, 3: 1.0}
    # Image queries against the confused old texts: the captions of red and green score 0, so that all texts
    # stand before them (ranks 5 and 4); "sky" scores 1 for blue, as does the wrong text "green" (rank 1).
    assert report.cell("new/old").i2t == {1: 0.0, 3: 1 / 3}
    assert report.meets_criterion("T2I") is False  # at k = 3 there is nothing to gain
    assert report.verdicts["new/old"]["T2I"] == {1: True, 3: False}
    assert (report.cells[0].n_images, report.cells[0].n_texts) == (3, 6)


def test_evaluate_retrieval_embeds_once_and_decodes_through_the_pairs(upgrade):
    evaluate_retrieval(upgrade.pairs, upgrade.old, upgrade.new, {"a": upgrade.better}, progress=True)
    colours = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    for encoder in (upgrade.old, upgrade.new, upgrade.better):
        assert encoder.calls == [("texts", upgrade.pairs.texts, True), ("images", colours, True)]
    assert upgrade.pairs.decoded == [3, 3, 3]


def test_evaluate_retrieval_names_several_upgrades(upgrade):
    upgraded = {"stage 1": upgrade.old, "stage 2": upgrade.better}
    report = evaluate_retrieval(upgrade.pairs, upgrade.old, upgrade.new, upgraded)
    assert list(report.verdicts) == ["new/old (stage 1)", "new/old (stage 2)"]
    assert not report.meets_criterion("T2I", "new/old (stage 1)")


def test_evaluate_retrieval_refuses_a_foreign_space_before_embedding(upgrade):
    with pytest.raises(SpaceMismatchError, match="the space of the upgraded encoder 'raw' is 'new'"):
        evaluate_retrieval(upgrade.pairs, upgrade.old, upgrade.new, {"raw": upgrade.new})
    upgrade.better.space = space("other")
    with pytest.raises(SpaceMismatchError, match="'other'"):
        evaluate_retrieval(upgrade.pairs, upgrade.old, upgrade.new, {"x": upgrade.better})
    assert upgrade.old.calls == []


def test_evaluate_retrieval_refuses_bad_questions_before_embedding(upgrade):
    with pytest.raises(DataError, match="ks holds 0"):
        evaluate_retrieval(upgrade.pairs, upgrade.old, upgrade.new, {"a": upgrade.better}, ks=(0,))
    upgrade.pairs.positives_i2t[1] = []
    with pytest.raises(DataError, match=r"positives_i2t\[1\] is empty"):
        evaluate_retrieval(upgrade.pairs, upgrade.old, upgrade.new, {"a": upgrade.better})
    assert upgrade.old.calls == []


def test_images_come_as_a_lazy_sequence(upgrade):
    seen = {}

    def encode_images(images, progress=False):
        seen["images"] = images
        return torch.eye(3)

    upgrade.old.encode_images = encode_images
    evaluate_retrieval(upgrade.pairs, upgrade.old, upgrade.new, {})
    images, before = seen["images"], sum(upgrade.pairs.decoded)
    assert len(images) == 3
    assert images[-1].getpixel((0, 0)) == (0, 0, 255)
    assert [image.getpixel((0, 0)) for image in images[:2]] == [(255, 0, 0), (0, 128, 0)]
    assert sum(upgrade.pairs.decoded) == before + 3
    with pytest.raises(IndexError):
        images[3]
    assert len(list(images)) == 3
