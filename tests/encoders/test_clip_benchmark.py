"""CLIP_benchmark's own evaluation of our encoders, against ours."""

from __future__ import annotations

import pickle
import sys
import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from torch.utils.data import DataLoader

from xbt.compatible import CompatibleEncoder
from xbt.data import make_scenes
from xbt.encoders import as_clip_benchmark, load_encoder, register_clip_benchmark
from xbt.errors import ConfigError, EncoderError, ImageError, SpaceMismatchError, TruncationWarning
from xbt.evaluation import evaluate_retrieval
from xbt.projections import fit_projection
from xbt.projections.ensemble import QueryEnsemble

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from clip_benchmark import models
    from clip_benchmark.metrics import zeroshot_retrieval

KS = (1, 5, 10)
PAIRS = make_scenes(24)


class PicturesAndCaptions(torch.utils.data.Dataset):
    """A data set of the kind that CLIP_benchmark reads: transformed picture, list of captions."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return len(PAIRS)

    def __getitem__(self, index):
        return self.transform(PAIRS.image(index)), PAIRS.captions[index]


def stacked(batch):
    """As CLIP_benchmark's own ``image_captions_collate_fn``."""
    pictures, captions = zip(*batch, strict=True)
    return torch.stack(pictures), captions


def clip_benchmark(model, transform, tokenizer, amp=False, num_workers=0):
    loader = DataLoader(
        PicturesAndCaptions(transform),
        batch_size=7,
        collate_fn=stacked,
        num_workers=num_workers,
    )
    found = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=amp, recall_k_list=KS)
    directions = {"T2I": "image_retrieval_recall", "I2T": "text_retrieval_recall"}
    return {ours: {k: found[f"{theirs}@{k}"] for k in KS} for ours, theirs in directions.items()}


@pytest.fixture(scope="module")
def upgrade(tmp_path_factory):
    root = tmp_path_factory.mktemp("upgrade")
    old = load_encoder(tiny.tiny_open_clip(root / "old", seed=4, context_length=96))
    new = load_encoder(tiny.tiny_transformers_clip(root / "new", seed=5, context_length=300))
    texts = [caption for group in make_scenes(20, seed=9).captions for caption in group]
    projection = fit_projection(
        new.encode_texts(texts), old.encode_texts(texts), new_space=new.space, old_space=old.space
    )
    upgraded = CompatibleEncoder(new, projection)
    return SimpleNamespace(old=old, new=new, projection=projection, upgraded=upgraded)


@pytest.fixture(scope="module")
def report(upgrade):
    return evaluate_retrieval(PAIRS, upgrade.old, upgrade.new, {"": upgrade.upgraded}, KS)


def single(recall):
    """In single precision, in which CLIP_benchmark takes its means."""
    return {k: torch.tensor(value, dtype=torch.float32).item() for k, value in recall.items()}


def test_premise_nothing_is_near_a_tie(upgrade, report):
    captions = [caption for group in PAIRS.captions for caption in group]
    assert len(set(captions)) == len(captions)
    owners = torch.tensor([each[0] for each in PAIRS.positives_t2i])
    sides = [upgrade.old, upgrade.new, upgrade.upgraded]
    texts = [each.encode_texts(PAIRS.texts).double() for each in sides]
    images = [each.encode_images(list(PAIRS.images)).double() for each in sides]
    for t, i in [(0, 0), (1, 1), (2, 0), (0, 2)]:
        scores = texts[t] @ images[i].T
        right = torch.nn.functional.one_hot(owners, len(PAIRS)).bool()
        for table, mine in ((scores, right), (scores.T, right.T)):
            best = table.masked_fill(~mine, -2).amax(dim=1, keepdim=True)
            assert float((table - best).abs().masked_fill(mine, 2).min()) > 1e-6
    values = {value for cell in report.cells for recall in (cell.t2i, cell.i2t) for value in recall.values()}
    assert len(values) > 8  # the models are random, but not all alike


@pytest.mark.parametrize("name", ["old/old", "new/new"])
@pytest.mark.parametrize("amp", [False, True])
def test_one_model_on_both_sides(upgrade, report, name, amp):
    encoder = upgrade.old if name == "old/old" else upgrade.new
    found = clip_benchmark(*as_clip_benchmark(encoder), amp=amp)
    assert found == {"T2I": single(report.cell(name).t2i), "I2T": single(report.cell(name).i2t)}


