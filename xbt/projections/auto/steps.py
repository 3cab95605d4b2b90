"""Choice of gallery-side steps: the caption forward map, the hubness bias, and the query they go with.

After the candidate is chosen, its query, plain means with it and the old query are tried with the steps of
:mod:`xbt.projections.gallery_steps`. The grid is climbed one setting at a time. Both are judged by nested
selection, as in :mod:`xbt.projections.auto.selection`: for every fold the climb sees the other folds' queries
alone. What the steps take from pairs comes from the other folds too, and never from a row's own cluster.

The old query is given the best steps of its own: a bias, and the same map with old vectors in place of new
ones. What the new model brings is what it has beyond that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xbt.evaluation import hits_at
from xbt.projections.caption_map import CaptionForwardMap, Neighbours, fit_caption_map
from xbt.projections.ensemble_fit import count_better
from xbt.projections.hubness import mean_of_highest, owned
from xbt.projections.pairs import PairVectors
from xbt.vectors import unit_rows

BEST, OLD = "best", "old"
"""Names of queries: that of the chosen candidate, and the old one alone."""

MAX_IMAGES, MAX_TEXTS = 1_000, 3_000
"""Most images of the pairs on which steps are chosen, and most texts: of more, the first of every image."""

MAX_BANK = 2_000
"""Most queries of a bank."""

MIN_ITEMS = 100
"""Fewest anchors of a forward map, and fewest queries of a bank."""

HUB_K = 10
SHARES = (0.0, 0.15, 0.3, 0.5, 0.7)
WEIGHTS = (0.0, 0.25, 0.5, 0.75)
RULES = (
    Neighbours(50, 0.05),
    Neighbours(50, 0.05, residual=True),
    Neighbours(20, 0.02),
    Neighbours(20, 0.02, residual=True),
)


_ALL_FOLDS = -1
"""In place of a fold, of what is the same for all of them."""


class StepSetting(NamedTuple):
    """A query and the steps of one direction.

    Attributes:
        query: :data:`BEST`, :data:`OLD`, or the share of the new query in a plain mean, such as ``"0.5"``.
        share: a, of the forward scores.
        rule: How f(g) is estimated; ``None`` where the share is 0.
        weight: c, of the hubness bias.
    """

    query: str
    share: float = 0.0
    rule: Neighbours | None = None
    weight: float = 0.0

    @property
    def uses_new(self) -> bool:
        """True if the new model's query counts."""
        return self.query != OLD or self.share > 0


class Items(NamedTuple):
    """Texts or images under both models.

    Attributes:
        old: (n, old_dim) unit rows.
        new: (n, new_dim) unit rows.
        owners: (n,) int64 cluster or image of the pairs that each belongs to, -1 for none.
    """

    old: Tensor
    new: Tensor
    owners: Tensor

    @classmethod
    def of(cls, old: Tensor, new: Tensor, owners: Tensor | None = None) -> Self:
        """Normalise the rows; without owners they belong to nothing."""
        nobody = torch.full((len(old),), -1, dtype=torch.int64)
        return cls(unit_rows(old), unit_rows(new), nobody if owners is None else owners)

    def take(self, chosen: Tensor) -> Items:
        """Some of the items, by position or by booleans."""
        return Items(self.old[chosen], self.new[chosen], self.owners[chosen])

    @property
    def owned(self) -> bool:
        """True if items belong to something."""
        return bool((self.owners >= 0).any())

    def outside(self, fold_of: Tensor, fold: int) -> Tensor:
        """(n,) booleans: items of the other folds, and those that belong to nothing."""
        return (self.owners < 0) | (fold_of[self.owners.clamp_min(0)] != fold)

    def spread(self, count: int) -> Items:
        """At most so many of the items, evenly spaced."""
        return self if len(self.old) <= count else self.take(_spread(len(self.old), count))

    def of_old(self) -> Items:
        """The same items with old vectors on both sides."""
        return Items(self.old, self.old, self.owners)


