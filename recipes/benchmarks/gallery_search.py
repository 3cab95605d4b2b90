"""Exact search of a gallery on disk against bare FAISS on the same vectors, and an approximate index.

    python recipes/benchmarks/gallery_search.py --folder /a/disk/with/2/GB

A gallery of random unit vectors around hidden centres is created unless it exists. Bare FAISS searches its
vectors as one float32 array and returns row numbers; the gallery returns the user's ids and rescored hits.
Both are timed in turns in one process, at several batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Spread, Timings, ratio, side_by_side, write_report
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from xbt.config import config_to_dict, run_recipe
from xbt.errors import ConfigError
from xbt.index import Gallery
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

SHARD_ROWS = 100_000
CENTRES = 1000
BARE, GALLERY, HOLEY = "bare FAISS", "gallery", "gallery, removals"


@dataclass
class GallerySearchBenchmark:
    """Time searches of a gallery and of bare FAISS, side by side."""

    rows: int = 1_000_000
    """Items in the gallery."""
    dim: int = 512
    """Dimension of the vectors."""
    batches: list[int] = field(default_factory=lambda: [1, 1000])
    """Queries per search."""
    k: int = 10
    """Items per query."""
    removed: int = 200
    """Items that are removed from a second gallery over the same store, timed too; 0 leaves it out."""
    index: str = ""
    """An approximate index to time as well, such as IVF1024,Flat; a gallery over the same store has it."""
    folder: str = "runs/benchmarks/gallery_search"
    """Folder of the galleries: rows · dim · 2 bytes, and the index."""
    rounds: int = 11
    """Measured rounds; every contender runs once in each."""
    threads: int = 2
    """Threads of torch and FAISS."""
    seed: int = 0
    """Seed of the vectors."""
    results: str = "recipes/benchmarks/results/gallery_search"
    """Path of the results, without suffix."""


def main(config: GallerySearchBenchmark) -> None:
    """Measure and write the results."""
    check(config)
    import faiss

    torch.set_num_threads(config.threads)
    faiss.omp_set_num_threads(config.threads)
    galleries = open_galleries(config)
    vectors = galleries[GALLERY].vectors(galleries[GALLERY].ids)
    rows: list[dict[str, Any]] = []
    timings: dict[str, Timings] = {}
    for batch in config.batches:
        queries = draw(config, config.seed + config.rows + batch, batch).numpy()
        found = {name: recall(config, each, vectors, queries) for name, each in galleries.items()}
        timed = side_by_side(contenders(config, galleries, vectors, queries), config.rounds)
        timings[f"{batch} at once"] = timed
        rows += [row(name, batch, timed, found.get(name)) for name in timed]
    written = write_report(
        config.results,
        "Searching a gallery",
        rows,
        describe(config),
        config={**config_to_dict(config), "folder": Path(config.folder).name},
        seconds=timings,
    )
    print(written.with_name(f"{written.stem}.md").read_text(encoding="utf-8"), end="")


def check(config: GallerySearchBenchmark) -> None:
    """Refuse sizes that do not fit together.

    Raises:
        ConfigError: If one does not.
    """
    if not config.batches or min(config.batches) < 1:
        raise ConfigError(f"--batches must be sizes of at least 1, got {config.batches}")
    if not 1 <= config.k <= config.rows - config.removed:
        raise ConfigError(
            f"--k must be from 1 to the items that are left, {config.rows - config.removed}, got {config.k}"
        )


def open_galleries(config: GallerySearchBenchmark) -> dict[str, Gallery]:
    """Open galleries over one store: all items, with items removed, and with an approximate index."""
    folder = Path(config.folder) / f"{config.rows}x{config.dim}-{config.seed}"
    store = fill_store(config, folder / "store")
    galleries = {GALLERY: open_or_create(folder / "full", store=store)}
    if config.removed:
        some = np.random.default_rng(config.seed).permutation(config.rows)[: config.removed]
        galleries[HOLEY] = open_or_create(folder / f"removed-{config.removed}", store=store)
        if len(galleries[HOLEY]) == config.rows:
            galleries[HOLEY].remove([str(row) for row in some])
    if config.index:
        galleries[config.index] = open_or_create(
            folder / config.index.replace(",", "_"), store=store, index=config.index
        )
    for gallery in galleries.values():
        gallery.prepare()
    return galleries


def fill_store(config: GallerySearchBenchmark, path: Path) -> EmbeddingStore:
    """Open the store of an earlier run, and add the rows that it lacks."""
    if path.is_dir():
        store = EmbeddingStore.open(path)
    else:
        store = EmbeddingStore.create(path, modality="image", space=random_space(config), dtype="float16")
    for start in range(len(store), config.rows, SHARD_ROWS):
        stop = min(start + SHARD_ROWS, config.rows)
        store.append(draw(config, config.seed + 1 + start, stop - start).half(), names(start, stop))
    return store


def open_or_create(path: Path, **options: Any) -> Gallery:
    """A gallery as an earlier run left it, or a new one."""
    return Gallery.open(path) if Gallery.exists(path) else Gallery.create(path, **options)


def names(start: int, stop: int) -> list[str]:
    """The items' ids."""
    return [str(number) for number in range(start, stop)]


