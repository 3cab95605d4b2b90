"""Vectors of the same items under both models, wherever they are: in memory, in stores, or in a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.store.store import EmbeddingStore
from xbt.vectors import Vectors, as_floating, require_dense, require_finite

Source = Tensor | NDArray[np.floating] | EmbeddingStore | Iterable[Vectors]
"""Vectors of one model: (n, dim) rows, a store, or an iterable of (k, dim) chunks of any sizes."""

BLOCK_ROWS = 8_192
NEW, OLD = "new vectors", "old vectors"


class PairedVectors(Protocol):
    """Vectors of the same items under both models that can be read in any order."""

    def __len__(self) -> int: ...

    @property
    def dims(self) -> tuple[int, int]:
        """Dimension of the new and of the old vectors."""

    def take(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(k, new_dim) and (k, old_dim) float32 vectors of some items, in the order of the positions."""


def paired_chunks(new: Source, old: Source, rows: int = BLOCK_ROWS) -> Iterator[tuple[Tensor, Tensor]]:
    """Reads both sides once, block by block, and checks on the way that they can be used together.

    Of stores the next block is read while the caller works on the last one: memory is that of two blocks.

    Args:
        new: Vectors of the new model. Chunks of a stream need not have the sizes of the other side's.
        old: Vectors of the old model, row by row of the same items.
        rows: Rows of a block; the last may be shorter.

    Yields:
        (k, new_dim) and (k, old_dim) CPU tensors, float32, or float64 where the source is float64.

    Raises:
        ConfigError: If ``rows`` is below 1.
        DataError: If there are no rows, the counts differ, the ids of two stores differ, or a value is NaN or
            infinite; the message names the first such row of the whole.
        SpaceMismatchError: If chunks of one stream differ in dimension.
    """
    if rows < 1:
        raise ConfigError(f"a block has at least 1 row, got rows={rows}")
    _require_same_count(new, old)
    start = 0
    blocks: Iterator[tuple[Tensor, Tensor]] = zip_longest(_blocks(new, NEW, rows), _blocks(old, OLD, rows))
    # A stream is the caller's code, which need not expect to be run in another thread.
    stores = isinstance(new, EmbeddingStore) and isinstance(old, EmbeddingStore)
    for left, right in _ahead(blocks) if stores else blocks:
        counts = [0 if side is None else len(side) for side in (left, right)]
        if counts[0] != counts[1]:
            ended, on = (NEW, OLD) if counts[0] < counts[1] else (OLD, NEW)
            raise DataError(
                f"the {ended} end after {start + min(counts)} rows, but the {on} go on; both must be of the "
                "same items"
            )
        _require_same_ids(new, old, start, start + counts[0])
        yield left, right
        start += counts[0]
    if start == 0:
        raise DataError(f"{NEW} is empty: it has 0 rows; give at least one vector")


def random_access(new: Source, old: Source) -> PairedRows:
    """Both sides for methods that take rows in an order of their own.

    Vectors in memory are checked at once, stores as they are read.

    Raises:
        ConfigError: If a side is a stream, which can be read only once.
        DataError: As :func:`paired_chunks`.
    """
    if not isinstance(new, Tensor | np.ndarray | EmbeddingStore):
        raise _once(new, NEW)
    if not isinstance(old, Tensor | np.ndarray | EmbeddingStore):
        raise _once(old, OLD)
    _require_same_count(new, old)
    for source, name in ((new, NEW), (old, OLD)):
        if len(source) == 0:
            raise DataError(f"{name} is empty: it has 0 rows; give at least one vector")
        for _ in () if isinstance(source, EmbeddingStore) else _blocks(source, name, BLOCK_ROWS):
            pass
    for start in range(0, len(new), BLOCK_ROWS):
        _require_same_ids(new, old, start, min(start + BLOCK_ROWS, len(new)))
    return PairedRows(new, old)