def _spread(items: int, count: int) -> Tensor:
    """At most so many positions of some items, evenly spaced."""
    return torch.from_numpy(np.linspace(0, items - 1, min(items, count)).astype(np.int64))


Mix = Callable[[int, str, Tensor, Tensor], Tensor]
"""Fold, name of the query, new and old vectors → (n, old_dim) unit queries by a fit without the fold."""


@dataclass(frozen=True)
class Judged:
    """Pairs that steps are judged on, in one direction.

    Attributes:
        pairs: The pairs.
        direction: ``"T2I"`` or ``"I2T"``.
        clusters: (n_images,) the first image of every image's cluster.
        fold_of: (n_images,) the fold of every image.
        ks: Cut-offs that count.
    """

    pairs: PairVectors
    direction: str
    clusters: Tensor
    fold_of: Tensor
    ks: tuple[int, ...]

    @property
    def groups(self) -> Tensor:
        """(n_queries,) the cluster of every query."""
        return self.clusters[self.pairs.groups(self.direction)]

    @property
    def folds(self) -> range:
        """Numbers of the folds."""
        return range(int(self.fold_of.max()) + 1)

    def owners_of_rows(self) -> Tensor:
        """(u, most owners) int64 clusters that the distinct gallery rows belong to, filled up with -1."""
        other = "I2T" if self.direction == "T2I" else "T2I"
        row_of_item = self.pairs.searched(self.direction).row_of_item
        both = torch.stack([row_of_item, self.clusters[self.pairs.groups(other)]], dim=1)
        both = torch.unique(both, dim=0)
        parts = both[:, 1].split(torch.bincount(both[:, 0]).tolist())
        return pad_sequence(list(parts), batch_first=True, padding_value=-1)


