"""The trial behind ``method="auto"``: every candidate fitted without the queries it is ranked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from xbt.evaluation import Interval, best_positive_ranks, bootstrap_interval
from xbt.evaluation.cells import DIRECTIONS
from xbt.projections.base import LinearProjection, Projection
from xbt.projections.candidates import NEW_ALONE, OLD_ALONE, Candidate, Fitter, settings_of
from xbt.projections.combinations import Adaptive, Combination, Linear, Nlerp
from xbt.projections.decision import CandidateScore
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.ensemble_fit import (
    confidence_by_folds,
    gallery_reference,
    projected_queries,
    rank_combinations,
)
from xbt.projections.pair_tuning import folded, tune_matrices
from xbt.projections.pairs import PairVectors
from xbt.projections.selection import (
    Choice,
    Contender,
    Judgement,
    choose,
    fold_of_clusters,
    honest_ranks,
    judge,
)


class Trial:
    """One choice under way: fits every candidate and ranks its queries.

    Args:
        fitter: Fits the candidates.
        pairs: What they are judged on.
        clusters: (n_images,) the first image of every image's cluster.
        learns: Whether candidates may learn from the pairs.
        use_old: Whether the old query takes part.
        ks: Cut-offs.
        folds: Folds of fitting and of judging.
        seed: Fixes folds and bootstrap.
    """

    def __init__(
        self,
        fitter: Fitter,
        pairs: PairVectors,
        clusters: NDArray[np.int64],
        learns: bool,
        use_old: bool,
        ks: tuple[int, ...],
        folds: int,
        seed: int,
    ) -> None:
        self.fitter, self.pairs, self.learns, self.use_old = fitter, pairs, learns, use_old
        self.ks, self.folds, self.seed = ks, folds, seed
        cluster_of = torch.from_numpy(clusters)
        self.groups = {direction: cluster_of[pairs.groups(direction)] for direction in pairs.directions}
        self.old_ranks = {
            direction: best_positive_ranks(
                pairs.queries(direction)[1], pairs.gallery(direction), pairs.positives(direction)
            )
            for direction in pairs.directions
        }
        self.settings: dict[str, dict[str, Combination]] = {}
        self.fold_of = fold_of_clusters(clusters, folds, seed)
        self._old_confidence: dict[str, Tensor] = {}
        # Made once: the fitter knows a fold's statistics by its pairs.
        self.seen = [
            pairs.subset(torch.from_numpy(np.flatnonzero(self.fold_of != fold))) for fold in range(folds)
        ]

    def contender(self, candidate: Candidate) -> Contender:
        """Ranks of every query with every setting, by fits that had not seen the query."""
        settings = settings_of(candidate, self.use_old)
        self.settings[str(candidate)] = {str(each): each for each in settings}
        fold_of = torch.from_numpy(self.fold_of)
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
                # A cluster is named after one of its images, and lies in one fold.
                rows = held[owner]
                new = projected_queries(projection, self.pairs, direction)
                surer = self._surer(direction, new, settings, rows)
                found = rank_combinations(self.pairs, direction, new, settings, surer, matrices, rows)
                for setting, one in zip(settings, found, strict=True):
                    ranks[direction][str(setting)][rows] = one
        return Contender(str(candidate), ranks)

    def _surer(
        self, direction: str, new: Tensor, settings: Sequence[Combination], rows: Tensor
    ) -> Tensor | None:
        """How much surer each of some new queries is than the old one, where a setting asks for it."""
        if not any(isinstance(each, Adaptive) and each.confidence for each in settings):
            return None

        def told(queries: Tensor, rows: Tensor | None) -> Tensor:
            return confidence_by_folds(self.pairs, direction, queries, self.fold_of, self.seed, rows)

        if direction not in self._old_confidence:
            self._old_confidence[direction] = told(self.pairs.queries(direction)[1], None)
        return told(normalize(new, dim=-1), rows) - self._old_confidence[direction]

    def matrices(
        self, candidate: Candidate, projection: Projection, pairs: PairVectors | None
    ) -> dict[str, Tensor]:
        """What pairs teach the candidate on top of its projection."""
        if candidate.tune_penalty is None or pairs is None:
            return {}
        return tune_matrices(projection, pairs, use_old=self.use_old, penalty=candidate.tune_penalty)

    def judgements(
        self, contenders: Sequence[Contender], confidence: float, every_k: bool
    ) -> dict[str, Judgement]:
        """Per direction whether the procedure beats the old query; a direction without queries does not."""
        honest = honest_ranks(contenders, self.old_ranks, self.ks, self.groups, self.fold_of)
        found = {
            direction: judge(
                direction,
                honest[direction],
                self.old_ranks[direction],
                self.ks,
                self.groups[direction],
                confidence,
                self.seed,
                every_k,
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
                name: matrices[name]
                if name in matrices
                else gallery_reference(self.pairs.gallery(direction), self.seed)
                for name in combination.tensors(projection.old_dim)
            }
            for direction, combination in combinations.items()
        }
        return projection, QueryEnsemble(projection.old_dim, combinations, tensors)

    def scores(
        self, contenders: Sequence[Contender], choice: Choice, setting: str | None = None
    ) -> list[CandidateScore]:
        """The old query and every candidate with intervals: at its best, or with one setting for all."""
        found = []
        for direction, owner in self.groups.items():
            old = self._recall(self.old_ranks[direction], owner)
            found.append(CandidateScore("old query", direction, None, old))
            for each in contenders:
                shown = setting or choose([each], self.old_ranks, self.ks, self.groups).settings[direction]
                found.append(
                    CandidateScore(
                        each.name,
                        direction,
                        self.settings[each.name][shown],
                        self._recall(each.ranks[direction][shown], owner),
                        each.name == choice.contender,
                    )
                )
        return found

    def _recall(self, ranks: Tensor, owner: Tensor) -> dict[int, Interval]:
        return {k: bootstrap_interval((ranks < k).double(), owner, samples=1000) for k in self.ks}
