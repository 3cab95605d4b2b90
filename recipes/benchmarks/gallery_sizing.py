"""Extrapolation from measured galleries to large ones: memory, disk, machines and hours."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import Spread
from torch import Tensor

from xbt.index import Gallery
from xbt.space import EmbeddingSpace

USED = 0.9
"""Share of a machine's memory that a gallery may have."""

MEMORY = """
import json, sys, time
import faiss, psutil, torch
from xbt.index import Gallery

def used():
    about = psutil.Process().memory_info()
    return about.rss - about.shared

before, began = used(), time.perf_counter()
gallery = Gallery.open(sys.argv[1], read_only=True)
gallery.prepare()
ready = time.perf_counter() - began
gallery.search(torch.nn.functional.normalize(torch.ones(1, gallery.dim), dim=1), 1)
print(json.dumps({"bytes": used() - before, "seconds": ready}))
"""


@dataclass(frozen=True)
class IndexCost:
    """Cost of an item of a gallery under one index.

    Attributes:
        index: FAISS's string.
        memory: Bytes of memory per item: its vector in the index, its id, and what finds them.
        disk: Bytes on disk per item.
        ready: Seconds from opening the gallery to its first search.
    """

    index: str
    memory: float
    disk: float
    ready: float


def measure_index(
    path: Path, index: str, items: Iterable[tuple[Tensor, list[str]]], space: EmbeddingSpace, count: int
) -> IndexCost:
    """Make a gallery; open it in a process that does nothing else.

    Args:
        path: Where to.
        index: Which.
        items: Vectors and ids, some at a time.
        space: Of the vectors.
        count: Of all of them.
    """
    gallery = Gallery.create(path, space=space, index=index)
    for vectors, ids in items:
        gallery.add(vectors, ids)
    gallery.prepare()
    gallery.close()
    process = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], check=True, capture_output=True, text=True
    )
    memory = json.loads(process.stdout)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return IndexCost(index, memory["bytes"] / count, size / count, memory["seconds"])


def sizing_rows(
    measured: Sequence[Mapping[str, Any]],
    costs: Sequence[IndexCost],
    rows: int,
    sizes: Sequence[int],
    machine_gb: float,
    encoder_rates: Mapping[str, float],
) -> list[dict[str, Any]]:
    """The sizing table.

    Args:
        measured: The rows of the first table.
        costs: What an item costs under each index.
        rows: Items of the gallery that was measured.
        sizes: Items to size for.
        machine_gb: Memory of a machine.
        encoder_rates: Images per second by encoder.
    """
    seconds = {row[""]: row["s in all"] / rows for row in measured if row["s in all"] != ""}
    writing = next(value for name, value in seconds.items() if name.startswith("backfill"))
    takes: dict[str, Callable[[int], str]] = {"to add": timed(seconds["add"])}
    takes["to write a backfill"] = timed(writing)
    for name, rate in encoder_rates.items():
        takes[f"to backfill with {name} at {rate:g} images/s"] = timed(max(1 / rate, writing))
    takes |= {f"for the {name}": timed(each) for name, each in seconds.items() if name.startswith("order")}
    for row in measured:
        if row[""].startswith("neighbours"):
            takes["for the neighbours of order rehearsed"] = neighbours(row)
    takes |= {f"index {cost.index}": index_size(cost, machine_gb) for cost in costs}
    return [
        {"": what, **{f"{size:,} items": estimate(size) for size in sizes}}
        for what, estimate in takes.items()
    ]


def timed(seconds_per_item: float) -> Callable[[int], str]:
    """Time that is proportional to the number of items."""
    return lambda size: hours(size * seconds_per_item)


def neighbours(row: Mapping[str, Any]) -> Callable[[int], str]:
    """Time of the neighbours: an item is compared with a fixed number of √n inverted lists."""
    spread: Spread = row["measured"]
    count = int(row[""].rsplit(", ", 1)[1].split()[0])
    return lambda size: hours(spread.median * (size / count) ** 1.5)


def index_size(cost: IndexCost, machine_gb: float) -> Callable[[int], str]:
    """Memory, number of machines, and disk."""

    def estimate(size: int) -> str:
        memory, disk = size * cost.memory / 1e9, size * cost.disk / 1e9
        machines = math.ceil(memory / (USED * machine_gb))
        return f"{memory:,.0f} GB memory = {machines} × {machine_gb:g} GB; {disk:,.0f} GB disk"

    return estimate


def hours(seconds: float) -> str:
    """Format a time in hours or seconds."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds:,.0f} s"


def sizing_notes(index_rows: int, rows: int, machine_gb: float, threads: int) -> str:
    """Assumptions of the table."""
    return (
        f"Memory and disk are those of a gallery of {index_rows:,} items, times the number of items; a "
        f"machine of {machine_gb:g} GB is filled to {100 * USED:.0f} %. Times are those of {rows:,} items on "
        f"{threads} threads, times the number of items, or times its power of 1.5 for the neighbours; a "
        "backfill's hours are the encoder's or the gallery's, whichever is more, in one process. An index of "
        "many more items wants more lists than the one measured, which adds little memory. Nothing of this "
        "size was run."
    )
