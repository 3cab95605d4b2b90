"""Cross-validation of the candidates: each is fitted without the queries that it is ranked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.evaluation import best_positive_ranks, hits_at
from xbt.evaluation.bootstrap import bootstrap_intervals
from xbt.evaluation.cells import DIRECTIONS
from xbt.projections.auto.candidates import NEW_ALONE, OLD_ALONE, Candidate, Fitter, settings_of
from xbt.projections.auto.decision import CandidateScore
from xbt.projections.auto.selection import (
    CandidateRanks,
    GainTest,
    Selection,
    SelectionOptions,
    choices_by_fold,
    choose,
    out_of_fold_ranks,
    run_gain_test,
)
from xbt.projections.auto.steps import BEST, OLD
from xbt.projections.base import LinearProjection, Modality, Projection
from xbt.projections.combinations import Combination, Linear, Nlerp
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.ensemble_fit import projected_queries, rank_combinations
from xbt.projections.near_duplicates import fold_of_clusters
from xbt.projections.pair_tuning import folded
from xbt.projections.pairs import PairVectors
from xbt.vectors import unit_rows


class Deployed(NamedTuple):
    """The chosen candidate, fitted to everything.

    Attributes:
        projection: Its map.
        matrices: What pairs taught it on top of that.
        is_folded: Whether the matrices are part of the map, so that nothing has to be added.
    """

    projection: Projection
    matrices: dict[str, Tensor]
    is_folded: bool

    def rule(self, combination: Combination) -> Combination:
        """A combination as it is deployed."""
        return NEW_ALONE if self.is_folded and isinstance(combination, Linear) else combination

    def ensemble(self, combinations: Mapping[str, Combination]) -> QueryEnsemble:
        """The query ensemble of some directions."""
        rules = {direction: self.rule(each) for direction, each in combinations.items()}
        tensors = {
            direction: {name: self.matrices[name] for name in rule.tensors(self.projection.old_dim)}
            for direction, rule in rules.items()
        }
        return QueryEnsemble(self.projection.old_dim, rules, tensors, self.projection.old_space)


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
        self.clusters, self._candidates = clusters, dict[str, Candidate]()
        self.fold_of = fold_of_clusters(clusters, options.folds, options.seed)
        # Made once: the fitter knows a fold's statistics by its pairs.
        self.seen = [
            pairs.subset(torch.from_numpy(np.flatnonzero(self.fold_of != fold)))
            for fold in range(options.folds)
        ]

    def rank(self, candidate: Candidate) -> CandidateRanks:
        """Rank every query with every setting, by fits that have not seen the query."""
        settings = settings_of(candidate, self.options.use_old)
        self.settings[str(candidate)] = {str(each): each for each in settings}
        self._candidates[str(candidate)] = candidate
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
            matrices = self.fitter.tune(candidate, seen, self.options.use_old)
            for direction, owner in self.groups.items():
                # A cluster is named after one of its images, and lies in one fold.
                rows = held_out[owner]
                new = projected_queries(projection, self.pairs, direction)
                by_setting = rank_combinations(
                    self.pairs, direction, new, settings, matrices=matrices, rows=rows
                )
                for setting, of_setting in zip(settings, by_setting, strict=True):
                    ranks[direction][str(setting)][rows] = of_setting
        return CandidateRanks(str(candidate), ranks)

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

    def fold_choices(self, ranked: Sequence[CandidateRanks]) -> list[Selection]:
        """Per fold what is chosen by the ranks of the other folds' queries."""
        return [
            choice
            for choice, _ in choices_by_fold(ranked, self.old_ranks, self.ks, self.groups, self.fold_of)
        ]

    def combination(self, selection: Selection, query: str, direction: str) -> Combination:
        """The combination that a query of :mod:`~xbt.projections.auto.steps` names."""
        if query == OLD:
            return OLD_ALONE
        if query == BEST:
            return self.settings[selection.candidate][selection.settings[direction]]
        return Nlerp(float(query))

    def mixed(
        self, selection: Selection, fold: int, query: str, direction: str, new: Tensor, old: Tensor
    ) -> Tensor:
        """(n, old_dim) unit queries of a selection whose fit has not seen a fold."""
        combination = self.combination(selection, query, direction)
        candidate = self._candidates[selection.candidate]
        seen = self.seen[fold] if self.fitter.looks_at_pairs(candidate) else None
        projection = self.fitter.fit(candidate, seen)
        matrices = self.fitter.tune(candidate, seen, self.options.use_old)
        modality: Modality = "text" if direction == "T2I" else "image"
        with torch.no_grad():
            return unit_rows(combination.combine(old, projection.project(new, modality).float(), matrices))

    def deploy(
        self, candidate: Candidate, selection: Selection, gain_tests: Mapping[str, GainTest]
    ) -> tuple[Deployed, QueryEnsemble]:
        """Fit the selected candidate to everything; its ensemble uses it where a gain is shown."""
        pairs = self.pairs if self.learns else None
        projection = self.fitter.fit(candidate, pairs)
        matrices = self.fitter.tune(candidate, pairs, self.options.use_old)
        folds = not self.options.use_old and isinstance(projection, LinearProjection) and projection.foldable
        is_folded = bool(matrices) and folds
        if is_folded:
            assert isinstance(projection, LinearProjection)
            projection = folded(projection, matrices["new_matrix"])
        deployed = Deployed(projection, matrices, is_folded)
        combinations: dict[str, Combination] = dict.fromkeys(DIRECTIONS, OLD_ALONE)
        for direction, test in gain_tests.items():
            if test.met:
                setting = self.settings[selection.candidate][selection.settings[direction]]
                combinations[direction] = deployed.rule(setting)
            elif self.options.accept_unverified and test.pooled is None:
                combinations[direction] = Nlerp(0.5) if self.options.use_old else NEW_ALONE
        return deployed, deployed.ensemble(combinations)

    def scores(
        self, ranked: Sequence[CandidateRanks], selection: Selection, setting: str | None = None
    ) -> list[CandidateScore]:
        """Recall of the old query and of every candidate: each at its best, or all with one setting."""
        scores = []
        for direction, owner in self.groups.items():
            shown = {each.name: setting or self.select([each]).settings[direction] for each in ranked}
            ranks = [self.old_ranks[direction]]
            ranks += [each.ranks[direction][shown[each.name]] for each in ranked]
            hits = torch.cat([hits_at(each, self.ks) for each in ranks], dim=1).double()
            intervals = iter(bootstrap_intervals(hits, owner, samples=1000))
            for name in ("old query", *shown):
                combination = self.settings[name][shown[name]] if name in shown else None
                recall = {k: next(intervals) for k in self.ks}
                chosen = name == selection.candidate
                scores.append(CandidateScore(name, direction, combination, recall, chosen))
        return scores
