"""A gallery: vectors with string ids, searched exactly by inner product.

FAISS finds the candidates, from one contiguous array that is not copied. It is imported when the first search
needs it and not before: torch and faiss-cpu in one process abort on macOS when both load OpenMP at import.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from xbt.errors import DataError, SpaceMismatchError
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors, as_vectors

FORMAT = 1
"""Version of the files :meth:`Gallery.save` writes."""

FILES = ("vectors.npy", "ids.json", "gallery.json")
SPARE = 8
"""Candidates fetched beyond k, so that the exact order among near-ties can be settled."""
SCRATCH_BYTES = 64 * 2**20
"""Bound on the products held while candidates are scored again."""
LONGEST = 1e15
"""Vectors beyond this length are refused: their float32 scores could overflow."""


@dataclass(frozen=True)
class SearchResult:
    """The first k gallery items of every query, best first.

    Attributes:
        ids: For every query the ids of its k items.
        scores: (n_queries, k) float32 inner products, descending. Equal scores stand in the gallery's order.
    """

    ids: list[list[str]]
    scores: NDArray[np.float32]


class Gallery:
    """Vectors with ids, held in memory as float32 and searched exactly.

    Attributes:
        ids: One unique string per vector, in the order of the vectors.
        space: Where the vectors live, or ``None`` if nobody said; then only dimensions can be checked.

    Example:
        >>> gallery = Gallery.build(old.encode_images(images), names, space=old.space)
        >>> gallery.search(upgraded.encode_texts(["a dog on a beach"]), k=10, space=upgraded.space).ids[0]
    """

    def __init__(self, vectors: NDArray[np.float32], ids: list[str], space: EmbeddingSpace | None) -> None:
        """Takes checked parts; use :meth:`build` or :meth:`open`."""
        self._vectors = vectors
        self.ids = ids
        self.space = space

    @classmethod
    def build(cls, vectors: Vectors, ids: Sequence[str], space: EmbeddingSpace | None = None) -> Self:
        """Makes a gallery.

        Args:
            vectors: (n, dim) torch tensor or numpy array of any float dtype, kept as float32 as they are:
                nothing is normalised.
            ids: n unique strings.
            space: The space the vectors live in, usually ``encoder.space``.

        Raises:
            DataError: If there are no vectors, a value is NaN, or ids are missing, repeated or no strings.
            SpaceMismatchError: If the vectors do not have the dimension of ``space``.
        """
        rows = _as_rows(vectors, "gallery vectors", None if space is None else space.dim)
        return cls(rows.copy(), _check_ids(ids, len(rows), "ids"), space)

    def add(self, vectors: Vectors, ids: Sequence[str], space: EmbeddingSpace | None = None) -> None:
        """Appends vectors of the same space; on an error the gallery is left as it was.

        Args:
            vectors: (n, dim) vectors.
            ids: n strings, unique and not yet in the gallery.
            space: The space the vectors live in.

        Raises:
            DataError: As :meth:`build`, or if an id is already in the gallery.
            SpaceMismatchError: If the space or the dimension is not the gallery's.
        """
        self._require(space, "the vectors to add")
        rows = _as_rows(vectors, "vectors to add", self.dim)
        new_ids = _check_ids(ids, len(rows), "ids")
        known = set(self.ids)
        for name in new_ids:
            if name in known:
                raise DataError(f"the id {name!r} is already in the gallery; give new items new ids")
        self._vectors = np.concatenate([self._vectors, rows])
        self.ids = self.ids + new_ids

    def search(self, vectors: Vectors, k: int = 10, space: EmbeddingSpace | None = None) -> SearchResult:
        """Finds the k items with the largest inner product for every query.

        FAISS alone neither gives equal vectors equal scores (its batched kernels round by position) nor keeps
        ties in order. Its candidates are therefore scored again, one pair at a time, and ordered by score,
        then by position in the gallery; a query gives the same result alone and in a batch.

        Args:
            vectors: (n_queries, dim) query vectors, or one of shape (dim,).
            k: Items per query, from 1 to the size of the gallery.
            space: The space the queries live in. Pass it: queries of another model give scores that mean
                nothing.

        Raises:
            DataError: If k is out of range, there are no queries or a value is NaN.
            SpaceMismatchError: If the space or the dimension is not the gallery's.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise DataError(f"k is {k!r}; give an integer of at least 1")
        if k > len(self):
            raise DataError(f"k is {k}, but the gallery has {len(self)} items; ask for at most that many")
        self._require(space, "the query vectors")
        single = vectors[None] if vectors.ndim == 1 else vectors
        queries = _as_rows(single, "query vectors", self.dim)

        import faiss

        fetched = min(int(k) + SPARE, len(self))
        rough, found = faiss.knn(queries, self._vectors, fetched, metric=faiss.METRIC_INNER_PRODUCT)
        scores, positions = self._settle(queries, found, int(k))
        if fetched < len(self):
            margin = self._rounding(queries)
            for row in np.flatnonzero(rough[:, -1] >= rough[:, k - 1] - margin):
                # More near-ties than candidates: take everything that could belong to the first k.
                own = self._vectors @ queries[row]
                near = np.flatnonzero(own >= np.partition(own, -k)[-k] - margin[row])
                query = queries[row : row + 1]
                scores[row : row + 1], positions[row : row + 1] = self._settle(query, near[None], int(k))
        return SearchResult([[self.ids[i] for i in row] for row in positions], scores)

    def _settle(
        self, queries: NDArray[np.float32], candidates: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores (n, c) candidates pair by pair and keeps the first k of each query."""
        owners, rows = np.repeat(np.arange(len(queries)), candidates.shape[1]), candidates.ravel()
        scores = np.empty(len(rows), dtype=np.float32)
        step = max(1, SCRATCH_BYTES // (8 * self.dim))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            products = self._vectors[rows[part]].astype(np.float64) * queries[owners[part]]
            scores[part] = products.sum(axis=1)
        exact = scores.reshape(candidates.shape)
        order = np.lexsort((candidates, -exact))[:, :k]
        return np.take_along_axis(exact, order, axis=1), np.take_along_axis(candidates, order, axis=1)

    def _rounding(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,) how far apart two float32 scores of a query must be for their order to be beyond doubt."""
        longest = np.sqrt(np.einsum("nd,nd->n", self._vectors, self._vectors).max())
        lengths = np.sqrt(np.einsum("nd,nd->n", queries, queries))
        unit = 2 * np.finfo(np.float32).eps * np.sqrt(self.dim)
        margin: NDArray[np.float32] = (unit * longest * lengths).astype(np.float32)
        return margin

    def save(self, directory: str | Path) -> None:
        """Writes ``vectors.npy``, ``ids.json`` and ``gallery.json``, all or nothing.

        Everything goes to a new directory beside the old one, which then takes its place; a job killed at any
        moment leaves a gallery that :meth:`open` can read, the old one or the new one.

        Args:
            directory: Where to; a gallery that is already there is replaced.

        Raises:
            DataError: If the directory holds anything besides a gallery.
        """
        target, fresh, previous = _places(directory)
        _recover(target, previous)
        if target.exists():
            foreign = (
                [target] if not target.is_dir() else [f for f in target.iterdir() if f.name not in FILES]
            )
            if foreign:
                raise DataError(f"{foreign[0]} is not part of a gallery; save to a directory of its own")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            self._write(fresh)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        if target.exists():
            target.rename(previous)
        fresh.rename(target)
        shutil.rmtree(previous, ignore_errors=True)

    def _write(self, directory: Path) -> None:
        np.save(directory / "vectors.npy", self._vectors, allow_pickle=False)
        (directory / "ids.json").write_text(json.dumps(self.ids), encoding="utf-8")
        space = None if self.space is None else self.space.to_dict()
        about = {"format": FORMAT, "dim": self.dim, "count": len(self), "space": space}
        (directory / "gallery.json").write_text(json.dumps(about, indent=2), encoding="utf-8")

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Reads what :meth:`save` wrote.

        Args:
            directory: Where it was saved.

        Raises:
            DataError: If a file is missing, damaged or does not fit the others; the message names it.
        """
        target, _, previous = _places(directory)
        if not target.exists() and previous.exists():
            target = previous  # a save was cut short between its two renames
        vectors_path, ids_path, about_path = (target / name for name in FILES)
        about = _read_json(about_path)
        version = about.get("format") if isinstance(about, dict) else None
        if version != FORMAT:
            raise DataError(f"{about_path} has format {version!r}, but this version of xbt reads {FORMAT}")
        try:
            shape = (int(about["count"]), int(about["dim"]))
            space = None if about["space"] is None else EmbeddingSpace.from_dict(about["space"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{about_path} is damaged ({error!r}); restore it or build the gallery again"
            ) from error
        try:
            vectors = np.load(vectors_path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{vectors_path} cannot be read: {error}") from error
        if not isinstance(vectors, np.ndarray) or vectors.dtype != np.float32 or vectors.shape != shape:
            raise DataError(
                f"{vectors_path} does not hold {shape[0]} x {shape[1]} float32 numbers as {about_path} says"
            )
        ids = _read_json(ids_path)
        if not isinstance(ids, list) or len(ids) != shape[0]:
            raise DataError(f"{ids_path} does not hold the {shape[0]} ids that {about_path} announces")
        if space is not None and space.dim != shape[1]:
            raise DataError(f"{about_path} gives dimension {shape[1]} but a space of dimension {space.dim}")
        return cls(_as_rows(vectors, str(vectors_path)), _check_ids(ids, shape[0], str(ids_path)), space)

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return int(self._vectors.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Gallery({len(self)} items, space={'unknown' if self.space is None else self.space})"

    def _require(self, space: EmbeddingSpace | None, what: str) -> None:
        if space is not None and self.space is not None:
            self.space.require(space, what)
        elif space is not None and space.dim != self.dim:
            raise SpaceMismatchError(
                f"{what} belongs to the space of {space}, but the gallery has dimension {self.dim}; "
                "use the model that made the gallery or project into its space"
            )


def _as_rows(vectors: Vectors, name: str, dim: int | None = None) -> NDArray[np.float32]:
    """Checks vectors and returns them as contiguous float32 rows."""
    checked = as_vectors(vectors, name, dim)
    longest = float(checked.norm(dim=1).max())
    if not longest < LONGEST:
        raise DataError(f"{name} has a vector of length {longest:.3g}; scores would overflow: normalise them")
    rows: NDArray[np.float32] = np.ascontiguousarray(checked.float().numpy())
    return rows


def _check_ids(ids: Sequence[str], count: int, name: str) -> list[str]:
    """Returns ids as a list after checking that they are ``count`` unique strings."""
    if isinstance(ids, str):
        raise DataError(f"{name} is the string {ids!r}; give a list with one string per vector")
    if len(ids) != count:
        raise DataError(f"{name} has {len(ids)} entries for {count} vectors; give one each")
    seen: set[str] = set()
    for position, item in enumerate(ids):
        if not isinstance(item, str):
            raise DataError(f"{name}[{position}] is {item!r}; ids must be strings: use str()")
        if item in seen:
            raise DataError(f"{name} has {item!r} twice, again at position {position}; ids must be unique")
        seen.add(item)
    return [str(item) for item in ids]


def _places(directory: str | Path) -> tuple[Path, Path, Path]:
    """A gallery's directory, where a new one is prepared, and where the old one waits during the exchange."""
    target = Path(directory).resolve()
    return target, target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.previous")


def _recover(target: Path, previous: Path) -> None:
    """Takes back an exchange that was cut short; only the moment between its two renames leaves no target."""
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(target)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
