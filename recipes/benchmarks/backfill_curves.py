"""Does recall rise all along a backfill? Recall of the mixed gallery at every tenth, and each tenth's gain.

    python recipes/benchmarks/backfill_curves.py --flickr8k flickr8k_clip_pair.npz

The data, projections and merges are those of backfill_orders.py: everything is fitted or chosen on a support
set and measured on other images. With nothing backfilled the gallery is new/old, with everything new/new. The
paired gain of every tenth over the one before has a bootstrap interval, for R@1, R@5 and R@10 each; a step
whose interval lies below zero would be a fall. The lines are drawn beside the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from backfill_orders import Areas, interval
from backfill_worlds import OURS, merge_of, orders, worlds
from bench import write_report
from projection_splits import ScenesConfig, without_folders
from torch import Tensor

from xbt.backfill.curve import backfill_curve
from xbt.config import config_to_dict, run_recipe
from xbt.errors import ConfigError
from xbt.report import draw_backfill_curve

TENTHS = tuple(number / 10 for number in range(11))
KS = (1, 5, 10)
SHOWN = ("random", OURS)


@dataclass
class BackfillCurvesBenchmark:
    """Measure recall at every tenth of a backfill."""

    flickr8k: str | None = None
    """An .npz file with val_{old,new}_{image,text} and corpus_{old,new}_text."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """The built-in scenes."""
    seed: int = 0
    """Seed of the random orders."""
    sample_queries: int = 5000
    """Unlabelled captions that our order rehearses with."""
    results: str = "recipes/benchmarks/results/backfill_curves"
    """The results' path without suffix; the pictures add the data's name to it."""


def main(config: BackfillCurvesBenchmark) -> None:
    """Measure every split, and write the table and the pictures."""
    found: dict[str, Areas] = {}
    for world in worlds(config.flickr8k, [], config.scenes):
        print(f"{world.split.data}, split {world.split.number}", flush=True)
        made = orders(world, config.seed, config.sample_queries)
        of_data = found.setdefault(world.split.data, {})
        for name in SHOWN:
            hits = tenths(world.test, made[name], merge_of(world))
            for label, each in hits.items():
                of_data.setdefault(name, {}).setdefault(label, []).append((each, world.groups))
    if not found:
        raise ConfigError("there is nothing to measure on; give --flickr8k or scene seeds")
    falls, steps = count_falls(found)
    write_report(
        config.results,
        "Recall of a mixed gallery while it is backfilled, in percent",
        rows(found),
        "Mean of R@1, R@5 and R@10 of text queries in the image gallery, with the merge that the support "
        "chooses, and 95 % bootstrap interval (queries drawn image by image). 0 % is new/old, 100 % new/new. "
        f"Of the {steps} steps from one tenth to the next (R@1, R@5 and R@10, every column), {falls} have a "
        "paired interval that lies below zero.",
        steps=gains(found),
        config=without_folders(config_to_dict(config)),
    )
    for data, of_data in found.items():
        lines = {name.removesuffix(" (ours)"): means(of_data[name]) for name in SHOWN}
        draw_backfill_curve(TENTHS, lines, f"{config.results}_{data}.png")
    print(Path(f"{config.results}.md").read_text(encoding="utf-8"))


def tenths(scores: Any, order: Tensor, merge: Any) -> dict[str, Tensor]:
    """(11, n_queries) hits at every tenth, by cut-off."""
    return {f"R@{k}": backfill_curve(scores, order, merge, fractions=TENTHS, ks=(k,)).hits for k in KS}


def averaged(of_order: Mapping[str, list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Per split the mean over the cut-offs."""
    splits = zip(*of_order.values(), strict=True)
    return [(torch.stack([hits for hits, _ in each]).mean(dim=0), each[0][1]) for each in splits]


def rows(found: Mapping[str, Areas]) -> list[dict[str, str]]:
    """A row per tenth, a column per data and order."""
    table = [{"backfilled": f"{100 * tenth:.0f} %"} for tenth in TENTHS]
    for data, of_data in found.items():
        for name in SHOWN:
            per_split = averaged(of_data[name])
            for number, row in enumerate(table):
                row[f"{data}, {name}"] = str(interval([(hits[number], who) for hits, who in per_split]))
    return table


def means(of_order: Mapping[str, list[tuple[Tensor, Tensor]]]) -> list[float]:
    """The mean recall at every tenth."""
    return torch.cat([hits for hits, _ in averaged(of_order)], dim=1).mean(dim=1).tolist()


def gains(found: Mapping[str, Areas]) -> dict[str, dict[str, dict[str, list[list[float]]]]]:
    """Data, order, cut-off: every step's gain with its interval, as fractions."""
    return {
        data: {
            name: {label: [list(each) for each in step_gains(splits)] for label, splits in of_order.items()}
            for name, of_order in of_data.items()
        }
        for data, of_data in found.items()
    }


def step_gains(splits: list[tuple[Tensor, Tensor]]) -> list[Any]:
    """The paired gain of every tenth over the one before."""
    return [
        interval([(hits[number] - hits[number - 1], who) for hits, who in splits])
        for number in range(1, len(TENTHS))
    ]


def count_falls(found: Mapping[str, Areas]) -> tuple[int, int]:
    """Number of steps with an interval below zero, and number of all steps."""
    steps = [
        step
        for of_data in gains(found).values()
        for of_order in of_data.values()
        for each in of_order.values()
        for step in each
    ]
    return sum(high < 0 for _, _, high in steps), len(steps)


if __name__ == "__main__":
    run_recipe(main, BackfillCurvesBenchmark)
