"""Every projection, every ensemble and ``auto`` on the same splits: what new queries find in an old gallery.

    python recipes/benchmarks/projections.py --flickr8k flickr8k_clip_pair.npz --lvis clip_lvis.npz

Three kinds of data, several splits of each: the built-in scenes, on which two small CLIPs are trained per
seed (``--scenes.seeds``); a pair of dual encoders on Flickr8k, selected on one half of the validation images
and measured on the other; and real CLIPs' vectors of LVIS class names and exemplars, in five folds of the
classes. Other vectors come in as folders of stores (``old_images``, ``new_images``, ``old_texts``,
``new_texts``, maybe ``old_corpus`` and ``new_corpus``; see ``projection_stores.py``) or as .npz files with
the keys of the Flickr8k file (``--others '["stores/", "mine.npz"]'``). Data that is not given is left out.
Per split, method and direction a JSON file is written; the table shows the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench import write_report
from projection_splits import ScenesConfig, Split, class_folds, halves, scenes, without_folders
from torch import Tensor
from torch.nn.functional import normalize

from xbt.config import config_to_dict, run_recipe
from xbt.errors import ConfigError
from xbt.evaluation import Interval, best_positive_ranks, bootstrap_interval
from xbt.projections import (
    Decision,
    Projection,
    choose_projection,
    fit_ensemble,
    fit_projection,
    tune_on_pairs,
)
from xbt.run_dir import write_json

KS = (1, 5, 10)
OLD, NEW_NEW, PROCRUSTES, MIDPOINT, AUTO = "old/old", "new/new", "procrustes", "procrustes + midpoint", "auto"
CENTRED, TUNED = "procrustes, centred", "tuned on pairs"
TEXT_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("identity", {}),
    "mean_shift": ("mean_shift", {}),
    "procrustes": ("procrustes", {}),
    CENTRED: ("procrustes", {"centring": "joint"}),
    "procrustes, scaled": ("procrustes", {"scale": True}),
    "ridge": ("ridge", {}),
    "low_rank": ("low_rank", {}),
    "whitened_procrustes": ("whitened_procrustes", {}),
    "lambda_orthogonal": ("lambda_orthogonal", {}),
    "mlp": ("mlp", {}),
    "xbt": ("xbt", {}),
}
PAIR_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "procrustes, pairs": ("procrustes", {}),
    "procrustes, centred by modality, pairs": ("procrustes", {"centring": "modality"}),
    "ridge, pairs": ("ridge", {}),
    "xbt, pairs": ("xbt", {}),
}
TRAINED = {"lambda_orthogonal", "mlp", "xbt"}


@dataclass
class ProjectionsBenchmark:
    """Compare all projections, ensembles and auto on the same splits."""

    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """The built-in scenes."""
    flickr8k: str | None = None
    """An .npz file with val_{old,new}_{image,text} and corpus_{old,new}_text."""
    lvis: str | None = None
    """An .npz file with old_text, new_text and old_image of the same classes."""
    others: list[str] = field(default_factory=list)
    """Folders of stores of both models, and more files like that of flickr8k."""
    trained_steps: int = 300
    """Steps of the trained projections."""
    thorough: bool = False
    """Let auto try the trained projections too."""
    results: str = "recipes/benchmarks/results/projections"
    """The results' path without suffix; the files of single cells go to a folder of that name beside it."""


@dataclass
class Result:
    """One method in one direction of one split.

    Attributes:
        ranks: (n,) of its queries.
        old_ranks: (n,) of the old queries.
        groups: (n,) the image of every query.
    """

    ranks: Tensor
    old_ranks: Tensor
    groups: Tensor

    @property
    def better(self) -> list[int]:
        """Per k, 1 if R@k is higher than the old query's."""
        return [int((self.ranks < k).sum() > (self.old_ranks < k).sum()) for k in KS]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "recall": {f"R@{k}": float((self.ranks < k).double().mean()) for k in KS},
            "old_recall": {f"R@{k}": float((self.old_ranks < k).double().mean()) for k in KS},
            "better_than_old": self.better,
        }


Results = dict[str, dict[str, dict[str, list[Result]]]]
"""Data, method, direction: a result per split."""


