from __future__ import annotations

import numpy as np
import pytest
import torch

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation.retrieval import best_positive_ranks
from xbt.projections import LinearProjection
from xbt.projections.combinations import confidence
from xbt.projections.ensemble import Adaptive, Linear, Nlerp, QueryEnsemble, Slerp
from xbt.projections.ensemble_fit import (
    candidate_grid,
    confidence_by_folds,
    fit_ensemble,
    mean_recall,
    projected_queries,
    rank_combinations,
)
from xbt.projections.pairs import PairVectors
from xbt.space import EmbeddingSpace

ALL = ("nlerp", "slerp", "slerp_padded", "adaptive", "adaptive_confidence")


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=-1)


def world(n=60, captions=3, old_noise=1.0, new_noise=0.5, dims=(20, 12), images=True):
    """Texts and images of both models around shared meanings; the new model is that of the old, rotated."""
    new_dim, old_dim = dims
    rotation = torch.linalg.qr(torch.randn(new_dim, new_dim))[0]
    gallery, owner = unit(torch.randn(n, old_dim)), torch.arange(n).repeat_interleave(captions)

    def seen(rows, noise):
        return unit(rows + noise * torch.randn(rows.shape) / rows.shape[1] ** 0.5)

    def lifted(rows):
        beyond = 0.5 * torch.randn(len(rows), new_dim - old_dim) / (new_dim - old_dim) ** 0.5
        return unit(torch.cat([rows, beyond], dim=1)) @ rotation

    pairs = PairVectors(
        lifted(seen(gallery[owner], new_noise)),
        seen(gallery[owner], old_noise),
        gallery,
        owner,
        lifted(seen(gallery, new_noise)) if images else None,
    )
    projection = LinearProjection.from_weight(rotation[:old_dim])
    projection.set_spaces(None, EmbeddingSpace("old", old_dim))
    return pairs, projection


def test_scores_are_those_of_the_ensembles_themselves():
    pairs, projection = world()
    references = {direction: pairs.gallery(direction) for direction in pairs.directions}
    fit = fit_ensemble(pairs, projection, ALL, references=references)
    seen = set()
    for direction in pairs.directions:
        new, old = projected_queries(projection, pairs, direction), pairs.queries(direction)[1]
        for combination, score in fit.candidates[direction][::3]:
            tensors = {"reference": references[direction]} if combination.tensors(12) else {}
            query = QueryEnsemble(12, {direction: combination}, {direction: tensors})(old, new, direction)
            ranks = best_positive_ranks(query, pairs.gallery(direction), pairs.positives(direction))
            expected = sum(float((ranks < k).float().mean()) for k in (1, 5, 10)) / 3
            # A rank may turn where two scores agree to the last bit.
            assert score == pytest.approx(expected, abs=1.01 / len(ranks)), combination
            seen.add((combination.mode, bool(tensors)))
        best = max(score for _, score in fit.candidates[direction])
        assert fit.best(direction).score == best
        assert fit.ensemble.directions[direction] == fit.best(direction).combination
    assert len(seen) == 4
    assert fit.ensemble.old_space is projection.old_space


@pytest.mark.parametrize(
    ("old_noise", "new_noise", "low", "high"), [(2.4, 1.2, 0.7, 0.9), (1.2, 2.4, 0.1, 0.3)]
)
def test_finds_the_planted_share(old_noise, new_noise, low, high):
    """Of two means with independent errors the best has weights of the inverse variances: 0.8 and 0.2."""
    pairs, projection = world(800, 4, old_noise, new_noise, dims=(32, 32))
    fit = fit_ensemble(pairs, projection)
    assert low <= fit.ensemble.directions["T2I"].beta <= high


def test_finds_that_one_side_is_useless():
    pairs, projection = world(200, 2, old_noise=0.8, new_noise=50.0)
    assert fit_ensemble(pairs, projection, "slerp").ensemble.directions["T2I"].alpha <= 0.2
    pairs, projection = world(200, 2, old_noise=50.0, new_noise=0.8)
    assert fit_ensemble(pairs, projection, "nlerp").ensemble.directions["T2I"].beta >= 0.8


