"""Speed of adding, searching and backfilling a gallery on disk, extrapolated to billions of items.

    python recipes/benchmarks/gallery_throughput.py --folder /a/disk/with/5/GB

A gallery of random unit vectors is filled, searched, backfilled in random order while it is searched, and
compacted. Memory and disk per item are measured for several indexes, each in its own process. A second table
extrapolates to 10 million to a billion items; its assumptions are below it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import Spread, write_report
from gallery_sizing import IndexCost, measure_index, sizing_notes, sizing_rows
from torch import Tensor
from torch.nn.functional import normalize

from xbt.backfill.orders import distance_to_mean_order, query_log_order, random_order
from xbt.config import config_to_dict, run_recipe
from xbt.errors import ConfigError
from xbt.index import AffineMerge, Gallery
from xbt.index.neighbours import nearest_items
from xbt.space import EmbeddingSpace

LOG = 1000
"""Queries of the log that the order query_log is made by."""


@dataclass
class GalleryThroughputBenchmark:
    """Measure the rates of a gallery on disk, and what they come to for large ones."""

    rows: int = 1_000_000
    """Items in the gallery."""
    dim: int = 512
    """Dimension of the old vectors."""
    new_dim: int = 768
    """Dimension of the new ones."""
    add_rows: int = 10_000
    """Items per add()."""
    backfill_rows: int = 1000
    """Items per backfill(), as the job's --commit_every."""
    batches: list[int] = field(default_factory=lambda: [1, 1000])
    """Queries per search."""
    k: int = 10
    """Items per query."""
    indexes: list[str] = field(
        default_factory=lambda: ["Flat", "IVF1024,Flat", "IVF1024,SQ8", "IVF1024,PQ64"]
    )
    """Indexes whose memory and disk are measured."""
    index_rows: int = 100_000
    """Items in the galleries that they are measured on."""
    order_rows: int = 200_000
    """Items that are ordered; what rehearsed needs grows with their power of 1.5, all else in proportion."""
    encoder_rates: dict[str, float] = field(default_factory=dict)
    """Images per second by the encoder's name, as measured elsewhere; a backfill's hours follow from them."""
    sizes: list[int] = field(default_factory=lambda: [10**7, 10**8, 10**9])
    """Items of the sizing table."""
    machine_gb: float = 256
    """Memory of a machine, of which nine tenths are used."""
    folder: str = "runs/benchmarks/gallery_throughput"
    """Folder of the galleries; existing ones are replaced."""
    rounds: int = 5
    """Measured searches of each batch size."""
    threads: int = 2
    """Threads of torch and FAISS."""
    seed: int = 0
    """Seed of the vectors."""
    results: str = "recipes/benchmarks/results/gallery_throughput"
    """Path of the results, without suffix; the name of the sizing table ends in _sizing."""


def main(config: GalleryThroughputBenchmark) -> None:
    """Measures, and writes both tables."""
    check(config)
    import faiss

    torch.set_num_threads(config.threads)
    faiss.omp_set_num_threads(config.threads)
    folder = Path(config.folder) / f"{config.rows}x{config.dim}"
    shutil.rmtree(folder, ignore_errors=True)
    rows = measure_gallery(config, folder / "gallery") + measure_orders(config)
    costs = [measure_one_index(config, folder / "indexes", index) for index in config.indexes]
    record: dict[str, Any] = {"config": {**config_to_dict(config), "folder": Path(config.folder).name}}
    record["indexes"] = [vars(cost) for cost in costs]
    written = write_report(config.results, "A gallery on disk", rows, describe(config), **record)
    table = sizing_rows(rows, costs, config.rows, config.sizes, config.machine_gb, config.encoder_rates)
    notes = sizing_notes(config.index_rows, config.rows, config.machine_gb, config.threads)
    sizing = write_report(f"{config.results}_sizing", "Sizing a gallery", table, notes, **record)
    for path in (written, sizing):
        print(path.with_name(f"{path.stem}.md").read_text(encoding="utf-8"))


def measure_one_index(config: GalleryThroughputBenchmark, folder: Path, index: str) -> IndexCost:
    """Cost of an item under an index."""
    items = parts(config, config.index_rows, 0)
    path = folder / index.replace(",", "_")
    return measure_index(path, index, items, space(config, config.dim), config.index_rows)


def check(config: GalleryThroughputBenchmark) -> None:
    """Refuse sizes that do not fit together.

    Raises:
        ConfigError: If one does not.
    """
    for name in ("rows", "add_rows", "backfill_rows", "index_rows", "order_rows", "rounds"):
        if getattr(config, name) < 2 * (name == "order_rows") or getattr(config, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, and order_rows 2, got {getattr(config, name)}")
    if not 1 <= config.k <= config.rows or not config.batches or min(config.batches) < 1:
        raise ConfigError(f"--k must be from 1 to --rows and --batches at least 1, got {config.k}")
    slow = {name: rate for name, rate in config.encoder_rates.items() if not rate > 0}
    if slow:
        raise ConfigError(f"--encoder_rates are images per second above 0, got {slow}")


def draw(config: GalleryThroughputBenchmark, seed: int, count: int, dim: int) -> Tensor:
    """(count, dim) float32 unit rows."""
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + seed)
    return normalize(torch.randn(count, dim, generator=generator), dim=1)