class StepTrial:
    """Ranks of queries with steps, fold by fold, and the climb through the grid.

    Args:
        judged: What it is judged on.
        anchors: What the forward map is made of; ``None`` tries none.
        bank: What hubness is measured by; ``None`` tries no bias.
        mix: Makes the queries.
        queries: Names of the queries to try, the first to begin with.
    """

    def __init__(
        self, judged: Judged, anchors: Items | None, bank: Items | None, mix: Mix, queries: Sequence[str]
    ) -> None:
        self.judged, self.anchors, self.mix, self.queries = judged, anchors, mix, queries
        self.bank = bank if bank is None or bank.owned else bank.spread(MAX_BANK)
        self.searched = judged.pairs.searched(judged.direction)
        self.own = judged.owners_of_rows()
        self.new, self.old = judged.pairs.queries(judged.direction)
        self.fold_of_query = judged.fold_of[judged.pairs.groups(judged.direction)]
        self._hits: dict[StepSetting, Tensor] = {}
        self._ranks: dict[StepSetting, Tensor] = {}
        self._kept: dict[tuple[str, int, object], Tensor] = {}
        self._maps: dict[int, CaptionForwardMap] = {}
        self._near: dict[int, tuple[Tensor, Tensor]] = {}

    def of_old(self) -> StepTrial:
        """The old query with steps of old vectors alone, which have the same nearest anchors."""
        pairs = self.judged.pairs
        images = None if pairs.new_images is None else pairs.old_images
        judged = replace(self.judged, pairs=replace(pairs, new_texts=pairs.old_texts, new_images=images))
        anchors, bank = (None if each is None else each.of_old() for each in (self.anchors, self.bank))
        made = StepTrial(judged, anchors, bank, lambda fold, query, new, old: old, (OLD,))
        made._near = self._near
        return made

    def nested(self, shares: Sequence[float] = SHARES) -> Tensor:
        """(n_queries,) ranks of every query with what the other folds' queries choose."""
        found = torch.zeros(len(self.fold_of_query), dtype=torch.int64)
        for fold in self.judged.folds:
            held = self.fold_of_query == fold
            if bool(held.any()):
                found[held] = self.ranks(self.climb(~held, shares))[held]
        return found

    def climb(self, counted: Tensor | None = None, shares: Sequence[float] = SHARES) -> StepSetting:
        """The setting with the highest mean R@k over some queries, found one number at a time, twice over."""
        weights = WEIGHTS if self.bank is not None else (0.0,)
        shares = shares if self.anchors is not None else (0.0,)
        best = StepSetting(self.queries[0])
        if len(shares) > 1:
            best = best._replace(share=0.3, rule=RULES[0])
        if len(weights) > 1:
            best = best._replace(weight=0.5)
        for _ in range(2):
            best = self._best([best, *(best._replace(query=query) for query in self.queries)], counted)
            rule = best.rule or RULES[0]
            tried = (best._replace(share=share, rule=rule if share else None) for share in shares)
            best = self._best([best, *tried], counted)
            if best.share:
                best = self._best([best, *(best._replace(rule=rule) for rule in RULES)], counted)
            best = self._best([best, *(best._replace(weight=weight) for weight in weights)], counted)
        return best

    def _best(self, settings: Iterable[StepSetting], counted: Tensor | None) -> StepSetting:
        def recall(setting: StepSetting) -> float:
            ranks = self.ranks(setting)
            hits = self._hits.setdefault(setting, hits_at(ranks, self.judged.ks).double().mean(dim=1))
            return round(float(hits.mean() if counted is None else hits[counted].mean()), 12)

        return max(settings, key=recall)  # the first of equals

    def ranks(self, setting: StepSetting) -> Tensor:
        """(n_queries,) ranks with one setting, each query by what has not seen its fold."""
        if setting not in self._ranks:
            ranks = torch.zeros(len(self.fold_of_query), dtype=torch.int64)
            for fold in self.judged.folds:
                held = self.fold_of_query == fold
                ranks[held] = self._ranks_of(setting, fold, held)
            self._ranks[setting] = ranks
        return self._ranks[setting]

    def _ranks_of(self, setting: StepSetting, fold: int, held: Tensor) -> Tensor:
        scores = self._base("queries", fold, setting.query, self.new[held], self.old[held])
        if setting.rule is not None:
            forward = self._forward("queries", fold, setting.rule, self.new[held])
            scores = torch.lerp(scores, forward, setting.share)
        if setting.weight:
            scores = scores - setting.weight * self._hubness(setting, fold)
        answers = self.searched.answers[held]
        own = self.searched.row_of_item[answers.clamp_min(0)]
        return count_better(scores, own, answers >= 0, self.searched.copies)

    def _hubness(self, setting: StepSetting, fold: int) -> Tensor:
        """(u,) mean of the highest scores of the rows with the bank."""
        bank = self.bank
        assert bank is not None

        def measure() -> Tensor:
            scores = self._base("bank", fold, setting.query, bank.new, bank.old).T
            if setting.rule is not None:
                forward = self._forward("bank", fold, setting.rule, bank.new).T
                scores = torch.lerp(scores, forward, setting.share)
            if bank.owned:
                scores = scores.masked_fill(self._left_out(bank, fold), -torch.inf)
            return mean_of_highest(scores, HUB_K)

        fixed = setting.query == OLD and not bank.owned and (setting.rule is None or self._same_anchors)
        key = (setting.query, setting.share, setting.rule)
        return self._once("hubness", _ALL_FOLDS if fixed else fold, key, measure)

    def _left_out(self, bank: Items, fold: int) -> Tensor:
        """(u, b) booleans: queries of the bank that do not count for a row while a fold is judged."""

        def find() -> Tensor:
            outside = torch.nonzero(bank.outside(self.judged.fold_of, fold)).flatten()
            out = torch.ones(len(bank.owners), dtype=torch.bool)
            out[outside[_spread(len(outside), MAX_BANK)]] = False
            return owned(self.own, bank.owners) | out

        return self._once("left out", fold, None, find)

    def _base(self, kind: str, fold: int, query: str, new: Tensor, old: Tensor) -> Tensor:
        """(n, u) scores of queries with the rows, without steps."""
        rows = self.searched.rows
        shared = _ALL_FOLDS if kind == "bank" and query == OLD else fold
        return self._once(
            f"{kind} base", shared, query, lambda: self._scores(kind, self.mix(fold, query, new, old), rows)
        )

    def _forward(self, kind: str, fold: int, rule: Neighbours, new: Tensor) -> Tensor:
        """(n, u) scores of new queries with the estimates of the rows."""
        shared = _ALL_FOLDS if kind == "bank" and self._same_anchors else fold
        return self._once(
            f"{kind} forward", shared, rule, lambda: self._scores(kind, new, self._estimates(fold, rule))
        )

    @staticmethod
    def _scores(kind: str, queries: Tensor, rows: Tensor) -> Tensor:
        # The bank's scores are read row by row of the gallery.
        return (rows @ queries.T).T if kind == "bank" else queries @ rows.T

    @property
    def _same_anchors(self) -> bool:
        """True if the forward map is the same for all folds."""
        return self.anchors is not None and not self.anchors.owned

    def _estimates(self, fold: int, rule: Neighbours) -> Tensor:
        items = self.anchors
        assert items is not None
        shared = _ALL_FOLDS if self._same_anchors else fold
        if shared not in self._maps:
            if items.owned:
                items = items.take(items.outside(self.judged.fold_of, fold))
            self._maps[shared] = fit_caption_map(items.old, items.new, owners=items.owners)
        made = self._maps[shared]
        if shared not in self._near:
            most = max(each.k for each in RULES)
            self._near[shared] = made.neighbours(self.searched.rows, most, self.own if items.owned else None)
        near = self._near[shared]
        return self._once(
            "estimates", shared, rule, lambda: unit_rows(made.estimate(self.searched.rows, *near, rule))
        )

    def _once(self, kind: str, fold: int, key: object, make: Callable[[], Tensor]) -> Tensor:
        if (kind, fold, key) not in self._kept:
            self._kept[kind, fold, key] = make()
        return self._kept[kind, fold, key]


