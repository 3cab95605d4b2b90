"""The order of a backfill on disk, and what of it is still to be done."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from xbt.backfilling.config import BackfillConfig
from xbt.backfilling.ordering import draw_order
from xbt.backfilling.queries import Models, Support
from xbt.backfilling.records import read_order, write_order
from xbt.backfilling.work import Chunk
from xbt.data import read_captions
from xbt.gallery import Gallery, Merge


def kept_order(path: Path, waiting: Sequence[str]) -> list[str] | None:
    """An earlier run's order, and behind it what was added to the gallery since.

    Args:
        path: The order's file.
        waiting: Items that are in the old space.

    Returns:
        Ids, most urgent first; ``None`` if no order has been drawn yet.

    Raises:
        StoreError: If the file is damaged, or cannot be written.
    """
    kept = read_order(path)
    if kept is None:
        return None
    known = set(kept[0])
    arrived = [name for name in waiting if name not in known]
    if arrived:
        write_order(path, kept[0] + arrived, kept[1])
    return kept[0] + arrived


def drawn_order(
    path: Path,
    config: BackfillConfig,
    gallery: Gallery,
    models: Models,
    support: Support | None,
    merge: Merge,
) -> list[str]:
    """Orders a gallery's items and writes the order down.

    Raises:
        XbtError: If there is too little to learn from, or the file cannot be written.
    """
    part = gallery.parts[0].name
    waiting = gallery.ids_of(part)
    log = None if config.query_log is None else models.queries(read_captions(config.query_log))
    drawn = draw_order(config, gallery.vectors(waiting, part=part), support, log, merge).tolist()
    ids = [waiting[row] for row in drawn]
    write_order(path, ids, {"order": config.order, "seed": config.seed})
    return ids


def cut(order: Sequence[str], waiting: Collection[str], config: BackfillConfig) -> tuple[int, list[Chunk]]:
    """The rest of an order in chunks, whose ends do not depend on where an earlier run was killed.

    Args:
        order: Ids, most urgent first.
        waiting: Those that are still to be done.
        config: How large chunks are, and how many items are wanted in all.

    Returns:
        The position before which nothing is to be done any more, and what follows.
    """
    done = next((place for place, name in enumerate(order) if name in waiting), len(order))
    position, limit = done, min(len(order), config.max_items or len(order))
    chunks = []
    while done < limit:
        steps = config.commit_every, config.evaluate_every
        end = min(limit, *((done // step + 1) * step for step in steps))
        chunks.append(Chunk([name for name in order[done:end] if name in waiting], end))
        done = end
    return position, chunks
