"""Our R@k against CLIP_benchmark's, torchmetrics' and a sort in numpy, on the same vectors."""

from __future__ import annotations

import random
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from xbt.evaluation import best_positive_ranks, evaluate_cell, recall_at_k
from xbt.evaluation import retrieval as module

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from clip_benchmark.metrics import zeroshot_retrieval
    from torchmetrics.retrieval import RetrievalHitRate

KS = (1, 5, 10)
CAPTIONS = {
    "one": lambda rng: 1,
    "five": lambda rng: 5,
    "five or six, as in COCO": lambda rng: 6 if rng.random() < 0.1 else 5,
    "1 to 20": lambda rng: rng.randint(1, 20),
}


class World(NamedTuple):
    """Captions stand in the order of their images, as CLIP_benchmark meets them."""

    texts: torch.Tensor
    images: torch.Tensor
    owners: list[int]

    @property
    def t2i(self):
        return [[owner] for owner in self.owners]

    @property
    def i2t(self):
        return [[j for j, o in enumerate(self.owners) if o == i] for i in range(len(self.images))]

    def directions(self):
        """Queries, gallery and answers of both."""
        return [(self.texts, self.images, self.t2i), (self.images, self.texts, self.i2t)]


def make_world(seed, captions="1 to 20", n_images=40, dim=16):
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    owners = [image for image in range(n_images) for _ in range(CAPTIONS[captions](rng))]
    images = noise.standard_normal((n_images, dim))
    texts = images[owners] + 2.5 * noise.standard_normal((len(owners), dim))
    return World(*(normalize(torch.from_numpy(each), dim=1).float() for each in (texts, images)), owners)


def relevance(queries, gallery, positives):
    relevant = torch.zeros(len(queries), len(gallery), dtype=torch.bool)
    for i, right in enumerate(positives):
        relevant[i, right] = True
    return relevant


def numpy_recall(queries, gallery, positives, k, ties="against us"):
    """Sorts every query's gallery by score; of equal scores the wrong ones come first, or last."""
    scores = queries.double().numpy() @ gallery.double().numpy().T
    scores = np.round(scores, 12)  # what differs by the last bits of a double is equal
    relevant = relevance(queries, gallery, positives).numpy()
    order = np.lexsort((relevant if ties == "against us" else ~relevant, -scores))
    return float(np.take_along_axis(relevant, order, axis=1)[:, :k].any(axis=1).mean())


def clip_benchmark_recall(queries, gallery, positives, k):
    relevant = relevance(queries, gallery, positives)
    found = zeroshot_retrieval.batchify(
        zeroshot_retrieval.recall_at_k, queries @ gallery.T, relevant, 7, "cpu", k=k
    )
    return (found > 0).float().mean().item()


def torchmetrics_recall(queries, gallery, positives, k):
    rows = torch.arange(len(queries)).repeat_interleave(len(gallery))
    relevant = relevance(queries, gallery, positives)
    return float(RetrievalHitRate(top_k=k)((queries @ gallery.T).flatten(), relevant.flatten(), indexes=rows))


def single(value):
    """In single precision, in which the others take their means: the same to the last digit."""
    return torch.tensor(value, dtype=torch.float32).item()


def assert_no_close_calls(queries, gallery, positives, margin=1e-7):
    """No wrong row is as near to the best right one as rounding could bring it."""
    scores = queries.double() @ gallery.double().T
    relevant = relevance(queries, gallery, positives)
    best = scores.masked_fill(~relevant, -np.inf).amax(dim=1, keepdim=True)
    assert float((scores - best).abs().masked_fill(relevant, np.inf).min()) > margin


