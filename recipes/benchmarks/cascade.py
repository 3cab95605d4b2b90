"""A cascade: recall against its depth, and what it embeds as traffic goes on.

    python recipes/benchmarks/cascade.py --vectors pair.npz
    python recipes/benchmarks/cascade.py --old OLD --new NEW --pairs dataset.json --pairs.split val

Vectors of both models come from a file, with the keys ``old_image``, ``new_image``, ``old_text``,
``new_text`` and ``pairs`` (n × 2: image row, caption row), or from two encoders and pairs with their photos.
The first stage is the old model's. Queries are drawn by Zipf's law: the r-th most popular caption in
proportion to 1 / r^s. With encoders, the gallery lies on disk and the new model embeds each photo that is
asked for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bench import write_report
from numpy.typing import NDArray
from torch import Tensor

from xbt.config import config_to_dict, run_recipe
from xbt.data import PairSource, load_readable_pairs
from xbt.encoders import load_encoder
from xbt.errors import ConfigError
from xbt.evaluation import best_positive_ranks, depth_curve
from xbt.index import Cascade, Gallery
from xbt.index.on_demand import Source
from xbt.space import EmbeddingSpace


@dataclass
class CascadeBenchmark:
    """Measure recall of a cascade against its depth, and what Zipf traffic makes it embed."""

    vectors: str = ""
    """An .npz file of vectors; otherwise give two encoders and pairs."""
    old: str = ""
    """The old encoder."""
    new: str = ""
    """The new encoder."""
    pairs: PairSource = field(default_factory=lambda: PairSource("scenes", limit=200, split="test"))
    """Photos and captions, with encoders."""
    depths: list[int] = field(default_factory=lambda: [1, 2, 3, 5, 10, 20, 50, 100, 200])
    """Depths of the curve."""
    depth: int = 0
    """Depth of the traffic; 0 takes the recommended one."""
    queries: int = 5000
    """Queries of the traffic."""
    zipf: float = 1.0
    """Exponent s of the popularity of queries."""
    prewarm: int = 1000
    """Earlier queries that a second cascade is warmed with."""
    k: int = 10
    """Items per query."""
    windows: list[int] = field(default_factory=lambda: [10, 100, 500, 1000, 2000, 5000, 10_000, 20_000])
    """Numbers of queries at which a row of the table ends."""
    threads: int = 1
    """Threads of torch."""
    seed: int = 0
    """Seed of the traffic."""
    results: str = "recipes/benchmarks/results/cascade"
    """Path of the results, without suffix."""


@dataclass
class World:
    """One pair of models on the same items and queries.

    Attributes:
        old_queries: (n, old_dim).
        new_queries: (n, new_dim).
        old_items: (m, old_dim).
        new_items: (m, new_dim).
        answers: (n,) the item that answers each query.
        encoder: The new model, or vectors that stand for it.
        originals: Its originals, by the number of the item as text.
        modality: Of the originals.
    """

    old_queries: Tensor
    new_queries: Tensor
    old_items: Tensor
    new_items: Tensor
    answers: NDArray[np.int64]
    encoder: Any
    originals: Source
    modality: Any

    @property
    def positives(self) -> list[list[int]]:
        """Items that answer each query."""
        return [[int(row)] for row in self.answers]


class Recorded:
    """Vectors in the place of a model; an original is its own number.

    Args:
        vectors: (m, dim) vectors of the items.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors
        self.space = EmbeddingSpace("recorded", vectors.shape[1], probe=vectors[:20])

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Look the vectors up."""
        return self.vectors[[int(text) for text in texts]]


def main(config: CascadeBenchmark) -> None:
    """Measure and write the results."""
    torch.set_num_threads(config.threads)
    if bool(config.vectors) == bool(config.old and config.new):
        raise ConfigError("give either --vectors, or --old and --new")
    world = recorded_world(config) if config.vectors else embedded_world(config)
    groups = torch.from_numpy(world.answers)
    curve = depth_curve(
        world.old_queries, world.new_queries, world.old_items, world.new_items, world.positives,
        depths=config.depths, groups=groups, seed=config.seed,
    )  # fmt: skip
    print(curve)
    depth = config.depth or curve.recommended() or max(config.depths)
    rows = traffic(config, world, depth, 0)
    if config.prewarm:
        # Vectors stand for the model here: only counts differ, not what a photo costs.
        rows += traffic(config, recorded(world), depth, config.prewarm)
    deployed = deployed_recall(config, world, depth)
    written = write_report(
        config.results,
        f"A cascade of depth {depth}",
        rows,
        f"{describe(config, world)}\n\n```text\n{curve}\n```\n\n{deployed['text']}",
        config=config_to_dict(config)
        | {
            "vectors": Path(config.vectors).name,
            "old": Path(config.old).name,
            "new": Path(config.new).name,
            "pairs": Path(config.pairs.source).name,
        },
        curve=curve.to_dict(),
        deployed=deployed,
    )
    print(written.with_name(f"{written.stem}.md").read_text(encoding="utf-8"), end="")


def recorded_world(config: CascadeBenchmark) -> World:
    """Read vectors of both models."""
    with np.load(config.vectors, allow_pickle=False) as file:
        part = {
            name: torch.from_numpy(file[name].astype(np.float32))
            for name in ("old_image", "new_image", "old_text", "new_text")
        }
        pairs = file["pairs"].astype(np.int64)
    items = part["new_image"]
    return World(
        part["old_text"][pairs[:, 1]], part["new_text"][pairs[:, 1]], part["old_image"], items, pairs[:, 0],
        Recorded(items), str, "text",
    )  # fmt: skip


def embedded_world(config: CascadeBenchmark) -> World:
    """Embed pairs with both encoders."""
    old, new = load_encoder(config.old), load_encoder(config.new)
    pairs, _ = load_readable_pairs(config.pairs)
    images = [pairs.image(row) for row in range(len(pairs))]
    return World(
        old.encode_texts(pairs.texts), new.encode_texts(pairs.texts), old.encode_images(images),
        new.encode_images(images), np.array(pairs.text_image), new, lambda item: pairs.images[int(item)],
        "image",
    )  # fmt: skip


def recorded(world: World) -> World:
    """The same world with vectors in the place of its model."""
    return World(
        world.old_queries, world.new_queries, world.old_items, world.new_items, world.answers,
        Recorded(world.new_items), str, "text",
    )  # fmt: skip


def drawn(config: CascadeBenchmark, world: World, count: int, seed: int) -> NDArray[np.int64]:
    """Draw queries by Zipf's law; which ones are popular follows from the config's seed alone."""
    popular = np.random.default_rng(config.seed).permutation(len(world.answers))
    weights = 1 / np.arange(1, len(popular) + 1) ** config.zipf
    draw = np.random.default_rng([config.seed, seed])
    return np.asarray(popular[draw.choice(len(popular), count, p=weights / weights.sum())], np.int64)


def gallery_of(world: World, path: Path) -> Gallery:
    """A gallery on disk with the old vectors."""
    space = EmbeddingSpace("old", world.old_items.shape[1], probe=world.old_items[:20])
    made = Gallery.create(path, space=space, dtype="float32")
    made.add(world.old_items, [str(row) for row in range(len(world.old_items))])
    return made


def traffic(config: CascadeBenchmark, world: World, depth: int, prewarm: int) -> list[dict[str, Any]]:
    """Ask query after query, and describe the windows between the config's numbers of queries."""
    asked = drawn(config, world, config.queries, 1)
    rows: list[dict[str, Any]] = []
    alone = best_positive_ranks(world.new_queries, world.new_items, world.positives).numpy()
    with TemporaryDirectory() as folder:
        gallery = gallery_of(world, Path(folder) / "gallery")
        with Cascade(world.encoder, world.originals, depth=depth, modality=world.modality) as cascade:
            if prewarm:
                cascade.prewarm(gallery, world.old_queries[drawn(config, world, prewarm, 2)])
            before, seconds, hits, begin = cascade.statistics, [], [], 0
            warmed = before.embedded
            ends = sorted({*(end for end in config.windows if end < len(asked)), len(asked)})
            for number, query in enumerate(asked, start=1):
                start = time.perf_counter()
                found = gallery.search(
                    world.old_queries[[query]],
                    config.k,
                    rerank=cascade,
                    new_queries=world.new_queries[[query]],
                )
                seconds.append(time.perf_counter() - start)
                hits.append(str(world.answers[query]) == found.ids[0][0])
                if number not in ends:
                    continue
                now, part = cascade.statistics, slice(begin, number)
                rows.append({
                    "traffic": f"after {prewarm} queries of a log" if prewarm else "cold",
                    "queries": f"{begin + 1}–{number}",
                    "images embedded a query": (now.embedded - before.embedded) / (number - begin),
                    "hit rate, %": 100 * (now.hits - before.hits) / (now.candidates - before.candidates),
                    "embedded so far, %": 100 * now.embedded / len(world.new_items),
                    "of these by the log, %": 100 * warmed / len(world.new_items),
                    "median ms": 1000 * float(np.median(seconds[part])),
                    "mean ms": 1000 * float(np.mean(seconds[part])),
                    "R@1, %": 100 * float(np.mean(hits[part])),
                    "R@1 of new/new, %": 100 * float(np.mean(alone[asked[part]] < 1)),
                })  # fmt: skip
                before, begin = now, number
    return rows


