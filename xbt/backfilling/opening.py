"""The gallery of a backfill: opened, its new part begun, and written to beside others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xbt.errors import DataError, StoreError
from xbt.gallery import Gallery
from xbt.space import EmbeddingSpace

PATIENCE = 60.0
"""Seconds for which another writer is waited for."""


def open_gallery(path: str | Path, store: str | None) -> Gallery:
    """Opens a gallery for writing; if there is none, makes one of a store, which stays as it is.

    Raises:
        StoreError: If there is no gallery and no store is given, or either is damaged.
    """
    if store is not None and not (Path(path).expanduser() / "gallery.json").is_file():
        return Gallery.create(path, store=store)
    return Gallery.open(path)


def is_through(gallery: Gallery, space: EmbeddingSpace) -> bool:
    """Whether a gallery has nothing but the new space: it was backfilled and compacted.

    Raises:
        SpaceMismatchError: If it has a second part, of another space.
    """
    only = gallery.parts[0].space
    if len(gallery.parts) > 1:
        there = gallery.parts[1].space
        assert there is not None  # a part is begun with its space
        there.require(space, f"the encoder that the part {gallery.parts[1].name!r} is to be filled with")
        return False
    return only is not None and only.dim == space.dim and only.same_as(space)


def begin_part(gallery: Gallery, space: EmbeddingSpace) -> None:
    """Begins the part of the new space, unless it is there.

    Raises:
        StoreError: If another process has been writing for long, or the disk is full.
    """
    with _writing_beside_others(gallery):
        if len(gallery.parts) == 1:
            gallery.begin_part(space)


def backfill_present(
    gallery: Gallery, vectors: NDArray[np.float32], ids: list[str], space: EmbeddingSpace
) -> int:
    """Backfills items, and leaves out those that somebody has removed or replaced meanwhile.

    Returns:
        How many were backfilled.

    Raises:
        StoreError: If another process has been writing for long, or the disk is full.
    """
    if not ids:
        return 0
    with _writing_beside_others(gallery):
        try:
            gallery.backfill(vectors, ids, space)
            return len(ids)
        except DataError:
            waiting = set(gallery.ids_of(gallery.parts[0].name))
            rows = [row for row, name in enumerate(ids) if name in waiting]
            if len(rows) == len(ids):
                raise
            if rows:
                gallery.backfill(vectors[rows], [ids[row] for row in rows], space)
            return len(rows)


@contextmanager
def _writing_beside_others(gallery: Gallery) -> Iterator[None]:
    """The right to write, waited for a while: whoever adds items holds it for moments only."""
    deadline, pause = time.monotonic() + PATIENCE, 0.05
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(gallery.writing())
                break
            except StoreError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
        yield