def draw(config: GallerySearchBenchmark, seed: int, count: int) -> Tensor:
    """(count, dim) float32 unit rows, each at a cosine of about 0.7 to one of the hidden centres."""
    generator = torch.Generator().manual_seed(config.seed)
    centres = normalize(torch.randn(CENTRES, config.dim, generator=generator), dim=1)
    generator.manual_seed(seed)
    noise = normalize(torch.randn(count, config.dim, generator=generator), dim=1)
    return normalize(centres[torch.randint(CENTRES, (count,), generator=generator)] + noise, dim=1)


def random_space(config: GallerySearchBenchmark) -> EmbeddingSpace:
    """A space that is known by its probe, as every encoder's is."""
    return EmbeddingSpace("random", config.dim, probe=draw(config, config.seed, 20))


def contenders(
    config: GallerySearchBenchmark,
    galleries: dict[str, Gallery],
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
) -> dict[str, Callable[[], object]]:
    """Functions to time; a gallery also gets the space of the queries and checks it."""
    import faiss

    index = faiss.IndexFlat(vectors.shape[1], faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    space = random_space(config)
    ways: dict[str, Callable[[], object]] = {BARE: lambda: index.search(queries, config.k)}
    for name, gallery in galleries.items():
        ways[name] = lambda gallery=gallery: gallery.search(queries, config.k, space)
    return ways


def recall(
    config: GallerySearchBenchmark,
    gallery: Gallery,
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
) -> float:
    """Share of what bare FAISS finds among all rows that a gallery finds as well."""
    import faiss

    _, rows = faiss.knn(queries, vectors, config.k, metric=faiss.METRIC_INNER_PRODUCT)
    exact = [[str(row) for row in found if str(row) in gallery] for found in rows.tolist()]
    found = gallery.search(queries, config.k).ids
    shares = [len({*mine} & {*true}) / max(len(true), 1) for mine, true in zip(found, exact, strict=True)]
    return float(np.mean(shares))


def row(name: str, batch: int, timed: Timings, found: float | None) -> dict[str, Any]:
    """One row of the table."""
    milliseconds = Spread(tuple(1000 * seconds / batch for seconds in timed[name].values))
    return {
        "": name,
        "queries at once": batch,
        "ms per query": milliseconds,
        "times as long as bare FAISS": ratio(timed, name, BARE),
        "of the true first k": "" if found is None else f"{100 * found:.2f} %",
    }


def describe(config: GallerySearchBenchmark) -> str:
    """Describe the table."""
    return (
        f"{config.rows:,} random unit vectors of dimension {config.dim} around {CENTRES:,} centres, stored "
        f"in fp16, k = {config.k}, {config.threads} threads, {config.rounds} rounds in turns, shown "
        "as median [least, greatest]. Bare FAISS is IndexFlat with inner product on the stored vectors as "
        "float32. A gallery checks queries and space, rescores and orders ties, and answers with ids; "
        f"'{HOLEY}' is the same with {config.removed:,} items removed since they were read. "
        "What is found is compared with bare FAISS."
    )


if __name__ == "__main__":
    run_recipe(main, GallerySearchBenchmark)
