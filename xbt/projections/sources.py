"""Vectors of the same items under both models, wherever they are, and the statistics of closed forms.

With N the new vectors (n, new_dim) and O the old ones (n, old_dim), every closed form is a function of some
of

    n,   NᵀO,   Nᵀ1,   Oᵀ1,   NᵀN,   OᵀO

which are gathered in one pass, take O(d²) memory however many rows there are, and of which two parts make the
whole by addition (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance").
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.store.store import EmbeddingStore
from xbt.vectors import Vectors, as_floating, require_dense, require_finite

Rows = Tensor | NDArray[np.floating] | EmbeddingStore
"""Vectors of one model that can be read in any order: (n, dim) rows, or a store."""
Source = Rows | Iterable[Vectors]
"""Vectors of one model: (n, dim) rows, a store, or an iterable of (k, dim) chunks of any sizes."""

BLOCK_ROWS = 8_192
NEW, OLD = "new vectors", "old vectors"


class PairedImages(Protocol):
    """Images under both models, as :class:`~xbt.projections.PairVectors` has them."""

    @property
    def new_images(self) -> Tensor | None:
        """(n, new_dim) vectors, if there are any."""

    @property
    def old_images(self) -> Tensor:
        """(n, old_dim) vectors."""


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
    rows = PairedRows(_many_times(new, NEW), _many_times(old, OLD))
    _require_same_count(new, old)
    for source, name in ((rows.new, NEW), (rows.old, OLD)):
        if len(source) == 0:
            raise DataError(f"{name} is empty: it has 0 rows; give at least one vector")
        for _ in () if isinstance(source, EmbeddingStore) else _blocks(source, name, BLOCK_ROWS):
            pass
    for start in range(0, len(rows), BLOCK_ROWS):
        _require_same_ids(new, old, start, min(start + BLOCK_ROWS, len(rows)))
    return rows


def _many_times(source: Source, name: str) -> Rows:
    if isinstance(source, Tensor | np.ndarray | EmbeddingStore):
        return source
    raise ConfigError(
        f"the {name} are a stream ({type(source).__name__}), which can be read only once, but this method "
        "reads rows many times; give vectors or stores"
    )


@dataclass(frozen=True)
class PairedRows:
    """Rows of both models by position; made by :func:`random_access`, which checks that they pair.

    However many rows the stores have, only ``rows`` grows with them, 8 bytes a row.

    Attributes:
        new: (n, new_dim) vectors of the new model.
        old: (n, old_dim) vectors of the old model.
        rows: (m,) int64, the rows to use; ``None`` uses all.
    """

    new: Rows
    old: Rows
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.new) if self.rows is None else len(self.rows)

    @property
    def dims(self) -> tuple[int, int]:
        """Dimension of the new and of the old vectors."""
        new, old = (
            side.dim if isinstance(side, EmbeddingStore) else int(side.shape[1])
            for side in (self.new, self.old)
        )
        return new, old

    def take(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Vectors by position, in the order asked for.

        Args:
            positions: (k,) int64, from 0 to the length.

        Returns:
            (k, new_dim) and (k, old_dim) float32 CPU tensors.
        """
        rows = positions if self.rows is None else self.rows[positions]
        return _take(self.new, rows, NEW), _take(self.old, rows, OLD)

    def chunks(self, positions: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
        """Vectors by position in blocks, in row order: sequential reads of stores."""
        ordered = np.sort(positions)
        for start in range(0, len(ordered), BLOCK_ROWS):
            yield self.take(ordered[start : start + BLOCK_ROWS])


def _take(source: Rows, positions: NDArray[np.int64], name: str) -> Tensor:
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


Term = Literal["cross", "sums", "new_gram", "old_gram"]
TERMS: tuple[Term, ...] = ("cross", "sums", "new_gram", "old_gram")
CROSS: tuple[Term, ...] = ("cross",)

EXACT_ROWS = 16_384
"""So many rows of a pass are multiplied in fp64; where few rows say little, rounding must not add to it."""

_COUNT, _FP32_ROWS = "count", "fp32_rows"
_PANEL = 128
_FP64_ROUNDING = 4 * torch.finfo(torch.float64).eps
_FP32_ROUNDING = 1e-6


@dataclass(frozen=True)
class PairStatistics:
    """Sums of products of paired vectors, in fp64 on the CPU.

    Closed forms take them in place of vectors, to fit several maps in one pass over the data:
    ``fit_ridge(of_texts)``, or ``fit_procrustes(of_texts, of_images, pairs_weight=0.33)``.

    The first :data:`EXACT_ROWS` rows of a pass, and fp64 vectors always, are multiplied in fp64. The rest are
    multiplied in fp32, which is faster, in blocks of at most 8,192 rows whose results are added up in fp64.
    Of fp16 vectors no single product is rounded. Tests hold the spectral norm of the error below
    :attr:`rounding` times the Frobenius norm of the term.

    Attributes:
        count: Number of pairs n.
        dims: Dimension of the new and of the old vectors.
        cross: (new_dim, old_dim) NᵀO.
        new_sum: (new_dim,) Nᵀ1.
        old_sum: (old_dim,) Oᵀ1.
        new_gram: (new_dim, new_dim) NᵀN.
        old_gram: (old_dim, old_dim) OᵀO.
        fp32_rows: How many of the pairs were multiplied in fp32.

    What was not asked for is ``None``; :meth:`term` names it.
    """

    count: int
    dims: tuple[int, int]
    cross: Tensor | None = None
    new_sum: Tensor | None = None
    old_sum: Tensor | None = None
    new_gram: Tensor | None = None
    old_gram: Tensor | None = None
    fp32_rows: float = 0.0

    @classmethod
    def from_chunks(cls, chunks: Iterable[tuple[Tensor, Tensor]], terms: Collection[Term] = CROSS) -> Self:
        """Gathers statistics of vectors that come piece by piece.

        Args:
            chunks: At least one pair of (k, new_dim) and (k, old_dim) vectors of the same items; k may differ
                from piece to piece.
            terms: What to gather, of :data:`TERMS`; ``"sums"`` are both Nᵀ1 and Oᵀ1.

        Raises:
            ConfigError: If a term is not known.
            DataError: If there are no rows, or a value is NaN or infinite; the message names the row.
            SpaceMismatchError: If a piece's dimension is not that of those before it.
        """
        unknown = sorted(set(terms) - set(TERMS))
        if unknown:
            raise ConfigError(f"there is no term {unknown[0]!r} of statistics; there is {', '.join(TERMS)}")
        total: Self | None = None
        for new, old in chunks:
            for start in range(0, max(len(new), len(old)), BLOCK_ROWS):
                seen = 0 if total is None else total.count
                block = cls._of_block(
                    new[start : start + BLOCK_ROWS], old[start : start + BLOCK_ROWS], terms, seen
                )
                total = block if total is None else total._add_in_place(block)
        if total is None:
            raise DataError("new and old vectors are empty: there are 0 rows; give at least one pair")
        return total

    @classmethod
    def of(cls, new: Source, old: Source, terms: Collection[Term] = CROSS) -> Self:
        """Statistics of vectors, stores or streams; see :func:`~xbt.projections.sources.paired_chunks`."""
        return cls.from_chunks(paired_chunks(new, old), terms)

    @classmethod
    def of_images(cls, pairs: PairedImages, terms: Collection[Term] = CROSS) -> Self:
        """Statistics of the images of pairs, each under both models.

        Raises:
            ConfigError: If the pairs have no new image vectors.
        """
        if pairs.new_images is None:
            raise ConfigError(
                "the pairs have no new image vectors, which a fit to images needs; give new_images, or set "
                "pairs_weight to 0"
            )
        return cls.of(pairs.new_images, pairs.old_images, terms)

    @classmethod
    def _of_block(cls, new: Tensor, old: Tensor, terms: Collection[Term], seen: int) -> Self:
        if len(new) != len(old):
            raise DataError(
                f"a chunk has {len(new)} new and {len(old)} old rows; both must be of the same items"
            )
        exact = seen < EXACT_ROWS or torch.float64 in (new.dtype, old.dtype)
        new, old = (side.detach().to("cpu", torch.float64 if exact else torch.float32) for side in (new, old))
        stats = cls._products(new, old, terms)
        if all(bool(torch.isfinite(tensor.sum())) for tensor in stats.to_tensors().values()):
            return stats
        for rows, name in ((new, NEW), (old, OLD)):
            bad = torch.nonzero(~torch.isfinite(rows).all(dim=1)).flatten()
            if len(bad):
                raise DataError(
                    f"{name} has NaN or infinite values, first in row {seen + int(bad[0])}; find out which "
                    "input made it and leave that out"
                )
        stats = cls._products(new.double(), old.double(), terms)
        if all(bool(torch.isfinite(tensor).all()) for tensor in stats.to_tensors().values()):
            return stats  # only fp32 was too small for the products
        raise DataError(
            f"products of the vectors from row {seen} on are too large for float64; give vectors of about "
            "unit length"
        )

    @classmethod
    def _products(cls, new: Tensor, old: Tensor, terms: Collection[Term]) -> Self:
        return cls(
            len(new),
            (new.shape[1], old.shape[1]),
            (new.T @ old).double() if "cross" in terms else None,
            new.sum(dim=0).double() if "sums" in terms else None,
            old.sum(dim=0).double() if "sums" in terms else None,
            _gram(new) if "new_gram" in terms else None,
            _gram(old) if "old_gram" in terms else None,
            float(len(new)) if new.dtype == torch.float32 else 0.0,
        )

    def term(self, name: str) -> Tensor:
        """A term by the name of its attribute.

        Raises:
            ConfigError: If it was not gathered.
        """
        found = getattr(self, name)
        if found is None:
            raise ConfigError(
                f"these statistics were gathered without {name}, which this method needs; ask for it in terms"
            )
        tensor: Tensor = found
        return tensor

    @property
    def rounding(self) -> float:
        """Largest error of a term by rounding, relative to its Frobenius norm before centring.

        Of rows that are all alike fp32 rounds all sums the same way, to nearly 1e-6; of others it is a tenth.
        """
        exact = _FP64_ROUNDING * math.sqrt(max(self.count, *self.dims))
        return max(exact, _FP32_ROUNDING * self.fp32_rows / self.count)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """(new_dim,) and (old_dim,) float64 means of both sides."""
        return self.term("new_sum") / self.count, self.term("old_sum") / self.count

    def centred(self) -> Self:
        """The same statistics of the vectors less their means, so that the sums are zero.

        Raises:
            ConfigError: If the sums were not gathered.
        """
        new_mean, old_mean = self.means
        means = {
            "cross": (new_mean, old_mean),
            "new_gram": (new_mean, new_mean),
            "old_gram": (old_mean, old_mean),
        }
        products = {
            name: tensor - self.count * torch.outer(*means[name])
            if name in means
            else torch.zeros_like(tensor)
            for name, tensor in self._products_by_name().items()
        }
        return type(self)(self.count, self.dims, **products, fp32_rows=self.fp32_rows)

    def mixed(self, other: Self, weight: float) -> Self:
        """Statistics as if ``weight`` of the pairs were drawn from ``other`` and the rest from these.

        All are scaled to the count of these, so that (1 − ω)·mean here + ω·mean there is n times larger; what
        one of both does not have is left out.

        Raises:
            ConfigError: If the weight is not in [0, 1).
            SpaceMismatchError: If the dimensions differ.
        """
        if not 0 <= weight < 1:
            raise ConfigError(f"pairs_weight must be at least 0 and below 1, got {weight}")
        return self._combined(other, self.count, 1 - weight, weight * self.count / other.count)

    def __add__(self, other: Self) -> Self:
        return self._combined(other, self.count + other.count, 1.0, 1.0)

    def _combined(self, other: Self, count: int, ours: float, theirs: float) -> Self:
        self._require_dims(other)
        mine, others = self._products_by_name(), other._products_by_name()
        kept = {name: ours * mine[name] + theirs * others[name] for name in mine if name in others}
        return type(self)(
            count, self.dims, **kept, fp32_rows=ours * self.fp32_rows + theirs * other.fp32_rows
        )

    def _add_in_place(self, other: Self) -> Self:
        self._require_dims(other)
        for name, tensor in self._products_by_name().items():
            tensor.add_(other.term(name))
        return replace(self, count=self.count + other.count, fp32_rows=self.fp32_rows + other.fp32_rows)

    def _require_dims(self, other: Self) -> None:
        if self.dims != other.dims:
            raise SpaceMismatchError(
                f"statistics of {self.dims[0]} → {self.dims[1]} dimensions cannot be combined with those of "
                f"{other.dims[0]} → {other.dims[1]}; were the vectors made by the same two models?"
            )

    def _products_by_name(self) -> dict[str, Tensor]:
        names = ("cross", "new_sum", "old_sum", "new_gram", "old_gram")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as float64 tensors that may be summed over processes, each by itself."""
        counts = {_COUNT: float(self.count), _FP32_ROWS: self.fp32_rows}
        scalars = {name: torch.tensor(count, dtype=torch.float64) for name, count in counts.items()}
        return {**scalars, **self._products_by_name()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], dims: tuple[int, int]) -> Self:
        """Makes statistics of what :meth:`to_tensors` gave, once it has been summed over processes.

        Args:
            tensors: The tensors by name.
            dims: Dimension of the new and of the old vectors.
        """
        products = {
            name: tensor.double() for name, tensor in tensors.items() if name not in (_COUNT, _FP32_ROWS)
        }
        return cls(round(float(tensors[_COUNT])), dims, **products, fp32_rows=float(tensors[_FP32_ROWS]))


def _gram(rows: Tensor) -> Tensor:
    """RᵀR in float64; what lies below the diagonal is copied, not multiplied again."""
    dim = rows.shape[1]
    gram = torch.empty(dim, dim, dtype=rows.dtype)
    for start in range(0, dim, _PANEL):
        stop = start + _PANEL
        torch.mm(rows[:, start:stop].T, rows[:, start:], out=gram[start:stop, start:])
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram.double()
