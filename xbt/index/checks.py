"""Checks of the vectors, ids and k passed to an index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from xbt.errors import DataError
from xbt.vectors import Vectors, as_floating, as_vectors

LONGEST = 1e15
"""Vectors beyond this length are refused: their float32 scores could overflow."""


MOST_ROUNDED = 0.01
"""Maximum relative rounding error of a vector; that of unit rows is below 0.001."""


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


def require_storable(rows: NDArray[np.float32], ids: Sequence[str], dtype: str) -> None:
    """Refuse vectors so short that rounding to float16 would change or erase them.

    Args:
        rows: (n, dim).
        ids: Of their items.
        dtype: The type they are stored with; the storage refuses values too large for it.

    Raises:
        DataError: If rounding changes a vector by more than :data:`MOST_ROUNDED` of its length.
    """
    if dtype != "float16":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        lost = np.linalg.norm(rows.astype(np.float16).astype(np.float32) - rows, axis=1)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    short = np.flatnonzero(np.isfinite(lost) & (lost > MOST_ROUNDED * lengths))
    if len(short):
        raise DataError(
            f"the vector of {ids[short[0]]!r} has length {lengths[short[0]]:.3g}, too short for float16, in "
            "which the gallery is stored; normalise it, or make the gallery with dtype='float32'"
        )


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
