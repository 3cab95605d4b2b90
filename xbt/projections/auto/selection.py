"""Choosing between ways to query, and judging the choice by queries whose ranks took no part in it.

The best of many candidates on some queries looks better there than it is. The choice is therefore judged by
nested selection (Cawley & Talbot, "On over-fitting in model selection", JMLR 2010): for every fold the choice
is made by the ranks of the other folds' queries, and only the fold's own queries count for it. What comes out
estimates the gain of *the procedure*, not of a lucky candidate.

What holds, precisely: no query is ranked by a map that was fitted to its image, and no choice is judged by a
query whose own rank took part in it. The separation is not perfect: the ranks of the other folds come from
maps that were fitted to all folds but their own, the judged one among them. Folds within folds would close
that gap at ``folds`` times the cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError
from xbt.evaluation import Difference, Interval, bootstrap_interval, compare_ranks, hits_at
from xbt.evaluation.bootstrap import cautious_interval, means_and_errors
from xbt.evaluation.retrieval import check_ks

MIN_IMAGES = 20
"""Fewest images (or groups of texts) to judge on: fewer could not show any gain."""

Setting = str
"""Names one way to combine the old and the new query."""

_MARGIN = 0.5
"""Standard errors by which every k must gain for a setting to be eligible."""


@dataclass(kw_only=True)
class SelectionOptions:
    """Options of a choice: what may be tried, what counts as a gain, and how it is tested.

    Raises:
        ConfigError: If a value cannot be used.
    """

    thorough: bool = False
    """Also try the trained projections, which takes minutes."""
    use_old: bool = True
    """Whether the old query tower may run at search time. If not, the choice is between the new query alone
    and, where that is not better, staying with the old model."""
    steps: bool = True
    """Whether gallery-side steps (caption forward map, hubness bias) are tried too."""
    pair_texts: bool = False
    """Whether the texts of the pairs join the corpus, fold by fold. It helps where the corpus is small, and
    takes a fit per fold for every candidate."""
    accept_unverified: bool = False
    """Deploy the mean of both queries (without use_old the new query alone) in directions without
    evidence."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Cut-offs that count, together: a direction must gain on average over them, and none may lose more than
    its standard error. (1,) judges by R@1 alone."""
    confidence: float = 0.95
    """One-sided confidence with which a direction must gain to be deployed. Where nothing is to be gained on
    average over the ks, a direction is deployed with a chance of at most 1 - confidence; see
    :func:`run_gain_test`."""
    folds: int = 5
    """Folds of fitting and of judging."""
    every_k: bool = False
    """Whether every k must gain with that confidence on its own, so that a loss at any of them is as unlikely
    as one on average; many a true gain is then not deployed."""
    seed: int = 0
    """Fixes folds and bootstrap."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Make the options from some of their fields by name.

        Raises:
            ConfigError: If a name is not known; the message lists those there are.
        """
        known = [each.name for each in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"the choice has no option {name!r}; it has {', '.join(known)}")
        return cls(**options)

    def __post_init__(self) -> None:
        self.ks = check_ks(self.ks)
        if not 0.5 < self.confidence < 1:
            raise ConfigError(
                f"confidence is {self.confidence}, but must lie between 0.5 and 1, such as 0.95"
            )
        if self.folds < 2:
            raise ConfigError(f"folds is {self.folds}, but must be at least 2")


@dataclass(frozen=True)
class CandidateRanks:
    """One projection and what its queries reach with every setting.

    Attributes:
        name: What to call it.
        ranks: Per direction and setting the (n_queries,) rank of every query, made by a fit that had not
            seen the query.
    """

    name: str
    ranks: Mapping[str, Mapping[Setting, Tensor]]


@dataclass(frozen=True)
class Selection:
    """A candidate and one of its settings per direction."""

    candidate: str
    settings: Mapping[str, Setting]


@dataclass(frozen=True)
class GainTest:
    """Gain of a direction over the old query, by queries whose own ranks took no part in the choice.

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
    def unknown(cls, direction: str, why: str) -> GainTest:
        """The gain_test where there is nothing to judge by."""
        return cls(direction, False, why, None)


