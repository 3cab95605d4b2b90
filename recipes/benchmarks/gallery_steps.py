"""Gallery-side steps in an old gallery: old and new queries with the same steps, with and without pairs.

    python recipes/benchmarks/gallery_steps.py --flickr8k flickr8k_clip_pair.npz --lvis clip_lvis.npz \
        --verite verite_clip_pair.npz

Settings are chosen on one part of the data and measured on another: halves of Flickr8k's validation photos,
five folds of LVIS's classes, five folds of VERITE's articles, and the built-in scenes. Where a row of the
gallery belongs to a pair that the steps were made from, its own captions do not count for it. The old query
is given the best steps of its own, chosen by the same climb on the same pairs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from bench import write_report
from projection_splits import (
    Asked,
    ScenesConfig,
    Split,
    article_folds,
    class_folds,
    halves,
    scenes,
    without_folders,
)
from torch import Tensor
from torch.nn.functional import normalize

from xbt.config import config_to_dict, run_recipe
from xbt.errors import ConfigError
from xbt.evaluation import Interval, best_positive_ranks, bootstrap_interval
from xbt.projections import Decision, choose_projection, fit_caption_map, fit_projection, hubness
from xbt.projections.auto.steps import HUB_K, MAX_BANK, Items, StepSetting

KS = (1, 5, 10)
OLD, OLD_BIAS, OLD_STEPS, NEW_NEW = "old/old", "old + CSLS", "old + its best steps", "new/new"
MIDPOINT, UNVERIFIED = "procrustes + midpoint", "procrustes + midpoint, unverified steps"
AUTO, AUTO_STEPS = "auto", "auto with steps"
METHODS = (OLD, OLD_BIAS, OLD_STEPS, MIDPOINT, UNVERIFIED, AUTO, AUTO_STEPS, NEW_NEW)
COMPARED = (
    (AUTO_STEPS, OLD_BIAS),
    (AUTO_STEPS, OLD_STEPS),
    (AUTO_STEPS, AUTO),
    (UNVERIFIED, MIDPOINT),
    (UNVERIFIED, OLD),
)
"""Of which differences are shown."""


@dataclass
class GalleryStepsBenchmark:
    """Compare queries with and without gallery-side steps on held-out data."""

    flickr8k: str | None = None
    """An .npz file with val_{old,new}_{image,text}, corpus_{old,new}_text and train_{old,new}_image."""
    lvis: str | None = None
    """An .npz file with old_text, new_text and old_image of the same classes."""
    verite: str | None = None
    """An .npz file with {old,new}_{image,text}, pairs and text_article."""
    scenes: ScenesConfig = field(default_factory=lambda: ScenesConfig(seeds=[]))
    """The built-in scenes; by default none."""
    results: str = "recipes/benchmarks/results/gallery_steps"
    """The results' path without suffix."""


@dataclass
class Ranks:
    """Ranks of one method in one direction, all splits joined.

    Attributes:
        ranks: (n,) of the queries.
        groups: (n,) the image of each, counted through.
    """

    ranks: Tensor
    groups: Tensor

    def joined(self, ranks: Tensor, groups: Tensor) -> Ranks:
        """These and the ranks of one more split."""
        start = int(self.groups.max()) + 1 if len(self.groups) else 0
        return Ranks(torch.cat([self.ranks, ranks]), torch.cat([self.groups, groups + start]))

    def recall(self, k: int) -> Interval:
        """R@k with a bootstrap interval; images are drawn."""
        return bootstrap_interval((self.ranks < k).double(), self.groups)

    def gain(self, other: Ranks, k: int) -> Interval:
        """R@k less that of another method with the same queries."""
        change = (self.ranks < k).double() - (other.ranks < k).double()
        return bootstrap_interval(change, self.groups)


Found = dict[tuple[str, str, str], Ranks]
"""Data, direction and method."""


