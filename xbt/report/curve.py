"""Expected recall while the gallery is backfilled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from xbt.backfill.curve import backfill_curve
from xbt.backfill.orders import random_order
from xbt.backfill.rehearsal import fit_rehearsed_order
from xbt.data.items import choose_subset
from xbt.evaluation import Interval, bootstrap_interval
from xbt.index.calibration import MixedScores, fit_merge
from xbt.index.mixed import Merge
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import random_access
from xbt.report.measure import Measured
from xbt.report.sample import Sample

FRACTIONS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
MAX_SCORES = 2**23
"""Maximum number of query–item pairs for the curve."""
MAX_REHEARSAL = 2**20
"""Maximum number of query–item pairs for the rehearsed order, which takes about 80 bytes a pair."""
SAMPLE_QUERIES = 1000
"""Number of texts of the corpus that serve as a query log."""
MIN_ITEMS = 40
"""Minimum number of images on either side; with fewer, a curve is noise."""


@dataclass(frozen=True)
class ExpectedCurve:
    """Recall of text queries in a partly backfilled gallery.

    ``recall`` holds, by order, the mean of R@k over the ks with its 95 % bootstrap interval at each fraction.
    """

    fractions: tuple[float, ...]
    recall: dict[str, tuple[Interval, ...]]
    merge: Merge
    n_queries: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "fractions": list(self.fractions),
            "mean_recall": {name: [list(point) for point in points] for name, points in self.recall.items()},
            "merge": self.merge.kind,
            "n_queries": self.n_queries,
        }


def expect_curve(chosen: Sample, measured: Measured, seed: int) -> ExpectedCurve | None:
    """Simulate the backfill of the measured images, in random and in rehearsed order.

    Merge and order are learned from the half of the sample that chose the method. The result is ``None`` if
    images have no new vectors or there are too few of them.
    """
    if measured.pairs.new_images is None or min(len(chosen), len(measured.pairs)) < MIN_ITEMS:
        return None
    learned = _limited(chosen.pairs, MAX_REHEARSAL)
    tested = _limited(measured.pairs, MAX_SCORES)
    kinds, groups = ("affine", "isotonic", "raw"), learned.groups("T2I")
    merge = fit_merge(*_sides(measured, learned), kinds=kinds, groups=groups, ks=measured.ks, seed=seed)
    old, new = _unlabelled(chosen, measured, seed) or _sides(measured, learned)[:2]
    rehearsed = fit_rehearsed_order(
        *_sides(measured, learned), merge, sample_old=old, sample_new=new, seed=seed
    )
    scores = MixedScores(*_sides(measured, tested))
    orders = {
        "random order": random_order(len(tested), seed),
        "rehearsed": rehearsed.order(tested.old_images),
    }
    recall = {}
    for name, order in orders.items():
        curve = backfill_curve(scores, order, merge, fractions=FRACTIONS, ks=measured.ks)
        recall[name] = tuple(bootstrap_interval(hits, tested.groups("T2I")) for hits in curve.hits)
    return ExpectedCurve(FRACTIONS, recall, merge, len(scores))


def _limited(pairs: PairVectors, max_scores: int) -> PairVectors:
    """The first images, such that queries × images stay within a bound."""
    per_image = len(pairs.image_of_text) / len(pairs)
    count = int(min(len(pairs), max(MIN_ITEMS, (max_scores / per_image) ** 0.5)))
    return pairs if count == len(pairs) else pairs.subset(range(count))


def _sides(measured: Measured, pairs: PairVectors) -> tuple[Tensor, Tensor, Tensor, Tensor, list[list[int]]]:
    """Old and new text queries, old and new images, and the images that answer each query."""
    assert pairs.new_images is not None
    old = measured.decision.queries(*pairs.queries("T2I"), "T2I")
    return old, pairs.new_texts, pairs.old_images, pairs.new_images, pairs.positives("T2I")


def _unlabelled(chosen: Sample, measured: Measured, seed: int) -> tuple[Tensor, Tensor] | None:
    """Texts of the corpus as queries in the old space and in the new one."""
    if chosen.corpus is None:
        return None
    rows = random_access(*chosen.corpus)
    new, old = rows.take(np.array(choose_subset(len(rows), SAMPLE_QUERIES, seed)))
    return measured.decision.queries(new, old, "T2I"), new