def choose(
    candidates: Sequence[CandidateRanks],
    old_ranks: Mapping[str, Tensor],
    ks: tuple[int, ...],
    groups: Mapping[str, Tensor],
    rows: Mapping[str, Tensor] | None = None,
) -> Selection:
    """The candidate and the settings with the highest mean R@k, among those that gain at every k.

    A high mean can hide a loss at one k, which the criterion forbids. A setting is therefore eligible if
    every k gains at least half a standard error over the old query; of the eligible ones the highest mean
    over the ks wins. Where none is eligible, the candidate gets the one whose worst k is best, in standard
    errors. The candidate with the highest mean over all directions wins; a direction counts with the
    old query's recall where nothing is eligible. Ties go to what comes first: list from simple to elaborate.

    Args:
        candidates: At least one, with the same directions each.
        old_ranks: Per direction the rank of every query under the old model.
        ks: Cut-offs, each of the same weight.
        groups: Per direction the image of every query.
        rows: Per direction which queries count, (n_queries,) booleans; by default all.
    """
    best: tuple[float, Selection] | None = None
    for candidate in candidates:
        settings, total = {}, 0.0
        for direction, by_setting in candidate.ranks.items():
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
            best = total, Selection(candidate.name, settings)
    assert best is not None
    return best[1]


def _standardised_gains(change: Tensor, owner: Tensor) -> Tensor:
    """(len(ks),) mean changes of hits in their standard errors, queries of one image taken together."""
    mean, error = means_and_errors(change, owner)
    return mean / error.clamp_min(1e-9)


def best_by_texts(
    candidates: Sequence[CandidateRanks],
    setting: Setting,
    ks: tuple[int, ...],
    groups: Mapping[str, Tensor],
    confidence: float = 0.95,
    seed: int = 0,
) -> Selection:
    """The candidate that finds texts best, where there is nothing else to go by.

    What is listed first stays ahead unless the gain of another in R@k, averaged over ks and directions, is
    above 0 with the given one-sided confidence (paired bootstrap); so do the closed forms before the trained.

    Args:
        candidates: At least one.
        setting: The one by which they are compared.
        ks: Cut-offs, each of the same weight.
        groups: Per direction the group of every query.
        confidence: One-sided, above 0.5.
        seed: Fixes the bootstrap.
    """
    owner = torch.cat(list(groups.values()))

    def hits(candidate: CandidateRanks) -> Tensor:
        ranks = torch.cat([candidate.ranks[direction][setting] for direction in groups])
        return hits_at(ranks, ks).double().mean(dim=1)

    best = candidates[0]
    for candidate in candidates[1:]:
        gain = hits(candidate) - hits(best)
        if bootstrap_interval(gain, owner, 2 * confidence - 1, seed=seed).low > 0:
            best = candidate
    return Selection(best.name, dict.fromkeys(groups, setting))


def out_of_fold_ranks(
    candidates: Sequence[CandidateRanks],
    old_ranks: Mapping[str, Tensor],
    ks: tuple[int, ...],
    groups: Mapping[str, Tensor],
    fold_of: NDArray[np.int64],
) -> dict[str, Tensor]:
    """Ranks of every query under the choice that is made by the ranks of the other folds' queries.

    Args:
        candidates: At least one.
        old_ranks: Per direction the rank of every query under the old model.
        ks: Cut-offs.
        groups: Per direction the image, or the cluster of images, of every query.
        fold_of: (n_groups,) the fold of every one of them; see :func:`fold_of_clusters`.

    Returns:
        Per direction (n_queries,) int64 ranks.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    result = {direction: torch.zeros(len(owner), dtype=torch.int64) for direction, owner in groups.items()}
    for choice, own in choices_by_fold(candidates, old_ranks, ks, groups, fold_of):
        for direction, rows in own.items():
            ranks = by_name[choice.candidate].ranks[direction][choice.settings[direction]]
            result[direction][rows] = ranks[rows]
    return result


def choices_by_fold(
    candidates: Sequence[CandidateRanks],
    old_ranks: Mapping[str, Tensor],
    ks: tuple[int, ...],
    groups: Mapping[str, Tensor],
    fold_of: NDArray[np.int64],
) -> Iterator[tuple[Selection, dict[str, Tensor]]]:
    """Per fold the choice by the other folds' queries, and booleans of its own queries; see above."""
    for fold in np.unique(fold_of):
        own = {
            direction: torch.from_numpy(fold_of[owner.numpy()] == fold) for direction, owner in groups.items()
        }
        others = {direction: ~rows for direction, rows in own.items()}
        yield choose(candidates, old_ranks, ks, groups, others), own


