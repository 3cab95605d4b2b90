"""Both directions of retrieval, as large as COCO's test split: our evaluation against CLIP_benchmark's.

    python recipes/benchmarks/evaluation_speed.py

Everybody is given the same vectors. Every measurement is a process of its own, which says how long it took,
how much memory it needed above the vectors, and what came out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from bench import Spread, write_report
from numpy.typing import NDArray
from streaming_fit import peak_mib
from torch import Tensor

from xbt.config import config_to_dict, run_recipe
from xbt.errors import ConfigError, DataError
from xbt.evaluation import evaluate_cell

OURS, WHOLE, SCORING = "xbt", "CLIP_benchmark", "CLIP_benchmark, scoring alone"
CLOSE_CALLS = 1e-4
"""Share of the queries that may be counted otherwise, because sums of products are rounded otherwise."""

Recalls = dict[str, list[float]]
"""Direction → R@k, in the order of the cut-offs."""


@dataclass
class EvaluationSpeedBenchmark:
    """Time exact R@k in both directions and measure its memory, side by side with CLIP_benchmark."""

    images: int = 5000
    """Images."""
    texts: int = 25_010
    """Captions, at least one per image."""
    dim: int = 512
    """Dimension of the vectors."""
    noise: float = 6.0
    """Length of what is added to an image's unit vector to make its captions': the more, the harder."""
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """Cut-offs of R@k."""
    batch_size: int = 64
    """CLIP_benchmark's; it scores as many queries at once."""
    rounds: int = 3
    """Rounds; everybody is measured once in each."""
    threads: int = 2
    """Threads of torch and of numpy's products."""
    seed: int = 0
    """Seed of the vectors."""
    results: str = "recipes/benchmarks/results/evaluation_speed"
    """Path of the results, without suffix."""


class Measured(NamedTuple):
    """Result of one process.

    Attributes:
        seconds: From vectors to R@k.
        mib: The most memory the process held meanwhile, less what it held before.
        recalls: What came out.
    """

    seconds: float
    mib: float
    recalls: Recalls


class World(NamedTuple):
    """Vectors, and the image of every caption; captions stand in the order of their images."""

    texts: Tensor
    images: Tensor
    owners: list[int]


def main(config: EvaluationSpeedBenchmark) -> None:
    """Measure and write the results."""
    check(config)
    runs: dict[str, list[Measured]] = {OURS: [], WHOLE: [], SCORING: []}
    names = list(runs)
    with tempfile.TemporaryDirectory() as folder:
        for side, vectors in zip(("texts", "images"), draw(config), strict=True):
            np.save(Path(folder) / side, vectors)
        for number in range(config.rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                runs[name].append(in_own_process(name, folder, config))
    otherwise = {name: counted_otherwise(config, found, runs[OURS][0]) for name, found in runs.items()}
    written = write_report(
        config.results,
        "Exact evaluation",
        [row(name, runs, otherwise[name]) for name in names],
        describe(config),
        config=config_to_dict(config),
        seconds={name: [run.seconds for run in found] for name, found in runs.items()},
        recalls={name: found[0].recalls for name, found in runs.items()},
    )
    print(written.with_name(f"{written.stem}.md").read_text(encoding="utf-8"), end="")


def check(config: EvaluationSpeedBenchmark) -> None:
    """Refuse sizes that do not fit together.

    Raises:
        ConfigError: If one does not.
    """
    if not 1 <= config.images <= config.texts:
        raise ConfigError(f"--texts must be at least --images {config.images}, got {config.texts}")
    if not config.ks or not 1 <= min(config.ks) <= max(config.ks) <= config.images:
        raise ConfigError(f"--ks must be cut-offs from 1 to --images {config.images}, got {config.ks}")


def owners_of(config: EvaluationSpeedBenchmark) -> list[int]:
    """The image of every caption: as many each as there are, and one more for the first images."""
    return sorted(number % config.images for number in range(config.texts))


def draw(config: EvaluationSpeedBenchmark) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(texts, dim) and (images, dim) float32 unit rows."""
    generator = np.random.default_rng(config.seed)
    images = unit(generator.standard_normal((config.images, config.dim), np.float32))
    noise = unit(generator.standard_normal((config.texts, config.dim), np.float32))
    return unit(images[owners_of(config)] + np.float32(config.noise) * noise), images


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows at length 1."""
    scaled: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def in_own_process(name: str, folder: str, config: EvaluationSpeedBenchmark) -> Measured:
    """One measurement, so that no other one's memory is counted."""
    threads = {f"{library}_NUM_THREADS": str(config.threads) for library in ("OMP", "OPENBLAS", "MKL")}
    command = [sys.executable, str(Path(__file__).resolve()), "measure", name, folder]
    done = subprocess.run(
        [*command, json.dumps(asdict(config))],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads},
    )
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, folder: str, config: EvaluationSpeedBenchmark) -> Measured:
    """Measure one contender in this process."""
    torch.set_num_threads(config.threads)
    texts, images = (torch.from_numpy(np.load(Path(folder) / f"{side}.npy")) for side in ("texts", "images"))
    few = 32  # libraries are imported and threads started
    contender(name, World(texts[:few], images[:few], list(range(few))), config.batch_size, [1])()
    run = contender(name, World(texts, images, owners_of(config)), config.batch_size, config.ks)
    before = psutil.Process().memory_info().rss / 2**20
    start = time.perf_counter()
    recalls = run()
    return Measured(time.perf_counter() - start, peak_mib() - before, recalls)


