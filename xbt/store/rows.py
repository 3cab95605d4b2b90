"""Rows of ``.npy`` files, read by position; nothing is unpickled and no file stays in memory."""

from __future__ import annotations

import io
import os
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import StoreError
from xbt.files import open_regular
from xbt.store.layout import AGAIN, DTYPES, file_spans
from xbt.vectors import lengths_of, not_unit

MAX_HEADER = 12_000
"""Maximum bytes of a header: numpy refuses to parse more than 10,000."""
_HEADERS: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    (3, 0): np.lib.format.read_array_header_2_0,  # UTF-8 instead of latin-1; the same for float arrays
}
_UNREADABLE = (
    *(ValueError, EOFError, SyntaxError, tokenize.TokenError, TypeError, KeyError, IndexError),
    *(AttributeError, OverflowError, RecursionError, MemoryError),
)
"""Errors of numpy for damaged headers."""


@dataclass(frozen=True)
class NpyFile:
    """An ``.npy`` file of (count, dim) rows.

    Attributes:
        path: The file.
        count: Number of rows.
        dim: Number of values per row.
        dtype: Type of the values.
        offset: The byte at which the values begin.
        status: Inode, size in bytes and modification time (ns) when the header was read.
    """

    path: Path
    count: int
    dim: int
    dtype: np.dtype[Any]
    offset: int
    status: tuple[int, ...]


def read_npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Parse the header of an ``.npy`` file with numpy's safe reader.

    ``head`` are the first bytes of the file, of which at most :data:`MAX_HEADER` are used. A damaged header
    is a ``ValueError`` of one line.

    Returns:
        Shape, True if the values are stored column by column, dtype, and the byte at which they begin.
    """
    file = io.BytesIO(head[:MAX_HEADER])
    try:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"its version is {version}")
        shape, fortran, dtype = _HEADERS[version](file)
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(reason) from error
    if any(size < 0 for size in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, fortran, dtype, file.tell()


def inspect_npy(path: Path) -> NpyFile:
    """Read the header of a shard and check it against the file's size; it must hold (n, dim) float rows."""
    try:
        with open_regular(path, path.parent.parent) as file:
            status = _status(file)
            shape, fortran, dtype, offset = read_npy_header(file.read(MAX_HEADER))
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error
    except StoreError:
        raise
    except ValueError as error:
        raise StoreError(f"{path} is not a whole .npy file ({error}); {AGAIN}") from error
    if dtype.hasobject:
        raise StoreError(
            f"{path} holds pickled Python objects, which are never loaded; save plain float rows"
        )
    if dtype.name not in DTYPES or len(shape) != 2 or (fortran and min(shape) > 1):
        order = ", column by column" if fortran else ""
        raise StoreError(
            f"{path} holds an array of shape {shape} and type {dtype}{order}; save (n, dim) rows of float16 "
            "or float32, row by row"
        )
    if dtype != dtype.newbyteorder("<"):
        # One flipped bit turns "<f4" into ">f4", and no tool writes big-endian stores.
        raise StoreError(
            f"{path} says that its values are big-endian ({dtype.str}), which looks like damage; {AGAIN}, "
            "or save its rows as little-endian"
        )
    needed, size = offset + shape[0] * shape[1] * dtype.itemsize, status[1]
    if size != needed:
        raise StoreError(f"{path} has {size} bytes, but its {shape[0]} rows need {needed}; {AGAIN}")
    if not shape[1]:
        raise StoreError(f"{path} has rows without values (shape {shape}); {AGAIN}")
    return NpyFile(path, *shape, dtype, offset, status)


