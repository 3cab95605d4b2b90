"""Rows of ``.npy`` files, read by position: nothing is unpickled and nothing is kept in memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from xbt.errors import StoreError
from xbt.store.layout import DTYPES

_OPEN_FILES = 128


@dataclass(frozen=True)
class NpyFile:
    """What a file's header says.

    Attributes:
        path: The file.
        count: Rows.
        dim: Values a row.
        dtype: float16 or float32, in either byte order.
        offset: Where the rows begin.
    """

    path: Path
    count: int
    dim: int
    dtype: np.dtype[Any]
    offset: int


def inspect_npy(path: Path) -> NpyFile:
    """Reads a header and checks that the file holds all it promises.

    Raises:
        StoreError: If the file cannot be read, is no ``.npy``, is cut or too long, or holds anything but
            (n, dim) rows of float16 or float32.
    """
    again = "copy it again, or embed its rows anew"
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = _read_header(file)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); {again}") from error
    except (ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        raise StoreError(f"{path} is not a whole .npy file ({reason}); {again}") from error
    if dtype.hasobject:
        raise StoreError(
            f"{path} holds pickled Python objects, which are never loaded; save plain float rows"
        )
    if dtype.name not in DTYPES or len(shape) != 2 or (fortran and min(shape) > 1):
        order = ", column by column" if fortran else ""
        raise StoreError(
            f"{path} holds an array of shape {shape} and type {dtype}{order}; a store holds (n, dim) rows of "
            "float16 or float32: save them so"
        )
    wanted = offset + shape[0] * shape[1] * dtype.itemsize
    if size != wanted:
        raise StoreError(f"{path} has {size} bytes, but its {shape[0]} rows need {wanted}; {again}")
    return NpyFile(path, shape[0], shape[1], dtype, offset)


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


class NpyRows:
    """Rows over several ``.npy`` files as if they were one.

    Rows are copied out of the files by position (``pread``) instead of through a memory map: what is read
    through a map counts as the process's memory until it is given back, and with large pages in the page
    cache a single row of 1.5 KB was seen to map more than 1 MB. Read by position, memory is what is returned,
    and as many rows come per second.

    Args:
        paths: The files in order.
        counts: Their rows.
        dim: Values a row.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], dim: int) -> None:
        self._paths, self.dim = list(paths), dim
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._open: OrderedDict[int, tuple[NpyFile, BinaryIO]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "dim": self.dim, "_starts": self._starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _open=OrderedDict(), _lock=threading.Lock())

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows by number, in the order asked for.

        Args:
            indices: (n,) row numbers within the range.

        Returns:
            (n, dim) float32 rows.
        """
        result = np.empty((len(indices), self.dim), np.float32)
        order = np.argsort(indices, kind="stable")
        wanted = indices[order]
        files = np.searchsorted(self._starts, wanted, side="right") - 1
        borders = np.flatnonzero(np.diff(files, prepend=-1, append=-1))
        for first, last in pairwise(borders.tolist()):
            number = int(files[first])
            numbers = wanted[first:last] - self._starts[number]
            result[order[first:last]] = self._gather(number, numbers)
        return result

    def slice(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start`` … ``stop − 1`` as (n, dim) float32."""
        result = np.empty((stop - start, self.dim), np.float32)
        position = start
        while position < stop:
            number = int(np.searchsorted(self._starts, position, side="right")) - 1
            end = min(stop, int(self._starts[number + 1]))
            first = position - int(self._starts[number])
            _widen(self._read(number, first, end - position), result[position - start : end - start])
            position = end
        return result

    def memory_maps(self) -> list[NDArray[np.floating]]:
        """Every file's (n, dim) rows, mapped read-only."""
        files = [inspect_npy(path) for path in self._paths]
        return [
            np.memmap(f.path, f.dtype, "r", f.offset, (f.count, f.dim))
            if f.count  # nothing cannot be mapped
            else np.zeros((0, f.dim), f.dtype)
            for f in files
        ]

    def close(self) -> None:
        """Closes the files; they are opened again when needed."""
        with self._lock:
            for _, file in self._open.values():
                file.close()
            self._open.clear()

    def _read(self, number: int, first: int, count: int) -> NDArray[np.floating]:
        return self._gather(number, np.arange(first, first + count))

    def _gather(self, number: int, numbers: NDArray[np.int64]) -> NDArray[np.floating]:
        """Rows of one file by their ascending numbers; neighbours are read in one go."""
        runs = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
        ends = [*runs[1:].tolist(), len(numbers)]
        with self._lock:
            npy, file = self._opened(number)
            width = self.dim * npy.dtype.itemsize
            rows = np.empty((len(numbers), self.dim), npy.dtype)
            target = memoryview(rows.data).cast("B")
            positions = (npy.offset + numbers[runs] * width).tolist()
            for start, end, position in zip(runs.tolist(), ends, positions, strict=True):
                _fill(file, target[start * width : end * width], position, npy.path)
        return rows

    def _opened(self, number: int) -> tuple[NpyFile, BinaryIO]:
        found = self._open.get(number)
        if found is None:
            npy = inspect_npy(self._paths[number])
            count = int(self._starts[number + 1] - self._starts[number])
            if (npy.count, npy.dim) != (count, self.dim):
                raise StoreError(
                    f"{npy.path} has {npy.count} rows of dimension {npy.dim}, but the store counts on "
                    f"{count} of dimension {self.dim}; copy it again, or embed its rows anew"
                )
            found = npy, npy.path.open("rb", buffering=0)
            self._open[number] = found
            # A billion rows are more files than a process may hold open.
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1][1].close()
        else:
            self._open.move_to_end(number)
        return found


def _widen(rows: NDArray[np.floating], target: NDArray[np.float32]) -> None:
    """Copies rows into float32 ones; torch makes float32 of float16 several times as fast as numpy."""
    if rows.dtype == np.float16 and rows.dtype.isnative:
        torch.from_numpy(target).copy_(torch.from_numpy(rows))
    else:
        target[...] = rows


def _fill(file: BinaryIO, target: memoryview, position: int, path: Path) -> None:
    done = _read_at(file, target, position)
    while done < len(target):  # the system may give less at a time than it was asked for
        got = _read_at(file, target[done:], position + done)
        if not got:
            raise StoreError(f"{path} ends before its last row; it was cut while open: copy it again")
        done += got


def _read_at(file: BinaryIO, target: memoryview, position: int) -> int:
    if hasattr(os, "preadv"):  # does not move the file's position, which forked workers share
        return os.preadv(file.fileno(), [target], position)
    file.seek(position)
    return int(file.readinto(target))  # type: ignore[attr-defined]
