"""The gallery of a backfill: opened, its new part begun, and written to beside others."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xbt.errors import DataError, StoreError
from xbt.gallery import Gallery
from xbt.space import EmbeddingSpace

PATIENCE = 60.0
"""Seconds for which another writer is waited for."""
ROWS_AT_ONCE = 65_536
"""Rows that are read at once."""


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


def marks_of(gallery: Gallery, ids: Sequence[str]) -> dict[str, int]:
    """A number for each item that changes when its old vector does, as when it is replaced.

    Row numbers would change with every :meth:`~xbt.gallery.Gallery.compact` as well.

    Args:
        gallery: The gallery.
        ids: Items that are searched in the old part.

    Raises:
        DataError: If one is not there, or some are in the new part.
        StoreError: If vectors cannot be read.
    """
    found: dict[str, int] = {}
    for start in range(0, len(ids), ROWS_AT_ONCE):
        some = ids[start : start + ROWS_AT_ONCE]
        found.update(zip(some, (hash(row.tobytes()) for row in gallery.vectors(some)), strict=True))
    return found


def backfill_present(
    gallery: Gallery,
    vectors: NDArray[np.float32],
    ids: list[str],
    space: EmbeddingSpace,
    marks: Mapping[str, int],
) -> int:
    """Backfills items, and leaves out those that somebody has removed or replaced meanwhile.

    Args:
        gallery: The gallery.
        vectors: (n, new_dim) the items' new vectors.
        ids: Which.
        space: The new space.
        marks: What :func:`marks_of` gave before the first of their images was read. An item that has
            another one by now was replaced: its vector may be of an image that it no longer has.

    Returns:
        How many were backfilled.

    Raises:
        StoreError: If another process has been writing for long, or the disk is full.
    """
    if not ids:
        return 0
    with _writing_beside_others(gallery):
        try:
            now = marks_of(gallery, ids)
        except DataError:  # some are gone, or in the new part already
            waiting = set(gallery.ids_of(gallery.parts[0].name))
            now = marks_of(gallery, [name for name in ids if name in waiting])
        rows = [row for row, name in enumerate(ids) if name in now and now[name] == marks.get(name)]
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