def main(config: ProjectionsBenchmark) -> None:
    """Run every split and write the results."""
    results: Results = {}
    decisions: dict[str, list[str]] = {}
    for split in splits(config):
        print(f"{split.data}, split {split.number}", flush=True)
        queries, decision = run_split(split, config)
        decisions.setdefault(split.data, []).append(str(decision))
        folder = Path(config.results) / f"{split.data}_{split.number}"
        write_json(folder / "auto_decision.json", decision.to_dict())
        for method, found in results_of(split, queries).items():
            name = method.replace(",", "").replace(" + ", " ").replace(" ", "_").replace("/", "_")
            write_json(folder / f"{name}.json", {each: result.to_dict() for each, result in found.items()})
            for direction, result in found.items():
                of_method = results.setdefault(split.data, {}).setdefault(method, {})
                of_method.setdefault(direction, []).append(result)
    if not results:
        raise ConfigError("there is nothing to measure on; give --flickr8k, --lvis, --others or scene seeds")
    versus = {data: gain(methods, AUTO, MIDPOINT, list(methods[AUTO])) for data, methods in results.items()}
    sentences = [
        f"{data}: auto minus {MIDPOINT} is {points(found)} points in the mean R@1 of its directions"
        for data, found in versus.items()
    ]
    tuned = {data: against_mixtures(methods) for data, methods in results.items()}
    sentences += [
        f"{data} {direction}: {TUNED} minus {found.mixture}, the best mixture whose map knows texts alone, "
        f"is {points(found.gain)}"
        for data, directions in tuned.items()
        for direction, found in directions.items()
    ]
    write_report(
        config.results,
        "R@1 of queries in the old gallery, in percent",
        summary(results),
        "Mean over the splits and 95 % bootstrap interval (queries drawn image by image). **Bold**: higher "
        "than old/old in every split; *x/n*: in how many of the cells (k = 1, 5, 10 in every split) R@k is "
        "higher than old/old. Methods with 'pairs' learn from the pairs by which the ensembles and auto are "
        f"selected. {'; '.join(sentences)}.",
        auto_minus_midpoint=versus,
        tuned_minus_best_mixture={
            data: {direction: found._asdict() for direction, found in directions.items()}
            for data, directions in tuned.items()
        },
        decisions=decisions,
        config=without_folders(config_to_dict(config)),
    )
    print(Path(f"{config.results}.md").read_text(encoding="utf-8"))


def splits(config: ProjectionsBenchmark) -> Iterator[Split]:
    """All splits of all data."""
    if config.flickr8k:
        yield from halves(config.flickr8k, "flickr8k")
    for path in config.others:
        yield from halves(path, Path(path).stem)
    if config.lvis:
        yield from class_folds(config.lvis)
    for seed in config.scenes.seeds:
        yield scenes(config.scenes, seed)


def run_split(split: Split, config: ProjectionsBenchmark) -> tuple[dict[str, dict[str, Tensor]], Decision]:
    """Every method's queries on one split, by direction, and auto's decision."""
    queries = {OLD: {direction: asked.old for direction, asked in split.asked.items()}}
    projections: dict[str, Projection] = {}
    with_images = PAIR_METHODS if split.support.new_images is not None else {}
    for name, (method, options) in {**TEXT_METHODS, **with_images}.items():
        steps = {"steps": config.trained_steps} if method in TRAINED else {}
        pairs = split.support if name in PAIR_METHODS else None
        projections[name] = fit_projection(*split.texts, method, pairs=pairs, **options, **steps)
        queries[name] = projected(split, projections[name])
    base = projections[PROCRUSTES]
    queries[MIDPOINT] = {
        direction: normalize(asked.old + queries[PROCRUSTES][direction], dim=1)
        for direction, asked in split.asked.items()
    }
    modes = ("nlerp", "slerp", "slerp_padded", "adaptive", "adaptive_confidence")
    for name, mode in [*((PROCRUSTES, mode) for mode in modes), (CENTRED, "nlerp")]:
        ensemble = fit_ensemble(split.support, projections[name], mode).ensemble
        queries[f"{name} + {mode}"] = combined(split, ensemble, projections[name])
    start = projections.get("procrustes, pairs", base)
    tuned = tune_on_pairs(start, split.support)
    queries[TUNED] = combined(split, tuned, start)
    alone = tune_on_pairs(start, split.support, use_old=False)
    assert isinstance(alone, Projection)
    queries["tuned on pairs, no old query"] = projected(split, alone)
    decision = choose_projection(
        *(split.corpus or (None, None)), pairs=split.support, thorough=config.thorough
    )
    queries[AUTO] = {
        direction: decision.queries(asked.new, asked.old, direction)
        for direction, asked in split.asked.items()
    }
    return queries, decision


def projected(split: Split, projection: Projection) -> dict[str, Tensor]:
    """Unit queries of a projection alone."""
    with torch.no_grad():
        return {
            direction: projection(asked.new, "text" if direction == "T2I" else "image")
            for direction, asked in split.asked.items()
        }


