"""Choosing between ways to query, and judging the choice by queries that had no say in it.

The best of many candidates on some queries looks better there than it is. The choice is therefore judged by
nested selection (Cawley & Talbot, "On over-fitting in model selection", JMLR 2010): for every fold the choice
is made on the other folds, and only the fold's own queries count for it. What comes out estimates the gain of
*the procedure*, not of a lucky candidate, and is never what the choice was made by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.evaluation import Difference, Interval, bootstrap_interval, compare_ranks, hits_at

Setting = str
"""Names one way to combine the old and the new query."""

_MARGIN = 0.5
"""Standard errors by which every k must gain for a setting to be eligible."""


@dataclass(frozen=True)
class Contender:
    """One projection and what its queries reach with every setting.

    Attributes:
        name: What to call it.
        ranks: Per direction and setting the (n_queries,) rank of every query, made by a fit that had not
            seen the query.
    """

    name: str
    ranks: Mapping[str, Mapping[Setting, Tensor]]


@dataclass(frozen=True)
class Choice:
    """A contender and one of its settings per direction."""

    contender: str
    settings: Mapping[str, Setting]


@dataclass(frozen=True)
class Judgement:
    """What a direction gains over the old query, measured on queries that had no say in the choice.

    Attributes:
        direction: ``"T2I"`` or ``"I2T"``.
        met: Whether a gain is shown, so that the choice may be deployed.
        why: One sentence.
        pooled: The mean gain over all ks with its interval, whose lower end decides; ``None`` where there was
            nothing to judge by.
        differences: Per k what changes.
        old_recall: R@k of the old query.
        recall: R@k of the procedure.
    """

    direction: str
    met: bool
    why: str
    pooled: Interval | None
    differences: Mapping[int, Difference] = field(default_factory=dict)
    old_recall: Mapping[int, float] = field(default_factory=dict)
    recall: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def unknown(cls, direction: str, why: str) -> Judgement:
        """The judgement where there is nothing to judge by."""
        return cls(direction, False, why, None)


def choose(
    contenders: Sequence[Contender],
    old_ranks: Mapping[str, Tensor],
    ks: tuple[int, ...],
    groups: Mapping[str, Tensor],
    rows: Mapping[str, Tensor] | None = None,
) -> Choice:
    """The contender and the settings with the highest mean R@k, among those that gain at every k.

    A high mean can hide a loss at one k, which the criterion forbids. A setting is therefore eligible if
    every k gains at least half a standard error over the old query; of the eligible ones the highest mean
    over the ks wins. Where none is eligible, the one whose worst k is best, in standard errors, stands for
    the contender. The contender with the highest mean over all directions wins; a direction counts with the
    old query's recall where nothing is eligible. Ties go to what comes first: list from simple to elaborate.

    Args:
        contenders: At least one, with the same directions each.
        old_ranks: Per direction the rank of every query under the old model.
        ks: Cut-offs, each of the same weight.
        groups: Per direction the image of every query.
        rows: Per direction which queries count, (n_queries,) booleans; by default all.
    """
    best: tuple[float, Choice] | None = None
    for contender in contenders:
        settings, total = {}, 0.0
        for direction, by_setting in contender.ranks.items():
            counted = slice(None) if rows is None else rows[direction]
            old = hits_at(old_ranks[direction][counted], ks).double()
            owner = groups[direction][counted]
            scored = []
            for setting, ranks in by_setting.items():
                hits = hits_at(ranks[counted], ks).double()
                worst = float((_standardised_gains(hits - old, owner)).min())
                scored.append((worst >= _MARGIN, float(hits.mean()), worst, setting))
            eligible = [each for each in scored if each[0]]
            if eligible:
                chosen = max(eligible, key=lambda each: each[1])
                total += chosen[1]
            else:
                chosen = max(scored, key=lambda each: each[2])
                total += float(old.mean())
            settings[direction] = chosen[3]
        if best is None or total > best[0] + 1e-12:
            best = total, Choice(contender.name, settings)
    assert best is not None
    return best[1]


def _standardised_gains(change: Tensor, owner: Tensor) -> Tensor:
    """(len(ks),) mean changes of hits in their standard errors, queries of one image taken together."""
    place = torch.unique(owner, return_inverse=True)[1]
    count = int(place.max()) + 1
    mean = change.mean(dim=0)
    by_group = torch.zeros(count, change.shape[1], dtype=torch.float64).index_add_(0, place, change - mean)
    error = (by_group.square().sum(dim=0) * count / max(1, count - 1)).sqrt() / len(change)
    return mean / error.clamp_min(1e-9)


def honest_ranks(
    contenders: Sequence[Contender],
    old_ranks: Mapping[str, Tensor],
    ks: tuple[int, ...],
    groups: Mapping[str, Tensor],
    folds: int = 5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Ranks of every query under the choice that is made without the query's fold.

    Args:
        contenders: At least one.
        old_ranks: Per direction the rank of every query under the old model.
        ks: Cut-offs.
        groups: Per direction the image of every query; a fold holds whole images.
        folds: How many.
        seed: Fixes the folds.

    Returns:
        Per direction (n_queries,) int64 ranks.
    """
    n_groups = 1 + max(int(owner.max()) for owner in groups.values())
    fold_of_group = fold_of_groups(n_groups, folds, seed)
    by_name = {contender.name: contender for contender in contenders}
    result = {direction: torch.zeros(len(owner), dtype=torch.int64) for direction, owner in groups.items()}
    for fold in range(folds):
        own = {
            direction: torch.from_numpy(fold_of_group[owner.numpy()] == fold)
            for direction, owner in groups.items()
        }
        others = {direction: ~rows for direction, rows in own.items()}
        choice = choose(contenders, old_ranks, ks, groups, others)
        for direction, rows in own.items():
            ranks = by_name[choice.contender].ranks[direction][choice.settings[direction]]
            result[direction][rows] = ranks[rows]
    return result


