from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from xbt.data import ImageTextPairs
from xbt.errors import ConfigError, DataError
from xbt.evaluation import (
    PROTOCOLS,
    Protocol,
    RetrievalReport,
    average_folds,
    evaluate_cell,
    find_protocol,
)


def make_pairs(images=6, captions=5, extra=2):
    """Images with ``captions`` each, the last one with ``extra`` more."""
    texts = [[f"{row}.{k}" for k in range(captions)] for row in range(images)]
    texts[-1] += [f"surplus {k}" for k in range(extra)]
    return ImageTextPairs([str(row) for row in range(images)], [Image.new("RGB", (2, 2))] * images, texts)


def test_published_counts():
    counts = {name: (each.images, each.captions, each.folds) for name, each in PROTOCOLS.items()}
    assert counts == {
        "flickr30k_1k": (1000, 5000, 1),
        "coco_5k": (5000, 25010, 1),
        "coco_1k": (5000, 25010, 5),
        "flickr30k_all": (31014, 155070, 1),
        "coco_2014_val": (35504, 177644, 1),
        "nocaps_val": (4500, 45000, 1),
    }
    assert all(each.name == name for name, each in PROTOCOLS.items())
    # COCO's val2014 has 40,504 images with 202,654 captions, and Karpathy's test split is a part of it.
    large, test = PROTOCOLS["coco_2014_val"], PROTOCOLS["coco_5k"]
    assert (large.images + test.images, large.captions + test.captions) == (40504, 202654)


def test_all_captions_are_kept():
    pairs = make_pairs()
    [fold] = Protocol("small", 6, 32, "none").prepare(pairs)
    assert fold.captions == pairs.captions
    assert len(fold.captions[-1]) == 7


def test_folds_are_sequential_and_captions_the_first():
    folds = Protocol("small", 6, 32, "none", folds=3, captions_per_image=5).prepare(make_pairs())
    assert [fold.ids for fold in folds] == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert all(fold.captions == [[f"{row}.{k}" for k in range(5)] for row in fold.ids] for fold in folds)


@pytest.mark.parametrize("pairs", [make_pairs(5), make_pairs(6, extra=0), make_pairs(7)])
def test_wrong_counts_are_one_sentence_with_the_usual_cause(pairs):
    protocol = Protocol("small", 6, 32, "look for duplicates")
    with pytest.raises(DataError) as caught:
        protocol.prepare(pairs, "a.json")
    assert str(caught.value) == (
        "the protocol 'small' has 6 images with 32 captions, but a.json holds "
        f"{len(pairs)} images with {len(pairs.texts)} captions; look for duplicates"
    )


def test_every_protocol_names_look_alikes():
    for protocol in PROTOCOLS.values():
        with pytest.raises(DataError, match="check that"):
            protocol.prepare(make_pairs())
    with pytest.raises(DataError, match=r"5,000 images with 25,010 captions, .* COCO val2017"):
        PROTOCOLS["coco_5k"].prepare(make_pairs())


def test_too_few_captions():
    with pytest.raises(DataError, match="takes 6 captions of every image, but '0' of the source has only 5"):
        Protocol("small", 6, 32, "none", captions_per_image=6).prepare(make_pairs())


def test_protocols_that_cannot_be():
    with pytest.raises(ConfigError, match="cannot cut 7 images into 2 folds"):
        Protocol("odd", 7, 35, "", folds=2)
    with pytest.raises(ConfigError, match="has a number below 1"):
        Protocol("none", 0, 0, "")
    with pytest.raises(ConfigError, match=r"no protocol 'coco5k'; there are flickr30k_1k, coco_5k"):
        find_protocol("coco5k")
    assert find_protocol("coco_1k").to_dict() == {
        "name": "coco_1k",
        "images": 5000,
        "captions": 25010,
        "folds": 5,
        "captions_per_image": 5,
    }


def fold_report(seed, images=4, texts=8):
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(size, 3, generator=generator) for size in (texts, images, texts, images)]
    owners = [text * images // texts for text in range(texts)]
    t2i = [[owner] for owner in owners]
    i2t = [[text for text in range(texts) if owners[text] == image] for image in range(images)]
    names = ("old/old", "new/old")
    cells = [evaluate_cell(name, *(v + i for v in vectors), t2i, i2t, (1, 2)) for i, name in enumerate(names)]
    return RetrievalReport(cells, {"T2I": torch.tensor(owners), "I2T": torch.arange(images)})


def test_the_mean_over_folds():
    reports = [fold_report(seed) for seed in range(5)]
    mean = average_folds(reports)
    for name in ("old/old", "new/old"):
        for direction in ("T2I", "I2T"):
            for k in (1, 2):
                each = [report.cell(name).recall(direction)[k] for report in reports]
                assert mean.cell(name).recall(direction)[k] == pytest.approx(sum(each) / 5)
                hits = (mean.cell(name).ranks[direction] < k).double().mean()
                assert mean.cell(name).recall(direction)[k] == pytest.approx(float(hits))
    assert (mean.cell("old/old").n_images, mean.cell("old/old").n_texts) == (4, 8)
    assert mean.groups["T2I"].unique().tolist() == list(range(20))
    assert mean.groups["I2T"].tolist() == list(range(20))
    gain = mean.differences["new/old"]["T2I"][1]
    assert gain.gain.estimate == pytest.approx(gain.fixed - gain.broken)
    assert average_folds(reports[:1]) is reports[0]


def test_folds_that_cannot_be_averaged():
    with pytest.raises(DataError, match="fold 1 has other cells, cut-offs or counts than the first"):
        average_folds([fold_report(0), fold_report(1, images=2)])
    with pytest.raises(DataError, match="no folds"):
        average_folds([])
    without = fold_report(2)
    without.cells = [dataclasses.replace(cell, ranks={}) for cell in without.cells]
    assert average_folds([without, without]).cell("old/old").ranks == {}