class NpyRows:
    """Rows of several ``.npy`` files, read as one array.

    Rows are read by position instead of through a memory map. Pages of a map count as memory of the process
    until the system takes them back, and a file that is cut while it is mapped kills the process. Reads by
    position use memory only for the result. No file stays open between two reads.

    ``counts`` are the rows of each file. ``dtype`` is the type of the values on disk, with byte order, and
    ``None`` accepts the type of each file. ``unit`` refuses rows that do not have length 1.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        counts: Sequence[int],
        dim: int,
        dtype: np.dtype[Any] | None = None,
        unit: bool = False,
    ) -> None:
        self._paths, self.dim, self._dtype, self._unit = list(paths), dim, dtype, unit
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._headers: dict[int, NpyFile] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows by number, in the given order, as (n, dim) float32; damaged or unusable rows are refused."""
        result = np.empty((len(indices), self.dim), np.float32)
        order = np.argsort(indices, kind="stable")
        ascending = indices[order]
        files = np.searchsorted(self._starts, ascending, side="right") - 1
        borders = np.flatnonzero(np.diff(files, prepend=-1, append=-1))
        for first, last in pairwise(borders.tolist()):
            number = int(files[first])
            numbers = ascending[first:last] - self._starts[number]
            result[order[first:last]] = self._gather(number, numbers)
        self._require_usable(result, indices)
        return result

    def slice(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start`` … ``stop − 1`` as (n, dim) float32, with the checks of :meth:`take`."""
        result = np.empty((stop - start, self.dim), np.float32)
        filled = 0
        for number, first, last in file_spans(self._starts, start, stop):
            _widen(self._gather(number, np.arange(first, last)), result[filled : filled + last - first])
            filled += last - first
        self._require_usable(result, range(start, stop))
        return result

    def memory_maps(self) -> list[NDArray[np.floating]]:
        """Every file's (n, dim) rows, mapped read-only."""
        files = [self._checked(number, inspect_npy(path)) for number, path in enumerate(self._paths)]
        return [
            np.memmap(f.path, f.dtype, "r", f.offset, (f.count, f.dim))
            if f.count  # an empty file cannot be mapped
            else np.zeros((0, f.dim), f.dtype)
            for f in files
        ]

    def _gather(self, number: int, numbers: NDArray[np.int64]) -> NDArray[np.floating]:
        """Rows of one file by their ascending numbers; consecutive rows take one read."""
        runs = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        ends = [*runs[1:].tolist(), len(numbers)]
        header, path = self._headers.get(number), self._paths[number]
        try:
            with open_regular(path, path.parent.parent if header is None else None) as file:
                if header is None or header.status != _status(file):
                    header = self._headers[number] = self._checked(number, inspect_npy(path))
                width = self.dim * header.dtype.itemsize
                rows = np.empty((len(numbers), self.dim), header.dtype)
                target = memoryview(rows.data).cast("B")
                positions = (header.offset + numbers[runs] * width).tolist()
                for start, end, position in zip(runs.tolist(), ends, positions, strict=True):
                    _fill(file, target[start * width : end * width], position, path)
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error
        return rows

    def _checked(self, number: int, npy: NpyFile) -> NpyFile:
        count = int(self._starts[number + 1] - self._starts[number])
        if (npy.count, npy.dim) != (count, self.dim):
            raise StoreError(
                f"{npy.path} has {npy.count} rows of dimension {npy.dim}, but the store expects {count} of "
                f"dimension {self.dim}; {AGAIN}"
            )
        if self._dtype is not None and npy.dtype != self._dtype:
            raise StoreError(
                f"{npy.path} holds values of type {npy.dtype.str}, but the store holds {self._dtype.str}; "
                f"{AGAIN}"
            )
        return npy

    def _require_usable(self, rows: NDArray[np.float32], numbers: Sequence[int] | NDArray[np.int64]) -> None:
        tensor = torch.from_numpy(rows)
        lengths = lengths_of(tensor)
        if not bool(torch.isfinite(lengths.sum())):  # also for huge finite values, so look at each
            not_finite = ~torch.isfinite(tensor).all(dim=1)
            if bool(not_finite.any()):
                raise StoreError(f"{self._describe(not_finite, numbers, 'has NaN or infinity')}: {AGAIN}")
        wrong_length = not_unit(lengths)
        if self._unit and bool(wrong_length.any()):
            largest = float((lengths - 1).abs().max())
            where = self._describe(wrong_length, numbers, "has rows that are not of length 1")
            raise StoreError(
                f"{where} (lengths differ from 1 by up to {largest:.3g}), but its space has unit rows: "
                "normalise them, or name a space of normalisation 'none'"
            )

    def _describe(self, bad: Tensor, numbers: Sequence[int] | NDArray[np.int64], what: str) -> str:
        row = int(numbers[int(torch.nonzero(bad)[0])])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        path = self._paths[number]
        shard = path.stem.removeprefix(f"{path.parent.name}_")
        return f"{path} of shard {shard!r} {what}, first in its row {row - int(self._starts[number])}"


def _status(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _widen(rows: NDArray[np.floating], target: NDArray[np.float32]) -> None:
    """Copy rows as float32; torch converts float16 several times as fast as numpy."""
    if rows.dtype == np.float16 and rows.dtype.isnative:
        torch.from_numpy(target).copy_(torch.from_numpy(rows))
    else:
        target[...] = rows


def _fill(file: BinaryIO, target: memoryview, position: int, path: Path) -> None:
    done = 0
    while done < len(target):  # one call may read less than requested
        if hasattr(os, "preadv"):
            count = os.preadv(file.fileno(), [target[done:]], position + done)
        else:
            file.seek(position + done)
            count = int(file.readinto(target[done:]))  # type: ignore[attr-defined]
        if not count:
            raise StoreError(f"{path} ends before its last row; it was cut while open: copy it again")
        done += count