def test_adaptive_sees_which_query_is_sure():
    """Half of the queries are good under the old model alone, half under the new one alone.

    Images come in subjects, so that a good query is visible without its own image, too.
    """
    torch.manual_seed(1)
    pairs, _ = world(300, 2, 0.6, 0.6, dims=(24, 24))
    subjects = unit(torch.randn(60, 24))[torch.arange(300) % 60]
    gallery = unit(subjects + 0.5 * torch.randn(300, 24) / 24**0.5)
    near = gallery[pairs.image_of_text]
    old, new = (unit(near + 0.3 * torch.randn(600, 24) / 24**0.5) for _ in range(2))
    odd = torch.arange(600) % 2 == 1
    old[odd], new[~odd] = unit(torch.randn(300, 24)), unit(torch.randn(300, 24))
    mixed = PairVectors(pairs.new_texts, old, gallery, pairs.image_of_text)
    fit = fit_ensemble(mixed, {"T2I": new}, ("nlerp", "adaptive_confidence"))
    best = fit.best("T2I")
    assert best.combination.confidence > 0
    assert best.score > 0.02 + max(s for c, s in fit.candidates["T2I"] if isinstance(c, Nlerp))
    assert fit.ensemble.tensors("T2I")["reference"].shape == (300, 24), "the whole gallery is deployed"


def test_confidence_leaves_the_answers_out():
    """As in use: with its answer among the reference, a query that finds it would look sure of itself."""
    pairs, projection = world(60, 3)
    fold_of = np.arange(60) % 4
    for direction in pairs.directions:
        new = unit(projected_queries(projection, pairs, direction))
        confidences = confidence_by_folds(pairs, direction, new, fold_of)
        some = torch.arange(len(new)) % 3 == 0
        part = confidence_by_folds(pairs, direction, new, fold_of, rows=some)
        torch.testing.assert_close(part, torch.where(some[:, None], confidences, 0.0))
        for query in range(0, len(new), 7):
            answers = pairs.positives(direction)[query]
            image = answers[0] if direction == "T2I" else query
            of_item = torch.arange(60) if direction == "T2I" else pairs.image_of_text
            others = pairs.gallery(direction)[torch.from_numpy(fold_of)[of_item] != fold_of[image]]
            torch.testing.assert_close(confidences[[query]], confidence(new[[query]], others))
    # What the deployed ensemble would do to the pairs' own gallery is not what the candidates see.
    only = [Adaptive(0, 0, 1.0)]
    honest = fit_ensemble(pairs, projection, candidates=only).best("T2I").score
    own = {direction: pairs.gallery(direction) for direction in pairs.directions}
    assert fit_ensemble(pairs, projection, candidates=only, references=own).best("T2I").score > honest


def test_ties_are_won_by_the_simplest():
    pairs, projection = world(40, 2, old_noise=0.01, new_noise=0.01)
    fit = fit_ensemble(pairs, projection, ("nlerp", "slerp", "adaptive"))
    assert set(fit.ensemble.directions.values()) == {Nlerp(0.5)}
    alone = fit_ensemble(pairs, projection, "adaptive_confidence")
    assert set(alone.ensemble.directions.values()) == {Adaptive(0, 0, 0)}
    assert fit.best("T2I").score == 1


