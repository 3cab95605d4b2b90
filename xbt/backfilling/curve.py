"""Recall while a gallery is backfilled: measured by its own search, and judged whether it still rises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from xbt.evaluation import bootstrap_interval, bootstrap_means
from xbt.gallery import Gallery, Merge, SearchResult
from xbt.space import EmbeddingSpace

KS = (1, 5, 10)
QUERIES_AT_ONCE = 1024
NEXT = 1000
"""Items whose gain decides whether more of them pay."""


@dataclass(frozen=True)
class Questions:
    """Queries in both spaces whose answers are known.

    Attributes:
        old: (n, old_dim) queries in the old space.
        new: (n, new_dim) the same in the new space.
        answers: For every query the id of the item that answers it.
        groups: (n,) int64; queries about one image have the same one.
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
        fraction: Share of the gallery's items that are backfilled.
        recall: R@k by k, as fractions.
        mean: Their mean.
        interval: Its 95 % bootstrap interval, drawn image by image.
        seconds: That the job had worked by then, all its runs together.
        hits: For every query how many of the cut-offs it meets.
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
        """Reads what :meth:`to_dict` gave."""
        recall = {int(name[2:]): value for name, value in data.items() if name.startswith("R@")}
        low, high = data["interval"]
        return cls(
            data["position"],
            data["fraction"],
            recall,
            data["mean"],
            (low, high),
            data["seconds"],
            tuple(map(int, data["hits"])),
        )


class Gain(NamedTuple):
    """What some items have added to the mean recall.

    Attributes:
        items: How many they were.
        gain: Their gain, as a fraction.
        standard_error: Its bootstrap standard error.
    """

    items: int
    gain: float
    standard_error: float

    @property
    def pays(self) -> bool:
        """Whether it is more than its standard error."""
        return self.gain > self.standard_error


def measure(
    gallery: Gallery, questions: Questions, merge: Merge, position: int, seconds: float
) -> CurvePoint:
    """Measures recall as users of a gallery get it: both parts are searched and merged.

    With the index ``"Flat"`` it is exact; what an approximate index does not find counts as not found. Ties
    count against us as far as the first 11 items show them.

    Args:
        gallery: The gallery, as it is now.
        questions: What to ask.
        merge: How both parts are merged.
        position: See :class:`CurvePoint`.
        seconds: Likewise.

    Raises:
        DataError, SpaceMismatchError, StoreError: As :meth:`~xbt.gallery.Gallery.search_mixed`.
    """
    k = min(max(KS) + 1, len(gallery))
    ranks: list[int] = []
    for start in range(0, len(questions.answers), QUERIES_AT_ONCE):
        asked = slice(start, start + QUERIES_AT_ONCE)
        found = gallery.search_mixed(
            questions.old[asked], questions.new[asked], k, merge, questions.old_space, questions.new_space
        )
        ranks += ranks_in(found, questions.answers[asked])
    return _point(torch.tensor(ranks), questions, gallery.fraction_backfilled, position, seconds)


def ranks_in(found: SearchResult, answers: Sequence[str]) -> list[int]:
    """For every query how many other items score at least as high as its answer, at most as many as found.

    An answer that is not among the first ones, or not in the gallery any more, meets no cut-off.
    """
    ranks = []
    for ids, scores, answer in zip(found.ids, found.scores, answers, strict=True):
        place = ids.index(answer) if answer in ids else None
        ranks.append(max(KS) if place is None else int(np.count_nonzero(scores >= scores[place])) - 1)
    return ranks


def gain_at(points: Sequence[CurvePoint], number: int, groups: Tensor) -> Gain | None:
    """What the items before a point of the curve have gained, at least :data:`NEXT` of them.

    Args:
        points: The curve.
        number: Which of its points.
        groups: (n,) int64 the queries' groups.

    Returns:
        The gain since the latest point that is far enough back; ``None`` if there is none.
    """
    here = points[number]
    before = [each for each in points[:number] if here.position - each.position >= NEXT]
    if not before:
        return None
    change = (_hits(here) - _hits(before[-1])) / len(KS)
    error = float(bootstrap_means(change, groups, 1000).std())
    return Gain(here.position - before[-1].position, float(change.mean()), error)


def stopping_position(points: Sequence[CurvePoint], groups: Tensor) -> int | None:
    """The position from which on the next items did not pay; ``None`` as long as they do.

    The rule is that of :func:`~xbt.gallery.backfill_curve.stopping_point`, told afterwards: what the next
    items gain is only known once they are backfilled.
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
