"""The trial behind ``method="auto"``: every candidate fitted without the queries it is ranked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from xbt.evaluation import Interval, best_positive_ranks, bootstrap_interval
from xbt.evaluation.cells import DIRECTIONS
from xbt.projections.base import LinearProjection, Projection
from xbt.projections.candidates import NEW_ALONE, OLD_ALONE, Candidate, Fitter, settings_of
from xbt.projections.combinations import Combination, Linear, Nlerp
from xbt.projections.decision import CandidateScore
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.ensemble_fit import gallery_reference, projected_queries, rank_combinations
from xbt.projections.pair_tuning import folded, tune_matrices
from xbt.projections.pairs import PairVectors
from xbt.projections.selection import (
    Choice,
    Contender,
    Judgement,
    choose,
    fold_of_groups,
    honest_ranks,
    judge,
)


class Trial:
    """One choice under way: fits every candidate and ranks its queries."""

    def __init__(
        self,
        fitter: Fitter,
        pairs: PairVectors,
        learns: bool,
        use_old: bool,
        ks: tuple[int, ...],
        folds: int,
        seed: int,
    ) -> None:
        self.fitter, self.pairs, self.learns, self.use_old = fitter, pairs, learns, use_old
        self.ks, self.folds, self.seed = ks, folds, seed
        self.groups = {direction: pairs.groups(direction) for direction in pairs.directions}
        self.old_ranks = {
            direction: best_positive_ranks(
                pairs.queries(direction)[1], pairs.gallery(direction), pairs.positives(direction)
            )
            for direction in pairs.directions
        }
        self.references = {
            direction: gallery_reference(pairs.gallery(direction), seed) for direction in pairs.directions
        }
        self.settings: dict[str, dict[str, Combination]] = {}
        fold_of = fold_of_groups(len(pairs), folds, seed)
        # Made once: the fitter knows a fold's statistics by its pairs.
        self.seen = [pairs.subset(torch.from_numpy(np.flatnonzero(fold_of != fold))) for fold in range(folds)]

    def contender(self, candidate: Candidate) -> Contender:
        """Ranks of every query with every setting, by fits that had not seen the query."""
        settings = settings_of(candidate, self.use_old)
        self.settings[str(candidate)] = {str(each): each for each in settings}
        fold_of = torch.from_numpy(fold_of_groups(len(self.pairs), self.folds, self.seed))
        ranks = {
            direction: {str(each): torch.zeros(len(owner), dtype=torch.int64) for each in settings}
            for direction, owner in self.groups.items()
        }
        learns = self.fitter.looks_at_pairs(candidate)
        for fold in range(self.folds if learns else 1):
            held = fold_of == fold if learns else torch.ones_like(fold_of, dtype=torch.bool)
            seen = self.seen[fold] if learns else None
            projection = self.fitter.fit(candidate, seen)
            matrices = self.matrices(candidate, projection, seen)
            for direction, owner in self.groups.items():
                rows = held[owner]
                found = rank_combinations(
                    self.pairs,
                    direction,
                    projected_queries(projection, self.pairs, direction),
                    settings,
                    self.references[direction],
                    matrices,
                    rows,
                )
                for setting, one in zip(settings, found, strict=True):
                    ranks[direction][str(setting)][rows] = one
        return Contender(str(candidate), ranks)

    def matrices(
        self, candidate: Candidate, projection: Projection, pairs: PairVectors | None
    ) -> dict[str, Tensor]:
        """What pairs teach the candidate on top of its projection."""
        if candidate.tune_penalty is None or pairs is None:
            return {}
        return tune_matrices(projection, pairs, use_old=self.use_old, penalty=candidate.tune_penalty)

    def judgements(self, contenders: Sequence[Contender], confidence: float) -> dict[str, Judgement]:
        """Per direction whether the procedure beats the old query; a direction without queries does not."""
        honest = honest_ranks(contenders, self.old_ranks, self.ks, self.groups, self.folds, self.seed)
        found = {
            direction: judge(
                direction,
                honest[direction],
                self.old_ranks[direction],
                self.ks,
                self.groups[direction],
                confidence,
                self.seed,
            )
            for direction in self.pairs.directions
        }
        for direction in DIRECTIONS:
            if direction not in found:
                found[direction] = Judgement.unknown(direction, f"the pairs have no {direction} queries")
        return found

    def deploy(
        self,
        candidate: Candidate,
        choice: Choice,
        judgements: Mapping[str, Judgement],
        accept_unverified: bool,
    ) -> tuple[Projection, QueryEnsemble]:
        """The chosen candidate fitted to everything, and the ensemble that uses it where it may be used."""
        pairs = self.pairs if self.learns else None
        projection = self.fitter.fit(candidate, pairs)
        matrices = self.matrices(candidate, projection, pairs)
        combinations: dict[str, Combination] = dict.fromkeys(DIRECTIONS, OLD_ALONE)
        for direction, judgement in judgements.items():
            if judgement.met:
                combinations[direction] = self.settings[choice.contender][choice.settings[direction]]
            elif accept_unverified and judgement.pooled is None:
                combinations[direction] = Nlerp(0.5) if self.use_old else NEW_ALONE
        if not self.use_old and matrices and isinstance(projection, LinearProjection) and projection.foldable:
            projection = folded(projection, matrices["new_matrix"])
            combinations = {
                direction: NEW_ALONE if isinstance(each, Linear) else each
                for direction, each in combinations.items()
            }
        tensors = {
            direction: {
                name: matrices[name] if name in matrices else self.references[direction]
                for name in combination.tensors(projection.old_dim)
            }
            for direction, combination in combinations.items()
        }
        return projection, QueryEnsemble(projection.old_dim, combinations, tensors)

    def scores(self, contenders: Sequence[Contender], choice: Choice) -> list[CandidateScore]:
        """The old query and every candidate at its best, with intervals."""
        found = []
        for direction, owner in self.groups.items():
            old = self._recall(self.old_ranks[direction], owner)
            found.append(CandidateScore("old query", direction, None, old))
            for each in contenders:
                best = choose([each], self.old_ranks, self.ks, self.groups).settings[direction]
                found.append(
                    CandidateScore(
                        each.name,
                        direction,
                        self.settings[each.name][best],
                        self._recall(each.ranks[direction][best], owner),
                        each.name == choice.contender,
                    )
                )
        return found

    def _recall(self, ranks: Tensor, owner: Tensor) -> dict[int, Interval]:
        return {k: bootstrap_interval((ranks < k).double(), owner, samples=1000) for k in self.ks}
