"""Recall while an index is backfilled: predicted from vectors, or measured by its own search and logged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from xbt.errors import ConfigError, DataError, StoreError
from xbt.evaluation import bootstrap_interval, bootstrap_means
from xbt.evaluation.retrieval import check_ks
from xbt.files import writing_to
from xbt.index.calibration import MixedScores
from xbt.index.mixed import Merge, search_mixed
from xbt.index.protocol import Hits, VectorIndex
from xbt.space import EmbeddingSpace

EQUALLY_SPACED = tuple(number / 20 for number in range(21))
"""0 %, 5 %, ..., 100 % backfilled."""


@dataclass(frozen=True)
class BackfillCurve:
    """Recall over the fraction that is backfilled.

    Attributes:
        fractions: Fractions of the items.
        recall: The mean of R@k over the cut-offs at each of them.
        hits: (n_fractions, n_queries) float64: for every query the share of the cut-offs that it meets.
    """

    fractions: tuple[float, ...]
    recall: tuple[float, ...]
    hits: Tensor = field(repr=False, compare=False)

    @property
    def area(self) -> float:
        """Mean recall over the fractions; over equally spaced ones it is FastFill's area under the curve."""
        return float(np.mean(self.recall))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"fractions": list(self.fractions), "recall": list(self.recall), "area": self.area}


@dataclass(frozen=True)
class StoppingPoint:
    """The part of an index that is worth backfilling.

    Attributes:
        items: Number of the most urgent items that pay; all of them if every step pays.
        gain: Recall that the next step would add; ``None`` if there is no next step.
        standard_error: The bootstrap's standard error of that gain.
    """

    items: int
    gain: float | None
    standard_error: float | None


def backfill_curve(
    scores: MixedScores,
    order: Tensor,
    merge: Merge,
    *,
    fractions: Sequence[float] = EQUALLY_SPACED,
    ks: Sequence[int] = (1, 5, 10),
) -> BackfillCurve:
    """Measure recall while the items are backfilled in an order.

    The area under the curve over equally spaced fractions is the measure of FastFill (Jaeckle et al.,
    "FastFill: Efficient Compatible Model Update", ICLR 2023).

    Args:
        scores: Queries and items under both models.
        order: (m,) int64 permutation of the items, most urgent first.
        merge: How the scores of both sides are compared.
        fractions: Where to measure, each from 0 to 1, rounded to whole items.
        ks: Cut-offs, over which R@k is averaged.

    Raises:
        ConfigError: If there are no fractions or one is out of range.
        DataError: If the order is no permutation of the items.
    """
    if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
        raise ConfigError(f"fractions are {list(fractions)}, but must lie from 0 to 1, such as 0.5")
    count = len(check_order(order, scores.old.shape[1]))
    hits = torch.stack(
        [hits_after(scores, order, round(fraction * count), merge, ks) for fraction in fractions]
    )
    return BackfillCurve(tuple(fractions), tuple(hits.mean(dim=1).tolist()), hits)


