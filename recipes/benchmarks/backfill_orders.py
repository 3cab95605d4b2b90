"""In what order to backfill, and how to merge the two parts while it lasts: areas under the recall curve.

    python recipes/benchmarks/backfill_orders.py --flickr8k flickr8k_clip_pair.npz

Text queries search images of which a growing part is backfilled. What is learnt or chosen is so on a support
set, what is measured on other images: on Flickr8k vectors one half of the validation images each, both ways,
and on the built-in scenes one pair of small CLIPs per seed (``--scenes.seeds``). Other vectors come in as
.npz files with the keys of the Flickr8k file (``--others``). The seeds of ``--seeds`` are those of whatever
an order draws at random. Two tables are written: orders, and ways to merge under the random order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from backfill_worlds import KINDS, ORDERS, OURS, World, merge_of, orders, worlds
from bench import write_report
from projection_splits import ScenesConfig, without_folders
from torch import Tensor

from xbt.backfill.curve import BackfillCurve, backfill_curve, stopping_point
from xbt.backfill.orders import random_order
from xbt.config import config_to_dict, run_recipe
from xbt.errors import ConfigError
from xbt.evaluation import Interval, bootstrap_interval

Areas = dict[str, dict[str, list[tuple[Tensor, Tensor]]]]
"""Data, contender: per split the area of every query, mean over the seeds, and the image of every query."""


@dataclass
class BackfillOrdersBenchmark:
    """Compare orders of backfilling and ways to merge."""

    flickr8k: str | None = None
    """An .npz file with val_{old,new}_{image,text} and corpus_{old,new}_text."""
    others: list[str] = field(default_factory=list)
    """More files like that of flickr8k."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """The built-in scenes."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Seeds of the random orders."""
    sample_queries: int = 5000
    """Unlabelled captions that serve as a query log."""
    step: int = 100
    """Number of next items for the stopping rule."""
    results: str = "recipes/benchmarks/results/backfill_orders"
    """The results' path without suffix; the table of merges has ``_merges`` behind it."""


def main(config: BackfillOrdersBenchmark) -> None:
    """Run every split and write both tables."""
    by_order: Areas = {}
    by_merge: Areas = {}
    record: dict[str, Any] = {}
    for world in worlds(config.flickr8k, config.others, config.scenes):
        data = world.split.data
        print(f"{data}, split {world.split.number}", flush=True)
        made = [orders(world, seed, config.sample_queries) for seed in config.seeds]
        curves = order_curves(world, made)
        merged = merge_curves(world, config.seeds[:2])
        add(by_order.setdefault(data, {}), curves, world.groups)
        add(by_merge.setdefault(data, {}), merged, world.groups)
        record[f"{data}_{world.split.number}"] = {
            "merge": {"chosen": world.chosen, **merge_of(world).to_dict()},
            "orders": {name: mean_curve(found) for name, found in curves.items()},
            "merges": {name: mean_curve(found) for name, found in merged.items()},
            "stopping_point": stops(world, made[0], config.step),
        }
    if not by_order:
        raise ConfigError("there is nothing to measure on; give --flickr8k, --others or scene seeds")
    settings = without_folders(config_to_dict(config))
    write_report(
        config.results,
        "Area under the recall curve of a backfill, in percent, by order",
        rows(by_order, ORDERS, OURS),
        "Mean of R@1, R@5 and R@10 of text queries in the image gallery, over 0, 5, ..., 100 % backfilled, "
        "mean over the splits and seeds, and 95 % bootstrap interval (queries drawn image by image). *ours "
        "minus it*: paired, with its interval. The merge is the one that the support chooses. The log's "
        "queries are captions that belong to no image of the gallery, and the order of the data is used as "
        "age.",
        splits=record,
        config=settings,
    )
    chosen = {name: each["merge"]["chosen"] for name, each in record.items()}
    write_report(
        f"{config.results}_merges",
        "Area under the recall curve of a backfill in random order, in percent, by merge",
        rows(by_merge, KINDS, None),
        "As the table of orders, with the first two seeds. All are fitted to the support. Chosen on it: "
        f"{chosen}.",
        config=settings,
    )
    for name in ("", "_merges"):
        print(Path(f"{config.results}{name}.md").read_text(encoding="utf-8"))


def order_curves(world: World, found: Sequence[Mapping[str, Tensor]]) -> dict[str, list[BackfillCurve]]:
    """Every order's curve, one per seed."""
    merge = merge_of(world)
    return {name: [backfill_curve(world.test, each[name], merge) for each in found] for name in ORDERS}


def merge_curves(world: World, seeds: Sequence[int]) -> dict[str, list[BackfillCurve]]:
    """Every merge's curves under the random orders."""
    count = world.test.old.shape[1]
    return {
        kind: [backfill_curve(world.test, random_order(count, seed), world.merges[kind]) for seed in seeds]
        for kind in KINDS
    }


def stops(world: World, found: Mapping[str, Tensor], step: int) -> dict[str, Any]:
    """Stopping positions of our order and of the random one."""
    merge = merge_of(world)
    return {
        name: vars(stopping_point(world.test, found[name], merge, step=step, groups=world.groups))
        for name in ("random", OURS)
    }


def add(
    areas: dict[str, list[tuple[Tensor, Tensor]]],
    curves: Mapping[str, Sequence[BackfillCurve]],
    groups: Tensor,
) -> None:
    """Add a split's area per query, mean over its curves."""
    for name, found in curves.items():
        per_query = torch.stack([curve.hits.mean(dim=0) for curve in found]).mean(dim=0)
        areas.setdefault(name, []).append((per_query, groups))


def mean_curve(curves: Sequence[BackfillCurve]) -> dict[str, Any]:
    """The mean over the seeds, and every seed's area."""
    recall = torch.tensor([curve.recall for curve in curves], dtype=torch.float64)
    return {
        "fractions": list(curves[0].fractions),
        "recall": recall.mean(dim=0).tolist(),
        "areas": [curve.area for curve in curves],
    }


def rows(areas: Areas, names: Sequence[str], ours: str | None) -> list[dict[str, str]]:
    """The table: a row per contender, and per data its area and what ours has more."""
    table = []
    for name in names:
        row = {"order" if ours else "merge": name}
        for data, found in areas.items():
            row[data] = str(interval(found[name]))
            if ours:
                row[f"ours minus it, {data}"] = "" if name == ours else gain(found[ours], found[name])
        table.append(row)
    return table


def gain(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> str:
    """The paired difference with its sign, to a hundredth of a point."""
    paired = [(mine - other, groups) for (mine, groups), (other, _) in zip(ours, theirs, strict=True)]
    found = interval(paired)
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.estimate:+.2f} [{low:+.2f}, {high:+.2f}]"


def interval(per_split: list[tuple[Tensor, Tensor]]) -> Interval:
    """The mean over all queries of all splits; images are drawn."""
    sizes = [int(groups.max()) + 1 for _, groups in per_split]
    owner = torch.cat([groups + sum(sizes[:number]) for number, (_, groups) in enumerate(per_split)])
    return bootstrap_interval(torch.cat([values for values, _ in per_split]), owner)


if __name__ == "__main__":
    run_recipe(main, BackfillOrdersBenchmark)