@pytest.mark.parametrize("captions", CAPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_last_digit_where_scores_are_distinct(seed, captions):
    world = make_world(seed, captions)
    values = set()
    for queries, gallery, positives in world.directions():
        assert_no_close_calls(queries, gallery, positives)
        for k, ours in recall_at_k(queries, gallery, positives, KS).items():
            assert ours == numpy_recall(queries, gallery, positives, k)
            assert single(ours) == clip_benchmark_recall(queries, gallery, positives, k)
            assert single(ours) == torchmetrics_recall(queries, gallery, positives, k)
            values.add(ours)
    assert len(values) >= 5  # neither solved nor hopeless


class Passed(torch.nn.Module):
    """A model for which vectors are images, and the numbers of captions are tokens."""

    def __init__(self, texts):
        super().__init__()
        self.texts = texts

    def encode_image(self, pixels):
        return pixels

    def encode_text(self, tokens):
        return self.texts[tokens]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_clip_benchmarks_whole_evaluation_gives_our_cell(batch_size, capfd):
    world = make_world(5)
    captions = [[str(j) for j in answers] for answers in world.i2t]
    loader = [
        (world.images[start : start + batch_size], captions[start : start + batch_size])
        for start in range(0, len(world.images), batch_size)
    ]
    found = zeroshot_retrieval.evaluate(
        Passed(world.texts),
        loader,
        lambda texts: torch.tensor([int(each) for each in texts]),
        device="cpu",
        amp=False,
        recall_k_list=KS,
    )
    cell = evaluate_cell(
        "old/old", world.texts, world.images, world.texts, world.images, world.t2i, world.i2t
    )
    for k in KS:
        assert found[f"image_retrieval_recall@{k}"] == single(cell.t2i[k])
        assert found[f"text_retrieval_recall@{k}"] == single(cell.i2t[k])
    assert cell.t2i[1] != cell.i2t[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("score_rows", [1, 3, 1000])
def test_every_precision_and_block_size(dtype, score_rows, monkeypatch):
    world = make_world(7)
    world = World(world.texts.to(dtype), world.images.to(dtype), world.owners)
    # Half precision is what stores hold; scores are never computed in it.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for queries, gallery, positives in world.directions():
        monkeypatch.setattr(module, "SCORE_BYTES", score_rows * wide.itemsize * len(gallery))
        wider = queries.to(wide), gallery.to(wide)
        for form in ((queries, gallery), (queries.numpy(), gallery.numpy())):
            for k, ours in recall_at_k(*form, positives, KS).items():
                assert ours == numpy_recall(*wider, positives, k)
                assert single(ours) == clip_benchmark_recall(*wider, positives, k)


def test_k_up_to_and_beyond_the_gallery():
    world = make_world(2, "five")
    for queries, gallery, positives in world.directions():
        n = len(gallery)
        worst = int(best_positive_ranks(queries, gallery, positives).max())
        for k in (worst, worst + 1, n - 1, n):
            ours = recall_at_k(queries, gallery, positives, [k])[k]
            assert single(ours) == clip_benchmark_recall(queries, gallery, positives, k)
            assert (ours < 1) == (k <= worst)
        # topk, and with it CLIP_benchmark, refuses a k that the gallery does not have.
        with pytest.raises(RuntimeError, match="k"):
            clip_benchmark_recall(queries, gallery, positives, n + 1)
        assert recall_at_k(queries, gallery, positives, [n + 1, 10 * n]) == {n + 1: 1.0, 10 * n: 1.0}
        assert torchmetrics_recall(queries, gallery, positives, n + 1) == 1.0


def test_copies_among_the_captions_of_one_image_change_nothing():
    world = make_world(11, "five")
    texts = world.texts.clone()
    for answers in world.i2t[::3]:
        texts[answers[1:3]] = texts[answers[0]].clone()
    world = World(texts, world.images, world.owners)
    for queries, gallery, positives in world.directions():
        for k, ours in recall_at_k(queries, gallery, positives, KS).items():
            assert ours == numpy_recall(queries, gallery, positives, k)
            assert single(ours) == clip_benchmark_recall(queries, gallery, positives, k)


@pytest.mark.parametrize("shared", [2, 20, 40])
def test_captions_that_several_images_share_count_against_us(shared):
    # Real captions recur. Whose copy topk takes first is arbitrary; ours is the least that it may come to.
    world = make_world(13, "five")
    texts = world.texts.clone()
    copies = [answers[0] for answers in world.i2t[:shared]]
    # Unequal weights: the plain mean of two unit rows scores the same for both, and rounding would decide.
    weights = torch.linspace(1, 2, shared)[:, None]
    middle = normalize((weights * world.images[:shared]).sum(dim=0), dim=0)
    texts[copies] = 5 * middle  # longer, so that it is found
    world = World(texts, world.images, world.owners)
    t2i, i2t = world.directions()
    assert_no_close_calls(*t2i)
    for k, ours in recall_at_k(*t2i, KS).items():  # as queries, copies tie with nothing
        assert single(ours) == clip_benchmark_recall(*t2i, k)
    strict = 0
    for k, ours in recall_at_k(*i2t, KS).items():
        most = numpy_recall(*i2t, k, ties="for us")
        assert ours == numpy_recall(*i2t, k)
        assert single(ours) <= clip_benchmark_recall(*i2t, k) <= single(most)
        strict += ours < most
    assert strict


@pytest.mark.parametrize(("n_images", "per_image"), [(30, 5), (50, 1), (7, 20)])
def test_a_model_that_gives_everything_the_same_vector_finds_nothing(n_images, per_image):
    owners = [image for image in range(n_images) for _ in range(per_image)]
    world = World(torch.ones(len(owners), 8), torch.ones(n_images, 8), owners)
    for queries, gallery, positives in world.directions():
        wrong = len(gallery) - len(positives[0])
        assert recall_at_k(queries, gallery, positives, [1, wrong, wrong + 1]) == {
            1: 0.0,
            wrong: 0.0,
            wrong + 1: 1.0,
        }
        assert numpy_recall(queries, gallery, positives, wrong) == 0.0
        assert numpy_recall(queries, gallery, positives, 1, ties="for us") == 1.0
