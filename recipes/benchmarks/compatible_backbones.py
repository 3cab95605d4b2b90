"""Comparison of backward-compatible backbones: BCT, BT², OCA, and Procrustes, which needs no training.

    python recipes/benchmarks/compatible_backbones.py --images.source tiny_imagenet100_32px

Five tables: one upgrade from 20 to 40 classes on worlds of vectors; there, BT² with more and more extra
dimensions, and a chain of three versions; real images (a data set in Hugging Face's form, split by classes);
and CLIPs upgraded on the built-in scenes. Every figure is a mean over the seeds with its 95 % bootstrap
interval over them. A part without seeds or source is left out, and what an earlier run wrote of it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import write_report
from compatible_clips import ClipsConfig, clip_cells
from compatible_images import ImagesConfig, image_cells
from compatible_worlds import CHAIN, CLASSES, OLD_CLASSES, WorldsConfig, chain, one_step, sweep
from tqdm import tqdm

from xbt.config import config_to_dict, run_recipe
from xbt.errors import ConfigError
from xbt.evaluation import CompatibilityMatrix, over_seeds

METRICS = ("top-1", "mAP")


@dataclass
class CompatibleBackbonesBenchmark:
    """Compare backbones that were trained to be compatible, with each other and with Procrustes."""

    worlds: WorldsConfig = field(default_factory=WorldsConfig)
    """Worlds of vectors."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    """Real images."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """CLIP upgrades."""
    threads: int = 2
    """Threads of torch."""
    results: str = "recipes/benchmarks/results/compatible_backbones"
    """The results' path; each table adds its name to it."""


def main(config: CompatibleBackbonesBenchmark) -> None:
    """Run every part that has seeds and write its table."""
    torch.set_num_threads(config.threads)
    ran = [run_worlds(config), run_images(config), run_clips(config)]
    if not any(ran):
        raise ConfigError("nothing is left to run; give --worlds.seeds, --images.source or --clips.seeds")


def run_worlds(config: CompatibleBackbonesBenchmark) -> bool:
    """The three tables on worlds of vectors."""
    seeds = config.worlds.seeds
    if not seeds:
        return False
    setting = (
        f"{len(seeds)} worlds of {CLASSES} classes, of which the old model knows {OLD_CLASSES}; MLPs of "
        f"{config.worlds.dim} dimensions"
    )
    with_extra = f"{setting} and {config.worlds.extra_dims} extra ones."
    found = per_seed(seeds, one_step, config.worlds)
    write(config, "worlds", "One upgrade, worlds of vectors", found, with_extra)
    found = per_seed(seeds, sweep, config.worlds)
    write(config, "sweep", "BT²'s extra dimensions", found, f"{setting}; λ1 = {config.worlds.new_weight:g}.")
    matrices = {seed: chain(config.worlds, seed) for seed in tqdm(seeds, desc="chains")}
    rows = [chain_row(method, [matrices[seed][method] for seed in seeds]) for method in matrices[seeds[0]]]
    steps = " → ".join(str(count) for count in CHAIN)
    notes = (
        f"mAP in percent of query model / gallery model. {len(seeds)} worlds, versions of {steps} classes, "
        "each compatible with the whole vector of the one before. AC: pairs of versions above the gallery's "
        "own model; AM: mean of all cells."
    )
    record = {"config": config_to_dict(config.worlds), "seeds": seeds, "matrices": matrices}
    write_report(f"{config.results}_chain", "A chain of three versions", rows, notes, **record)
    return True


def run_images(config: CompatibleBackbonesBenchmark) -> bool:
    """The table on real images."""
    if config.images.source is None or not config.images.seeds:
        return False
    found = per_seed(config.images.seeds, image_cells, config.images)
    write(config, "images", "One upgrade, real images", found, config.images.describe())
    return True


