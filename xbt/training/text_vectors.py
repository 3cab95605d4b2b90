"""The same texts under two models, row by row, in memory or in stores."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError, StoreError
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore
from xbt.vectors import as_vectors

CAPTION = "caption"
_ROWS_AT_ONCE = 8_192


@dataclass(frozen=True)
class TextVectors:
    """The same texts under both models.

    However many rows the stores have, only ``rows`` grows with them, 8 bytes a row.

    Attributes:
        new: (n, new_dim) float32 unit rows, as a tensor or a store.
        old: (n, old_dim) float32 unit rows, as a tensor or a store.
        new_space: The space of ``new``.
        old_space: The space of ``old``.
        rows: (m,) int64, the rows to use; ``None`` uses all.
    """

    new: Tensor | EmbeddingStore
    old: Tensor | EmbeddingStore
    new_space: EmbeddingSpace | None = None
    old_space: EmbeddingSpace | None = None
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.new) if self.rows is None else len(self.rows)

    @property
    def dims(self) -> tuple[int, int]:
        """Dimension of the new and of the old vectors."""
        new, old = (
            each.dim if isinstance(each, EmbeddingStore) else each.shape[1] for each in (self.new, self.old)
        )
        return new, old

    def checked(self) -> Self:
        """The same vectors, once it is sure that they can be used; stores are checked as they are read.

        Raises:
            DataError: If a tensor holds NaN, or the row counts differ.
        """
        new = self.new if isinstance(self.new, EmbeddingStore) else as_vectors(self.new, "new text vectors")
        old = self.old if isinstance(self.old, EmbeddingStore) else as_vectors(self.old, "old text vectors")
        if len(new) != len(old):
            raise DataError(
                f"new and old vectors must be of the same texts: there are {len(new)} new and {len(old)} "
                "old rows"
            )
        return replace(self, new=new, old=old)

    def take(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """New and old vectors of some texts, in the order asked for.

        Args:
            positions: (k,) int64, from 0 to the length.

        Returns:
            (k, new_dim) and (k, old_dim) float32.

        Raises:
            DataError: If a store holds NaN there; the message names the row.
        """
        rows = positions if self.rows is None else self.rows[positions]
        return _take(self.new, rows), _take(self.old, rows)

    def chunks(self, positions: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        """New and old vectors of some texts, a few thousand at a time, in row order (sequential reads)."""
        ordered = np.sort(positions)
        for start in range(0, len(ordered), _ROWS_AT_ONCE):
            yield self.take(ordered[start : start + _ROWS_AT_ONCE])


def open_text_stores(new: str, old: str) -> TextVectors:
    """Opens two stores of the same texts and pairs them.

    Args:
        new: The directory of the new model's text store.
        old: The directory of the old model's text store.

    Returns:
        The vectors; of texts that occur several times, where the stores know their captions, the first row.
        (Captions are compared by 64-bit hashes.)

    Raises:
        StoreError: If a store cannot be opened, is not of texts, or does not say its space.
        DataError: If the rows do not pair; the message names the first that differs.
    """
    first, second = _open(new, "new_store"), _open(old, "old_store")
    return TextVectors(first, second, first.space, second.space, distinct_rows(first, second))


def _open(path: str, flag: str) -> EmbeddingStore:
    try:
        store = EmbeddingStore.open(path, "text")
    except StoreError as error:
        raise StoreError(f"--{flag}: {error}") from error
    if store.space is None:
        raise StoreError(
            f"--{flag}: {store.path} does not say which model made its vectors, and a projection must know; "
            "embed the texts with recipes/embed.py, whose stores say it"
        )
    return store


def distinct_rows(new: EmbeddingStore, old: EmbeddingStore) -> NDArray[np.int64] | None:
    """Rows of the first of equal captions, or ``None`` for all; checks on the way that the rows pair."""
    count = min(len(new), len(old))
    captioned = [store for store in (new, old) if CAPTION in store.columns]
    hashes = np.empty(count if captioned else 0, np.uint64)
    for start in range(0, count, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, count)
        ids = new.read_ids(start, stop)
        _require_same(new, old, "id", ids, old.read_ids(start, stop), start)
        if captioned:
            captions = [each.metadata([CAPTION], start, stop)[CAPTION].to_pylist() for each in captioned]
            _require_same(new, old, CAPTION, captions[0], captions[-1], start)
            texts = [name if text is None else text for name, text in zip(ids, captions[0], strict=True)]
            hashes[start:stop] = [_hash(text) for text in texts]
    if len(new) != len(old):
        raise DataError(
            f"--new_store {new.path} has {len(new)} rows and --old_store {old.path} has {len(old)}, but "
            "both must be of the same texts; embed the same captions with both models"
        )
    first = np.sort(np.unique(hashes, return_index=True)[1])
    return None if len(first) == count or not captioned else first


def _require_same(
    new: EmbeddingStore, old: EmbeddingStore, what: str, ours: list[str], theirs: list[str], start: int
) -> None:
    if ours == theirs:
        return
    row = next(number for number, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
    raise DataError(
        f"row {start + row} has the {what} {ours[row]!r} in --new_store {new.path} but {theirs[row]!r} in "
        f"--old_store {old.path}; embed the same captions with both models"
    )


def _hash(text: str) -> int:
    # Not Python's own, which differs between processes.
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def _take(source: Tensor | EmbeddingStore, rows: NDArray[np.int64]) -> Tensor:
    if isinstance(source, Tensor):
        return source[torch.from_numpy(rows)]
    vectors = source.rows(rows)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{source.path} has NaN or infinite values in row {rows[np.flatnonzero(~finite)[0]]}; check it "
            "with its verify()"
        )
    return torch.from_numpy(vectors)
