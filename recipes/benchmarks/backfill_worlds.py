"""The worlds of the backfill benchmark, and what is fitted on each before anything is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from projection_splits import ScenesConfig, Split, halves, scenes
from torch import Tensor

from xbt.backfill.orders import (
    distance_to_mean_order,
    fastfill_order,
    oldest_first,
    query_log_order,
    random_order,
)
from xbt.backfill.rehearsal import fit_rehearsed_order
from xbt.index.calibration import MixedScores, compare_merges, fit_kind
from xbt.index.mixed import Merge
from xbt.projections import Projection, fit_projection

OURS = "rehearsed (ours)"
ORDERS = (
    "random",
    "oldest first",
    "query log",
    "distance to cluster mean",
    "distance to mean of all",
    "fastfill",
    OURS,
)
KINDS = ("affine", "isotonic", "rank", "raw")


@dataclass
class World:
    """A split with its projection and its merges.

    Attributes:
        split: What is fitted to and what is measured.
        projection: New queries to the old space, by which the old part is searched.
        support: Scores of the support's texts with its images.
        test: Scores of the texts to measure with their images.
        groups: (n,) the image of every text to measure.
        chosen: The kind of merge with the best cross-fitted recall on the support.
        merges: All kinds, fitted to the support.
    """

    split: Split
    projection: Projection
    support: MixedScores
    test: MixedScores
    groups: Tensor
    chosen: str
    merges: dict[str, Merge]

    def project(self, texts: Tensor) -> Tensor:
        """New text vectors in the old space."""
        with torch.no_grad():
            return self.projection(texts, "text")


def worlds(flickr8k: str | None, others: Sequence[str], of_scenes: ScenesConfig) -> Iterator[World]:
    """Every split of all data that is given, ready to be backfilled."""
    for path in [flickr8k, *others]:
        if path:
            for split in halves(path, "flickr8k" if path == flickr8k else Path(path).stem):
                yield prepare(split)
    for seed in of_scenes.seeds:
        yield prepare(scenes(of_scenes, seed))


def prepare(split: Split) -> World:
    """Fit the projection and the merges to what a split selects on."""
    support, asked = split.support, split.asked["T2I"]
    projection = fit_projection(*split.texts, "procrustes", pairs=support)
    assert support.new_images is not None
    assert asked.new_gallery is not None
    with torch.no_grad():
        old_support, old_test = projection(support.new_texts, "text"), projection(asked.new, "text")
    fitted = MixedScores(
        old_support, support.new_texts, support.old_images, support.new_images, support.positives("T2I")
    )
    measured = MixedScores(old_test, asked.new, asked.gallery, asked.new_gallery, asked.answers)
    found = compare_merges(fitted, KINDS, support.groups("T2I"))
    chosen = max(KINDS, key=lambda kind: found[kind])
    merges = {kind: fit_kind(kind, fitted) for kind in KINDS}
    return World(split, projection, fitted, measured, asked.groups, chosen, merges)


def orders(world: World, seed: int, sample_queries: int) -> Mapping[str, Tensor]:
    """Orders of the gallery to measure, by name.

    The log and the sample queries are captions of the corpus; none of them belongs to the gallery. There are
    no dates, so the order of the data is used as age.
    """
    support, gallery = world.split.support, world.split.asked["T2I"].gallery
    texts = world.split.texts[0]
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(texts))[:sample_queries])
    new_sample = texts[drawn]
    old_sample = world.project(new_sample)
    assert support.new_images is not None
    rehearsed = fit_rehearsed_order(
        world.project(support.new_texts),
        support.new_texts,
        support.old_images,
        support.new_images,
        support.positives("T2I"),
        merge_of(world),
        sample_old=old_sample,
        sample_new=new_sample,
        seed=seed,
    )
    return {
        "random": random_order(len(gallery), seed),
        "oldest first": oldest_first(range(len(gallery))),
        "query log": query_log_order(old_sample, gallery),
        "distance to cluster mean": distance_to_mean_order(gallery, seed=seed),
        "distance to mean of all": distance_to_mean_order(gallery, clusters=1),
        "fastfill": fastfill_order(
            gallery,
            support.old_images,
            support.new_images,
            support.new_texts,
            support.image_of_text,
            seed=seed,
        ),
        OURS: rehearsed.order(gallery),
    }


def merge_of(world: World) -> Merge:
    """The merge that was chosen; a rehearsal needs one that compares scores, as the best one always did."""
    chosen = world.merges[world.chosen]
    return world.merges["affine"] if chosen.by_rank else chosen
