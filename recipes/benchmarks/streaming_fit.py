"""Closed forms over stores that do not fit into memory, against reading the files and one product.

    python recipes/benchmarks/streaming_fit.py --folder /a/disk/with/25/GB

Two stores of random vectors are made, unless they are there: the old ones are the new ones turned by a hidden
rotation, with noise, so that what comes out can be checked. Every measurement is a process of its own, which
says how long the fit took and how much memory the whole process has held at most.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench import Spread, write_report
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from xbt.config import config_to_dict, run_recipe
from xbt.errors import ConfigError
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

BARE, PROCRUSTES, RIDGE = "reading + one product", "procrustes", "ridge"
BLOCK_ROWS = 8_192
SHARD_ROWS = 100_000
NOISE = 0.5


@dataclass
class StreamingFitBenchmark:
    """Time closed forms over stores, and measure the memory they need."""

    rows: int = 10_000_000
    """Pairs in the two stores."""
    new_dim: int = 768
    """Dimension of the new vectors."""
    old_dim: int = 512
    """Dimension of the old ones, at most new_dim."""
    folder: str = "runs/benchmarks/streaming_fit"
    """Folder of the stores: rows · (new_dim + old_dim) · 2 bytes."""
    rounds: int = 3
    """Rounds; everybody is measured once in each."""
    threads: int = 2
    """Threads of torch."""
    seed: int = 0
    """Seed of the vectors."""
    results: str = "recipes/benchmarks/results/streaming_fit"
    """Path of the results, without suffix."""


class Measured(NamedTuple):
    """Result of one process.

    Attributes:
        seconds: From the first byte read to the finished map.
        peak_mib: The most memory the process held, imports included.
        error: Greatest difference of the map's entries from the hidden rotation's, where it is one.
    """

    seconds: float
    peak_mib: float
    error: float | None


def main(config: StreamingFitBenchmark) -> None:
    """Measure and write the results."""
    if not 1 <= config.old_dim <= config.new_dim:
        raise ConfigError(f"--old_dim must be from 1 to --new_dim {config.new_dim}, got {config.old_dim}")
    make_stores(config)
    runs: dict[str, list[Measured]] = {BARE: [], PROCRUSTES: [], RIDGE: []}
    names = list(runs)
    for number in range(config.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(in_own_process(name, config))
    seconds = {name: Spread(tuple(run.seconds for run in found)) for name, found in runs.items()}
    rows = [row(name, found, seconds) for name, found in runs.items()]
    written = write_report(
        config.results,
        "Closed forms over stores",
        rows,
        describe(config),
        config={**config_to_dict(config), "folder": Path(config.folder).name},
        seconds=seconds,
    )
    print(written.with_name(f"{written.stem}.md").read_text(encoding="utf-8"), end="")


def row(name: str, found: list[Measured], seconds: dict[str, Spread]) -> dict[str, Any]:
    """One row of the table."""
    error = found[-1].error
    return {
        "": name,
        "seconds": seconds[name],
        "times as long": seconds[name].over(seconds[BARE]),
        "peak MiB": f"{max(run.peak_mib for run in found):.0f}",
        "off the hidden rotation": "" if error is None else f"{error:.1e}",
    }


def describe(config: StreamingFitBenchmark) -> str:
    """Describe the table."""
    gigabytes = config.rows * (config.new_dim + config.old_dim) * 2 / 1e9
    return (
        f"{config.rows:,} pairs, {config.new_dim} → {config.old_dim}, fp16 stores of {gigabytes:.1f} GB "
        f"together, {config.threads} threads, {config.rounds} rounds in turns, shown as median [least, "
        f"greatest]. The first row reads both sides' files in blocks of {BLOCK_ROWS:,} rows and multiplies "
        "each in fp32 once, without adding up, checking or solving anything. Peaks are of whole processes, "
        "imports included."
    )


def make_stores(config: StreamingFitBenchmark) -> None:
    """Make both stores unless they exist; a half-made pair is continued.

    Raises:
        ConfigError: If what is there has another size.
    """
    stores = [open_or_create(config, "new", config.new_dim), open_or_create(config, "old", config.old_dim)]
    for store in stores:
        if len(store) > config.rows or store.dim not in (config.new_dim, config.old_dim):
            raise ConfigError(
                f"{store.path} has {len(store)} rows of dimension {store.dim}, more or others than asked "
                "for; choose another --folder"
            )
    for start in range(0, config.rows, SHARD_ROWS):
        stop = min(start + SHARD_ROWS, config.rows)
        if all(len(store) >= stop for store in stores):
            continue
        ids = [str(number) for number in range(start, stop)]
        for store, vectors in zip(stores, draw(config, start, stop), strict=True):
            if len(store) < stop:
                store.append(vectors, ids)


def open_or_create(config: StreamingFitBenchmark, name: str, dim: int) -> EmbeddingStore:
    """One of both stores."""
    path = Path(config.folder) / name
    if path.exists():
        return EmbeddingStore.open(path)
    return EmbeddingStore.create(path, modality="text", space=EmbeddingSpace(name, dim))


def hidden_rotation(config: StreamingFitBenchmark) -> Tensor:
    """(new_dim, old_dim) float32 with orthonormal columns."""
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randn(config.new_dim, config.old_dim, generator=generator)
    rotation: Tensor = torch.linalg.qr(drawn).Q
    return rotation


def draw(config: StreamingFitBenchmark, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """New and old unit rows ``start`` … ``stop − 1``, fp16."""
    generator = torch.Generator().manual_seed(config.seed + 1 + start)
    new = normalize(torch.randn(stop - start, config.new_dim, generator=generator), dim=1)
    noise = torch.randn(stop - start, config.old_dim, generator=generator)
    old = normalize(new @ hidden_rotation(config) + NOISE * config.old_dim**-0.5 * noise, dim=1)
    return new.half().numpy(), old.half().numpy()


def in_own_process(name: str, config: StreamingFitBenchmark) -> Measured:
    """One measurement, so that no other one's memory is counted."""
    command = [sys.executable, str(Path(__file__).resolve()), "measure", name, json.dumps(asdict(config))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


def measure(name: str, config: StreamingFitBenchmark) -> Measured:
    """Time one contender in this process."""
    torch.set_num_threads(config.threads)
    new, old = (EmbeddingStore.open(Path(config.folder) / side) for side in ("new", "old"))
    torch.ones(256, 256) @ torch.ones(256, 256)  # threads are started
    if name == BARE:
        start = time.perf_counter()
        for left, right in zip(bare_blocks(new), bare_blocks(old), strict=True):
            left.T @ right
        return Measured(time.perf_counter() - start, peak_mib(), None)
    from xbt.projections import LinearProjection, fit_projection

    start = time.perf_counter()
    projection = fit_projection(new, old, name)
    seconds = time.perf_counter() - start
    assert isinstance(projection, LinearProjection)
    found = projection.weight.detach().T
    error = float((found - hidden_rotation(config)).abs().max()) if name == PROCRUSTES else None
    return Measured(seconds, peak_mib(), error)


def bare_blocks(store: EmbeddingStore) -> Iterator[Tensor]:
    """A store's fp16 files, read with nothing around it, as fp32."""
    for mapped in store.memory_maps():
        assert isinstance(mapped, np.memmap)
        with Path(str(mapped.filename)).open("rb", buffering=0) as file:
            file.seek(mapped.offset)
            for start in range(0, len(mapped), BLOCK_ROWS):
                rows = min(BLOCK_ROWS, len(mapped) - start)
                values = np.fromfile(file, mapped.dtype, rows * store.dim)
                yield torch.from_numpy(values.reshape(rows, store.dim)).float()


def peak_mib() -> float:
    """The most memory this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # what resource says counts the parent's, which it was started from
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], StreamingFitBenchmark(**json.loads(sys.argv[3])))))
    else:
        run_recipe(main, StreamingFitBenchmark)
