"""Cost of a query beyond the new text tower: a map, folded or not, and an ensemble with the old query.

The forms that ``auto`` deploys are among them: a combination tuned on pairs, and one whose weight depends on
how sure each query is of its best score in a sample of the gallery.

    python recipes/benchmarks/query_cost.py

Nothing is downloaded: both towers have the architecture's size and random weights, which take exactly as long
as trained ones. Each way is timed in two manners, in turns. Its *own time* is that of what it adds alone (the
matrix, the MLP, the combination), divided by the tower's in the same round; the *difference* is that of whole
``encode_texts`` calls with and without it, which holds everything, the noise of two long times included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from bench import Spread, Timings, side_by_side, write_report
from torch import Tensor
from torch.nn.functional import normalize

from xbt.compatible import CompatibleEncoder
from xbt.config import config_to_dict, run_recipe
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.errors import ConfigError
from xbt.projections import LinearProjection, Projection, ResidualProjection
from xbt.projections.combinations import MAX_REFERENCE, Adaptive, Linear
from xbt.projections.ensemble import QueryEnsemble

WORDS = ("dog", "beach", "red", "car", "two", "children", "street", "cat", "old", "bicycle", "snow", "table")
TOWER = "tower"
BY_CONSTRUCTION = "0, by construction"


@dataclass
class QueryCostBenchmark:
    """Time text queries with a projection, folded and not, and with an ensemble, beside the tower alone."""

    model: str = "ViT-B-32"
    """An architecture of open_clip, for the new and for the old model."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 64])
    """Queries that come at a time."""
    hidden_dim: int = 1536
    """Hidden units of the MLP, XBT's φ."""
    rounds: int = 15
    """Rounds; everything is timed once in each."""
    repeats: int = 20
    """Applications of a map in each round; its time is divided by this number."""
    threads: int = 2
    """Threads of torch."""
    seed: int = 0
    """Seed of the weights and the texts."""
    results: str = "recipes/benchmarks/results/query_cost"
    """Path of the results; suffixes are appended."""


Ways = dict[str, tuple[Callable[[list[str]], object], Callable[[Tensor], object] | None]]
"""Name → (a whole query, what it adds to the tower's vectors alone)."""


def main(config: QueryCostBenchmark) -> None:
    """Measure and write the results."""
    if config.repeats < 1 or not config.batch_sizes or min(config.batch_sizes) < 1:
        raise ConfigError(
            f"repeats is {config.repeats} and batch_sizes {config.batch_sizes}; give numbers of at least 1"
        )
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    new, old = tower(config.model, "new"), tower(config.model, "old")
    rows: list[dict[str, Any]] = []
    seconds: dict[str, Timings] = {}
    for batch_size in config.batch_sizes:
        texts = queries(batch_size, config.seed)
        timings = measure(config, ways(config, new, old, texts), new, texts)
        seconds[f"batch of {batch_size}"] = timings
        rows += [
            row(name, batch_size, timings) for name in timings if ", alone" not in name and name != TOWER
        ]
    written = write_report(
        config.results,
        f"Cost of a text query, {config.model}",
        rows,
        describe(config, new),
        config=config_to_dict(config),
        seconds=seconds,
    )
    print(written.with_suffix(".md").read_text(encoding="utf-8"), end="")


def tower(model: str, name: str) -> OpenClipEncoder:
    """A frozen encoder of the architecture with random weights."""
    encoder = OpenClipEncoder.create(model, name=f"open_clip:{name}")
    encoder.module.eval().requires_grad_(False)
    return encoder


def ways(config: QueryCostBenchmark, new: OpenClipEncoder, old: OpenClipEncoder, texts: list[str]) -> Ways:
    """Functions to compare with the tower alone."""
    dim = new.dim
    linear = LinearProjection.from_weight(torch.linalg.qr(torch.randn(dim, dim))[0])
    mlp = ResidualProjection(dim, dim, hidden_dim=config.hidden_dim)
    for projection in (linear, mlp):
        projection.set_spaces(new.space, old.space)
        projection.eval().requires_grad_(False)
    vectors = old.encode_texts(texts)

    def alone(projection: Projection) -> Callable[[Tensor], object]:
        return lambda part: projection(part, "text")

    found: Ways = {
        "linear, folded": (CompatibleEncoder(new, linear).fold().encode_texts, None),
        "linear": (CompatibleEncoder(new, linear).encode_texts, alone(linear)),
        f"MLP (hidden {config.hidden_dim})": (CompatibleEncoder(new, mlp).encode_texts, alone(mlp)),
    }
    for name, ensemble in ensembles(old).items():
        mixed = CompatibleEncoder(new, linear, ensemble, old)
        found[f"linear + {name}, old vectors given"] = (
            lambda part, mixed=mixed: mixed.encode_texts(part, old_vectors=vectors),
            lambda part, ensemble=ensemble: ensemble(vectors, linear.project(part), "T2I"),
        )
    midpoint = ensembles(old)["midpoint"]
    found["linear + midpoint, old tower"] = (
        CompatibleEncoder(new, linear, midpoint, old).encode_texts,
        lambda part: midpoint(old.encode_texts(texts), linear.project(part), "T2I"),
    )
    return found


