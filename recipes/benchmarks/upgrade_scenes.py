"""Several seeds of the demo: what each stage of the upgrade gains on scenes never trained on.

    accelerate launch --num_processes 1 recipes/benchmarks/upgrade_scenes.py

Every seed trains both CLIPs, the projection and LoRA afresh on scenes and captions of its own. The results,
with versions, machine and seeds, go to JSON and a Markdown table beside it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xbt.config import config_to_dict, parse_config, run_recipe
from xbt.demo import DemoConfig, run_demo
from xbt.errors import ConfigError
from xbt.evaluation import RetrievalReport
from xbt.run_dir import versions, write_json

KS = (1, 5, 10)


@dataclass
class UpgradeBenchmark:
    """Run the demo with several seeds and put its cells together."""

    demo: str = "recipes/configs/quickstart.yaml"
    """The demo's config file; its seed and output directory are replaced by each run's own."""
    seeds: list[int] = field(default_factory=lambda: [3, 4, 5])
    """One run per seed; seeds 0 to 2 were used to choose the demo's models."""
    runs_dir: str = "runs/benchmarks/upgrade_scenes"
    """Folder of the runs; existing runs are continued, not repeated."""
    results: str = "recipes/benchmarks/results/upgrade_scenes.json"
    """The JSON file to write."""


def main(config: UpgradeBenchmark) -> None:
    """Run every seed and write the results."""
    if not config.seeds:
        raise ConfigError("--seeds is empty; give at least one")
    reports, base = {}, parse_config(DemoConfig, ["--config", config.demo])
    for seed in config.seeds:
        demo = replace(base, seed=seed, output_dir=f"{config.runs_dir}/seed_{seed}")
        reports[seed] = run_demo(demo)
    cells = summarise(reports)
    result = {
        "what": "R@k as fractions over unseen scenes, per seed; criterion: new/old strictly above old/old",
        "config": config_to_dict(base),
        "versions": versions(),
        "seeds": config.seeds,
        "cells": cells,
        "criterion_met_in_seeds": criterion_counts(reports),
    }
    target = write_json(Path(config.results), result)
    table = format_summary(cells, len(config.seeds))
    target.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    print(table)


def summarise(reports: dict[int, RetrievalReport]) -> dict[str, Any]:
    """Per cell, direction and k: the value of every seed, their mean, least and greatest."""
    names = [cell.name for cell in next(iter(reports.values())).cells]
    cells: dict[str, Any] = {}
    for name in names:
        for direction in ("T2I", "I2T"):
            for k in KS:
                values = [report.cell(name).recall(direction)[k] for report in reports.values()]
                cells.setdefault(name, {}).setdefault(direction, {})[f"R@{k}"] = {
                    "per_seed": values,
                    "mean": statistics.mean(values),
                    "min": min(values),
                    "max": max(values),
                }
    return cells


def criterion_counts(reports: dict[int, RetrievalReport]) -> dict[str, Any]:
    """In how many seeds each new/old cell beats old/old, per direction and k."""
    counts: dict[str, Any] = {}
    for report in reports.values():
        for name, verdict in report.verdicts.items():
            for direction, met in verdict.items():
                for k, good in met.items():
                    slot = counts.setdefault(name, {}).setdefault(direction, {})
                    slot[f"R@{k}"] = slot.get(f"R@{k}", 0) + int(good)
    return counts


def format_summary(cells: dict[str, Any], n_seeds: int) -> str:
    """A Markdown table: mean over the seeds in percent, with the least and the greatest in brackets."""
    heads = [f"{direction} R@{k}" for direction in ("T2I", "I2T") for k in KS]
    lines = [f"| query/gallery | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name, cell in cells.items():
        shown = [
            f"{100 * value['mean']:.1f} [{100 * value['min']:.1f}, {100 * value['max']:.1f}]"
            for direction in ("T2I", "I2T")
            for value in cell[direction].values()
        ]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", f"Mean over {n_seeds} seeds in percent, least and greatest in brackets."])


if __name__ == "__main__":
    run_recipe(main, UpgradeBenchmark)