def test_equal_vectors_get_the_worst_rank():
    same = torch.ones(6, 8)
    pairs = PairVectors(same, same, same[:3], torch.arange(6) // 2, same[:3])
    ranks = {}
    fit_ensemble(
        pairs, {"T2I": same, "I2T": same[:3]}, objective=lambda r: ranks.setdefault(len(r), r).sum().item()
    )
    assert ranks[6].tolist() == [2] * 6
    assert ranks[3].tolist() == [4] * 3


def test_counted_in_parts_of_the_queries(monkeypatch):
    pairs, projection = world()
    whole = fit_ensemble(pairs, projection, ALL)
    monkeypatch.setattr("xbt.projections.ensemble_fit._RANK_BYTES", 4 * 60 * 7)
    for direction, found in fit_ensemble(pairs, projection, ALL).candidates.items():
        scores = torch.tensor(
            [[each.score for each in found], [e.score for e in whole.candidates[direction]]]
        )
        torch.testing.assert_close(scores[0], scores[1], atol=1.01 / 60, rtol=0)


def test_linear_combinations_and_some_of_the_queries_are_ranked_too():
    pairs, projection = world()
    matrices = {name: 0.3 * torch.randn(12, 12) for name in ("old_matrix", "new_matrix")}
    some = torch.arange(180) % 3 == 0
    new, old = projected_queries(projection, pairs, "T2I"), pairs.queries("T2I")[1]
    for with_old in (True, False):
        given = matrices if with_old else {"new_matrix": matrices["new_matrix"]}
        combination = Linear(0.3, with_old)
        ensemble = QueryEnsemble(12, {"T2I": combination}, {"T2I": given})
        expected = best_positive_ranks(ensemble(old, new, "T2I"), pairs.old_images, pairs.positives("T2I"))
        (whole,) = rank_combinations(pairs, "T2I", new, [combination], matrices=given)
        (part,) = rank_combinations(pairs, "T2I", new, [combination], matrices=given, rows=some)
        assert int((whole != expected).sum()) <= 1  # two scores may agree to the last bit
        assert torch.equal(part, whole[some])


def test_own_candidates_objective_and_text_pairs_only():
    pairs, projection = world(images=False)
    fit = fit_ensemble(
        pairs, projection, candidates=[Slerp(0.2), Nlerp(0.7)], objective=lambda ranks: -float(ranks.sum())
    )
    assert list(fit.ensemble.directions) == ["T2I"]
    assert [each.combination for each in fit.candidates["T2I"]] == [Slerp(0.2), Nlerp(0.7)]
    assert all(each.score <= 0 for each in fit.candidates["T2I"])


def test_a_large_reference_is_sampled(monkeypatch):
    monkeypatch.setattr("xbt.projections.ensemble_fit.MAX_REFERENCE", 10)
    pairs, projection = world()
    only = [Adaptive(0, 0, 1.0)]
    first, again, other = (
        fit_ensemble(pairs, projection, candidates=only, seed=seed).ensemble.tensors("T2I")["reference"]
        for seed in (0, 0, 1)
    )
    assert first.shape == (10, 12)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_mean_recall():
    assert mean_recall(torch.tensor([0, 4, 9, 10])) == pytest.approx((1 / 4 + 2 / 4 + 3 / 4) / 3)


def test_grid_sizes():
    assert [len(candidate_grid(mode)) for mode in ALL] == [11, 11, 11, 20, 100]
    assert candidate_grid("nlerp")[:3] == [Nlerp(0.5), Nlerp(0.4), Nlerp(0.6)]
    assert candidate_grid("adaptive_confidence")[0] == Adaptive(0, 0, 0)


def test_wrong_inputs():
    pairs, projection = world()
    with pytest.raises(ConfigError, match=r"no ensemble modes \['lerp'\]"):
        fit_ensemble(pairs, projection, "lerp")
    with pytest.raises(ConfigError, match="linear ones come from tune_on_pairs"):
        fit_ensemble(pairs, projection, candidates=[Linear()])
    with pytest.raises(ConfigError, match="none at all"):
        fit_ensemble(pairs, projection, candidates=[])
    with pytest.raises(DataError, match="no projected new queries for I2T"):
        fit_ensemble(pairs, {"T2I": pairs.old_texts})
    with pytest.raises(DataError, match="3 projected queries of T2I for the pairs' 180 queries"):
        fit_ensemble(pairs, {"T2I": pairs.old_texts[:3]})
    with pytest.raises(SpaceMismatchError, match=r"shape \(180, 20\), but the old dimension is 12"):
        fit_ensemble(pairs, {"T2I": pairs.new_texts})
    with pytest.raises(SpaceMismatchError, match="maps 20 → 8 dimensions, but the pairs are of 20 and 12"):
        fit_ensemble(pairs, LinearProjection(20, 8))
    with pytest.raises(SpaceMismatchError, match=r"reference has the shape \(4, 3\)"):
        fit_ensemble(pairs, projection, references={"T2I": torch.ones(4, 3)})