def test_new_queries_on_the_old_gallery_take_two_runs(upgrade, report):
    expected = report.cell("new/old")
    found = clip_benchmark(*as_clip_benchmark(upgrade.upgraded, upgrade.old))
    assert found["T2I"] == single(expected.t2i)
    found = clip_benchmark(*as_clip_benchmark(upgrade.old, upgrade.upgraded))
    assert found["I2T"] == single(expected.i2t)


def test_with_loading_processes(upgrade, report):
    found = clip_benchmark(*as_clip_benchmark(upgrade.old), num_workers=1)
    assert found["T2I"] == single(report.cell("old/old").t2i)


def test_vectors_are_those_of_the_encoders(upgrade):
    model, transform, tokenizer = as_clip_benchmark(upgrade.upgraded, upgrade.old)
    texts, images = PAIRS.texts[:5], [PAIRS.image(i) for i in range(5)]
    tokens, pixels = tokenizer(texts), torch.stack([transform(image) for image in images])
    assert tokens.shape == (5, upgrade.new.context_length)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(pixels, tokens)
    for vectors, expected in zip(
        found, (upgrade.old.encode_images(images), upgrade.upgraded.encode_texts(texts)), strict=True
    ):
        assert vectors.dtype == torch.float32
        assert not vectors.requires_grad
        torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)


def test_training_mode_is_left_and_found_again(upgrade):
    model, _, tokenizer = as_clip_benchmark(upgrade.old)
    upgrade.old.module.train()
    try:
        vectors = model.encode_text(tokenizer(PAIRS.texts[:3]))
        assert upgrade.old.module.training
    finally:
        upgrade.old.module.eval()
    assert not vectors.requires_grad
    assert not model.eval().training


def test_pictures_of_every_mode_are_read_as_encoders_read_them(upgrade):
    transform = pickle.loads(pickle.dumps(as_clip_benchmark(upgrade.old).transform))
    image = PAIRS.image(0).convert("P")
    model = as_clip_benchmark(upgrade.old).model
    torch.testing.assert_close(
        model.encode_image(transform(image)[None]), upgrade.old.encode_images([image]), rtol=0, atol=1e-6
    )
    with pytest.raises(ImageError, match="cannot be decoded"):
        transform(Image.new("RGB", (1, 1000)))


def test_texts_that_are_cut_are_reported(upgrade):
    with pytest.warns(TruncationWarning, match="1 of 2 texts"):
        as_clip_benchmark(upgrade.old).tokenizer(["a red circle " * 50, "a star"])


def test_sides_must_share_a_space(upgrade):
    with pytest.raises(SpaceMismatchError, match="the space of the image encoder"):
        as_clip_benchmark(upgrade.new, upgrade.old)


def test_mixed_queries_are_refused(upgrade):
    ensemble = QueryEnsemble.midpoint(upgrade.old.dim, upgrade.old.space)
    mixing = CompatibleEncoder(upgrade.new, upgrade.projection, ensemble, upgrade.old)
    with pytest.raises(EncoderError, match="combines its queries with the old model's"):
        clip_benchmark(*as_clip_benchmark(mixing, upgrade.old))


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(models, "TYPE2FUNC", dict(models.TYPE2FUNC))
    monkeypatch.setattr(models, "MODEL_TYPES", list(models.MODEL_TYPES))
    return models


def test_registered_encoders_are_a_model_type(upgrade, report, registry):
    register_clip_benchmark("xbt", upgrade.new)
    register_clip_benchmark("xbt", upgrade.upgraded, upgrade.old)  # the last one counts
    assert registry.MODEL_TYPES.count("xbt") == 1
    found = clip_benchmark(*registry.load_clip("xbt", "", "", "", "cpu"))
    assert found["T2I"] == single(report.cell("new/old").t2i)
    with pytest.raises(ConfigError, match="'open_clip' is one of CLIP_benchmark's own"):
        register_clip_benchmark("open_clip", upgrade.old)


def test_without_clip_benchmark(upgrade, monkeypatch):
    monkeypatch.setitem(sys.modules, "clip_benchmark.models", None)
    with pytest.raises(ConfigError, match="CLIP_benchmark is not installed; run pip install"):
        register_clip_benchmark("xbt", upgrade.old)
