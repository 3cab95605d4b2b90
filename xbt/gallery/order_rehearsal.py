"""An order that is learnt by rehearsing the backfill on a sample of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xbt.errors import ConfigError, DataError
from xbt.gallery.backfill_curve import backfill_curve
from xbt.gallery.backfill_ranks import MixedScores
from xbt.gallery.calibration import logistic_fit
from xbt.gallery.merge import Merge
from xbt.gallery.neighbours import nearest_items
from xbt.gallery.order_fastfill import out_of_fold
from xbt.gallery.order_features import FEATURES, FOUND, Slopes, item_features
from xbt.gallery.order_gains import moving_gains
from xbt.gallery.order_spread import spread_out
from xbt.gallery.orders import require_same_dim
from xbt.projections import Projection, fit_ridge
from xbt.vectors import Vectors, as_vectors

SPREADS = (0.0, 2.0)
"""Weights of the neighbours' share that are tried on the sample."""
FOLDS = 10
BELIEF = {"mean score": -1.0, "distance to the mean": 1.0}
"""What is believed beside that an item little found is urgent: so is one far from everything."""
_SHRINKAGE = 10.0


@dataclass(frozen=True)
class RehearsedOrder:
    """How urgent an item is, as learnt on a sample; made by :func:`fit_rehearsed_order`.

    Attributes:
        weights: One per feature of :data:`~xbt.gallery.order_features.FEATURES`.
        spread: By how much an item is less urgent when all of its neighbours are backfilled.
        slopes: Of both parts' log-odds of relevance.
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
        """Orders a gallery of which the old vectors alone are known, most urgent first.

        It compares all items with the n sample queries, and each with those near it
        (:func:`~xbt.gallery.neighbours.nearest_items`): O(m·n + m^1.5) products in a large gallery.

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
            raise DataError("the gallery has a single item, so there is nothing to order; give at least 2")
        with torch.no_grad():
            mapped = self.forward.project(items)
        cosines, rows = nearest_items(items)
        features = item_features(items, mapped, self.old_queries, self.new_queries, self.slopes, cosines)
        return spread_out(_standardised(features @ self.weights), rows, self.spread)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form of what was learnt, for the record."""
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
    """Learns on a sample of pairs what makes an item urgent, by backfilling the sample in thought.

    The method is ours. For every item of the sample the *gain* is measured: how much the hits change when
    this item moves to the new part, the others being backfilled or not at random
    (:func:`~xbt.gallery.order_gains.moving_gains`). The gain is then explained by what can be told of any
    item before it is backfilled (:mod:`~xbt.gallery.order_features`). The explanation starts from a belief,
    that items which few queries find and that lie far from the others come first, and ridge regression of
    what is left adds to it as far as the sample bears it out.

    One thing no single item shows: two items that are taken for each other are told apart as soon as one of
    them is backfilled. While the order is made, an item therefore loses urgency by the share of its
    neighbours that are already chosen; the weight of that share is the one with the greatest area under the
    sample's own curve.

    About 80 bytes are held per query and item of the sample: of 1,000 items with five queries each 400 MB.

    Args:
        old_queries: (q, old_dim) labelled queries of the sample in the old space.
        new_queries: (q, new_dim) the same in the new space.
        old_gallery: (n, old_dim) items of the sample under the old model.
        new_gallery: (n, new_dim) the same under the new model.
        positives: For every query the items that answer it.
        merge: How both parts will be merged; one that compares scores.
        sample_old: Unlabelled queries in the old space, such as captions.
        sample_new: The same in the new space.
        spreads: Weights of the neighbours' share to try; a single one is taken as it is.
        seed: Fixes folds and states.

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
    weights = _explained(features, _standardised(moving_gains(scores, merge, seed=seed)))
    urgency = _standardised(features @ weights)
    areas = {
        spread: backfill_curve(scores, spread_out(urgency, rows, spread), merge).area
        for spread in (spreads if len(spreads) > 1 else ())
    }
    chosen = max(spreads, key=lambda spread: areas.get(spread, 0.0))
    return RehearsedOrder(weights, chosen, slopes, fit_ridge(items, new, intercept=True), *asked)


def _explained(features: Tensor, gains: Tensor) -> Tensor:
    """Weights of the features: the belief, scaled to the gains, and a ridge regression of what is left."""
    belief = torch.tensor([BELIEF.get(name, -1.0 if name in FOUND else 0.0) for name in FEATURES])
    belief = belief / (features @ belief).std().clamp_min(1e-6)
    # The belief keeps a little weight even if the sample contradicts it: samples are small.
    slope = float(((features @ belief) * gains).mean().clamp_min(0.02))
    rest = gains - slope * (features @ belief)
    gram = features.T @ features / len(features) + _SHRINKAGE * torch.eye(features.shape[1])
    weights: Tensor = slope * belief + torch.linalg.solve(gram, features.T @ rest / len(features))
    return weights


def _standardised(values: Tensor) -> Tensor:
    values = values.float()
    spread = values.std()
    scaled: Tensor = (values - values.mean()) / (spread if float(spread) > 0 else 1.0)
    return scaled