def run_gain_test(
    direction: str,
    new_ranks: Tensor,
    old_ranks: Tensor,
    ks: tuple[int, ...],
    groups: Tensor,
    confidence: float = 0.95,
    seed: int = 0,
    every_k: bool = False,
) -> GainTest:
    """Test whether the new queries beat the old ones with confidence.

    Two things are asked for. The gain in R@k, averaged over the ks, must be above 0 with the given one-sided
    confidence (:func:`~xbt.evaluation.bootstrap.cautious_interval`, groups drawn as wholes). And no single
    k may be seen to lose more than its standard error.

    What that guarantees: a direction in which nothing is to be gained *on average over the ks* is deployed
    with a chance of at most ``1 - confidence``, as far as the pairs resemble the queries to come. It is not
    the share of losses among what is deployed, which depends on how often there is nothing to be gained. And
    it says little of a single k: one that truly loses a point, beside others that gain, is mostly deployed on
    a few hundred queries, since the error of one R@k is larger than that.

    With ``every_k`` each k must be above 0 with that confidence on its own. A loss at any k is then deployed
    with a chance of at most ``1 - confidence``, with no correction for their number, because all have to pass
    (intersection-union; Berger, "Multiparameter hypothesis testing and acceptance sampling", Technometrics
    1982); and many a true gain is not deployed. Who cares for R@1 alone asks for ``ks=(1,)`` instead.

    Args:
        direction: For the message.
        new_ranks: (n,) ranks from :func:`out_of_fold_ranks`.
        old_ranks: (n,) ranks of the old query.
        ks: Cut-offs.
        groups: (n,) the image, or the cluster of images, of every query.
        confidence: One-sided, above 0.5.
        seed: Fixes the bootstrap.
        every_k: Whether every k must gain with confidence, not their mean alone.
    """
    change = hits_at(new_ranks, ks).double() - hits_at(old_ranks, ks).double()
    two_sided = 2 * confidence - 1
    pooled = cautious_interval(change.mean(dim=1), groups, two_sided, seed=seed)
    differences = {
        k: compare_ranks(new_ranks, old_ranks, k, groups, two_sided, seed=seed, interval=cautious_interval)
        for k in ks
    }
    standardised = zip(ks, _standardised_gains(change, groups).tolist(), strict=True)
    losing = [k for k, gain in standardised if gain <= -1]
    open_ks = [k for k in ks if every_k and differences[k].gain.low <= 0]
    why = (
        f"{100 * pooled.estimate:+.1f} points of R@k on average over k = {', '.join(map(str, ks))}, at least "
        f"{100 * pooled.low:+.1f} with {100 * confidence:g} % confidence"
    )
    if pooled.low <= 0:
        why += ", which does not exclude a loss"
    elif losing:
        why += f", but a loss at {_named(losing)}"
    elif open_ks:
        why += f", but that does not exclude a loss at {_named(open_ks)}"
    return GainTest(
        direction,
        pooled.low > 0 and not losing and not open_ks,
        why,
        pooled,
        differences,
        {k: float((old_ranks < k).double().mean()) for k in ks},
        {k: float((new_ranks < k).double().mean()) for k in ks},
    )


def _named(ks: Sequence[int]) -> str:
    return ", ".join(f"R@{k}" for k in ks)