def judge(
    direction: str,
    new_ranks: Tensor,
    old_ranks: Tensor,
    ks: tuple[int, ...],
    groups: Tensor,
    confidence: float = 0.95,
    seed: int = 0,
) -> Judgement:
    """Whether the new queries beat the old ones with confidence.

    Two things are asked for. The gain in R@k, averaged over the ks, must be above 0 with the given one-sided
    confidence: its bootstrap interval, drawn image by image, must lie above 0. And no single k may lose by
    more than its standard error: a single R@1 on a few hundred queries is too noisy to be asked for more,
    while a map that buys R@10 with R@1 is found out. A choice that gains nothing on average is thereby
    deployed with a chance of at most ``1 - confidence`` per direction, as far as the pairs resemble the
    queries to come.

    Args:
        direction: For the message.
        new_ranks: (n,) ranks from :func:`honest_ranks`.
        old_ranks: (n,) ranks of the old query.
        ks: Cut-offs.
        groups: (n,) the image of every query.
        confidence: One-sided, above 0.5.
        seed: Fixes the bootstrap.
    """
    change = hits_at(new_ranks, ks).double() - hits_at(old_ranks, ks).double()
    two_sided = 2 * confidence - 1
    pooled = bootstrap_interval(change.mean(dim=1), groups, two_sided, seed=seed)
    losing = [
        k for k, gain in zip(ks, _standardised_gains(change, groups).tolist(), strict=True) if gain <= -1
    ]
    shown = (
        f"{100 * pooled.estimate:+.1f} points of R@k on average over k = {', '.join(map(str, ks))}, at least "
        f"{100 * pooled.low:+.1f} with {100 * confidence:g} % confidence"
    )
    if pooled.low <= 0:
        why = f"{shown}, which does not exclude a loss"
    elif losing:
        why = f"{shown}, but a loss at R@{', R@'.join(map(str, losing))}"
    else:
        why = shown
    return Judgement(
        direction,
        pooled.low > 0 and not losing,
        why,
        pooled,
        {k: compare_ranks(new_ranks, old_ranks, k, groups, two_sided, seed=seed) for k in ks},
        {k: float((old_ranks < k).double().mean()) for k in ks},
        {k: float((new_ranks < k).double().mean()) for k in ks},
    )


def fold_of_groups(n_groups: int, folds: int, seed: int) -> NDArray[np.int64]:
    """(n_groups,) the fold of every group: as :meth:`PairVectors.folds` splits them."""
    order = np.random.default_rng(seed).permutation(n_groups)
    place = np.empty(n_groups, dtype=np.int64)
    for fold, part in enumerate(np.array_split(order, folds)):
        place[part] = fold
    return place
