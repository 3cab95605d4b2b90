"""Checks and normalisation of vectors, and checks of their ids, shared by all layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError, SpaceMismatchError

Vectors = Tensor | NDArray[np.floating]

UNIT_TOLERANCE = 2.0**-7
"""Tolerance of the length of a unit row.

It is the largest error of half precision. Normalisation in bfloat16 (8 significant bits; rounding changes a
value by a factor of up to 1 ± u with u = 2⁻⁸) rounds the norm once and each quotient once, so the length
changes by up to 2u. For float16, u is 2⁻¹¹. Values of float16 below 2⁻¹⁴ are rounded by up to 2⁻²⁵ each
instead, √dim · 2⁻²⁵ together, which is below 2⁻¹³ for every dimension below 2²⁴.
"""


LONGEST = 1e15
"""Vectors beyond this length are refused: their float32 scores could overflow."""


def unit_rows(rows: Tensor) -> Tensor:
    """Normalise rows of any length that the dtype can hold: no square overflows or underflows.

    Args:
        rows: (…, dim) floating-point tensor; gradients flow.

    Returns:
        (…, dim) rows of length 1 in the same dtype; a row of zeros stays zero.
    """
    if torch.compiler.is_compiling():  # exported graphs expect vectors of ordinary lengths
        return torch.nn.functional.normalize(rows, dim=-1)
    # Division by a power of two rounds nothing, so it does not change the result for ordinary rows.
    largest = rows.detach().abs().amax(dim=-1, keepdim=True)
    wide = largest if largest.dtype == torch.float64 else largest.float()
    tiny = torch.finfo(rows.dtype).tiny
    power = torch.where(wide > 4 * tiny, wide * 0.5 / torch.frexp(wide).mantissa, tiny)
    return torch.nn.functional.normalize(rows / power.to(rows.dtype), dim=-1)


def lengths_of(rows: Tensor) -> Tensor:
    """(n,) lengths of (n, dim) rows in their dtype; infinite beyond its range, NaN for rows with NaN."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return lengths


def not_unit(lengths: Tensor) -> Tensor:
    """(n,) booleans: True where a length differs from 1 by more than :data:`UNIT_TOLERANCE`."""
    return ~((lengths - 1).abs() <= UNIT_TOLERANCE)


def as_vectors(vectors: Vectors, name: str, dim: int | None = None) -> Tensor:
    """Check vectors and return them as a float CPU tensor.

    Args:
        vectors: (n, dim) torch tensor or numpy array of any float dtype; half precision becomes float32.
        name: Name of the vectors in error messages ("gallery", "new text vectors").
        dim: Required dimension, if any.

    Returns:
        (n, dim) float32 tensor (float64 stays float64) on the CPU, detached.

    Raises:
        DataError: If there are no rows, the shape is not (n, dim), or a value is NaN or infinite; the
            message names the first such row.
        SpaceMismatchError: If the dimension is not ``dim``.
    """
    tensor = as_floating(vectors, name).detach().cpu()
    if tensor.dtype != torch.float64:
        tensor = tensor.float()
    if tensor.ndim != 2 or tensor.shape[1] == 0:
        raise DataError(f"{name} must have the shape (n, dim), got {tuple(tensor.shape)}")
    if tensor.shape[0] == 0:
        raise DataError(f"{name} is empty: it has 0 rows; give at least one vector")
    if dim is not None and tensor.shape[1] != dim:
        raise SpaceMismatchError(
            f"{name} has dimension {tensor.shape[1]}, but {dim} is needed; was it made by another model?"
        )
    finite = torch.isfinite(tensor).all(dim=1)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten()
        raise DataError(
            f"{name} has NaN or infinite values in {len(bad)} of {len(tensor)} rows, first in row "
            f"{int(bad[0])}; find the input of that row and leave it out"
        )
    return tensor


def as_floating(vectors: Vectors, name: str) -> Tensor:
    """Return vectors as a floating-point tensor; a tensor keeps its device and its graph.

    Args:
        vectors: Torch tensor or numpy array of any float dtype and shape.
        name: Name of the vectors in error messages.

    Raises:
        DataError: If they are not floating point.
    """
    if isinstance(vectors, np.ma.MaskedArray):
        raise DataError(f"{name} is a masked array; fill in the masked values, or leave those rows out")
    if isinstance(vectors, np.ndarray) and vectors.dtype.kind == "f":
        # torch has no extended precision, refuses foreign byte order and negative strides, and warns about
        # read-only memory maps.
        dtype = vectors.dtype.newbyteorder("=") if vectors.itemsize <= 8 else np.dtype(np.float64)
        with np.errstate(over="ignore"):  # a value beyond float64 becomes infinite, and is refused later
            vectors = np.require(vectors, dtype, ["C", "W"])
    elif isinstance(vectors, np.ndarray):  # torch does not support every dtype
        raise DataError(f"{name} must be floating point, got {vectors.dtype}; embed the data first")
    try:
        tensor = torch.as_tensor(vectors)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"{name} must be a torch tensor or a numpy array, got a {type(vectors).__name__}"
        ) from error
    require_dense(tensor, name)
    if not tensor.is_floating_point():
        raise DataError(f"{name} must be floating point, got {tensor.dtype}; embed the data first")
    return tensor