def some_images(
    pairs: PairVectors, clusters: NDArray[np.int64], fold_of: NDArray[np.int64], seed: int
) -> tuple[PairVectors, Tensor, Tensor]:
    """Pairs, clusters and folds of some images, in whole clusters, which bounds time and memory."""
    if len(pairs) > MAX_IMAGES:
        place = np.random.default_rng(seed).permutation(len(pairs))
        order = np.argsort(place[clusters], kind="stable")  # clusters as wholes, in a random order
        first = order[:MAX_IMAGES]
        kept = np.sort(first[clusters[first] != clusters[order[MAX_IMAGES]]])
        moved = np.full(len(pairs), -1)
        moved[kept] = np.arange(len(kept))
        pairs, fold_of = pairs.subset(torch.from_numpy(kept)), fold_of[kept]
        clusters = moved[clusters[kept]]
    return _first_texts(pairs), torch.from_numpy(clusters), torch.from_numpy(fold_of)


def _first_texts(pairs: PairVectors) -> PairVectors:
    """The pairs with the first few texts of every image, so that there are at most :data:`MAX_TEXTS`."""
    owner = pairs.image_of_text
    order = torch.argsort(owner, stable=True)
    starts = torch.cumsum(torch.bincount(owner), dim=0) - torch.bincount(owner)
    number = torch.empty_like(owner)
    number[order] = torch.arange(len(owner)) - starts[owner[order]]
    up_to = torch.cumsum(torch.bincount(number), dim=0)
    kept = number < max(1, int((up_to <= MAX_TEXTS).sum()))
    if bool(kept.all()):
        return pairs
    return replace(
        pairs,
        new_texts=pairs.new_texts[kept],
        old_texts=pairs.old_texts[kept],
        image_of_text=owner[kept],
    )