@dataclass(frozen=True)
class PairedRows:
    """Rows of both models by position; made by :func:`random_access`, which checks that they pair.

    Attributes:
        new: Vectors of the new model.
        old: Vectors of the old model.
    """

    new: Tensor | NDArray[np.floating] | EmbeddingStore
    old: Tensor | NDArray[np.floating] | EmbeddingStore

    def __len__(self) -> int:
        return len(self.new)

    @property
    def dims(self) -> tuple[int, int]:
        """Dimension of the new and of the old vectors."""
        new, old = (
            side.dim if isinstance(side, EmbeddingStore) else int(side.shape[1])
            for side in (self.new, self.old)
        )
        return new, old

    def take(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Rows by position, in the order asked for.

        Args:
            positions: (k,) int64, from 0 to the number of rows.

        Returns:
            (k, new_dim) and (k, old_dim) float32 CPU tensors.

        Raises:
            DataError: If a store holds NaN or infinity there; the message names the row.
        """
        return _take(self.new, positions, NEW), _take(self.old, positions, OLD)


def _once(source: object, name: str) -> ConfigError:
    return ConfigError(
        f"the {name} are a stream ({type(source).__name__}), which can be read only once, but this method "
        "reads rows many times; give vectors or stores"
    )


def _take(
    source: Tensor | NDArray[np.floating] | EmbeddingStore, positions: NDArray[np.int64], name: str
) -> Tensor:
    if isinstance(source, EmbeddingStore):
        rows = torch.from_numpy(source.rows(positions))
        require_finite(rows, _called(source, name), positions)
        return rows
    picked = source[torch.from_numpy(positions).to(source.device)] if isinstance(source, Tensor) else None
    return _rows(source[positions] if picked is None else picked, name).float()


def _blocks(source: Source, name: str, rows: int) -> Iterator[Tensor]:
    """Blocks of exactly ``rows`` rows (the last may be shorter), finite."""
    read: Iterator[Tensor]
    if isinstance(source, EmbeddingStore):
        read = (torch.from_numpy(block) for block in source.batches(rows))
    elif isinstance(source, Tensor | np.ndarray):
        if isinstance(source, Tensor):
            require_dense(source, name)
        if source.ndim != 2:
            raise DataError(f"{name} must have the shape (n, dim), got {tuple(source.shape)}")
        read = (_rows(source[start : start + rows], name) for start in range(0, len(source), rows))
    elif isinstance(source, Iterable):
        read = _regrouped(source, name, rows)
    else:
        raise DataError(
            f"the {name} are of type {type(source).__name__}; give a tensor, a numpy array, a store or an "
            "iterable of (k, dim) chunks"
        )
    start = 0
    for block in read:
        require_finite(block, _called(source, name), range(start, start + len(block)))
        yield block
        start += len(block)


def _regrouped(chunks: Iterable[Vectors], name: str, rows: int) -> Iterator[Tensor]:
    kept: list[Tensor] = []
    held, dim = 0, 0
    for number, chunk in enumerate(chunks):
        where = f"chunk {number} of the {name}"
        if not isinstance(chunk, Tensor | np.ndarray):
            raise DataError(f"{where} is a {type(chunk).__name__}; give tensors or arrays of shape (k, dim)")
        rest = _rows(chunk, where)
        dim = dim or rest.shape[1]
        if rest.shape[1] != dim:
            raise SpaceMismatchError(f"{where} has dimension {rest.shape[1]}, but those before it have {dim}")
        while held + len(rest) >= rows:
            yield torch.cat([*kept, rest[: rows - held]])
            rest, kept, held = rest[rows - held :], [], 0
        if len(rest):
            kept.append(rest.clone())  # whoever makes the stream may fill the same memory again
            held += len(rest)
    if kept:
        yield torch.cat(kept)


def _rows(vectors: Vectors, name: str) -> Tensor:
    """Float32 (or float64) CPU rows of any float dtype."""
    tensor = as_floating(vectors, name).detach().cpu()
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise DataError(f"{name} must have the shape (n, dim), got {tuple(tensor.shape)}")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _called(source: object, name: str) -> str:
    return f"{name} ({source.path})" if isinstance(source, EmbeddingStore) else name


def _require_same_count(new: Source, old: Source) -> None:
    ours, theirs = _count(new), _count(old)
    if ours is not None and theirs is not None and ours != theirs:
        raise DataError(
            f"new and old vectors must be of the same items: there are {ours} new and {theirs} old rows"
        )


def _count(side: Source) -> int | None:
    """Rows, where they are known before they are read."""
    if isinstance(side, EmbeddingStore):
        return len(side)
    return len(side) if isinstance(side, Tensor | np.ndarray) and side.ndim == 2 else None


def _require_same_ids(new: Source, old: Source, start: int, stop: int) -> None:
    if not (isinstance(new, EmbeddingStore) and isinstance(old, EmbeddingStore)):
        return
    ours, theirs = new.read_ids(start, stop), old.read_ids(start, stop)
    if ours != theirs:
        row = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
        raise DataError(
            f"row {start + row} has the id {ours[row]!r} in {new.path} but {theirs[row]!r} in {old.path}; "
            "embed the same items with both models"
        )


def _ahead(blocks: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same blocks, each read in a thread while its predecessor is worked on."""
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(next, blocks, None)
        while (block := waiting.result()) is not None:
            waiting = reader.submit(next, blocks, None)
            yield block