def main(config: GalleryStepsBenchmark) -> None:
    """Run every split and write the results."""
    found: Found = {}
    seconds: dict[str, list[float]] = {}
    settings: list[dict[str, Any]] = []
    for split in splits(config):
        start = time.process_time()
        decision = choose_projection(*(split.corpus or (None, None)), pairs=split.support)
        seconds.setdefault(split.data, []).append(time.process_time() - start)
        settings.append(setting_of(split, decision))
        unverified = without_pairs(split)
        for direction, asked in split.asked.items():
            for method, ranks in ranks_of(split, direction, asked, decision, unverified).items():
                key = (split.data, direction, method)
                before = found.get(
                    key, Ranks(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
                )
                found[key] = before.joined(ranks, asked.groups)
        print(f"{split.data}, split {split.number}: {decision}", flush=True)
    if not found:
        raise ConfigError("there is nothing to measure on; give --flickr8k, --lvis, --verite or scene seeds")
    write_report(
        config.results,
        "Gallery-side steps: queries in the old gallery",
        table(found),
        "R@1/5/10 in percent over all splits, R@1 with a 95 % bootstrap interval (images drawn). Settings "
        f"are chosen on other images than these. {'. '.join(differences(found))}.",
        intervals=in_full(found),
        settings=settings,
        choose_cpu_seconds=seconds,
        config=without_folders(config_to_dict(config)),
    )


def splits(config: GalleryStepsBenchmark) -> Iterator[Split]:
    """All splits of all data."""
    if config.flickr8k:
        yield from halves(config.flickr8k, "flickr8k")
    if config.lvis:
        yield from class_folds(config.lvis)
    if config.verite:
        yield from article_folds(config.verite)
    for seed in config.scenes.seeds:
        yield scenes(config.scenes, seed)


def setting_of(split: Split, decision: Decision) -> dict[str, Any]:
    """What was chosen on a split."""
    shares = {} if decision.steps is None else decision.steps.shares
    return {
        "data": split.data,
        "split": split.number,
        "candidate": decision.name,
        "shares": dict(shares),
        "bias": {direction: bias.weight for direction, bias in decision.bias.items()},
        "control": {direction: str(tests.control) for direction, tests in decision.step_tests.items()},
    }


def without_pairs(split: Split) -> Decision | None:
    """The decision by the corpus and unlabelled images alone; ``None`` where the pairs' texts are all."""
    if split.corpus is None:
        return None
    images, old_images = split.support.new_images, split.support.old_images
    bank = None if images is None else (images, old_images)
    return choose_projection(*split.corpus, images=bank, accept_unverified=True)


def ranks_of(
    split: Split, direction: str, asked: Asked, decision: Decision, unverified: Decision | None
) -> dict[str, Tensor]:
    """Ranks of all methods in one direction."""
    text_only = fit_projection(*split.texts, "procrustes")
    modality = "text" if direction == "T2I" else "image"
    with torch.no_grad():
        midpoint = normalize(asked.old + text_only(asked.new, modality), dim=1)

    def ranks(queries: Tensor, rows: Tensor) -> Tensor:
        return best_positive_ranks(queries, rows, asked.answers)

    control = decision.step_tests[direction].control
    found = {
        OLD: ranks(asked.old, asked.gallery),
        OLD_BIAS: ranks(*old_with_steps(split, direction, asked, StepSetting("old", weight=0.5))),
        OLD_STEPS: ranks(*old_with_steps(split, direction, asked, control)),
        MIDPOINT: ranks(midpoint, asked.gallery),
        AUTO: ranks(decision.queries(asked.new, asked.old, direction), asked.gallery),
        AUTO_STEPS: ranks(*with_steps(decision, direction, asked)),
    }
    if unverified is not None:
        found[UNVERIFIED] = ranks(*with_steps(unverified, direction, asked))
    if asked.new_gallery is not None:
        found[NEW_NEW] = ranks(asked.new, asked.new_gallery)
    return {method: found[method] for method in METHODS if method in found}


def with_steps(decision: Decision, direction: str, asked: Asked) -> tuple[Tensor, Tensor]:
    """Queries and rows of what a decision deploys."""
    if decision.steps is None or not decision.has_steps(direction):
        return decision.queries(asked.new, asked.old, direction), asked.gallery
    rows = decision.steps.rows(direction, asked.gallery, asked.own)
    return decision.step_queries(asked.new, asked.old, direction), rows


def old_with_steps(split: Split, direction: str, asked: Asked, setting: StepSetting) -> tuple[Tensor, Tensor]:
    """The old query with its own steps: a map from old vectors to old vectors, and a bias."""
    pairs = split.support
    belongs = torch.arange(len(pairs))
    if split.corpus is not None:
        texts = Items.of(split.corpus[1], split.corpus[1])
    else:
        texts = Items.of(pairs.old_texts, pairs.old_texts, pairs.image_of_text)
    bank = texts if direction == "T2I" else Items.of(pairs.old_images, pairs.old_images, belongs)
    bank, share = bank.spread(MAX_BANK), setting.share
    rows = (1 - share) * asked.gallery
    queries, asked_by = (1 - share) * asked.old, bank.old
    if setting.rule is not None:
        modality = "image" if direction == "T2I" else "text"
        made = fit_caption_map(texts.old, texts.old, rules={modality: setting.rule}, owners=texts.owners)
        rows = torch.cat([rows, share * made(asked.gallery, modality, asked.own)], dim=1)
        queries, asked_by = (torch.cat([each, each], dim=1) for each in (asked.old, bank.old))
    hubs = setting.weight * hubness(rows, asked_by, HUB_K, asked.own, bank.owners)
    return with_ones(queries), torch.cat([rows, -hubs[:, None]], dim=1)


def with_ones(queries: Tensor) -> Tensor:
    """Queries with a 1 that meets the rows' bias."""
    return torch.cat([queries, queries.new_ones(len(queries), 1)], dim=1)


def table(found: Found) -> list[dict[str, str]]:
    """A row per method, a column per data and direction."""
    columns = list(dict.fromkeys((data, direction) for data, direction, _ in found))
    return [
        {
            "method": method,
            **{f"{data} {way}": shown(found.get((data, way, method))) for data, way in columns},
        }
        for method in METHODS
    ]


def shown(ranks: Ranks | None) -> str:
    """R@1 with its interval, R@5 and R@10."""
    if ranks is None:
        return ""
    return f"{ranks.recall(1)} / {' / '.join(f'{100 * ranks.recall(k).estimate:.1f}' for k in KS[1:])}"


def differences(found: Found) -> Iterator[str]:
    """A sentence per comparison."""
    for data, way in dict.fromkeys((data, way) for data, way, _ in found):
        for ours, theirs in COMPARED:
            mine, other = (found.get((data, way, method)) for method in (ours, theirs))
            if mine is not None and other is not None:
                estimate, low, high = (100 * value for value in mine.gain(other, 1))
                yield f"{data} {way}: {ours} minus {theirs} {estimate:+.1f} [{low:+.1f}, {high:+.1f}]"


def in_full(found: Found) -> Mapping[str, Any]:
    """All recalls and differences with intervals, for the JSON file."""
    recalls = {" ".join(key): {f"R@{k}": list(ranks.recall(k)) for k in KS} for key, ranks in found.items()}
    gains = {
        f"{data} {way} {ours} minus {theirs}": {
            f"R@{k}": list(found[data, way, ours].gain(found[data, way, theirs], k)) for k in KS
        }
        for data, way in dict.fromkeys((data, way) for data, way, _ in found)
        for ours, theirs in COMPARED
        if (data, way, ours) in found and (data, way, theirs) in found
    }
    return {"recall": recalls, "gains": gains}


if __name__ == "__main__":
    run_recipe(main, GalleryStepsBenchmark)
