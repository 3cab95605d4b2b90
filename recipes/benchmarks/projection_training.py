"""Training XBT's φ on vectors that are already there, against nothing but the matrix products it needs.

    python recipes/benchmarks/projection_training.py

The vectors are random: what they are does not change how long a step takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from bench import Spread, Timings, side_by_side, write_report
from torch import Tensor
from torch.nn.functional import normalize

from xbt.batches import SeededBatches
from xbt.config import config_to_dict, run_recipe
from xbt.errors import ConfigError
from xbt.losses import RELATIONAL_ROWS
from xbt.projections.objective import TextLoss, TextProjectionObjective
from xbt.projections.sources import random_access
from xbt.projections.trained import STAGE1, ResidualProjection
from xbt.projections.trainer import FitSchedule, NoisyVectors, train

BARE, TRAINING = "matrix products", "training"
LOSSES = {"": TextLoss(), ", relational loss too": TextLoss(relational_weight=100.0)}
"""The loss of stage 1 without and with its relational term, by what is added to the name."""


@dataclass
class ProjectionTrainingBenchmark:
    """Time the training of φ and its bare matrix products side by side."""

    new_dim: int = 768
    """Dimension of the new vectors."""
    old_dim: int = 512
    """Dimension of the old vectors."""
    hidden_dim: int = 1536
    """Width of φ's MLP."""
    batch_size: int = 1024
    """Rows of a step."""
    more_batch_sizes: list[int] = field(default_factory=lambda: [2048])
    """Other numbers of rows to measure with as well."""
    rows: int = 20_000
    """Rows to draw batches from."""
    steps: int = 10
    """Steps that are timed at a time."""
    rounds: int = 11
    """Rounds; everybody is timed once in each."""
    threads: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of threads of torch to measure with."""
    device: str = "cpu"
    """Device of the training."""
    seed: int = 0
    """Seed of the vectors and the weights."""
    results: str = "recipes/benchmarks/results/projection_training"
    """Path of the results; suffixes are appended."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If one cannot be used.
        """
        for name in ("new_dim", "old_dim", "hidden_dim", "batch_size", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        largest = max([self.batch_size, *self.more_batch_sizes])
        if self.rows < largest:
            raise ConfigError(f"--rows {self.rows} is less than --batch_size {largest}; raise it")
        if not self.threads or min(self.threads) < 1:
            raise ConfigError(f"--threads must be numbers of at least 1, got {self.threads}")


def main(config: ProjectionTrainingBenchmark) -> None:
    """Measure and write the results."""
    torch.manual_seed(config.seed)
    rows: list[dict[str, Any]] = []
    seconds: dict[str, Timings] = {}
    for size in [config.batch_size, *config.more_batch_sizes]:
        sized = replace(config, batch_size=size)
        contenders: dict[str, Callable[[], object]] = {}
        for name, loss in LOSSES.items():
            contenders[f"{BARE}{name}"] = bare_products(sized, loss)
            contenders[f"{TRAINING}{name}"] = training(sized, loss)
        for threads in config.threads:
            torch.set_num_threads(threads)
            timings = side_by_side(contenders, config.rounds)
            seconds[f"{size} rows, {threads} threads"] = timings
            rows += [compare(sized, timings, name, threads) for name in contenders]
    written = write_report(
        config.results,
        f"Training φ, {config.new_dim} → {config.old_dim} with a hidden width of {config.hidden_dim}",
        rows,
        describe(config),
        config=config_to_dict(config),
        seconds=seconds,
    )
    print(written.with_suffix(".md").read_text(encoding="utf-8"), end="")


def compare(config: ProjectionTrainingBenchmark, timings: Timings, name: str, threads: int) -> dict[str, Any]:
    """One row of the table."""
    taken = Spread(tuple(1000 * each / config.steps for each in timings[name].values))
    products = name.replace(TRAINING, BARE)
    return {
        "what": name,
        "rows a step": config.batch_size,
        "threads": threads,
        "milliseconds a step": taken,
        "throughput, of the products'": timings[products].over(timings[name]),
    }


def describe(config: ProjectionTrainingBenchmark) -> str:
    """Describe the table."""
    return (
        f"Steps on {config.device}, {config.steps} at a time, {config.rounds} "
        "rounds in turns, shown as median [least, greatest]. *Matrix products*: those of φ forwards and "
        "backwards, without that of the fixed rotation's gradient, and the logits of the contrastive loss "
        "with their gradient; with the relational loss also its own five and no other; into memory that is "
        "there already. *Training*: drawing the batch and Gaussian noise, φ, the cosine and contrastive loss "
        "(and the relational one, as `fit_xbt` does it), gradients, clipping and AdamW; no evaluation."
    )


def bare_products(config: ProjectionTrainingBenchmark, loss: TextLoss) -> Callable[[], None]:
    """The products of a step and nothing else: φ, its gradients, the loss's and theirs."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=config.device) * shape[-1] ** -0.5

    batch, new, old, hidden = config.batch_size, config.new_dim, config.old_dim, config.hidden_dim
    z, h, y, d = draw(batch, new), draw(batch, hidden), draw(batch, old), draw(batch, batch)
    w, first, second = draw(old, new), draw(hidden, new), draw(old, hidden)
    products = [
        (z, w.T),  # the linear part
        (z, first.T),  # the MLP
        (h, second.T),
        (y, y.T),  # the logits
        (d, y),  # their gradient
        (y.T, h),  # the second layer's weights, and what it was given
        (y, second),
        (h.T, z),  # the first layer's weights
    ]
    if loss.relational_weight:
        part, gram = y[:RELATIONAL_ROWS], draw(old, old)
        products += [(part.T, part)] * 3 + [(part, gram)] * 2
    results = [left.new_empty(left.shape[0], right.shape[1]) for left, right in products]

    def run() -> None:
        for _ in range(config.steps):
            for (left, right), result in zip(products, results, strict=True):
                torch.mm(left, right, out=result)

    return run


def training(config: ProjectionTrainingBenchmark, loss: TextLoss) -> Callable[[], object]:
    """``steps`` steps as :func:`xbt.projections.trained.fit_xbt` makes them."""
    new, old = (normalize(torch.randn(config.rows, dim), dim=1) for dim in (config.new_dim, config.old_dim))
    schedule = FitSchedule(
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.steps,
        seed=config.seed,
        device=config.device,
    )
    projection = ResidualProjection.seeded(config.new_dim, config.old_dim, config.seed, config.hidden_dim)
    projection.weight.requires_grad_(False)
    objective = TextProjectionObjective(projection, loss)
    data = NoisyVectors(random_access(new, old), np.arange(config.rows), config.seed, STAGE1.noise)
    draws = SeededBatches(config.rows, config.batch_size, config.seed, 0, config.steps)

    def run() -> object:
        return train(objective, map(data.__getitems__, draws), schedule, lambda: 0.0)

    return run


if __name__ == "__main__":
    run_recipe(main, ProjectionTrainingBenchmark)