def contender(name: str, world: World, batch_size: int, ks: list[int]) -> Callable[[], Recalls]:
    """Measured function; its inputs are prepared beforehand."""
    if name == OURS:
        return ours(world, ks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from clip_benchmark.metrics import zeroshot_retrieval
    make = whole if name == WHOLE else scoring
    return make(zeroshot_retrieval, world, batch_size, ks)


def ours(world: World, ks: list[int]) -> Callable[[], Recalls]:
    """One cell, with intervals' ranks and all."""
    t2i, i2t = [[owner] for owner in world.owners], answers(world)

    def run() -> Recalls:
        cell = evaluate_cell(
            "old/old", world.texts, world.images, world.texts, world.images, t2i, i2t, tuple(ks)
        )
        return {"T2I": [cell.t2i[k] for k in ks], "I2T": [cell.i2t[k] for k in ks]}

    return run


def answers(world: World) -> list[list[int]]:
    """The captions of every image."""
    found: list[list[int]] = [[] for _ in world.images]
    for caption, owner in enumerate(world.owners):
        found[owner].append(caption)
    return found


def whole(theirs: Any, world: World, batch_size: int, ks: list[int]) -> Callable[[], Recalls]:
    """Their ``evaluate`` of a model whose pixels are vectors already, and whose tokens are row numbers."""

    class Passed(torch.nn.Module):
        def encode_image(self, pixels: Tensor) -> Tensor:
            return pixels

        def encode_text(self, tokens: Tensor) -> Tensor:
            return world.texts[tokens]

    captions = [[str(row) for row in rows] for rows in answers(world)]
    loader = [
        (world.images[start : start + batch_size], captions[start : start + batch_size])
        for start in range(0, len(captions), batch_size)
    ]

    def run() -> Recalls:
        found = theirs.evaluate(
            Passed(),
            loader,
            lambda texts: torch.tensor([int(text) for text in texts]),
            device="cpu",
            amp=False,
            recall_k_list=ks,
        )
        return {
            "T2I": [found[f"image_retrieval_recall@{k}"] for k in ks],
            "I2T": [found[f"text_retrieval_recall@{k}"] for k in ks],
        }

    return run


def scoring(theirs: Any, world: World, batch_size: int, ks: list[int]) -> Callable[[], Recalls]:
    """The second half of their ``evaluate``, which needs no copy of the vectors."""

    def run() -> Recalls:
        scores = world.texts @ world.images.t()
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[torch.arange(len(scores)), world.owners] = True
        found: Recalls = {"T2I": [], "I2T": []}
        for k in ks:
            for direction, table, right in (("T2I", scores, positive), ("I2T", scores.T, positive.T)):
                recall = theirs.batchify(theirs.recall_at_k, table, right, batch_size, "cpu", k=k)
                found[direction].append((recall > 0).float().mean().item())
        return found

    return run


def counted_otherwise(config: EvaluationSpeedBenchmark, found: list[Measured], reference: Measured) -> int:
    """The most queries, over directions, cut-offs and rounds, that a contender counts otherwise than we do.

    Raises:
        DataError: If there are more than rounding explains.
    """
    most = 0
    for direction, queries in (("T2I", config.texts), ("I2T", config.images)):
        for run in found:
            pairs = zip(run.recalls[direction], reference.recalls[direction], strict=True)
            most = max(most, *(round(abs(theirs - mine) * queries) for theirs, mine in pairs))
    if most > CLOSE_CALLS * config.texts:
        raise DataError(f"{most} queries are counted otherwise than xbt counts them; one of the two is wrong")
    return most


def row(name: str, runs: dict[str, list[Measured]], otherwise: int) -> dict[str, Any]:
    """One row of the table."""
    seconds, mib = (
        {each: spread(found, what) for each, found in runs.items()} for what in ("seconds", "mib")
    )
    return {
        "": name,
        "seconds": seconds[name],
        "times as long": seconds[name].over(seconds[OURS]),
        "peak MiB above the vectors": mib[name],
        "times as much": mib[name].over(mib[OURS]),
        "queries counted otherwise": otherwise,
    }


def spread(found: list[Measured], what: str) -> Spread:
    """Seconds or MiB of every round."""
    return Spread(tuple(getattr(run, what) for run in found))


def describe(config: EvaluationSpeedBenchmark) -> str:
    """Describe the table."""
    mib = (config.texts + config.images) * config.dim * 4 / 2**20
    return (
        f"{config.texts:,} text and {config.images:,} image vectors of dimension {config.dim} in fp32 "
        f"({mib:.0f} MiB), R@k for k in {config.ks} in both directions, {config.threads} threads, "
        f"{config.rounds} rounds in turns, every measurement in a process of its own, shown as median "
        "[least, greatest]. CLIP_benchmark is its own evaluate, unchanged, with a model that passes vectors "
        f"on, batches of {config.batch_size}, amp off; in the last row only what evaluate does once it has "
        "the vectors. Vectors are random, captions around their images, so that ties are not expected. A "
        "query is counted otherwise where two scores differ by rounding alone."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(*sys.argv[2:4], EvaluationSpeedBenchmark(**json.loads(sys.argv[4])))))
    else:
        run_recipe(main, EvaluationSpeedBenchmark)
