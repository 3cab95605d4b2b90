"""Mixed search: search an index under backfill as if all of it were in one space.

Rows that are backfilled are searched with a query in the new space, the other rows with the same query in the
old space. The scores of the two sides do not mean the same: two models differ in the spread of their scores
and in the gap between texts and images. A merge is a frozen dataclass that puts both sides on one scale.

Seo et al. ("Metric Compatible Training for Online Backfilling in Large-Scale Retrieval", WACV 2025, arXiv
2301.03767) merge the two lists by distance, and train the models until their distances are comparable. Here
the models stay as they are, and the scores are calibrated. :func:`~xbt.index.calibration.fit_merge` chooses
the merge on held-out pairs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from xbt.errors import ConfigError, DataError
from xbt.index.protocol import Hits, VectorIndex
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors

Side = Literal["old", "new"]

STRICT_SLOPE = 1e-6
"""Slope that is added to a calibrated curve, so that unequal scores stay unequal where the curve is flat."""
_HAIR = 1e-9


@dataclass(frozen=True)
class Merge(ABC):
    """One way to merge; immutable, and JSON-able by :meth:`to_dict` and :func:`merge_from_dict`.

    Attributes:
        kind: Its name.
        by_rank: Whether the sides are interleaved by rank; scores are not compared then.
    """

    kind: ClassVar[str]
    by_rank: ClassVar[bool] = False

    @abstractmethod
    def calibrate(self, side: Side, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Map the scores of one side to the common scale.

        The map is strictly increasing for scores that differ by 1e-9 or more. Closer scores may become equal
        but are never reversed beyond rounding, and :func:`merge_top` keeps the order of each side.

        Args:
            side: ``"old"`` or ``"new"``.
            scores: Inner products, of any shape.

        Returns:
            float64 of the same shape; higher is better.

        Raises:
            ConfigError: If there is no such side.
        """

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, from which :func:`merge_from_dict` makes an equal merge."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make a merge from the result of :meth:`to_dict`, without its kind.

        Raises:
            ConfigError: If a key is missing or unknown, or its value cannot be used.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ConfigError(
                f"a merge of kind {cls.kind!r} has the keys {sorted(names)}, got {sorted(map(str, data))}; "
                "write it with to_dict()"
            )
        try:
            return cls(**{name: _as_numbers(value) for name, value in data.items()})
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"a merge of kind {cls.kind!r} cannot be read: {error}") from error