def run_clips(config: CompatibleBackbonesBenchmark) -> bool:
    """The table of CLIP upgrades, whose cells are rows."""
    seeds = config.clips.seeds
    if not seeds:
        return False
    found = per_seed(seeds, clip_cells, config.clips)
    rows = [
        {"query/gallery": name, **{key: str(interval(found, name, key)) for key in found[seeds[0]][name]}}
        for name in found[seeds[0]]
    ]
    notes = f"R@1 in percent, mean over {len(seeds)} seeds with its 95 % bootstrap interval over the seeds."
    record = {"config": config_to_dict(config.clips), "seeds": seeds, "cells": found}
    write_report(f"{config.results}_clips", "CLIP upgrades on the scenes", rows, notes, **record)
    return True


def per_seed(seeds: Sequence[int], run: Any, settings: Any) -> dict[int, dict[str, dict[str, float]]]:
    """Results of ``run`` for every seed."""
    return {seed: run(settings, seed) for seed in tqdm(seeds, desc=run.__name__)}


def write(
    config: CompatibleBackbonesBenchmark,
    name: str,
    title: str,
    found: Mapping[int, Mapping[str, Mapping[str, float]]],
    setting: str,
) -> None:
    """A table with a row per method: old/old first, then what each reaches and what compatibility costs."""
    seeds = list(found)
    methods = list(found[seeds[0]])
    old = {f"{metric} new/old": interval(found, methods[0], f"{metric} old/old") for metric in METRICS}
    rows = [row("old/old", old)]
    for method in methods:
        cells = {
            f"{metric} {cell}": interval(found, method, f"{metric} {cell}")
            for metric in METRICS
            for cell in ("new/old", "new/new")
        }
        met = [found[seed][method]["mAP new/old"] > found[seed][method]["mAP old/old"] for seed in seeds]
        rows.append({**row(method, cells), "criterion (mAP)": f"{sum(met)}/{len(met)}"})
        if "independent" in methods:
            tax = [
                found[seed]["independent"]["mAP new/new"] - found[seed][method]["mAP new/new"]
                for seed in seeds
            ]
            rows[-1]["tax (mAP)"] = str(over_seeds(tax))
    heads = list(rows[-1])
    table = [{head: each.get(head, "") for head in heads} for each in rows]
    notes = (
        f"Percent; mean over {len(seeds)} seeds with its 95 % bootstrap interval over the seeds. {setting} "
        "Queries and gallery are the test items of all classes, a query's own item left out; the first row "
        "is old/old, which new/old must exceed."
    )
    if "independent" in methods:
        notes += " Tax: new/new of the independent model less the method's."
    record = {"config": recorded(config), "seeds": seeds, "cells": found}
    write_report(f"{config.results}_{name}", title, table, notes, **record)


def recorded(config: CompatibleBackbonesBenchmark) -> dict[str, Any]:
    """The config as it goes on record: of the images the name, not where they lie on this machine."""
    record = config_to_dict(config)
    if config.images.source is not None:
        record["images"]["source"] = Path(config.images.source).name
    return record


def row(method: str, cells: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table."""
    return {"method": method, **{name: str(value) for name, value in cells.items()}}


def interval(found: Mapping[int, Mapping[str, Mapping[str, float]]], method: str, key: str) -> Any:
    """The mean over the seeds."""
    return over_seeds([values[method][key] for values in found.values()])


def chain_row(method: str, matrices: Sequence[Mapping[str, Iterable[Iterable[float]]]]) -> dict[str, str]:
    """A method's cells below the diagonal and on it, and what sums them up."""
    values = np.array([[list(line) for line in matrix["mAP"]] for matrix in matrices])
    names = [f"v{number}" for number in range(values.shape[1])]
    cells = {
        f"{names[i]}/{names[j]}": str(over_seeds(values[:, i, j].tolist()))
        for i in range(len(names))
        for j in range(i + 1)
    }
    judged = [CompatibilityMatrix(names, matrix) for matrix in values]
    met = [matrix.average_compatibility() for matrix in judged]
    return {
        "method": method,
        **cells,
        "AC": f"{sum(each[0] for each in met)}/{sum(each[1] for each in met)}",
        "AM": str(over_seeds([matrix.average_metric() for matrix in judged])),
    }


if __name__ == "__main__":
    run_recipe(main, CompatibleBackbonesBenchmark)
