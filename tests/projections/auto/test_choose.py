"""The automatic choice on worlds of which it is known what it should do."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation import best_positive_ranks
from xbt.projections import PairVectors, Projection, QueryEnsemble, fit_projection
from xbt.projections.auto.candidates import Candidate, Fitter, default_candidates
from xbt.projections.auto.choose import choose_projection
from xbt.projections.combinations import Linear, Nlerp, Slerp
from xbt.projections.fitting import CLOSED_FORMS
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

QUICK = [
    Candidate("procrustes"),
    Candidate("procrustes", {"pairs_weight": 0.33}),
    Candidate("procrustes", {"pairs_weight": 0.33}, 30.0),
]
BOTH = ("T2I", "I2T")
TEXTS = [Candidate("procrustes"), Candidate("ridge")]


def world(name, n_corpus=3000, seed=0, n_support=200):
    made = make_vector_world(*WORLDS[name], n_corpus=n_corpus, n_support=n_support, n_test=300, seed=seed)
    return made, PairVectors(**made.support), PairVectors(**made.test)


def mean_gain(decision, test, direction):
    new, old = test.queries(direction)
    gallery, positives = test.gallery(direction), test.positives(direction)
    gains = []
    for k in (1, 5, 10):
        ours, theirs = (
            (best_positive_ranks(queries, gallery, positives) < k).double().mean()
            for queries in (decision.queries(new, old, direction), old)
        )
        gains.append(float(ours - theirs))
    return sum(gains) / 3


@pytest.fixture(scope="module")
def better():
    made, support, test = world("much better")
    return choose_projection(made.corpus_new, made.corpus_old, pairs=support, candidates=QUICK), test


def test_a_better_model_is_deployed_and_gains_on_other_queries(better):
    decision, test = better
    for direction in ("T2I", "I2T"):
        assert decision.deployed(direction)
        assert decision.gain_tests[direction].met
        assert mean_gain(decision, test, direction) > 0.03


def test_what_it_promises_is_what_it_keeps(better):
    """The honest estimate of the gain lies near what other queries show (both have errors of ~2 points)."""
    decision, test = better
    for direction in ("T2I", "I2T"):
        promised = decision.gain_tests[direction].pooled.estimate
        # The two galleries differ in size, and gains with it.
        assert abs(promised - mean_gain(decision, test, direction)) < 0.07


def test_a_worse_model_stays_out():
    made, support, test = world("worse")
    decision = choose_projection(made.corpus_new, made.corpus_old, pairs=support, candidates=QUICK)
    for direction in ("T2I", "I2T"):
        assert not decision.deployed(direction)
        _, old = test.queries(direction)
        torch.testing.assert_close(decision.queries(None, old, direction), old)
        assert "the old query alone" in str(decision)


def test_directions_are_decided_apart():
    """Texts gain and images lose: the new model may answer texts alone."""
    made, support, _ = world("better texts alone", n_support=300)
    decision = choose_projection(
        made.corpus_new, made.corpus_old, pairs=support, candidates=QUICK[:1], use_old=False
    )
    assert not decision.deployed("I2T")
    made, support, _ = world("much better")
    blind = torch.randn(len(support), 64, generator=torch.Generator().manual_seed(0))
    decision = choose_projection(
        made.corpus_new, made.corpus_old, pairs=replace(support, new_images=blind), candidates=QUICK[:1]
    )
    assert decision.deployed("T2I")
    assert not decision.deployed("I2T")


def test_without_the_old_tower_the_tuned_projection_is_one_matrix():
    made, support, _ = world("much better", n_support=600)
    decision = choose_projection(
        made.corpus_new, made.corpus_old, pairs=support, candidates=QUICK[2:], use_old=False
    )
    assert decision.projection.foldable
    assert any(decision.deployed(direction) for direction in ("T2I", "I2T"))
    for direction in ("T2I", "I2T"):
        if decision.deployed(direction):
            assert not decision.ensemble.needs_old(direction)


def test_pairs_without_new_images_judge_text_queries_alone():
    made, support, _ = world("much better")
    texts = replace(support, new_images=None)
    decision = choose_projection(made.corpus_new, made.corpus_old, pairs=texts)
    assert decision.deployed("T2I")
    assert not decision.deployed("I2T")
    assert "no I2T queries" in decision.gain_tests["I2T"].why
    assert decision.gain_tests["I2T"].pooled is None


def test_the_texts_of_the_pairs_may_be_all_there_is():
    """They are fitted to fold by fold: a map judged on its own texts would look far too good."""
    _, support, test = world("much better", n_support=300)
    few, alone = support.subset(range(40)), [Candidate("procrustes")]
    leaking = fit_projection(few.new_texts, few.old_texts)(few.new_texts)
    gallery, positives = few.gallery("T2I"), few.positives("T2I")
    flattering = float((best_positive_ranks(leaking, gallery, positives) < 1).double().mean())
    honest = choose_projection(None, None, pairs=few, candidates=alone, use_old=False)
    (shown,) = (s for s in honest.candidates if s.name == "procrustes" and s.direction == "T2I")
    assert flattering > shown.recall[1].estimate + 0.1
    decision = choose_projection(None, None, pairs=support, candidates=QUICK)
    assert decision.deployed("I2T")
    assert mean_gain(decision, test, "I2T") > 0.03
    made, _, _ = world("much better", n_corpus=300)
    both = Fitter(made.corpus_new, made.corpus_old, pair_texts=True).fit(alone[0], support)
    joined = fit_projection(
        torch.cat([made.corpus_new, support.new_texts]), torch.cat([made.corpus_old, support.old_texts])
    )
    torch.testing.assert_close(both.weight, joined.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_old", [True, False])
def test_text_groups_are_no_evidence_about_images(use_old):
    """Texts gain and images lose: what texts alone promise must not be deployed."""
    _, support, test = world("better texts alone", n_corpus=10, n_support=500)
    new, old = support.new_texts, support.old_texts
    for accepted in (False, True):
        decision = choose_projection(
            new,
            old,
            text_groups=support.image_of_text,
            candidates=TEXTS,
            use_old=use_old,
            accept_unverified=accepted,
        )
        assert decision.evidence == "text groups"
        assert decision.n_images == 100, "a fifth of the 500 groups is held out"
        assert "images were not seen" in str(decision)
        for direction in ("T2I", "I2T"):
            gain_test = decision.gain_tests[direction]
            assert not gain_test.met
            assert gain_test.pooled is None
            assert "no evidence" in gain_test.why
            assert decision.deployed(direction) is accepted
            if not accepted:
                assert mean_gain(decision, test, direction) == 0
        if accepted:
            expected = Nlerp(0.5) if use_old else Nlerp(1.0)
            assert set(decision.ensemble.directions.values()) == {expected}
    shown = {score.name: score for score in decision.candidates if score.direction == "T2I"}
    assert shown[decision.name].chosen
    assert shown[decision.name].combination == expected
    low, estimate = shown["procrustes"].recall[1].low, shown["procrustes"].recall[1].estimate
    assert 0 < low < estimate


def test_without_evidence_the_old_query_stays_unless_that_is_accepted():
    made, _, _ = world("much better", n_corpus=600)
    for accepted in (False, True):
        decision = choose_projection(
            made.corpus_new, made.corpus_old, candidates=TEXTS, accept_unverified=accepted
        )
        assert decision.evidence == "own captions"
        assert decision.deployed("T2I") is accepted
        assert decision.deployed("I2T") is accepted
        assert "no evidence" in decision.gain_tests["T2I"].why
        assert decision.name == "procrustes", "ridge finds texts no better by more than the error"


def twice(pairs, size=0.05):
    """Every photo twice, slightly changed, with the captions shared out between the two."""
    n, own = len(pairs), pairs.image_of_text
    late = torch.arange(len(own)) % 5 >= 2

    def copies(rows):
        jittered = rows + size * torch.randn(rows.shape) / rows.shape[1] ** 0.5
        return torch.cat([rows, torch.nn.functional.normalize(jittered, dim=1)])

    images = copies(pairs.old_images), copies(pairs.new_images)
    return PairVectors(pairs.new_texts, pairs.old_texts, images[0], own + n * late, images[1])


def test_copies_of_photos_do_not_speak_for_each_other():
    """With the copies in other folds this was deployed: +4.8 points, where there are none to be gained."""
    made, support, _ = world("much better", n_corpus=1000, seed=6, n_support=150)
    torch.manual_seed(6)
    pairs = twice(support)
    decision = choose_projection(
        made.corpus_new, made.corpus_old, pairs=pairs, candidates=QUICK[1:], use_old=False
    )
    assert not decision.deployed("T2I")
    assert decision.gain_tests["T2I"].pooled.estimate < 0.02
    assert decision.n_joined == 300
    assert "300 of these images are near-duplicates of others or share a text" in str(decision)


def test_images_that_are_all_the_same_are_refused():
    made, support, _ = world("much better", n_corpus=300)
    rows = torch.arange(200) % 3
    same = replace(support, old_images=support.old_images[rows], new_images=support.new_images[rows])
    with (
        pytest.warns(UserWarning, match="only exact copies are kept together"),
        pytest.raises(DataError, match="of the 200 images of the pairs only 3 are different"),
    ):
        choose_projection(made.corpus_new, made.corpus_old, pairs=same, candidates=QUICK[:1])


@pytest.mark.parametrize("kind", ["memory", "store", "stream"])
def test_texts_of_the_pairs_are_left_out_of_the_corpus(kind, tmp_path):
    """A map would be judged on what it was fitted to."""
    made, support, _ = world("much better", n_corpus=300)
    few = support.subset(range(60))
    sides = {
        "new": torch.cat([made.corpus_new[:100], few.new_texts, made.corpus_new[100:]]),
        "old": torch.cat([made.corpus_old[:100], few.old_texts, made.corpus_old[100:]]),
    }

    def source(side):
        if kind == "memory":
            return sides[side].half()
        if kind == "stream":
            return iter(sides[side].split(70))
        rows = sides[side]
        store = EmbeddingStore.create(
            tmp_path / side, modality="text", space=EmbeddingSpace(side, rows.shape[1])
        )
        store.append(rows.numpy(), [str(row) for row in range(len(rows))])
        return store

    candidates = [*TEXTS, Candidate("mlp", {"steps": 2})] if kind != "stream" else TEXTS
    found = choose_projection(source("new"), source("old"), pairs=few, candidates=candidates, use_old=False)
    assert found.n_left_out == 300
    assert "300 texts of the corpus are among these" in str(found)
    expected = choose_projection(
        made.corpus_new, made.corpus_old, pairs=few, candidates=candidates, use_old=False
    )
    assert expected.n_left_out == 0
    for ours, theirs in zip(found.candidates, expected.candidates, strict=True):
        for k in (1, 5, 10):
            assert ours.recall[k].estimate == pytest.approx(theirs.recall[k].estimate, abs=0.02)
    with pytest.raises(DataError, match="all 300 texts of the corpus are texts that the fits are judged on"):
        choose_projection(few.new_texts, few.old_texts, pairs=few, candidates=TEXTS)


def test_every_k_may_be_asked_for():
    made, support, _ = world("little better", n_corpus=1000, n_support=60, seed=1)
    options = {"pairs": support, "candidates": QUICK[:1], "steps": False}
    plain = choose_projection(made.corpus_new, made.corpus_old, **options)
    asked = choose_projection(made.corpus_new, made.corpus_old, every_k=True, **options)
    for direction, gain_test in asked.gain_tests.items():
        lows = [each.gain.low for each in gain_test.differences.values()]
        assert gain_test.met == (min(lows) > 0 and plain.gain_tests[direction].met)
    assert plain.deployed("T2I")
    assert not asked.deployed("I2T")


def test_the_decision_can_be_printed_saved_and_loaded(better, tmp_path):
    decision, test = better
    shown = str(decision)
    for word in (
        "chose procrustes",
        "of 3 candidates",
        "T2I",
        "I2T",
        "old query",
        "R@1",
        "* procrustes",
        "95 % confidence",
    ):
        assert word in shown
    decision.save(tmp_path)
    record = json.loads((tmp_path / "decision.json").read_text())
    assert record["chosen"] == decision.name
    assert record["directions"]["T2I"]["deployed"] is True
    assert len(record["candidates"]) == 2 * (1 + len(QUICK))
    projection = Projection.from_pretrained(tmp_path / "projection")
    ensemble = QueryEnsemble.from_pretrained(tmp_path / "ensemble")
    again = replace(decision, projection=projection, ensemble=ensemble)
    new, old = test.queries("T2I")
    torch.testing.assert_close(again.queries(new, old, "T2I"), decision.queries(new, old, "T2I"))


def test_scores_are_those_of_what_would_be_deployed(better):
    """Every query written out in numpy: mixed by its rule, or the old one alone."""
    decision, test = better
    generator = torch.Generator().manual_seed(0)
    matrices = {name: 0.1 * torch.randn(48, 48, generator=generator) for name in ("old_matrix", "new_matrix")}
    mixtures = {
        "linear": QueryEnsemble(48, dict.fromkeys(BOTH, Linear(0.4)), dict.fromkeys(BOTH, matrices)),
        "nlerp": QueryEnsemble(48, {"T2I": Nlerp(0.3), "I2T": Nlerp(0.0)}),
        "slerp": QueryEnsemble(48, {"T2I": Slerp(0.4), "I2T": Slerp(1.0)}),
    }

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    weight = decision.projection.weight.detach().double().numpy()
    for direction in ("T2I", "I2T"):
        new, old = test.queries(direction)
        gallery = 3 * test.gallery(direction)  # lengths do not count
        u, v = unit(old.double().numpy()), unit(new.double().numpy() @ weight.T)
        angle = np.arccos((u * v).sum(axis=1, keepdims=True))
        linear = u @ matrices["old_matrix"].double().numpy().T + v @ matrices["new_matrix"].double().numpy().T
        expected = {
            "linear": unit(0.6 * u + 0.4 * v + linear),
            "nlerp": unit(0.7 * u + 0.3 * v) if direction == "T2I" else u,
            "slerp": unit(np.sin(0.6 * angle) * u + np.sin(0.4 * angle) * v) if direction == "T2I" else v,
        }
        for name, queries in expected.items():
            deployed = replace(decision, ensemble=mixtures[name], steps=None)
            scores = deployed.scores(direction, new.numpy(), old, gallery.double())
            assert scores.shape == (len(new), len(gallery))
            wanted = queries @ unit(gallery.double().numpy()).T
            np.testing.assert_allclose(scores.numpy(), wanted, atol=2e-6, rtol=0)
    kept = replace(decision, ensemble=mixtures["nlerp"], steps=None)
    assert not kept.deployed("I2T")
    new, old = test.queries("I2T")
    without = kept.scores("I2T", None, old, test.old_texts)
    assert torch.equal(without, kept.scores("I2T", new, old, test.old_texts))
    for arguments, error, message in (
        (("T2T", None, old, test.old_texts), DataError, "no direction 'T2T'"),
        (("I2T", None, old, test.new_texts), SpaceMismatchError, "gallery vectors has dimension 64, but 48"),
        (("T2I", None, old, test.old_texts), DataError, "need the projected new query vectors"),
        (("I2T", new, None, test.old_texts), DataError, "need the old query vectors"),
        (("T2I", new, old[:-1], test.old_images), DataError, "give both for each query"),
        (("I2T", None, new, test.old_texts), SpaceMismatchError, "old queries has dimension 64, but 48"),
    ):
        with pytest.raises(error, match=message):
            kept.scores(*arguments)


def test_the_same_seed_decides_the_same(better):
    decision, _ = better
    made, support, _ = world("much better")
    again = choose_projection(made.corpus_new, made.corpus_old, pairs=support, candidates=QUICK)
    assert again.to_dict() == decision.to_dict()
    assert torch.equal(again.projection.weight, decision.projection.weight)


def test_streams_are_read_once_and_serve_closed_forms():
    made, support, _ = world("much better", n_corpus=1000)
    reads = []

    def chunks(rows):
        reads.append(1)
        yield from rows.split(300)

    decision = choose_projection(
        chunks(made.corpus_new), chunks(made.corpus_old), pairs=support, candidates=QUICK
    )
    direct = choose_projection(made.corpus_new, made.corpus_old, pairs=support, candidates=QUICK)
    assert len(reads) == 2
    torch.testing.assert_close(decision.projection.weight, direct.projection.weight)


def test_spaces_are_attached_and_checked():
    made, support, _ = world("much better", n_corpus=500)
    spaces = {
        "new_space": EmbeddingSpace("new", 64),
        "old_space": EmbeddingSpace("old", 48),
    }
    decision = choose_projection(
        made.corpus_new, made.corpus_old, pairs=support, candidates=QUICK[:1], **spaces
    )
    assert decision.projection.old_space == spaces["old_space"]
    assert decision.projection.method == "procrustes", "which a card tells, with its paper"
    assert decision.ensemble.old_space == spaces["old_space"]
    with pytest.raises(SpaceMismatchError):
        choose_projection(
            made.corpus_new,
            made.corpus_old,
            pairs=support,
            candidates=QUICK[:1],
            new_space=EmbeddingSpace("new", 65),
        )


def test_a_space_that_is_not_the_stores_is_refused(tmp_path):
    made, support, _ = world("much better", n_corpus=100)
    store = EmbeddingStore.create(tmp_path / "new", modality="text", space=EmbeddingSpace("a", 64))
    store.append(made.corpus_new.numpy(), [str(row) for row in range(100)])
    options = {"pairs": support, "candidates": QUICK[:1]}
    decision = choose_projection(store, made.corpus_old, **options)
    assert decision.projection.new_space == store.space
    with pytest.raises(SpaceMismatchError, match=r"'a' \(64-d\), but 'other' \(64-d\) is needed"):
        choose_projection(store, made.corpus_old, new_space=EmbeddingSpace("other", 64), **options)


def test_what_it_cannot_do_is_refused():
    made, support, _ = world("much better", n_corpus=300)
    new, old = made.corpus_new, made.corpus_old

    def refused(message, kind=ConfigError, **options):
        with pytest.raises(kind, match=message):
            choose_projection(new, old, **{"pairs": support, "candidates": QUICK[:1], **options})

    refused("no candidates", candidates=[])
    refused("'procrustes' comes twice", candidates=[Candidate("procrustes")] * 2)
    refused("learns from pairs", candidates=QUICK, pairs=None)
    refused("needs the pairs' new_images", candidates=QUICK, pairs=replace(support, new_images=None))
    refused("both given", text_groups=torch.zeros(300))
    refused("confidence is 0.5", confidence=0.5)
    refused("no option 'colour'; it has thorough, use_old", colour=1)
    refused("folds is 1", folds=1)
    refused("folds is 201, more than the 200 images", folds=201)
    refused("fewer than 20", DataError, pairs=support.subset(range(19)))
    refused("no two rows", DataError, pairs=None, text_groups=np.arange(300))
    refused("one per row", DataError, pairs=None, text_groups=np.arange(3))
    refused("must be an integer", DataError, ks=(1.5,))
    with pytest.raises(ConfigError, match="belong together"):
        choose_projection(new, None, pairs=support)
    with pytest.raises(ConfigError, match="nothing to fit to"):
        choose_projection(None, None)
    refused("no option 'colour'", candidates=[Candidate("procrustes", {"colour": 1})])
    refused("'magic' is not known", candidates=[Candidate("magic")])


@pytest.mark.parametrize("method", sorted(CLOSED_FORMS))
def test_every_closed_form_can_be_a_candidate(method):
    """Fitted from the corpus's statistics it is what it is when it is fitted to the vectors."""
    made, support, _ = world("no better", n_corpus=400)
    fitted = Fitter(made.corpus_new, made.corpus_old).fit(Candidate(method), support)
    direct = fit_projection(made.corpus_new, made.corpus_old, method)
    torch.testing.assert_close(fitted(support.new_texts), direct(support.new_texts))


def test_default_candidates_fit_what_there_is():
    made, support, _ = world("no better", n_corpus=200)
    assert not any(each.uses_pairs for each in default_candidates(None))
    texts = default_candidates(replace(support, new_images=None))
    assert any(each.uses_pairs for each in texts)
    assert not any(each.needs_image_vectors for each in texts)
    full = default_candidates(support, thorough=True)
    assert len({str(each) for each in full}) == len(full)
    fitter = Fitter(made.corpus_new, made.corpus_old)
    for candidate in default_candidates(support):
        assert fitter.fit(candidate, support)(support.new_texts).shape == (len(support.new_texts), 48)