def deployed_recall(config: CascadeBenchmark, world: World, depth: int) -> dict[str, Any]:
    """R@k of all queries through a gallery and a cascade, beside new/new and the plain searches' time."""
    names = [str(row) for row in world.answers]
    with TemporaryDirectory() as folder:
        gallery = gallery_of(world, Path(folder) / "gallery")
        own = recorded(world)
        with Cascade(own.encoder, own.originals, depth=depth, modality="text") as cascade:
            found = gallery.search(world.old_queries, 10, rerank=cascade, new_queries=world.new_queries)
        pairs = zip(found.ids, names, strict=True)
        places = [line.index(name) if name in line else 10 for line, name in pairs]
        plain = [timed(gallery, query) for query in world.old_queries[:200]]
    alone = best_positive_ranks(world.new_queries, world.new_items, world.positives).numpy()
    recall = {f"R@{k}": 100 * float(np.mean(np.array(places) < k)) for k in (1, 5, 10)}
    new = {f"R@{k}": 100 * float(np.mean(alone < k)) for k in (1, 5, 10)}
    shown = ", ".join(f"{name} {value:.1f} (new/new {new[name]:.1f})" for name, value in recall.items())
    plain_ms = 1000 * float(np.median(plain))
    text = (
        f"All queries through one gallery and a cascade of depth {depth}, 256 at once, where new vectors "
        f"that earlier queries have stored are searched as well: {shown}. A search of the old vectors alone "
        f"takes {plain_ms:.2f} ms."
    )
    return {"recall": recall, "new": new, "plain_ms": plain_ms, "text": text}


def timed(gallery: Gallery, query: Tensor) -> float:
    """Seconds of one search of the old vectors."""
    start = time.perf_counter()
    gallery.search(query, 10, using="old")
    return time.perf_counter() - start


def describe(config: CascadeBenchmark, world: World) -> str:
    """Describe the table."""
    source = Path(config.vectors).name if config.vectors else "photos and two encoders"
    return (
        f"{len(world.new_items)} items and {len(world.answers)} queries of {source}; traffic by Zipf's law "
        f"with s = {config.zipf:g}, one query at a time, {config.threads} thread(s) of torch. Queries are "
        "vectors already: the time holds both stages, reading and embedding photos, and writing their "
        "vectors. The traffic after a log is replayed with vectors in the place of the model."
    )


if __name__ == "__main__":
    run_recipe(main, CascadeBenchmark)
