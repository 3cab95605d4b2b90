"""In how many cells a rule makes queries worse than doing nothing: ``auto`` and its peers, over many worlds.

    python recipes/benchmarks/auto_cells.py --flickr8k flickr8k_clip_pair.npz --lvis clip_lvis.npz

A cell is one world, corpus size, seed, direction and k. It is violated where the queries that a rule deploys
have a lower R@k than the old queries on test pairs that nobody has seen. The worlds are vectors of two models
of known quality (:mod:`xbt.data.synthetic`: a much better, a little better, an equal and a worse one, and
one better for texts alone), and, if they are given, the vectors of a pair of dual encoders on Flickr8k and
those of LVIS class names. With the old query beside it a new one has something to add in every world; without
it (``auto, no old query``) there are worlds in which nothing is to be gained, and the old query has to stay.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench import write_report
from projection_splits import Asked, Split, asked_of, class_folds, halves, without_folders
from torch import Tensor
from torch.nn.functional import normalize

from xbt.config import config_to_dict, run_recipe
from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.evaluation import best_positive_ranks
from xbt.projections import PairVectors, choose_projection, fit_ensemble, fit_procrustes

KS = (1, 5, 10)
RULES = (
    "procrustes",
    "procrustes + midpoint",
    "procrustes + nlerp",
    "procrustes + slerp",
    "procrustes + adaptive",
    "auto",
    "auto, no old query",
)


@dataclass
class AutoCellsBenchmark:
    """Count the cells in which a deployed query is worse than the old one."""

    flickr8k: str | None = None
    """An .npz file with val_{old,new}_{image,text} and corpus_{old,new}_text."""
    lvis: str | None = None
    """An .npz file with old_text, new_text and old_image, a row per class; the classes chosen by are the
    corpus, whatever the corpus sizes."""
    corpus_sizes: list[int] = field(default_factory=lambda: [100, 1000, 10_000, 30_000])
    """Texts that projections are fitted to."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the worlds of vectors."""
    support: int = 300
    """Images, with five texts each, by which the rules choose."""
    test: int = 500
    """Images to measure on."""
    confidence: float = 0.95
    """One-sided confidence that auto asks for."""
    results: str = "recipes/benchmarks/results/auto_cells"
    """The results' path without suffix."""


@dataclass
class Count:
    """Cells of one rule.

    Attributes:
        worse: Cells with a lower R@k than the old query.
        better: Cells with a higher one.
        cells: All.
        gain: Sum of the changes of R@k.
    """

    worse: int = 0
    better: int = 0
    cells: int = 0
    gain: float = 0.0

    def add(self, asked: Asked, queries: Tensor) -> None:
        """Count the cells of one direction."""
        ours, old = (best_positive_ranks(each, asked.gallery, asked.answers) for each in (queries, asked.old))
        for k in KS:
            change = int((ours < k).sum()) - int((old < k).sum())
            self.worse += change < 0
            self.better += change > 0
            self.cells += 1
            self.gain += change / len(old)


def main(config: AutoCellsBenchmark) -> None:
    """Run every world and write the counts."""
    counts: dict[str, dict[str, Count]] = {}
    started = time.perf_counter()
    for split in splits(config):
        for rule, queries in deployed(split, config).items():
            for direction, asked in split.asked.items():
                counts.setdefault(split.data, {}).setdefault(rule, Count()).add(asked, queries[direction])
        print(f"{time.perf_counter() - started:6.0f} s  {split.data}, {split.number}", flush=True)
    write_report(
        config.results,
        "Cells made worse than the old query, of all cells, and the mean change of R@k in points",
        [
            {
                "rule": rule,
                **{data: shown(of_data[rule]) for data, of_data in counts.items()},
                "all": shown(total(counts, rule)),
            }
            for rule in RULES
        ],
        f"Cells: corpus sizes {', '.join(map(str, config.corpus_sizes))} x seeds (or halves) x T2I and I2T x "
        f"k = 1, 5, 10. All rules but the first two choose on the same {config.support} images with five "
        f"texts each ({_chosen_by(config)}). auto deploys a direction only if its mean gain over the ks is "
        f"above 0 with {100 * config.confidence:g} % one-sided confidence, and the old query otherwise; "
        "'no old query' may not mix the old query with the new one.",
        counts={
            data: {rule: vars(count) for rule, count in of_data.items()} for data, of_data in counts.items()
        },
        config=without_folders(config_to_dict(config)),
    )
    print(Path(f"{config.results}.md").read_text(encoding="utf-8"))


def deployed(split: Split, config: AutoCellsBenchmark) -> dict[str, dict[str, Tensor]]:
    """The queries that each rule searches with, by direction."""
    projection = fit_procrustes(*split.texts)
    found: dict[str, dict[str, Tensor]] = {rule: {} for rule in RULES}
    ensembles = {
        mode: fit_ensemble(split.support, projection, mode).ensemble
        for mode in ("nlerp", "slerp", "adaptive")
    }
    decisions = {
        name: choose_projection(
            *(split.corpus or (None, None)),
            pairs=split.support,
            use_old=use_old,
            confidence=config.confidence,
        )
        for name, use_old in (("auto", True), ("auto, no old query", False))
    }
    with torch.no_grad():
        for direction, asked in split.asked.items():
            new = projection(asked.new)
            found["procrustes"][direction] = new
            found["procrustes + midpoint"][direction] = normalize(asked.old + new, dim=1)
            for mode, ensemble in ensembles.items():
                found[f"procrustes + {mode}"][direction] = ensemble(asked.old, new, direction)
            for name, decision in decisions.items():
                found[name][direction] = decision.queries(asked.new, asked.old, direction)
    return found


def splits(config: AutoCellsBenchmark) -> Iterator[Split]:
    """All worlds, seeds and corpus sizes."""
    for name, models in WORLDS.items():
        for seed in config.seeds:
            for size in config.corpus_sizes:
                world = make_vector_world(*models, size, config.support, config.test, seed)
                yield Split(
                    f"new model {name}",
                    seed,
                    (world.corpus_new, world.corpus_old),
                    PairVectors(**world.support),
                    asked_of(PairVectors(**world.test)),
                )
    if config.flickr8k:
        for split in halves(config.flickr8k, "flickr8k"):
            assert split.corpus is not None
            for size in config.corpus_sizes:
                corpus = split.corpus[0][:size], split.corpus[1][:size]
                yield Split(split.data, split.number, corpus, split.support, split.asked)
    if config.lvis:
        yield from class_folds(config.lvis)


def _chosen_by(config: AutoCellsBenchmark) -> str:
    """Pairs for the choice on the given data."""
    lvis = "; of LVIS four fifths of the class names, and text queries alone" if config.lvis else ""
    return f"500 of Flickr8k{lvis}"


def shown(count: Count) -> str:
    """Violations of all cells, and the mean change in points."""
    return f"{count.worse}/{count.cells} ({100 * count.gain / count.cells:+.1f})"


def total(counts: dict[str, dict[str, Count]], rule: str) -> Count:
    """A rule's counts over all worlds."""
    own = [of_data[rule] for of_data in counts.values()]
    return Count(*(sum(getattr(each, name) for each in own) for name in vars(Count())))


if __name__ == "__main__":
    run_recipe(main, AutoCellsBenchmark)
