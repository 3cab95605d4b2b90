"""Choosing how old and new queries are combined, on a small set of labelled pairs.

Every candidate of the modes nlerp, slerp and adaptive ranks a gallery by w₁ ⟨u, g⟩ + w₂ ⟨v, g⟩ with weights
of its own for every query. Both scores are therefore computed once, and a candidate costs one weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation.retrieval import Positives, count_before_best
from xbt.projections.base import Modality, Projection
from xbt.projections.combinations import (
    MAX_REFERENCE,
    Adaptive,
    Combination,
    Linear,
    Nlerp,
    Slerp,
    confidence,
)
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.near_duplicates import clusters_of, fold_of_clusters
from xbt.projections.pairs import PairVectors
from xbt.vectors import unit_rows

Objective = Callable[[Tensor], float]
"""(n_queries,) ranks, from 0 for the best, → what is to be as large as possible."""

_RANK_BYTES = 2 * 2**20
"""Scores of a block of queries: what stays in the processor's cache is added up and compared faster."""
_TENTHS = tuple(tenth / 10 for tenth in range(11))
_BIASES = (-3.0, -1.5, 0.0, 1.5, 3.0)
_SIMILARITIES = (-3.0, 0.0, 3.0, 6.0)
_CONFIDENCES = (0.0, -1.0, -0.5, 0.5, 1.0)
_FOLDS = 5


class TriedCombination(NamedTuple):
    """A combination that was tried, and how well it did."""

    combination: Combination
    score: float


@dataclass(frozen=True)
class EnsembleFit:
    """Result of :func:`fit_ensemble`.

    Attributes:
        ensemble: With the best combination of every direction.
        candidates: Per direction, all that were tried, those that win a tie first.
    """

    ensemble: QueryEnsemble
    candidates: dict[str, list[TriedCombination]]

    def best(self, direction: str) -> TriedCombination:
        """The candidate that was chosen for a direction."""
        return _best(self.candidates[direction])


