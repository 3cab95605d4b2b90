from __future__ import annotations

import pytest
import torch

from xbt.batches import Draw
from xbt.data import make_scenes
from xbt.encoders import load_encoder
from xbt.store import EmbeddingStore
from xbt.training import batches
from xbt.training.batches import PairBatches

pytestmark = pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")


@pytest.fixture
def encoder(open_clip_spec):
    return load_encoder(open_clip_spec)


def draws(step, items, first=0):
    return [Draw(step, first + position, item) for position, item in enumerate(items)]


def test_a_batch_holds_each_images_pixels_and_one_of_its_captions(encoder):
    pairs = make_scenes(10)
    marks = torch.arange(len(pairs.texts))
    batch = PairBatches(pairs, encoder, seed=0, per_text={"row": marks}).__getitems__(draws(3, [4, 0, 9]))
    for position, item in enumerate((4, 0, 9)):
        assert torch.equal(batch["pixels"][position], encoder.preprocess(pairs.image(item)))
        row = int(batch["row"][position])
        assert pairs.text_image[row] == item
        assert torch.equal(batch["tokens"][position], encoder.tokenize([pairs.texts[row]])[0])


def test_captions_vary_with_the_step_but_not_with_the_slicing(encoder):
    dataset = PairBatches(make_scenes(10), encoder, seed=0)
    whole = dataset.__getitems__(draws(1, range(8)))["tokens"]
    halves = [dataset.__getitems__(draws(1, range(a, a + 4), first=a))["tokens"] for a in (0, 4)]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(dataset.__getitems__(draws(2, range(8)))["tokens"], whole)


@pytest.mark.parametrize(("cache_rows", "calls"), [(512, 10), (3, 17), (0, 20)])
def test_pixels_are_preprocessed_once_where_they_fit(encoder, monkeypatch, cache_rows, calls):
    pairs, count = make_scenes(10), []
    original = encoder.preprocess
    expected = torch.stack([original(pairs.image(row)) for row in range(10)])
    monkeypatch.setattr(batches, "CACHE_BYTES", cache_rows * expected[0].nbytes)
    monkeypatch.setattr(encoder, "preprocess", lambda image: count.append(1) or original(image))
    dataset = PairBatches(pairs, encoder, seed=0)
    for step in range(2):
        assert torch.equal(dataset.__getitems__(draws(step, range(10)))["pixels"], expected)
    assert len(count) == calls


@pytest.mark.parametrize("cache_rows", [0, 7, 10**6])
def test_captions_beyond_the_cache_are_tokenised_as_they_come(encoder, monkeypatch, recwarn, cache_rows):
    pairs = make_scenes(10)
    expected = encoder.tokenize(pairs.texts)
    recwarn.clear()
    monkeypatch.setattr(batches, "TOKEN_CACHE_BYTES", cache_rows * encoder.context_length * 4)
    dataset = PairBatches(pairs, encoder, seed=0, per_text={"row": torch.arange(len(pairs.texts))})
    assert len(dataset._tokens) == min(max(cache_rows, 1), len(pairs.texts))
    assert dataset._tokens.dtype == torch.int32
    before = len(recwarn)
    for step in range(5):
        batch = dataset.__getitems__(draws(step, range(10)))
        assert batch["tokens"].dtype == torch.int64
        assert torch.equal(batch["tokens"], expected[batch["row"]])
    assert len(recwarn) == before  # cut captions are reported once, not once per batch


def test_rows_of_a_store_go_with_their_captions(encoder, tmp_path):
    pairs = make_scenes(10)
    rows = torch.nn.functional.normalize(torch.randn(len(pairs.texts), 16), dim=1)
    store = EmbeddingStore.create(tmp_path, modality="text", space=encoder.space, dtype="float32")
    store.append(rows, [str(row) for row in range(len(rows))])
    both = {"memory": rows, "disk": store}
    batch = PairBatches(pairs, encoder, seed=0, per_text=both).__getitems__(draws(1, [3, 0, 7]))
    assert torch.equal(batch["disk"], batch["memory"])