def stopping_point(
    scores: MixedScores,
    order: Tensor,
    merge: Merge,
    *,
    step: int = 1000,
    ks: Sequence[int] = (1, 5, 10),
    groups: Tensor | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> StoppingPoint:
    """Find where the next items no longer pay: their gain is below its own bootstrap standard error.

    Args:
        scores: Queries and items under both models.
        order: (m,) int64 permutation of the items, most urgent first.
        merge: How the scores of both sides are compared.
        step: Number of items in a step.
        ks: Cut-offs, over which R@k is averaged.
        groups: (n,) integers; queries of one group are drawn together.
        samples: Bootstrap samples.
        seed: Seeds them.

    Raises:
        ConfigError: If ``step`` is below 1.
        DataError: If the order is no permutation of the items.
    """
    if step < 1:
        raise ConfigError(f"step is {step}, but must be at least 1")
    count = len(check_order(order, scores.old.shape[1]))
    before = hits_after(scores, order, 0, merge, ks)
    for done in range(0, count, step):
        after = hits_after(scores, order, min(done + step, count), merge, ks)
        change = after - before
        error = float(bootstrap_means(change, groups, samples, seed).std())
        gain = float(change.mean())
        if gain <= error:
            return StoppingPoint(done, gain, error)
        before = after
    return StoppingPoint(count, None, None)


def hits_after(scores: MixedScores, order: Tensor, done: int, merge: Merge, ks: Sequence[int]) -> Tensor:
    """Share of the cut-offs that each query meets with the first ``done`` items backfilled: (n,) float64."""
    cut_offs = torch.tensor(check_ks(ks))
    mask = np.zeros(scores.old.shape[1], dtype=bool)
    mask[order[:done].numpy()] = True
    return (scores.ranks(mask, merge)[:, None] < cut_offs).double().mean(dim=1)


def check_order(order: Tensor, count: int) -> Tensor:
    """Return an order after checking that it names every item once."""
    integral = not order.is_floating_point() and order.ndim == 1 and len(order) == count
    if not integral or not torch.equal(order.sort().values.long(), torch.arange(count)):
        raise DataError(
            f"an order must name each of the {count} items once, got the shape {tuple(order.shape)}"
        )
    return order


KS = (1, 5, 10)
QUERIES_AT_ONCE = 1024
NEXT = 1000
"""Number of items whose gain decides whether more of them pay."""


@dataclass(frozen=True)
class Questions:
    """Queries in both spaces whose answers are known.

    The (n, dim) queries are the same in both spaces; ``answers`` are the ids of the items that answer them.
    Queries about one image have the same number in ``groups``.
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
        start = {"position": self.position, "fraction": self.fraction, **recall, "mean": self.mean}
        hits = "".join(map(str, self.hits))
        return {**start, "interval": list(self.interval), "seconds": self.seconds, "hits": hits}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read the result of :meth:`to_dict`."""
        recall = {int(name[2:]): float(value) for name, value in data.items() if name.startswith("R@")}
        low, high = map(float, data["interval"])
        fraction, mean, seconds = (float(data[name]) for name in ("fraction", "mean", "seconds"))
        hits = tuple(map(int, str(data["hits"])))
        return cls(int(data["position"]), fraction, recall, mean, (low, high), seconds, hits)


class Gain(NamedTuple):
    """The gain of some items in mean recall, as a fraction, and its bootstrap standard error."""

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
    Ties count against us as far as the first 11 items show them. ``position`` and ``seconds`` are those of
    :class:`CurvePoint`.
    """
    ranks: list[int] = []
    spaces = questions.old_space, questions.new_space
    for start in range(0, len(questions.answers), QUERIES_AT_ONCE):
        asked = slice(start, start + QUERIES_AT_ONCE)
        queries = questions.old[asked], questions.new[asked]
        found = search_mixed(index, *queries, max(KS) + 1, merge, *spaces)
        ranks += ranks_in(found, questions.answers[asked])
    met = torch.tensor(ranks)[:, None] < torch.tensor(KS)
    hits = met.sum(dim=1)
    mean, *ends = bootstrap_interval(hits.double() / len(KS), questions.groups)
    recall = dict(zip(KS, met.double().mean(dim=0).tolist(), strict=True))
    fraction = index.info().fraction_backfilled
    return CurvePoint(position, fraction, recall, mean, (ends[0], ends[1]), seconds, tuple(hits.tolist()))


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
    """Compute the gain of the items since the latest point that is :data:`NEXT` items back, or more.

    ``groups`` are those of the queries. ``None`` if there is no such point.
    """
    here = points[number]
    before = [point for point in points[:number] if here.position - point.position >= NEXT]
    if not before:
        return None
    hits = torch.tensor([here.hits, before[-1].hits], dtype=torch.float64)
    change = (hits[0] - hits[1]) / len(KS)
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


class JsonLines:
    """A file of JSON objects, one a line; appended lines are on disk, a line that a kill cut off is dropped.

    ``keys`` are those that every object in ``entries`` must have, with the types of their values.
    """

    def __init__(self, path: Path, keys: Mapping[str, type] | None = None) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        try:
            content = path.read_bytes() if path.is_file() else b""
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
        self._end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._end].split(b"\n")[:-1], start=1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}, is no JSON; restore the file, or pass --overwrite true"
                ) from error
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(key), kind) for key, kind in (keys or {}).items()
            ):
                needed = f" with the keys {', '.join(keys)}" if keys else ""
                raise DataError(
                    f"{path}, line {number}, is no JSON object{needed}; restore the file, or pass "
                    "--overwrite true"
                )
            self.entries.append(entry)

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Add lines, all of which are on disk when it returns."""
        if not entries:
            return
        content = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode("utf-8")
        with writing_to(self.path, len(content)):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            with os.fdopen(handle, "r+b") as file:
                file.truncate(self._end)  # what a killed or failed append left
                file.seek(self._end)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self._end += len(content)
        self.entries += entries


class CurveLog:
    """The curve of a backfill, of all runs, in a file; without ``questions`` nothing is measured."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)
        self.points: list[CurvePoint] = []
        for line, entry in enumerate(self._lines.entries, start=1):
            try:
                self.points.append(CurvePoint.from_dict(entry))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise DataError(
                    f"{path}, line {line}, is no point of a curve ({error}); restore the file, or pass "
                    "--overwrite true"
                ) from error
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
