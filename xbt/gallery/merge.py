"""How two parts of a gallery that is being backfilled are merged into one list of results.

The old part is searched with a query in the old space, the new part with the same query in the new space, and
their scores do not mean the same: two models differ in the spread of their scores and in the gap between
texts and images. Each way to merge is a frozen dataclass that puts both on one scale.

Merging the two lists by the rank of distances is what metric-compatible online backfilling does (Seo et al.,
"Metric Compatible Training for Online Backfilling in Large-Scale Retrieval", WACV 2025, arXiv 2301.03767),
which trains the models until their distances are comparable. Here the models are as they are, and the scores
are calibrated. :func:`~xbt.gallery.calibration.fit_merge` chooses on held-out pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from xbt.errors import ConfigError

Part = Literal["old", "new"]

STRICT_SLOPE = 1e-6
"""Slope that is added to a calibrated curve: where it is flat, unequal scores still stay unequal."""
_HAIR = 1e-9


@dataclass(frozen=True)
class Merge(ABC):
    """One way to merge; immutable, and JSON-able by :meth:`to_dict` and :func:`merge_from_dict`.

    Attributes:
        kind: Its name.
        by_rank: Whether the parts are interleaved by rank; scores are not compared then.
    """

    kind: ClassVar[str]
    by_rank: ClassVar[bool] = False

    @abstractmethod
    def calibrate(self, part: Part, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """Scores of one part on the scale that both parts share.

        The map is strictly increasing for scores that differ by 1e-9 or more; closer ones may become equal,
        never reversed beyond rounding, which is why :func:`merge_top` keeps each part's own order.

        Args:
            part: ``"old"`` or ``"new"``.
            scores: Inner products, of any shape.

        Returns:
            float64 of the same shape; higher is better.

        Raises:
            ConfigError: If there is no such part.
        """

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, from which :func:`merge_from_dict` makes an equal merge."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Makes a merge of what :meth:`to_dict` gave, without its kind.

        Raises:
            ConfigError: If a key is missing, not known, or its value cannot be used.
        """
        known = {field.name for field in fields(cls)}
        if set(data) != known:
            raise ConfigError(
                f"a merge of kind {cls.kind!r} has the keys {sorted(known)}, got {sorted(data)}; "
                "write it with to_dict()"
            )
        try:
            return cls(**{name: _frozen(value) for name, value in data.items()})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a merge of kind {cls.kind!r} cannot be read: {error}") from error


