"""Cross-validation of the candidates: each is fitted without the queries that it is ranked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from xbt.evaluation import Interval, best_positive_ranks, bootstrap_interval
from xbt.evaluation.cells import DIRECTIONS
from xbt.projections.auto.candidates import NEW_ALONE, OLD_ALONE, Candidate, Fitter, settings_of
from xbt.projections.auto.decision import CandidateScore
from xbt.projections.auto.selection import (
    CandidateRanks,
    GainTest,
    Selection,
    SelectionOptions,
    choose,
    out_of_fold_ranks,
    run_gain_test,
)
from xbt.projections.base import LinearProjection, Projection
from xbt.projections.combinations import Adaptive, Combination, Linear, Nlerp
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.ensemble_fit import (
    confidence_by_folds,
    gallery_reference,
    projected_queries,
    rank_combinations,
)
from xbt.projections.near_duplicates import fold_of_clusters
from xbt.projections.pair_tuning import folded, tune_matrices
from xbt.projections.pairs import PairVectors


class CrossValidation:
    """Fits every candidate without the queries that it is ranked on, and ranks them.

    Args:
        fitter: Fits the candidates.
        pairs: What they are judged on.
        clusters: (n_images,) the first image of every image's cluster.
        learns: Whether candidates may learn from the pairs.
        options: Folds, cut-offs, and whether the old query takes part.
    """

    def __init__(
        self,
        fitter: Fitter,
        pairs: PairVectors,
        clusters: NDArray[np.int64],
        learns: bool,
        options: SelectionOptions,
    ) -> None:
        self.fitter, self.pairs, self.learns, self.options = fitter, pairs, learns, options
        self.ks, self.seed = options.ks, options.seed
        cluster_of = torch.from_numpy(clusters)
        self.groups = {direction: cluster_of[pairs.groups(direction)] for direction in pairs.directions}
        self.old_ranks = {
            direction: best_positive_ranks(
                pairs.queries(direction)[1], pairs.gallery(direction), pairs.positives(direction)
            )
            for direction in pairs.directions
        }
        self.settings: dict[str, dict[str, Combination]] = {}
        self.fold_of = fold_of_clusters(clusters, options.folds, options.seed)
        self._old_confidence: dict[str, Tensor] = {}
        # Made once: the fitter knows a fold's statistics by its pairs.
        self.seen = [
            pairs.subset(torch.from_numpy(np.flatnonzero(self.fold_of != fold)))
            for fold in range(options.folds)
        ]

    def rank(self, candidate: Candidate) -> CandidateRanks:
        """Rank every query with every setting, by fits that have not seen the query."""
        settings = settings_of(candidate, self.options.use_old)
        self.settings[str(candidate)] = {str(each): each for each in settings}
        fold_of = torch.from_numpy(self.fold_of)
        ranks = {
            direction: {str(each): torch.zeros(len(owner), dtype=torch.int64) for each in settings}
            for direction, owner in self.groups.items()
        }
        learns = self.fitter.looks_at_pairs(candidate)
        for fold in range(self.options.folds if learns else 1):
            held_out = fold_of == fold if learns else torch.ones_like(fold_of, dtype=torch.bool)
            seen = self.seen[fold] if learns else None
            projection = self.fitter.fit(candidate, seen)
            matrices = self.matrices(candidate, projection, seen)
            for direction, owner in self.groups.items():
                # A cluster is named after one of its images, and lies in one fold.
                rows = held_out[owner]
                new = projected_queries(projection, self.pairs, direction)
                gap = self._confidence_gap(direction, new, settings, rows)
                by_setting = rank_combinations(self.pairs, direction, new, settings, gap, matrices, rows)
                for setting, of_setting in zip(settings, by_setting, strict=True):
                    ranks[direction][str(setting)][rows] = of_setting
        return CandidateRanks(str(candidate), ranks)

    def _confidence_gap(
        self, direction: str, new: Tensor, settings: Sequence[Combination], rows: Tensor
    ) -> Tensor | None:
        """Confidence of some new queries less that of the old ones, where a setting asks for it."""
        if not any(isinstance(each, Adaptive) and each.confidence for each in settings):
            return None

        def confidence(queries: Tensor, rows: Tensor | None) -> Tensor:
            return confidence_by_folds(self.pairs, direction, queries, self.fold_of, self.seed, rows)

        if direction not in self._old_confidence:
            self._old_confidence[direction] = confidence(self.pairs.queries(direction)[1], None)
        return confidence(normalize(new, dim=-1), rows) - self._old_confidence[direction]

    def matrices(
        self, candidate: Candidate, projection: Projection, pairs: PairVectors | None
    ) -> dict[str, Tensor]:
        """Matrices that pairs teach the candidate on top of its projection."""
        if candidate.tune_penalty is None or pairs is None:
            return {}
        return tune_matrices(projection, pairs, use_old=self.options.use_old, penalty=candidate.tune_penalty)

    def select(self, ranked: Sequence[CandidateRanks]) -> Selection:
        """Choose the candidate and its settings by all queries."""
        return choose(ranked, self.old_ranks, self.ks, self.groups)

    def gain_tests(self, ranked: Sequence[CandidateRanks]) -> dict[str, GainTest]:
        """Test per direction that the procedure beats the old query; without queries it does not."""
        new_ranks = out_of_fold_ranks(ranked, self.old_ranks, self.ks, self.groups, self.fold_of)
        tests = {
            direction: GainTest.unknown(direction, f"the pairs have no {direction} queries")
            for direction in DIRECTIONS
        }
        for direction in self.pairs.directions:
            tests[direction] = run_gain_test(
                direction,
                new_ranks[direction],
                self.old_ranks[direction],
                self.ks,
                self.groups[direction],
                self.options.confidence,
                self.seed,
                self.options.every_k,
            )
        return tests

    def deploy(
        self, candidate: Candidate, selection: Selection, gain_tests: Mapping[str, GainTest]
    ) -> tuple[Projection, QueryEnsemble]:
        """Fit the selected candidate to everything; its ensemble uses it where a gain is shown."""
        pairs = self.pairs if self.learns else None
        projection = self.fitter.fit(candidate, pairs)
        matrices = self.matrices(candidate, projection, pairs)
        combinations: dict[str, Combination] = dict.fromkeys(DIRECTIONS, OLD_ALONE)
        for direction, test in gain_tests.items():
            if test.met:
                combinations[direction] = self.settings[selection.candidate][selection.settings[direction]]
            elif self.options.accept_unverified and test.pooled is None:
                combinations[direction] = Nlerp(0.5) if self.options.use_old else NEW_ALONE
        foldable = isinstance(projection, LinearProjection) and projection.foldable
        if not self.options.use_old and matrices and foldable:
            assert isinstance(projection, LinearProjection)
            projection = folded(projection, matrices["new_matrix"])
            combinations = {
                direction: NEW_ALONE if isinstance(each, Linear) else each
                for direction, each in combinations.items()
            }
        tensors = {
            direction: {
                name: matrices[name]
                if name in matrices
                else gallery_reference(self.pairs.gallery(direction), self.seed)
                for name in combination.tensors(projection.old_dim)
            }
            for direction, combination in combinations.items()
        }
        return projection, QueryEnsemble(projection.old_dim, combinations, tensors)

    def scores(
        self, ranked: Sequence[CandidateRanks], selection: Selection, setting: str | None = None
    ) -> list[CandidateScore]:
        """Recall of the old query and of every candidate: each at its best, or all with one setting."""
        scores = []
        for direction, owner in self.groups.items():
            old = self._recall(self.old_ranks[direction], owner)
            scores.append(CandidateScore("old query", direction, None, old))
            for candidate in ranked:
                shown = setting or self.select([candidate]).settings[direction]
                scores.append(
                    CandidateScore(
                        candidate.name,
                        direction,
                        self.settings[candidate.name][shown],
                        self._recall(candidate.ranks[direction][shown], owner),
                        candidate.name == selection.candidate,
                    )
                )
        return scores

    def _recall(self, ranks: Tensor, owner: Tensor) -> dict[int, Interval]:
        return {k: bootstrap_interval((ranks < k).double(), owner, samples=1000) for k in self.ks}
