"""An order that is learned by rehearsing the backfill on a sample of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from xbt.backfill.curve import backfill_curve
from xbt.backfill.orders import SCORES_AT_ONCE, out_of_fold, require_same_dim, spread_out
from xbt.errors import ConfigError, DataError
from xbt.index.calibration import MixedScores, logistic_fit
from xbt.index.mixed import Merge
from xbt.index.neighbours import nearest_items
from xbt.projections.base import Projection
from xbt.projections.ridge import fit_ridge
from xbt.vectors import Vectors, as_vectors

SHARES = (0.002, 0.02, 0.1)
"""Shares of the gallery that count as found."""
MAPPED_SHARE = 0.02
NEAREST = 10

FOUND = (
    "found among the first 0.2 %",
    "found among the first 2 %",
    "found among the first 10 %",
    "chance to be meant, summed",
    "greatest chance to be meant",
    "chance to be meant when mapped, summed",
    "found among the first 2 % when mapped",
)
"""Seven measures of how often an item is found; the old model is weak where an item is found rarely."""

FEATURES = (
    *FOUND,
    "mean score",
    "greatest score",
    "similarity of the nearest items",
    "distance to the mean",
    "length when mapped",
)

SPREADS = (0.0, 2.0)
"""Weights of the neighbours' share that are tried on the sample."""
FOLDS = 10
PRIOR = {"mean score": -1.0, "distance to the mean": 1.0}
"""Prior feature weights, beside -1 for all of FOUND: items far from all others come first."""
_SHRINKAGE = 10.0


class Slopes(NamedTuple):
    """Slopes of the log-odds of relevance over the scores: with them a softmax gives probabilities."""

    old: float
    new: float


class Search(NamedTuple):
    """Statistics of each of m items over some queries, all (m,).

    ``found`` counts, for every share, how often the item is among that share of the results. ``summed`` and
    ``greatest`` are of the item's shares in softmax(slope · scores), ``mean`` and ``highest`` of its scores.
    """

    found: list[Tensor]
    summed: Tensor
    greatest: Tensor
    mean: Tensor
    highest: Tensor