def ensembles(old: OpenClipEncoder) -> dict[str, QueryEnsemble]:
    """The ways to combine the old query with the new one, from the simplest to those that learn most."""
    dim = old.dim
    matrices = {name: torch.randn(dim, dim) / dim for name in Linear().tensors(dim)}
    reference = normalize(torch.randn(MAX_REFERENCE, dim), dim=1)
    sure = Adaptive(similarity=1.0, confidence=0.3)
    return {
        "midpoint": QueryEnsemble.midpoint(dim, old.space),
        "tuned on pairs": QueryEnsemble(dim, {"T2I": Linear()}, {"T2I": matrices}, old.space),
        "confidence": QueryEnsemble(dim, {"T2I": sure}, {"T2I": {"reference": reference}}, old.space),
    }


def measure(config: QueryCostBenchmark, compared: Ways, new: OpenClipEncoder, texts: list[str]) -> Timings:
    """Seconds per round: of the tower, of every whole way, and of what it adds alone."""
    encoded = new.encode_texts(texts)
    contenders: dict[str, Callable[[], object]] = {TOWER: lambda: new.encode_texts(texts)}
    times: dict[str, int] = {}
    for name, (whole, added) in compared.items():
        contenders[name] = lambda whole=whole: whole(texts)
        if added is not None:
            # A tower is timed as often as the first one; a map is too quick for one call.
            times[f"{name}, alone"] = 1 if "old tower" in name else config.repeats
            contenders[f"{name}, alone"] = repeated(added, encoded, times[f"{name}, alone"])
    with torch.no_grad():
        timings = side_by_side(contenders, config.rounds, warmup=2)
    return {
        name: Spread(tuple(value / times.get(name, 1) for value in spread.values))
        for name, spread in timings.items()
    }


def repeated(run: Callable[[Tensor], object], vectors: Tensor, times: int) -> Callable[[], object]:
    """The same call several times."""

    def call() -> None:
        for _ in range(times):
            run(vectors)

    return call


def row(name: str, batch_size: int, timings: Timings) -> dict[str, Any]:
    """One row of the table; folded, nothing is added: the last layer has another matrix of its size."""
    own = timings.get(f"{name}, alone")
    return {
        "query": name,
        "batch": batch_size,
        "own time, % of the tower's": percent(own.over(timings[TOWER])) if own else BY_CONSTRUCTION,
        "difference, % of the tower's": percent(timings[name].minus(timings[TOWER]).over(timings[TOWER])),
        "tower, ms": scaled(timings[TOWER], 1000),
    }


def percent(share: Spread) -> Spread:
    """A share as per cent."""
    return scaled(share, 100)


def scaled(spread: Spread, factor: float) -> Spread:
    """Every round's value times a factor."""
    return Spread(tuple(factor * value for value in spread.values))


def queries(count: int, seed: int) -> list[str]:
    """Distinct texts of the length of captions, about ten words."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(WORDS), (count, 6), generator=generator).tolist()
    return [
        f"a photo of {' '.join(WORDS[word] for word in words)} {number}" for number, words in enumerate(drawn)
    ]


def describe(config: QueryCostBenchmark, new: OpenClipEncoder) -> str:
    """Describe the table."""
    return (
        f"Median [min, max] over {config.rounds} rounds in which everything was timed in turns, on the CPU "
        f"with {config.threads} threads, fp32; towers of {config.model} with random weights, {new.dim} → "
        f"{new.dim} dimensions. Own time: the map or combination alone, over the tower in the same round; "
        "for the old tower, that tower and the combination. A folded matrix takes the place of one of its "
        "size, so that there is nothing of its own to time. Tuned on pairs: a matrix for each query; "
        f"confidence: scores of both queries against {MAX_REFERENCE:,} rows of the gallery. Difference: "
        "whole `encode_texts` calls, tokenising included, with and without."
    )


if __name__ == "__main__":
    run_recipe(main, QueryCostBenchmark)