def space(config: GalleryThroughputBenchmark, dim: int) -> EmbeddingSpace:
    """A space that is known by its probe, as every encoder's is."""
    return EmbeddingSpace(f"random-{dim}", dim, probe=draw(config, dim, 20, dim))


def parts(config: GalleryThroughputBenchmark, count: int, first: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Vectors and ids of so many items, some at a time."""
    for start in range(first, first + count, config.add_rows):
        stop = min(start + config.add_rows, first + count)
        ids = [f"{number:010d}.jpg" for number in range(start, stop)]
        yield draw(config, start, stop - start, config.dim), ids


def measure_gallery(config: GalleryThroughputBenchmark, path: Path) -> list[dict[str, Any]]:
    """Fills, searches, backfills and compacts a gallery."""
    old, new = space(config, config.dim), space(config, config.new_dim)
    gallery = Gallery.create(path, space=old)
    adding = []
    for vectors, ids in parts(config, config.rows, 0):
        adding.append(seconds(partial(gallery.add, vectors, ids)) / len(ids))
    rows = [row("add", "items/s", adding, config.rows)]
    gallery = Gallery.open(path)
    rows.append(row("first search", "s", [seconds(gallery.prepare)], invert=False))
    asked = {count: draw(config, -count, count, config.dim) for count in config.batches}
    for count, queries in asked.items():
        found = [
            seconds(lambda q=queries: gallery.search(q, config.k, old)) for _ in range(config.rounds + 1)
        ]
        rows.append(row(f"search, {count} at once", "queries/s", [each / count for each in found[1:]]))
    rows += measure_backfill(config, gallery, new)
    rows.append(row("compact", "s", [seconds(gallery.compact)], invert=False))
    return rows


def measure_backfill(
    config: GalleryThroughputBenchmark, gallery: Gallery, new: EmbeddingSpace
) -> list[dict[str, Any]]:
    """Backfill all items, and search both parts in the middle."""
    gallery.begin_part(new)
    ids, order = gallery.ids, random_order(len(gallery), config.seed).tolist()
    writing, searching = [], []
    half = None
    for start in range(0, len(order), config.backfill_rows):
        some = [ids[place] for place in order[start : start + config.backfill_rows]]
        vectors = draw(config, start, len(some), config.new_dim)
        writing.append(seconds(partial(gallery.backfill, vectors, some, new)) / len(some))
        if half is None and 2 * (start + len(some)) >= len(order):
            half = gallery.fraction_backfilled
            for count in config.batches:
                old, renewed = draw(config, 1, count, config.dim), draw(config, 2, count, config.new_dim)
                merge = AffineMerge(1.0, 0.0)
                ask = partial(gallery.search_mixed, old, renewed, config.k, merge)
                found = [seconds(ask) / count for _ in range(config.rounds + 1)]
                name = f"search both parts, {100 * half:.0f} % backfilled, {count} at once"
                searching.append(row(name, "queries/s", found[1:]))
    return [row("backfill, without the encoder", "items/s", writing, config.rows), *searching]


def measure_orders(config: GalleryThroughputBenchmark) -> list[dict[str, Any]]:
    """Order some of the gallery's items, whose cost grows with their number."""
    count = min(config.order_rows, config.rows)
    items = torch.cat([vectors for vectors, _ in parts(config, count, 0)])
    log = draw(config, 3, LOG, config.dim)
    ways: dict[str, Callable[[], object]] = {
        "order random": lambda: random_order(len(items)),
        f"order query_log, {LOG} queries": lambda: query_log_order(log, items),
        "order distance_to_mean, 20 clusters": lambda: distance_to_mean_order(items),
    }
    rows = [row(name, "items/s", [seconds(way) / len(items)], config.rows) for name, way in ways.items()]
    name = f"neighbours for order rehearsed, {len(items)} items"
    return [*rows, row(name, "s", [seconds(lambda: nearest_items(items))], invert=False)]


def seconds(run: Callable[[], object]) -> float:
    """Seconds of one run of a function."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row(
    what: str, unit: str, taken: list[float], items: int | None = None, invert: bool = True
) -> dict[str, Any]:
    """A row of the table: rates of the single steps, and seconds of all of them where they are all items."""
    spread = Spread(tuple(1 / each for each in taken) if invert else tuple(taken))
    total = None if items is None else items * sum(taken) / len(taken)
    return {"": what, "unit": unit, "measured": spread, "s in all": "" if total is None else total}


def describe(config: GalleryThroughputBenchmark) -> str:
    """Describe the table."""
    return (
        f"{config.rows:,} random unit vectors of dimension {config.dim}, backfilled with ones of dimension "
        f"{config.new_dim}, all stored in fp16; index Flat, k = {config.k}, {config.threads} threads. "
        f"{config.add_rows:,} items per add, {config.backfill_rows:,} per backfill, every one synchronised "
        "to disk. Shown as median [least, greatest] of the single steps. The orders' rates are those of "
        f"{min(config.order_rows, config.rows):,} items; what they take in all follows."
    )


if __name__ == "__main__":
    run_recipe(main, GalleryThroughputBenchmark)
