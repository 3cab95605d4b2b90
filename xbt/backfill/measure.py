"""Recall while an index is backfilled, measured by its own search and kept in a log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from xbt.backfill.records import JsonLines
from xbt.errors import DataError
from xbt.evaluation import bootstrap_interval, bootstrap_means
from xbt.index.mixed import Merge, search_mixed
from xbt.index.protocol import Hits, VectorIndex
from xbt.index.target import fraction_backfilled
from xbt.space import EmbeddingSpace

KS = (1, 5, 10)
QUERIES_AT_ONCE = 1024
NEXT = 1000
"""Number of items whose gain decides whether more of them pay."""


@dataclass(frozen=True)
class Questions:
    """Queries in both spaces whose answers are known.

    Attributes:
        old: (n, old_dim) queries in the old space.
        new: (n, new_dim) the same in the new space.
        answers: Id of the item that answers each query.
        groups: (n,) int64; queries about one image have the same number.
        old_space: Space of the old queries.
        new_space: Space of the new ones.
    """

    old: Tensor
    new: Tensor
    answers: list[str]
    groups: Tensor
    old_space: EmbeddingSpace
    new_space: EmbeddingSpace


@dataclass(frozen=True)
class CurvePoint:
    """Recall at one state of a backfill.

    Attributes:
        position: Items of the order that were taken up.
        fraction: Share of the items that are backfilled.
        recall: R@k by k, as fractions.
        mean: Their mean.
        interval: Its 95 % bootstrap interval, drawn image by image.
        seconds: Time that the job had worked, in all runs.
        hits: Number of cut-offs that each query meets.
    """

    position: int
    fraction: float
    recall: dict[int, float]
    mean: float
    interval: tuple[float, float]
    seconds: float
    hits: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; every query's hits are a digit."""
        recall = {f"R@{k}": value for k, value in self.recall.items()}
        rest = {
            "interval": list(self.interval),
            "seconds": self.seconds,
            "hits": "".join(map(str, self.hits)),
        }
        return {"position": self.position, "fraction": self.fraction, **recall, "mean": self.mean, **rest}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read the result of :meth:`to_dict`."""
        recall = {int(name[2:]): float(value) for name, value in data.items() if name.startswith("R@")}
        low, high = map(float, data["interval"])
        fraction, mean, seconds = (float(data[name]) for name in ("fraction", "mean", "seconds"))
        hits = tuple(map(int, str(data["hits"])))
        return cls(int(data["position"]), fraction, recall, mean, (low, high), seconds, hits)


class Gain(NamedTuple):
    """The gain of some items in mean recall.

    Attributes:
        items: Number of items.
        gain: Their gain, as a fraction.
        standard_error: Its bootstrap standard error.
    """

    items: int
    gain: float
    standard_error: float

    @property
    def pays(self) -> bool:
        """True if the gain is more than its standard error."""
        return self.gain > self.standard_error


def measure(
    index: VectorIndex, questions: Questions, merge: Merge, position: int, seconds: float
) -> CurvePoint:
    """Measure recall as users of an index get it: both sides are searched and merged.

    It is exact where the index searches exactly. What an approximate index does not find counts as not found.
    Ties count against us as far as the first 11 items show them.

    Args:
        index: The index, as it is now.
        questions: The queries.
        merge: How both sides are merged.
        position: See :class:`CurvePoint`.
        seconds: Likewise.

    Raises:
        DataError, SpaceMismatchError, StoreError: As :func:`~xbt.index.mixed.search_mixed`.
    """
    ranks: list[int] = []
    for start in range(0, len(questions.answers), QUERIES_AT_ONCE):
        asked = slice(start, start + QUERIES_AT_ONCE)
        hits = search_mixed(
            index,
            questions.old[asked],
            questions.new[asked],
            max(KS) + 1,
            merge,
            questions.old_space,
            questions.new_space,
        )
        ranks += ranks_in(hits, questions.answers[asked])
    return _point(torch.tensor(ranks), questions, fraction_backfilled(index), position, seconds)


def ranks_in(hits: Hits, answers: Sequence[str]) -> list[int]:
    """Count for each query the other hits that score at least as high as its answer.

    An answer that is not among the hits, or not in the index any more, meets no cut-off.
    """
    ranks = []
    for ids, scores, answer in zip(hits.ids, hits.scores, answers, strict=True):
        place = ids.index(answer) if answer in ids else None
        ranks.append(max(KS) if place is None else int(np.count_nonzero(scores >= scores[place])) - 1)
    return ranks


def gain_at(points: Sequence[CurvePoint], number: int, groups: Tensor) -> Gain | None:
    """Compute the gain of the items before a point of the curve, at least :data:`NEXT` of them.

    Args:
        points: The curve.
        number: Number of the point.
        groups: (n,) int64 groups of the queries.

    Returns:
        The gain since the latest point that is far enough back; ``None`` if there is none.
    """
    here = points[number]
    before = [point for point in points[:number] if here.position - point.position >= NEXT]
    if not before:
        return None
    change = (_hits(here) - _hits(before[-1])) / len(KS)
    error = float(bootstrap_means(change, groups, 1000).std())
    return Gain(here.position - before[-1].position, float(change.mean()), error)


def stopping_position(points: Sequence[CurvePoint], groups: Tensor) -> int | None:
    """Find the position from which the next items did not pay; ``None`` as long as they do.

    The rule is that of :func:`~xbt.backfill.curve.stopping_point`, applied afterwards: the gain of the next
    items is only known once they are backfilled.
    """
    for number in range(len(points)):
        gain = gain_at(points, number, groups)
        if gain is not None and not gain.pays:
            return points[number].position - gain.items
    return None


def _hits(point: CurvePoint) -> Tensor:
    return torch.tensor(point.hits, dtype=torch.float64)


def _point(ranks: Tensor, questions: Questions, fraction: float, position: int, seconds: float) -> CurvePoint:
    met = ranks[:, None] < torch.tensor(KS)
    hits = met.sum(dim=1)
    interval = bootstrap_interval(hits.double() / len(KS), questions.groups)
    recall = dict(zip(KS, met.double().mean(dim=0).tolist(), strict=True))
    ends = (interval.low, interval.high)
    return CurvePoint(position, fraction, recall, interval.estimate, ends, seconds, tuple(hits.tolist()))


class CurveLog:
    """The curve of a backfill in a file; without questions nothing is measured.

    Args:
        path: The file.

    Attributes:
        points: The curve, of all runs.
        questions: Queries to measure with; ``None`` measures nothing.

    Raises:
        DataError: If the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)
        self.points = [_read_point(path, *entry) for entry in enumerate(self._lines.entries, start=1)]
        self.questions: Questions | None = None

    @property
    def seconds(self) -> float:
        """Time that earlier runs had worked when they measured last."""
        return self.points[-1].seconds if self.points else 0.0

    def measure(self, index: VectorIndex, merge: Merge, position: int, seconds: float) -> None:
        """Add a point, unless there is one for this position or a later one."""
        if self.questions is None or (self.points and self.points[-1].position >= position):
            return
        point = measure(index, self.questions, merge, position, seconds)
        self._lines.append([point.to_dict()])
        self.points.append(point)

    def last_gain(self) -> Gain | None:
        """Gain of the last items, if it is known."""
        if self.questions is None or not self.points:
            return None
        return gain_at(self.points, len(self.points) - 1, self.questions.groups)

    def stopping_position(self) -> int | None:
        """See :func:`stopping_position`."""
        return None if self.questions is None else stopping_position(self.points, self.questions.groups)


def _read_point(path: Path, line: int, entry: dict[str, Any]) -> CurvePoint:
    try:
        return CurvePoint.from_dict(entry)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}, line {line}, is no point of a curve ({error}); restore the file, or pass "
            "--overwrite true"
        ) from error