def require_dense(tensor: Tensor, name: str) -> None:
    """Refuse tensors that have no values (meta), are nested, or are sparse.

    Raises:
        DataError: If the tensor is one of these.
    """
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided:
        layout = "meta" if tensor.is_meta else "nested" if tensor.is_nested else "sparse"
        raise DataError(f"{name} is a {layout} tensor; give a dense tensor with values")


def require_finite(
    vectors: Tensor, name: str, numbers: Sequence[int] | NDArray[np.int64] | None = None
) -> None:
    """Refuse vectors with NaN or infinity; quick for finite ones.

    Args:
        vectors: (n, dim) rows.
        name: Name of the vectors in error messages.
        numbers: Row numbers in error messages; ``None`` counts from 0.

    Raises:
        DataError: If a value is NaN or infinite; the message names the first such row.
    """
    # A sum costs a tenth of a check of every value, and is not finite if any value is not.
    if bool(torch.isfinite(vectors.sum())):
        return
    bad = torch.nonzero(~torch.isfinite(vectors).all(dim=1)).flatten()
    if len(bad):
        first = int(bad[0]) if numbers is None else int(numbers[int(bad[0])])
        raise DataError(
            f"{name} has NaN or infinite values, first in row {first}; find the input of that row and leave "
            "it out"
        )


def as_rows(vectors: Vectors, name: str, dim: int | None = None) -> NDArray[np.float32]:
    """Check vectors and return them as contiguous float32 rows.

    Args:
        vectors: (n, dim) torch tensor or numpy array of any float dtype, n at least 1.
        name: What they are, for the message.
        dim: The dimension they must have, if there is one.

    Returns:
        (n, dim) float32; it may share memory with what was given.

    Raises:
        DataError: If there are none, a value is NaN or infinite, or one is longer than :data:`LONGEST`.
        SpaceMismatchError: If the dimension is another.
    """
    checked = as_vectors(vectors, name, dim)
    longest = float(checked.norm(dim=1).max())
    if not longest < LONGEST:
        raise DataError(f"{name} has a vector of length {longest:.3g}; scores would overflow: normalise them")
    rows: NDArray[np.float32] = np.ascontiguousarray(checked.float().numpy())
    return rows


def as_queries(vectors: Vectors, name: str, dim: int) -> NDArray[np.float32]:
    """Convert query vectors to rows. A single one may have the shape (dim,)."""
    rows = as_floating(vectors, name)
    return as_rows(rows[None] if rows.ndim == 1 else rows, name, dim)


def as_ids(ids: Iterable[str], name: str, count: int | None = None) -> list[str]:
    """Return ids as a list after checking that they are unique strings.

    Args:
        ids: The user's own names of items.
        name: What they are, for the message.
        count: How many there must be, one a vector.

    Raises:
        DataError: If there is another number of them, one is no string or no valid text, or one is repeated.
    """
    if isinstance(ids, str):
        raise DataError(f"{name} is the string {ids!r}; give a list with one string per item")
    try:
        ids = list(ids)
    except TypeError as error:
        raise DataError(f"{name} is {ids!r:.40}; give a list with one string per item") from error
    if count is not None and len(ids) != count:
        raise DataError(f"{name} has {len(ids)} entries for {count} vectors; give one each")
    seen: set[str] = set()
    for position, item in enumerate(ids):
        if not isinstance(item, str):
            raise DataError(f"{name}[{position}] is {item!r}; ids must be strings: use str()")
        if item in seen:
            raise DataError(f"{name} has {item!r} twice, again at position {position}; ids must be unique")
        seen.add(item)
    names = [str(item) for item in ids]
    try:
        "".join(names).encode("utf-8")
    except UnicodeEncodeError:
        raise _not_text(names, name) from None
    return names


def as_k(k: object, count: int | None = None) -> int:
    """Validate the number of requested items, from 1 to the number available.

    Raises:
        DataError: If it is no such integer. Fewer results than asked for are never returned.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise DataError(f"k is {k!r}; give an integer of at least 1")
    if count == 0:
        raise DataError("the gallery is empty; add items before searching it")
    if count is not None and k > count:
        raise DataError(f"k is {k}, but the gallery has {count} items; ask for at most that many")
    return int(k)


def _not_text(names: list[str], name: str) -> DataError:
    """Build the error for ids with half a surrogate pair, which no file can store."""
    position = next(place for place, item in enumerate(names) if not _is_text(item))
    return DataError(
        f"{name}[{position}] is {names[position]!r}, which is not valid Unicode text; decode the bytes it "
        "was read from with their own encoding"
    )


def _is_text(item: str) -> bool:
    try:
        item.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