def search_statistics(
    queries: Tensor, items: Tensor, slope: float, shares: tuple[float, ...] = SHARES
) -> Search:
    """Compare (n, dim) queries with all (m, dim) items, some queries at a time.

    ``slope`` is that of the log-odds of relevance. Of each share of the items at least the first is found.
    """
    count = len(items)
    cuts = [max(1, round(share * count)) for share in shares]
    found = [torch.zeros(count) for _ in cuts]
    summed, greatest, total = torch.zeros(count), torch.zeros(count), torch.zeros(count)
    highest = torch.full((count,), -torch.inf)
    step = max(1, SCORES_AT_ONCE // count)
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ items.T
        first = scores.topk(max(cuts), dim=1).indices
        for counts, cut in zip(found, cuts, strict=True):
            counts += torch.bincount(first[:, :cut].flatten(), minlength=count)
        chances = torch.softmax(slope * scores, dim=1)
        summed += chances.sum(dim=0)
        greatest = torch.maximum(greatest, chances.amax(dim=0))
        total += scores.sum(dim=0)
        highest = torch.maximum(highest, scores.amax(dim=0))
    return Search(found, summed, greatest, total / len(queries), highest)


def item_features(
    items: Tensor,
    mapped: Tensor,
    old_queries: Tensor,
    new_queries: Tensor,
    slopes: Slopes,
    neighbour_cosines: Tensor,
) -> Tensor:
    """Compute features of every item, each as its percentile, so that indexes of any size compare.

    ``mapped`` are the (m, new_dim) old vectors under a forward map, not normalised: shorter where less
    certain. The (n, dim) queries are a sample in both spaces; ``neighbour_cosines`` are of
    :func:`~xbt.index.neighbours.nearest_items`.

    Returns:
        (m, len(FEATURES)) float32, each column of mean 0 and variance 1.
    """
    old = search_statistics(old_queries, items, slopes.old)
    new = search_statistics(new_queries, normalize(mapped, dim=1), slopes.new, (MAPPED_SHARE,))
    columns = (
        *old.found,
        old.summed,
        old.greatest,
        new.summed,
        new.found[0],
        old.mean,
        old.highest,
        neighbour_cosines[:, :NEAREST].mean(dim=1),
        (items - items.mean(dim=0)).norm(dim=1),
        mapped.norm(dim=1),
    )
    return torch.stack([_percentiles(column) for column in columns], dim=1)


def _percentiles(values: Tensor) -> Tensor:
    """Ranks with mean ranks for ties, scaled to mean 0 and variance 1."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return torch.zeros(len(values))
    middle = counts.cumsum(0).double() - (counts.double() + 1) / 2
    ranks = middle[place] / (len(values) - 1) - 0.5
    scaled: Tensor = (ranks * 12**0.5).float()
    return scaled


@dataclass(frozen=True)
class RehearsedOrder:
    """Urgency of items, learned on a sample by :func:`fit_rehearsed_order`.

    Attributes:
        weights: One per feature of :data:`FEATURES`.
        spread: Urgency that an item loses when all of its neighbours are backfilled.
        slopes: Slopes of both sides' log-odds of relevance.
        forward: Ridge map from old to new vectors.
        old_queries: (n, old_dim) sample queries in the old space.
        new_queries: (n, new_dim) the same in the new space.
    """

    weights: Tensor
    spread: float
    slopes: Slopes
    forward: Projection
    old_queries: Tensor
    new_queries: Tensor

    def order(self, gallery: Vectors) -> Tensor:
        """Order items of which only the old vectors are known, most urgent first.

        It compares all items with the n sample queries, and each with those near it
        (:func:`~xbt.index.neighbours.nearest_items`): O(m·n + m^1.5) products in a large index.

        Args:
            gallery: (m, old_dim) the items' old vectors, at least two.

        Returns:
            (m,) int64 permutation.

        Raises:
            DataError: If there are fewer than two items, or the vectors cannot be used.
            SpaceMismatchError: If the dimension is not that of the sample.
        """
        items = as_vectors(gallery, "gallery", self.old_queries.shape[1]).float()
        if len(items) < 2:
            raise DataError("there is a single item, so there is nothing to order; give at least 2")
        with torch.no_grad():
            mapped = self.forward.project(items)
        cosines, rows = nearest_items(items)
        features = item_features(items, mapped, self.old_queries, self.new_queries, self.slopes, cosines)
        return spread_out(_standardised(features @ self.weights), rows, self.spread)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form of the weights, for the record."""
        return {"weights": dict(zip(FEATURES, self.weights.tolist(), strict=True)), "spread": self.spread}


def fit_rehearsed_order(
    old_queries: Vectors,
    new_queries: Vectors,
    old_gallery: Vectors,
    new_gallery: Vectors,
    positives: Sequence[Sequence[int]],
    merge: Merge,
    *,
    sample_old: Vectors,
    sample_new: Vectors,
    spreads: Sequence[float] = SPREADS,
    seed: int = 0,
) -> RehearsedOrder:
    """Learn which items are urgent, by simulating the backfill of a sample of pairs.

    For every item of the sample the *gain* is measured: the change of the hits when this item is backfilled,
    with random states of the other items (:func:`moving_gains`). The gain is then predicted from features
    that are known before an item is backfilled (:func:`item_features`). The prediction starts
    from a prior: items that few queries find and that lie far from the others come first. A ridge regression
    of the residual corrects the prior as far as the sample supports it.

    Two items that the old model confuses are separated as soon as one of them is backfilled. While the order
    is made, an item therefore loses urgency by the share of its neighbours that are already chosen. The
    weight of that share is the one with the greatest area under the sample's own curve.

    About 80 bytes are held per query and item of the sample: of 1,000 items with five queries each 400 MB.

    Args:
        old_queries: (q, old_dim) labelled queries of the sample in the old space.
        new_queries: (q, new_dim) the same in the new space.
        old_gallery: (n, old_dim) items of the sample under the old model.
        new_gallery: (n, new_dim) the same under the new model.
        positives: For every query the items that answer it.
        merge: How both sides will be merged; one that compares scores.
        sample_old: Unlabelled queries in the old space, such as captions.
        sample_new: The same in the new space.
        spreads: Weights of the neighbours' share to try; a single one is taken as it is.
        seed: Seeds folds and states.

    Raises:
        ConfigError: If the merge goes by rank, or there are no spreads or a negative one.
        DataError: If the sample has fewer than 20 items, or vectors cannot be used or do not fit each other.
        SpaceMismatchError: If queries and items of a side differ in dimension.
    """
    if not spreads or not all(0 <= spread < np.inf for spread in spreads):
        raise ConfigError(f"spreads are {list(spreads)}; give numbers of at least 0, such as [0, 2]")
    scores = MixedScores(old_queries, new_queries, old_gallery, new_gallery, positives)
    items, new = (
        as_vectors(old_gallery, "old gallery").float(),
        as_vectors(new_gallery, "new gallery").float(),
    )
    if len(items) < 2 * FOLDS:
        raise DataError(
            f"the sample has {len(items)} items; to learn an order from it takes {2 * FOLDS} or more"
        )
    asked = as_vectors(sample_old, "sample queries").float(), as_vectors(sample_new, "sample queries").float()
    for queries, side in zip(asked, (items, new), strict=True):
        require_same_dim(queries, side)
    if len(asked[0]) != len(asked[1]):
        raise DataError(
            f"there are {len(asked[0])} sample queries in the old space and {len(asked[1])} in the new one"
        )
    relevant = scores.relevant()
    slopes = Slopes(*(logistic_fit(side, relevant)[0] for side in (scores.old, scores.new)))
    cosines, rows = nearest_items(items)
    features = item_features(items, out_of_fold(items, new, FOLDS, seed), *asked, slopes, cosines)
    weights = _fit_weights(features, _standardised(moving_gains(scores, merge, seed=seed)))
    urgency = _standardised(features @ weights)
    areas = {
        spread: backfill_curve(scores, spread_out(urgency, rows, spread), merge).area
        for spread in (spreads if len(spreads) > 1 else ())
    }
    chosen = max(spreads, key=lambda spread: areas.get(spread, 0.0))
    return RehearsedOrder(weights, chosen, slopes, fit_ridge(items, new, intercept=True), *asked)


def _fit_weights(features: Tensor, gains: Tensor) -> Tensor:
    """Weights of the features: the prior, scaled to the gains, and a ridge regression of the residual."""
    prior = torch.tensor([PRIOR.get(name, -1.0 if name in FOUND else 0.0) for name in FEATURES])
    prior = prior / (features @ prior).std().clamp_min(1e-6)
    # The prior keeps a little weight even if the sample contradicts it: samples are small.
    slope = float(((features @ prior) * gains).mean().clamp_min(0.02))
    residual = gains - slope * (features @ prior)
    gram = features.T @ features / len(features) + _SHRINKAGE * torch.eye(features.shape[1])
    weights: Tensor = slope * prior + torch.linalg.solve(gram, features.T @ residual / len(features))
    return weights


def _standardised(values: Tensor) -> Tensor:
    values = values.float()
    spread = values.std()
    scaled: Tensor = (values - values.mean()) / (spread if float(spread) > 0 else 1.0)
    return scaled


STATES = 20


def moving_gains(
    scores: MixedScores, merge: Merge, *, ks: Sequence[int] = (1, 5, 10), states: int = STATES, seed: int = 0
) -> Tensor:
    """Measure what backfilling each item adds to the queries' hits, on average over random states: (m,).

    A state backfills a random subset whose share is drawn uniformly. An item counts both as the answer to its
    own queries and as a wrong answer to all others. Every pair of a query and one of its positives counts as
    a query with one answer. This is the Banzhaf value of the items, by sampling.
    """
    if merge.by_rank:
        raise ConfigError(
            f"a merge of kind {merge.kind!r} compares no scores; give an affine or isotonic one"
        )
    old, new = scores.calibrated(merge)
    starts, positive = scores.positives
    query = np.repeat(np.arange(len(scores)), np.diff(starts))
    own_old, own_new = old[query, positive][:, None], new[query, positive][:, None]
    wrong = ~scores.relevant()[query]
    old, new = old[query], new[query]
    rng, gains = np.random.default_rng(seed), np.zeros(old.shape[1])
    for _ in range(states):
        mask: NDArray[np.bool_] = np.less(rng.random(old.shape[1]), rng.random())
        mixed = np.where(mask, new, old)
        before, after = (_hits(((mixed >= own) & wrong).sum(axis=1), ks) for own in (own_old, own_new))
        np.add.at(gains, positive, after - before)
        own = np.where(mask[positive][:, None], own_new, own_old)
        gains += _competing(mixed >= own, old >= own, new >= own, wrong, ks)
    return torch.from_numpy(gains / (states * len(query)))


def _competing(
    before: NDArray[np.bool_],
    if_old: NDArray[np.bool_],
    if_new: NDArray[np.bool_],
    wrong: NDArray[np.bool_],
    ks: Sequence[int],
) -> NDArray[np.float64]:
    """Change of all queries' hits when each item's score, as a wrong answer, becomes the new one: (m,)."""
    ranks = (before & wrong).sum(axis=1)[:, None]
    # Only an item that comes before the answer under one model and not under the other changes a rank.
    change = np.where(wrong, if_new.astype(np.int8) - if_old.astype(np.int8), 0)
    without = ranks - (before & wrong)
    rows, items = np.nonzero(change)
    rank = without[rows, items]
    shift = np.zeros(len(rows))
    for k in ks:
        # Ranks below k hit: at rank k - 1 the item pushes the answer out, or lets it in again.
        shift -= change[rows, items] * (rank == k - 1)
    return np.bincount(items, weights=shift / len(ks), minlength=before.shape[1]).astype(np.float64)


def _hits(ranks: NDArray[np.int64], ks: Sequence[int]) -> NDArray[np.float64]:
    hits: NDArray[np.float64] = np.mean([ranks < k for k in ks], axis=0)
    return hits