@dataclass(frozen=True)
class RawMerge(Merge):
    """The scores as they are: right where both spaces are one, as those of a born-compatible model."""

    kind: ClassVar[str] = "raw"

    def calibrate(self, part: Part, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """See :meth:`Merge.calibrate`."""
        _require_part(part)
        return np.asarray(scores, dtype=np.float64)


@dataclass(frozen=True)
class RankMerge(Merge):
    """Interleaves both parts by relative rank, and compares no scores.

    The item of rank r (from 0) in a part of n items has the place (r + ½) / n, and the lower place comes
    first; at equal places the new part does (:func:`relative_places`). A part is thereby met as often as it
    is large, which is right if both models rank equally well, and blind to how sure a query is of its first
    item.
    """

    kind: ClassVar[str] = "rank"
    by_rank: ClassVar[bool] = True

    def calibrate(self, part: Part, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """See :meth:`Merge.calibrate`; the scores as they are, since only their order is used."""
        _require_part(part)
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

    def calibrate(self, part: Part, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """See :meth:`Merge.calibrate`."""
        _require_part(part)
        exact = np.asarray(scores, dtype=np.float64)
        return exact if part == "old" else self.scale * exact + self.shift


@dataclass(frozen=True)
class IsotonicMerge(Merge):
    """A score counts as the probability that an item of this score is relevant, learnt for each part.

    Between the knots the curve is linear, beyond them it is flat, and everywhere a slope of
    :data:`STRICT_SLOPE` keeps it strictly increasing. To rank by the probability of relevance is best if the
    probabilities are right (Robertson, "The probability ranking principle in IR", 1977).

    Attributes:
        old_scores: Knots of the old part's curve, ascending.
        old_values: Its values there, not descending.
        new_scores: Knots of the new part's curve.
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
        for part in ("old", "new"):
            knots, values = getattr(self, f"{part}_scores"), getattr(self, f"{part}_values")
            rising = bool(np.all(np.diff(knots) > 0) and np.all(np.diff(values) >= 0))
            finite = bool(np.all(np.isfinite(knots)) and np.all(np.isfinite(values)))
            if not knots or len(knots) != len(values) or not (rising and finite):
                raise ConfigError(
                    f"the {part} curve of an isotonic merge needs equally many finite scores and values, the "
                    f"scores rising and the values not falling; got {len(knots)} and {len(values)}"
                )

    def calibrate(self, part: Part, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """See :meth:`Merge.calibrate`."""
        _require_part(part)
        exact = np.asarray(scores, dtype=np.float64)
        curve = np.interp(exact, getattr(self, f"{part}_scores"), getattr(self, f"{part}_values"))
        strict: NDArray[np.float64] = curve + STRICT_SLOPE * exact
        return strict


KINDS: dict[str, type[Merge]] = {
    each.kind: each for each in (RawMerge, RankMerge, AffineMerge, IsotonicMerge)
}


def merge_from_dict(data: Mapping[str, Any]) -> Merge:
    """Makes a merge of what :meth:`Merge.to_dict` gave, of whatever kind it was.

    Raises:
        ConfigError: If the kind is not known or the rest does not fit it.
    """
    kind = data.get("kind")
    if kind not in KINDS:
        raise ConfigError(f"a merge of kind {kind!r} is not known; there is {', '.join(KINDS)}")
    return KINDS[kind].from_dict({name: value for name, value in data.items() if name != "kind"})


def relative_places(part: Part, ranks: NDArray[np.int64], part_size: int) -> NDArray[np.float64]:
    """(r + ½) / n: by which :class:`RankMerge` interleaves the item of rank r in a part of n items.

    Args:
        part: ``"old"`` or ``"new"``; the new part's places are less by a hair, so that it wins ties.
        ranks: Ranks within the part, from 0, of any shape.
        part_size: Items of the part.
    """
    half = 0.5 if part == "old" else 0.5 - _HAIR
    places: NDArray[np.float64] = (ranks + half) / max(part_size, 1)
    return places


def merge_top(
    merge: Merge,
    old_scores: NDArray[np.float32],
    new_scores: NDArray[np.float32],
    k: int,
    sizes: tuple[int, int],
) -> NDArray[np.int64]:
    """The first k of two sorted lists per query.

    Equal keys stand new before old, and within a part in the part's order: each part's own order is kept
    whatever the calibration rounds to.

    Args:
        merge: How to merge.
        old_scores: (n, k_old) the old part's scores per query, descending; k_old may be 0.
        new_scores: (n, k_new) the new part's, likewise.
        k: How many to keep, at most k_old + k_new.
        sizes: Items of the old and of the new part, by which ranks are made relative.

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
        # Rounding may not reverse a part's own order.
        keys = [np.minimum.accumulate(side, axis=1) if side.shape[1] else side for side in keys]
    joined = np.concatenate([keys[1], keys[0]], axis=1)
    order = np.argsort(-joined, axis=1, kind="stable")[:, :k]
    n_new, n_old = keys[1].shape[1], keys[0].shape[1]
    columns_of: NDArray[np.int64] = np.where(order < n_new, order + n_old, order - n_new)
    return columns_of


def _frozen(value: Any) -> Any:
    return tuple(float(each) for each in value) if isinstance(value, list | tuple) else value


def _require_part(part: str) -> None:
    if part not in ("old", "new"):
        raise ConfigError(f"a gallery has no part {part!r}; use 'old' or 'new'")