def fit_ensemble(
    pairs: PairVectors,
    projected: Projection | Mapping[str, Tensor],
    modes: str | Sequence[str] = "nlerp",
    *,
    candidates: Sequence[Combination] | None = None,
    objective: Objective | None = None,
    references: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> EnsembleFit:
    """Tries a grid of combinations on pairs and keeps the best one of each direction.

    Ties are decided for the simpler candidate: the earlier mode, the share nearest to one half, the smaller
    coefficients. To know what the choice is worth, measure it on other pairs.

    Args:
        pairs: The pairs to choose on; the directions they have are fitted.
        projected: The projection, or per direction the (n_queries, old_dim) projected new queries of the
            pairs, before normalisation if lengths are to count (:meth:`Projection.project`).
        modes: One or several of ``"nlerp"`` (β from 0 to 1 in tenths), ``"slerp"`` and ``"slerp_padded"`` (α
            likewise), ``"adaptive"`` (b and s) and ``"adaptive_confidence"`` (b, s and c).
        candidates: Combinations to try in place of the grids, those that win a tie first.
        objective: By default the mean of R@1, R@5 and R@10 (:func:`mean_recall`).
        references: Per direction, gallery rows used to estimate query confidence, without answers to the
            pairs' queries. By default the ensemble gets the pairs' own gallery, and while the candidates are
            compared every query's confidence is estimated on the fifths of it without its answer: in
            use, too, answers are not in the reference. Of more than 4,096 rows a sample is taken.
        seed: Of that sample, and of the fifths.

    Returns:
        The ensemble, in the projection's old space if it is known, and what every candidate reached.

    Raises:
        ConfigError: If a mode is not known, or a candidate is one that cannot be tried (linear).
        DataError: If a direction's projected queries are missing or not as many as the pairs' queries.
        SpaceMismatchError: If the projected queries or the references are not of the old dimension.
    """
    tried = candidate_grid(modes) if candidates is None else list(candidates)
    odd = [each for each in tried if isinstance(each, Linear)]
    if odd or not tried:
        raise ConfigError(
            f"the ensemble's candidates are {odd or 'none at all'}, but linear ones come from tune_on_pairs; "
            "give nlerp, slerp or adaptive ones"
        )
    scored: dict[str, list[TriedCombination]] = {}
    chosen: dict[str, Combination] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    fold_of: NDArray[np.int64] | None = None
    for direction in pairs.directions:
        new = projected_queries(projected, pairs, direction)
        given = (references or {}).get(direction)
        reference = gallery_reference(
            pairs.gallery(direction) if given is None else given, seed, pairs.dims[1]
        )
        confidence_gap = None
        if any(isinstance(each, Adaptive) and each.confidence for each in tried):
            fold_of = _folds_of(pairs, seed) if fold_of is None else fold_of
            of_new, of_old = (
                confidence_by_folds(pairs, direction, queries, fold_of, seed)
                if given is None
                else confidence(queries, reference)
                for queries in (unit_rows(new), pairs.queries(direction)[1])
            )
            confidence_gap = of_new - of_old
        ranks = rank_combinations(pairs, direction, new, tried, confidence_gap)
        measure = objective or mean_recall
        scored[direction] = [
            TriedCombination(c, float(measure(r))) for c, r in zip(tried, ranks, strict=True)
        ]
        chosen[direction] = _best(scored[direction]).combination
        needed = chosen[direction].tensors(pairs.dims[1])
        tensors[direction] = dict.fromkeys(needed, reference)
    space = projected.old_space if isinstance(projected, Projection) else None
    return EnsembleFit(QueryEnsemble(pairs.dims[1], chosen, tensors, space), scored)


def mean_recall(ranks: Tensor) -> float:
    """Mean of R@1, R@5 and R@10 over (n_queries,) ranks from 0."""
    return sum(float((ranks < k).double().mean()) for k in (1, 5, 10)) / 3


def candidate_grid(modes: str | Sequence[str]) -> list[Combination]:
    """The combinations that :func:`fit_ensemble` tries for some modes, those that win a tie first."""
    names = [modes] if isinstance(modes, str) else list(modes)
    grids: dict[str, list[Combination]] = {
        "nlerp": [Nlerp(share) for share in _TENTHS],
        "slerp": [Slerp(share) for share in _TENTHS],
        "slerp_padded": [Slerp(share, padded=True) for share in _TENTHS],
        "adaptive": [Adaptive(b, s) for s in _SIMILARITIES for b in _BIASES],
        "adaptive_confidence": [
            Adaptive(b, s, c) for c in _CONFIDENCES for s in _SIMILARITIES for b in _BIASES
        ],
    }
    unknown = [name for name in names if name not in grids]
    if unknown or not names:
        raise ConfigError(f"there are no ensemble modes {unknown or names}; there are {', '.join(grids)}")
    return [each for name in names for each in sorted(grids[name], key=_plainness)]


def projected_queries(
    projected: Projection | Mapping[str, Tensor], pairs: PairVectors, direction: str
) -> Tensor:
    """(n_queries, old_dim) float32 CPU vectors of the pairs' new queries, as projected, not normalised."""
    queries, _ = pairs.queries(direction)
    if isinstance(projected, Projection):
        if pairs.dims != (projected.new_dim, projected.old_dim):
            raise SpaceMismatchError(
                f"the projection maps {projected.new_dim} → {projected.old_dim} dimensions, but the pairs "
                f"are of {pairs.dims[0]} and {pairs.dims[1]}; use pairs of the same two models"
            )
        device = next(projected.parameters(), torch.empty(0)).device
        modality: Modality = "text" if direction == "T2I" else "image"
        with torch.no_grad():
            return projected.project(queries.to(device), modality).float().cpu()
    if direction not in projected:
        raise DataError(f"there are no projected new queries for {direction}; give them, or the projection")
    rows = projected[direction].detach().float().cpu()
    if rows.ndim != 2 or rows.shape[1] != pairs.dims[1]:
        raise SpaceMismatchError(
            f"the projected queries of {direction} have the shape {tuple(rows.shape)}, but the old dimension "
            f"is {pairs.dims[1]}; project them first"
        )
    if len(rows) != len(queries):
        raise DataError(
            f"there are {len(rows)} projected queries of {direction} for the pairs' {len(queries)} queries"
        )
    return rows


def _plainness(candidate: Combination) -> tuple[float, ...]:
    """A sorting key: the smaller, the simpler."""
    if isinstance(candidate, Nlerp):
        return (round(abs(candidate.beta - 0.5), 6), candidate.beta)
    if isinstance(candidate, Slerp):
        return (round(abs(candidate.alpha - 0.5), 6), candidate.alpha)
    assert isinstance(candidate, Adaptive)
    numbers = (candidate.confidence, candidate.similarity, candidate.bias)
    return tuple(key for number in numbers for key in (abs(number), number))


def _best(candidates: Sequence[TriedCombination]) -> TriedCombination:
    # max keeps the first of equals.
    return max(candidates, key=lambda each: each.score)


def gallery_reference(gallery: Tensor, seed: int = 0, dim: int | None = None) -> Tensor:
    """At most 4,096 unit rows of a gallery, in its order, to estimate the confidence of queries."""
    rows = unit_rows(gallery.float().cpu())
    if rows.ndim != 2 or (dim is not None and rows.shape[1] != dim):
        raise SpaceMismatchError(
            f"the reference has the shape {tuple(rows.shape)}, but the old dimension is {dim}"
        )
    if len(rows) > MAX_REFERENCE:
        chosen = np.random.default_rng(seed).choice(len(rows), MAX_REFERENCE, replace=False)
        rows = rows[torch.from_numpy(np.sort(chosen))]
    return rows


def confidence_by_folds(
    pairs: PairVectors,
    direction: str,
    queries: Tensor,
    fold_of: NDArray[np.int64],
    seed: int = 0,
    rows: Tensor | None = None,
) -> Tensor:
    """Confidence of every query, estimated on the gallery items of the other folds, without its answer.

    Args:
        pairs: The pairs.
        direction: ``"T2I"`` or ``"I2T"``.
        queries: (n_queries, old_dim) unit rows.
        fold_of: (n_images,) the fold of every image. A single fold is estimated on itself.
        seed: Fixes the sample of a large gallery.
        rows: (n_queries,) booleans, whose confidence is asked for; by default that of all.

    Returns:
        (n_queries, 1), 0 where it was not asked for; see :func:`~xbt.projections.combinations.confidence`.
    """
    fold_of_image = torch.from_numpy(fold_of)
    of_text = fold_of_image[pairs.image_of_text]
    of_query, of_item = (of_text, fold_of_image) if direction == "T2I" else (fold_of_image, of_text)
    found = queries.new_zeros(len(queries), 1)
    for fold in torch.unique(fold_of_image):
        own = of_query == fold if rows is None else rows & (of_query == fold)
        others = of_item != fold
        if bool(own.any()):
            gallery = pairs.gallery(direction)[others] if bool(others.any()) else pairs.gallery(direction)
            found[own] = confidence(queries[own], gallery_reference(gallery, seed))
    return found


def rank_combinations(
    pairs: PairVectors,
    direction: str,
    new: Tensor,
    candidates: Sequence[Combination],
    confidence_gap: Tensor | None = None,
    matrices: Mapping[str, Tensor] | None = None,
    rows: Tensor | None = None,
) -> list[Tensor]:
    """Ranks of the pairs' queries under several combinations, exact, ties counting against the query.

    Args:
        pairs: The pairs.
        direction: ``"T2I"`` or ``"I2T"``.
        new: (n_queries, old_dim) projected new queries.
        candidates: Combinations to try.
        confidence_gap: (n_queries, 1) confidence of the new query less that of the old one, for those with a
            confidence term.
        matrices: What :class:`Linear` ones add: ``"new_matrix"``, and ``"old_matrix"`` if they have it.
        rows: (n_queries,) booleans, the queries to rank; by default all.

    Returns:
        Per candidate (number of queries ranked,) int64 ranks, from 0 for the best.
    """
    old = pairs.queries(direction)[1]
    gallery, row_of_item, copies, answers = pairs.searched(direction)
    if rows is not None:
        old, answers, new = old[rows], answers[rows], new[rows]
        confidence_gap = None if confidence_gap is None else confidence_gap[rows]
    step = max(1, _RANK_BYTES // (gallery.element_size() * len(gallery)))
    ranks: list[list[Tensor]] = [[] for _ in candidates]
    for start in range(0, len(old), step):
        part = slice(start, start + step)
        u, a = old[part], new[part]
        v = unit_rows(a)
        of_old, of_new = u @ gallery.T, v @ gallery.T
        cosines, added = (u * v).sum(dim=1, keepdim=True), None
        if matrices:
            extra = v @ matrices["new_matrix"].T
            added = (extra + u @ matrices["old_matrix"].T if "old_matrix" in matrices else extra) @ gallery.T
        own = row_of_item[answers[part].clamp_min(0)]
        for found, candidate in zip(ranks, candidates, strict=True):
            first, second = _score_weights(
                candidate, u, a, cosines, None if confidence_gap is None else confidence_gap[part]
            )
            scores = torch.addcmul(first * of_old, second.expand(len(u), 1), of_new)
            if isinstance(candidate, Linear) and added is not None:
                scores += added
            found.append(count_better(scores, own, answers[part] >= 0, copies))
    return [torch.cat(found) for found in ranks]


def _score_weights(
    candidate: Combination, old: Tensor, new: Tensor, cosines: Tensor, confidence_gap: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Factors of the scores of u and of v."""
    if isinstance(candidate, Adaptive):
        beta = candidate.weights(cosines, confidence_gap if candidate.confidence else None)
        return 1 - beta, beta
    visible = candidate.visible(new)
    first, second = candidate.shares(old, visible, {})
    return first, second * visible.norm(dim=1, keepdim=True)


def _folds_of(pairs: PairVectors, seed: int) -> NDArray[np.int64]:
    clusters = clusters_of(pairs, min(_FOLDS, len(pairs)))
    return fold_of_clusters(clusters, min(_FOLDS, len(np.unique(clusters))), seed)


def count_better(scores: Tensor, own: Tensor, is_answer: Tensor, copies: Tensor) -> Tensor:
    """Wrong gallery rows that score at least as high as the best answer; see ``count_before_best``.

    Args:
        scores: (n, u) scores with the distinct rows of the gallery.
        own: (n, most answers) int64 distinct rows of the answers.
        is_answer: (n, most answers) booleans; false where a query has fewer answers.
        copies: (u,) number of items of each row.

    Returns:
        (n,) int64 ranks, from 0 for the best.
    """
    starts = np.concatenate([[0], is_answer.sum(dim=1).cumsum(0).numpy()])
    positives = Positives(starts, own[is_answer].numpy())
    return torch.from_numpy(count_before_best(scores.numpy(), positives, copies=copies.numpy()))
