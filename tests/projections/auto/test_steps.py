"""The choice of gallery-side steps: no leaks, the same steps for the old query, and what is deployed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.errors import ConfigError, DataError
from xbt.evaluation import best_positive_ranks
from xbt.projections import PairVectors, choose_projection
from xbt.projections.auto import steps as step_module
from xbt.projections.auto.candidates import Candidate
from xbt.projections.auto.steps import OLD, Items, Judged, StepSetting, StepTrial, some_images
from xbt.projections.caption_map import Neighbours, fit_caption_map
from xbt.projections.gallery_steps import GallerySteps

PLAIN = [Candidate("procrustes")]


def rows(n, dim, seed):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def judged_on(pairs, direction, folds=5):
    images = torch.arange(len(pairs))
    return Judged(pairs, direction, images, images % folds, (1, 5))


def old_alone(fold, query, new, old):
    return old


@pytest.mark.parametrize("direction", ["T2I", "I2T"])
def test_pairs_of_noise_stay_at_chance(direction):
    """Queries say nothing of their answers: all that could lift them is what steps know of the pairs."""
    n = 150
    owner = torch.arange(n)
    pairs = PairVectors(rows(n, 6, 0), rows(n, 5, 1), rows(n, 5, 2), owner, rows(n, 6, 3))
    texts = Items.of(pairs.old_texts, pairs.new_texts, owner)
    images = Items.of(pairs.old_images, pairs.new_images, owner)
    bank = texts if direction == "T2I" else images
    setting = StepSetting(OLD, 0.5, Neighbours(1, 0.05), 0.75)
    trial = StepTrial(judged_on(pairs, direction), bank, bank, old_alone, [OLD])
    hits = float((trial.ranks(setting) < 5).double().mean())
    assert hits < 0.08, "5 of 150 are chance"
    leaking = images._replace(new=pairs.new_texts, owners=torch.full((n,), -1))
    known = StepTrial(judged_on(pairs, "T2I"), leaking, None, old_alone, [OLD])
    leak = known.ranks(StepSetting(OLD, 0.9, Neighbours(1, 0.05)))
    assert float((leak < 1).double().mean()) > 0.9, "a row that sees its own caption finds it"


@pytest.mark.parametrize("direction", ["T2I", "I2T"])
def test_ranks_are_those_of_the_formula(direction):
    """Fold by fold, written out: anchors of the corpus, a bank without the fold and without what is own."""
    n, owner = 40, torch.arange(40).repeat_interleave(2)
    pairs = PairVectors(rows(80, 6, 4), rows(80, 5, 5), rows(n, 5, 6), owner, rows(n, 6, 7))
    corpus = Items.of(rows(60, 5, 8), rows(60, 6, 9))
    texts = direction == "T2I"
    bank = (
        Items.of(pairs.old_texts, pairs.new_texts, owner)
        if texts
        else Items.of(pairs.old_images, pairs.new_images, torch.arange(n))
    )
    setting = StepSetting(OLD, 0.4, Neighbours(9, 0.1, residual=True), 0.5)
    found = StepTrial(judged_on(pairs, direction), corpus, bank, old_alone, [OLD]).ranks(setting)
    made = fit_caption_map(corpus.old, corpus.new, rules={"text": setting.rule})
    new, old = pairs.queries(direction)
    gallery = pairs.gallery(direction)
    stored = torch.cat([0.6 * gallery, 0.4 * made(gallery)], dim=1)
    of_row = torch.arange(n) if texts else owner
    of_query = pairs.groups(direction)
    expected = torch.zeros(len(old), dtype=torch.int64)
    for query in range(len(old)):
        fold = int(of_query[query]) % 5
        kept = bank.owners % 5 != fold
        scores = stored @ torch.cat([bank.old, bank.new], dim=1)[kept].T
        scores[of_row[:, None] == bank.owners[kept]] = -torch.inf
        bias = 0.5 * scores.topk(10, dim=1).values.mean(dim=1)
        total = stored @ torch.cat([old[query], new[query]]) - bias
        answers = torch.tensor(pairs.positives(direction)[query])
        expected[query] = (total > total[answers].max()).sum()
    assert (found == expected).double().mean() > 0.98, "but for ties in the last bit"


@pytest.fixture(scope="module")
def better():
    made = make_vector_world(*WORLDS["much better"], n_corpus=3000, n_support=200, n_test=300, seed=0)
    support, test = PairVectors(**made.support), PairVectors(**made.test)
    return choose_projection(made.corpus_new, made.corpus_old, pairs=support, candidates=PLAIN), test, made


def recall(scores, positives):
    queries = torch.eye(len(scores))
    return float((best_positive_ranks(queries, scores.T.contiguous(), positives) < 5).double().mean())


def test_steps_are_deployed_where_they_gain_and_can_be_stored(better, tmp_path):
    decision, test, _ = better
    assert any(decision.has_steps(direction) for direction in test.directions)
    decision.save(tmp_path)
    record = json.loads((tmp_path / "decision.json").read_text())
    assert set(record["step_tests"]) == {"T2I", "I2T"}
    loaded = replace(decision, steps=GallerySteps.load(tmp_path / "steps"))
    for direction in test.directions:
        new, old = test.queries(direction)
        gallery = test.gallery(direction)
        scores = decision.scores(direction, new, old, gallery)
        assert torch.equal(loaded.scores(direction, new, old, gallery), scores)
        if not decision.has_steps(direction):
            continue
        assert direction in record["steps"]
        assert f"{direction} with steps: " in str(decision)
        queries = decision.step_queries(new, old, direction)
        torch.testing.assert_close(queries @ decision.steps.rows(direction, gallery).T, scores)
        plain = old @ gallery.T
        assert recall(scores, test.positives(direction)) > recall(plain, test.positives(direction)) + 0.03
        assert decision.step_tests[direction].new.met or not decision.steps.needs_new(direction)


def test_without_steps_there_are_none(better):
    decision, test, made = better
    kept = choose_projection(
        made.corpus_new, made.corpus_old, pairs=PairVectors(**made.support), candidates=PLAIN, steps=False
    )
    assert kept.steps is None
    assert kept.forward is None
    assert kept.bias == {}
    assert kept.gain_tests["T2I"].why == decision.gain_tests["T2I"].why
    new, old = test.queries("T2I")
    torch.testing.assert_close(
        kept.scores("T2I", new, old, test.old_images), decision.queries(new, old, "T2I") @ test.old_images.T
    )
    with pytest.raises(ConfigError, match="no steps are deployed in T2I"):
        kept.step_queries(new, old, "T2I")


def test_a_bias_that_helps_the_old_query_is_offered_to_it():
    """The new model knows nothing, and hubs of the old one can be pushed down without it."""
    n = 400
    generator = torch.Generator().manual_seed(0)

    def near(rows, size):
        return normalize(rows + size * torch.randn(rows.shape, generator=generator) / 4, dim=1)

    middle = torch.eye(16)[0]
    clean = rows(n, 16, 1)
    lifted = clean + torch.rand(n, 1, generator=generator) * 2 * middle
    corpus = near(rows(3000, 16, 2) + middle, 0.0)
    pairs = PairVectors(
        rows(n, 8, 3), near(clean + middle, 0.6), normalize(lifted, dim=1), torch.arange(n), None
    )
    decision = choose_projection(rows(3000, 8, 4), corpus, pairs=pairs, candidates=PLAIN)
    assert not decision.deployed("T2I")
    assert decision.has_steps("T2I")
    assert not decision.steps.needs_new("T2I")
    assert decision.forward is None
    assert "T2I with steps: the old query + hubness bias" in str(decision)
    assert not decision.step_tests["T2I"].new.met
    scores = decision.scores("T2I", None, pairs.old_texts, pairs.old_images)
    assert recall(scores, pairs.positives("T2I")) > recall(
        pairs.old_texts @ pairs.old_images.T, pairs.positives("T2I")
    )


def test_without_pairs_fixed_steps_are_accepted_unverified(better):
    _, _, made = better
    images = made.support["new_images"], made.support["old_images"]
    new, old = made.corpus_new, made.corpus_old

    def chosen(count, **options):
        return choose_projection(
            torch.cat([new, new + 0.01])[:count], torch.cat([old, old + 0.01])[:count], candidates=PLAIN,
            accept_unverified=True, **options,
        )  # fmt: skip

    assert choose_projection(new, old, candidates=PLAIN, images=images).steps is None
    few = chosen(2000)
    assert few.forward is None, "with few captions the forward map may do harm"
    assert set(few.bias) == {"T2I"}, "the bank of image queries needs images"
    full = chosen(4500, images=images)
    assert set(full.bias) == {"T2I", "I2T"}
    assert full.forward.rules["image"] == Neighbours(50, 0.05)
    assert full.steps.shares == {"T2I": 0.2, "I2T": 0.5}
    assert "accepted unverified" in str(full)
    assert set(chosen(2000, images=(images[0][:99], images[1][:99])).bias) == {"T2I"}
    with pytest.raises(DataError, match="give both of each"):
        chosen(2000, images=(images[0], images[1][1:]))


def test_of_many_pairs_whole_clusters_are_drawn(monkeypatch):
    monkeypatch.setattr(step_module, "MAX_IMAGES", 30)
    clusters = np.arange(90)
    clusters[60:] = np.arange(30)
    pairs = PairVectors(rows(90, 4, 5), rows(90, 4, 6), rows(90, 4, 7), torch.arange(90), rows(90, 4, 8))
    fold_of = clusters % 5
    few, kept, folds = some_images(pairs, clusters, fold_of, seed=0)
    assert 25 <= len(few) <= 30
    places = [int((pairs.old_images == row).all(dim=1).nonzero()) for row in few.old_images]
    assert all(
        clusters[places[int(first)]] == clusters[place] for first, place in zip(kept, places, strict=True)
    )
    sizes = np.bincount(clusters)[clusters[places]]
    assert np.array_equal(np.bincount(kept.numpy(), minlength=len(few))[kept.numpy()], sizes)
    assert np.array_equal(folds.numpy(), fold_of[places])


def test_of_many_texts_the_first_of_every_image_are_kept(monkeypatch):
    monkeypatch.setattr(step_module, "MAX_TEXTS", 25)
    owner = torch.cat([torch.arange(10), torch.arange(10), torch.arange(5), torch.arange(5)])
    pairs = PairVectors(rows(30, 4, 5), rows(30, 4, 6), rows(10, 4, 7), owner)
    few, clusters, _ = some_images(pairs, np.arange(10), np.arange(10) % 5, seed=0)
    assert torch.equal(few.new_texts, pairs.new_texts[:25])
    assert torch.equal(few.image_of_text, owner[:25])
    assert torch.equal(clusters, torch.arange(10))
    monkeypatch.setattr(step_module, "MAX_TEXTS", 5)
    assert len(some_images(pairs, np.arange(10), np.arange(10) % 5, seed=0)[0].image_of_text) == 10