@dataclass(frozen=True)
class RawMerge(Merge):
    """The scores as they are: right where both spaces are one, as with a backward-compatible model."""

    kind: ClassVar[str] = "raw"

    def calibrate(self, side: Side, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """See :meth:`Merge.calibrate`."""
        _require_side(side)
        return np.asarray(scores, dtype=np.float64)


@dataclass(frozen=True)
class RankMerge(Merge):
    """Interleaves both sides by relative rank, and compares no scores.

    The row of rank r (from 0) in a side of n rows gets the place (r + ½) / n, and the lower place comes
    first. At equal places the new side does (:func:`relative_places`). A side therefore appears as often as
    it is large. This is right if both models rank equally well; it ignores how confident a query is of its
    first result.
    """

    kind: ClassVar[str] = "rank"
    by_rank: ClassVar[bool] = True

    def calibrate(self, side: Side, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """See :meth:`Merge.calibrate`; the scores as they are, since only their order is used."""
        _require_side(side)
        return np.asarray(scores, dtype=np.float64)


@dataclass(frozen=True)
class AffineMerge(Merge):
    """A new score s counts as ``scale · s + shift`` beside the old ones.

    Attributes:
        scale: Above 0.
        shift: Any finite number.

    Raises:
        ConfigError: If a value is out of range.
    """

    scale: float
    shift: float
    kind: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale) and self.scale > 0 and np.isfinite(self.shift)):
            raise ConfigError(
                f"an affine merge needs a finite scale above 0 and a finite shift, got {self.scale} and "
                f"{self.shift}; fit it to pairs of both models"
            )

    def calibrate(self, side: Side, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """See :meth:`Merge.calibrate`."""
        _require_side(side)
        exact = np.asarray(scores, dtype=np.float64)
        return exact if side == "old" else self.scale * exact + self.shift


@dataclass(frozen=True)
class IsotonicMerge(Merge):
    """A score counts as the probability that a row of this score is relevant, fitted for each side.

    Between the knots the curve is linear, beyond them it is flat, and a slope of :data:`STRICT_SLOPE` keeps
    it strictly increasing everywhere. Ranking by the probability of relevance is optimal if the probabilities
    are right (Robertson, "The probability ranking principle in IR", 1977).

    Attributes:
        old_scores: Knots of the old side's curve, ascending.
        old_values: Its values there, not descending.
        new_scores: Knots of the new side's curve.
        new_values: Its values there.

    Raises:
        ConfigError: If a curve has no knots or is not monotone.
    """

    old_scores: tuple[float, ...]
    old_values: tuple[float, ...]
    new_scores: tuple[float, ...]
    new_values: tuple[float, ...]
    kind: ClassVar[str] = "isotonic"

    def __post_init__(self) -> None:
        for side in ("old", "new"):
            knots, values = getattr(self, f"{side}_scores"), getattr(self, f"{side}_values")
            rising = bool(np.all(np.diff(knots) > 0) and np.all(np.diff(values) >= 0))
            finite = bool(np.all(np.isfinite(knots)) and np.all(np.isfinite(values)))
            if not knots or len(knots) != len(values) or not (rising and finite):
                raise ConfigError(
                    f"the {side} curve of an isotonic merge needs equally many finite scores and values, the "
                    f"scores rising and the values not falling; got {len(knots)} and {len(values)}"
                )

    def calibrate(self, side: Side, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """See :meth:`Merge.calibrate`."""
        _require_side(side)
        exact = np.asarray(scores, dtype=np.float64)
        curve = np.interp(exact, getattr(self, f"{side}_scores"), getattr(self, f"{side}_values"))
        strict: NDArray[np.float64] = curve + STRICT_SLOPE * exact
        return strict


KINDS: dict[str, type[Merge]] = {
    each.kind: each for each in (RawMerge, RankMerge, AffineMerge, IsotonicMerge)
}


def merge_from_dict(data: Mapping[str, Any]) -> Merge:
    """Make a merge of any kind from the result of :meth:`Merge.to_dict`.

    Raises:
        ConfigError: If the kind is unknown or the rest does not fit it.
    """
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"a merge of kind {kind!r} is not known; there is {', '.join(KINDS)}")
    return KINDS[kind].from_dict({name: value for name, value in data.items() if name != "kind"})


def next_vector_name(name: str) -> str:
    """Name the vector that follows another one: ``new``, ``new2``, ``new3``, …; no name comes back."""
    match = re.fullmatch(r"new(\d{0,9})", name)
    return "new" if match is None else f"new{int(match[1] or 1) + 1}"


def search_mixed(
    index: VectorIndex,
    old_queries: Vectors,
    new_queries: Vectors,
    k: int,
    merge: Merge,
    old_space: EmbeddingSpace | None = None,
    new_space: EmbeddingSpace | None = None,
    **options: Any,
) -> Hits:
    """Search the backfilled rows with the new queries, the other rows with the old ones, and merge.

    Args:
        index: An index whose first vector is the old model's. The second one, if there is one, is the new
            model's; until there is one, the old queries alone are used.
        old_queries: (n, old_dim) queries in the old space.
        new_queries: (n, new_dim) the same queries in the new space.
        k: Rows a query; fewer are returned where there are fewer rows.
        merge: Puts the scores of both sides on one scale, or interleaves the sides by rank.
        old_space: Space of the old queries, checked where it is given.
        new_space: Space of the new queries, likewise.
        **options: Further arguments of :meth:`VectorIndex.search`, such as ``filter``.

    Returns:
        Ids and the scores of the merge; the scores of a search where one side alone has rows.

    Raises:
        DataError: If the index is empty, there are not as many old queries as new ones, or as
            :meth:`VectorIndex.search`.
        SpaceMismatchError: If the space or the dimension of queries is another.
    """
    require_same_count(old_queries, new_queries)
    info = index.info()
    if not info.count:
        raise DataError("the index is empty; add items before searching it")
    old, *rest = info.vectors
    for name, given in zip((old, *rest[:1]), (old_space, new_space), strict=False):
        known = info.vectors[name].space
        if known is not None and given is not None:
            known.require(given, f"the queries for the vector {name!r}")
    if not rest:
        return index.search(old_queries, k, using=old, **options)
    new_count = info.vectors[rest[0]].count
    nothing = Hits([[] for _ in range(len(old_queries))], np.zeros((len(old_queries), 0), np.float32))
    old_hits = new_hits = nothing
    # In this order a row that is backfilled in between is found twice, and never missed.
    if info.count > new_count:
        old_hits = index.search(
            old_queries, min(k, info.count - new_count), using=old, without=rest[0], **options
        )
    if new_count:
        new_hits = index.search(new_queries, min(k, new_count), using=rest[0], **options)
    return merge_hits(merge, old_hits, new_hits, k, (info.count - new_count, new_count))


def require_same_count(old_queries: Vectors, new_queries: Vectors) -> None:
    """Refuse old and new queries that cannot be the same ones."""
    if len(old_queries) != len(new_queries):
        raise DataError(
            f"there are {len(old_queries)} old queries and {len(new_queries)} new ones; give each query in "
            "both spaces"
        )


def merge_hits(merge: Merge, old: Hits, new: Hits, k: int, sizes: tuple[int, int]) -> Hits:
    """Merge the first rows of both sides for every query, of sides with ``sizes`` rows.

    A row in both lists was backfilled between the two searches; its old score does not count.

    Returns:
        The first k with the scores of the merge, or 1 / place for a merge by rank; fewer where both lists
        together are shorter. Where one side found nothing for a query, the other side's scores as they are.
    """
    if _rectangular(old) and _rectangular(new) and all(map(_disjoint, old.ids, new.ids)):
        return _merge_rectangular(merge, old, new, k, sizes)
    lines = [
        _merge_rectangular(merge, _kept(old, row, new.ids[row]), _kept(new, row), k, sizes)
        for row in range(len(old.ids))
    ]
    scores = np.full((len(lines), max(line.scores.shape[1] for line in lines)), -np.inf, np.float32)
    for row, line in zip(scores, lines, strict=True):
        row[: line.scores.shape[1]] = line.scores[0]
    return Hits([line.ids[0] for line in lines], scores)


def _rectangular(hits: Hits) -> bool:
    return all(len(ids) == hits.scores.shape[1] for ids in hits.ids)


def _disjoint(old: Sequence[str], new: Sequence[str]) -> bool:
    return set(new).isdisjoint(old)


def _kept(hits: Hits, row: int, leave_out: Sequence[str] = ()) -> Hits:
    """One query's hits, without the rows that are to be left out."""
    ids, left_out = hits.ids[row], set(leave_out)
    places = [place for place, name in enumerate(ids) if name not in left_out]
    return Hits([[ids[place] for place in places]], hits.scores[row : row + 1, places])


def _merge_rectangular(merge: Merge, old: Hits, new: Hits, k: int, sizes: tuple[int, int]) -> Hits:
    """Merge results of which all queries have as many old rows, and all as many new ones."""
    n_old, n_new = old.scores.shape[1], new.scores.shape[1]
    if not n_old or not n_new:
        alone = new if n_new else old
        return Hits([ids[:k] for ids in alone.ids], alone.scores[:, :k])
    k = min(k, n_old + n_new)
    columns = merge_top(merge, old.scores, new.scores, k, sizes)
    ids = [
        [first[c] if c < n_old else second[c - n_old] for c in row]
        for first, second, row in zip(old.ids, new.ids, columns.tolist(), strict=True)
    ]
    if merge.by_rank:
        return Hits(ids, np.tile(1 / np.arange(1, k + 1, dtype=np.float32), (len(ids), 1)))
    both = np.concatenate([merge.calibrate("old", old.scores), merge.calibrate("new", new.scores)], axis=1)
    scores = np.take_along_axis(both, columns, axis=1).astype(np.float32)
    return Hits(ids, np.minimum.accumulate(scores, axis=1))


def relative_places(side: Side, ranks: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """(r + ½) / n, by which :class:`RankMerge` interleaves the row of rank r in a side of n rows.

    The places of the new side are less by a hair, so that it wins ties.
    """
    half = 0.5 if side == "old" else 0.5 - _HAIR
    places: NDArray[np.float64] = (ranks + half) / max(count, 1)
    return places


def merge_top(
    merge: Merge,
    old_scores: NDArray[np.float32],
    new_scores: NDArray[np.float32],
    k: int,
    sizes: tuple[int, int],
) -> NDArray[np.int64]:
    """Merge two lists per query, each sorted by descending scores, of sides with ``sizes`` rows.

    At equal keys the new side comes first. Within a side its own order is kept, whatever the calibration
    rounds to.

    Returns:
        (n, k) columns: c < k_old is the old list's entry c, and c ≥ k_old the new list's entry c − k_old.
    """
    if merge.by_rank:
        n_old, n_new = old_scores.shape[1], new_scores.shape[1]
        old_places = relative_places("old", np.arange(n_old), sizes[0])
        new_places = relative_places("new", np.arange(n_new), sizes[1])
        keys = [
            np.broadcast_to(-old_places, old_scores.shape),
            np.broadcast_to(-new_places, new_scores.shape),
        ]
    else:
        keys = [merge.calibrate("old", old_scores), merge.calibrate("new", new_scores)]
        # Rounding must not reverse a side's own order.
        keys = [np.minimum.accumulate(side, axis=1) if side.shape[1] else side for side in keys]
    joined = np.concatenate([keys[1], keys[0]], axis=1)
    order = np.argsort(-joined, axis=1, kind="stable")[:, :k]
    n_new, n_old = keys[1].shape[1], keys[0].shape[1]
    columns_of: NDArray[np.int64] = np.where(order < n_new, order + n_old, order - n_new)
    return columns_of


def _as_numbers(value: Any) -> float | tuple[float, ...]:
    if isinstance(value, list | tuple):
        return tuple(_as_number(each) for each in value)
    return _as_number(value)


def _as_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _require_side(side: str) -> None:
    if side not in ("old", "new"):
        raise ConfigError(f"a merge has no side {side!r}; use 'old' or 'new'")