def combined(split: Split, ensemble: Any, projection: Projection) -> dict[str, Tensor]:
    """Unit queries of an ensemble."""
    with torch.no_grad():
        return {
            direction: ensemble(
                asked.old,
                projection.project(asked.new, "text" if direction == "T2I" else "image"),
                direction,
            )
            for direction, asked in split.asked.items()
        }


def results_of(split: Split, queries: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Result]]:
    """Ranks of all methods; the last one embeds the gallery again, where its new vectors are known."""
    found: dict[str, dict[str, Result]] = {method: {} for method in (*queries, NEW_NEW)}
    for direction, asked in split.asked.items():
        old = best_positive_ranks(asked.old, asked.gallery, asked.answers)
        for method, by_direction in queries.items():
            ranks = best_positive_ranks(by_direction[direction], asked.gallery, asked.answers)
            found[method][direction] = Result(ranks, old, asked.groups)
        if asked.new_gallery is not None:
            ranks = best_positive_ranks(asked.new, asked.new_gallery, asked.answers)
            found[NEW_NEW][direction] = Result(ranks, old, asked.groups)
    return {method: directions for method, directions in found.items() if directions}


class AgainstMixture(NamedTuple):
    """Gain of tuning on pairs in one direction.

    Attributes:
        mixture: The best mixture of the old query and one that is projected by a map of texts alone, chosen
            by the very queries it is measured on, which favours it.
        gain: R@1 less that mixture's.
    """

    mixture: str
    gain: Interval


def against_mixtures(methods: Mapping[str, Mapping[str, list[Result]]]) -> dict[str, AgainstMixture]:
    """The gain of tuning on pairs over the best mixture, per direction."""
    mixtures = [name for name in methods if name.startswith(PROCRUSTES) and " + " in name]
    found = {}
    for direction, ours in methods[TUNED].items():
        best = max(mixtures, key=lambda name: hits(methods[name][direction]).mean())
        assert len(methods[best][direction]) == len(ours)
        found[direction] = AgainstMixture(best, gain(methods, TUNED, best, [direction]))
    return found


def gain(
    methods: Mapping[str, Mapping[str, list[Result]]], ours: str, theirs: str, directions: list[str]
) -> Interval:
    """Paired difference of the mean R@1 of two methods over some directions; images are resampled."""
    gains = []
    for number in range(len(methods[ours][directions[0]])):
        per_image = []
        for direction in directions:
            own, other = methods[ours][direction][number], methods[theirs][direction][number]
            change = (own.ranks < 1).double() - (other.ranks < 1).double()
            counts = torch.bincount(own.groups)
            per_image.append(torch.bincount(own.groups, weights=change) / counts)
        gains.append(torch.stack(per_image).mean(dim=0))
    return bootstrap_interval(torch.cat(gains))


def points(interval: Interval) -> str:
    """A difference in points, with its interval."""
    estimate, low, high = (100 * value for value in interval)
    return f"{estimate:+.1f} [{low:+.1f}, {high:+.1f}]"


def hits(found: list[Result]) -> Tensor:
    """(n,) per query of all splits 1 if its answer is the first."""
    return torch.cat([(each.ranks < 1).double() for each in found])


def summary(results: Results) -> list[dict[str, str]]:
    """A row per method: R@1 per data and direction."""
    names = list(dict.fromkeys(method for methods in results.values() for method in methods))
    names.sort(key=lambda name: (name == NEW_NEW, name == AUTO))
    columns = [(data, direction) for data, methods in results.items() for direction in methods[OLD]]
    return [
        {
            "method": name,
            **{
                f"{data} {direction}": shown(results[data].get(name, {}).get(direction), name)
                for data, direction in columns
            },
        }
        for name in names
    ]


def shown(found: list[Result] | None, name: str) -> str:
    """The mean with its interval, and how often the criterion is met."""
    if not found:
        return ""
    sizes = [int(each.groups.max()) + 1 for each in found]
    groups = torch.cat([each.groups + sum(sizes[:number]) for number, each in enumerate(found)])
    text = str(bootstrap_interval(hits(found), groups))
    if name in (OLD, NEW_NEW):
        return text
    better = [value for each in found for value in each.better]
    text = f"**{text}**" if all(each.better[0] for each in found) else text
    return f"{text} *{sum(better)}/{len(better)}*"


if __name__ == "__main__":
    run_recipe(main, ProjectionsBenchmark)
