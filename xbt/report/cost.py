"""Cost of an upgrade per query, and cost of embedding the gallery again.

On a shared machine the seconds of one run mean little. Alternatives are therefore timed in turns in one
process and compared round by round, because a disturbance affects all alternatives of a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from xbt.errors import ConfigError
from xbt.report.measure import Measured
from xbt.report.sample import Sample

ROUNDS = 9
BYTES_PER_VALUE = 2
_HOUR = 3600


@dataclass(frozen=True)
class Spread:
    """Values of all rounds: seconds, or ratios of seconds."""

    values: tuple[float, ...]

    @property
    def min(self) -> float:
        """Minimum."""
        return min(self.values)

    @property
    def median(self) -> float:
        """Median."""
        return statistics.median(self.values)

    @property
    def max(self) -> float:
        """Maximum."""
        return max(self.values)

    def over(self, other: Spread) -> Spread:
        """Divide by another spread, round by round."""
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def minus(self, other: Spread) -> Spread:
        """Subtract another spread, round by round."""
        return Spread(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.min:.2f}, {self.max:.2f}]"


Timings = dict[str, Spread]
"""Seconds of every round, per contender."""


def side_by_side(contenders: Mapping[str, Callable[[], object]], rounds: int = 5, warmup: int = 1) -> Timings:
    """Time contenders in turns, ``rounds`` times after the ``warmup``; every round starts with the next one.

    On CUDA the timer waits for each to finish.

    Raises:
        ConfigError: If there is no contender, or ``rounds`` is less than 1 or ``warmup`` negative.
    """
    if not contenders:
        raise ConfigError("there is nothing to time; give at least one contender")
    if rounds < 1 or warmup < 0:
        raise ConfigError(f"rounds is {rounds} and warmup {warmup}, but must be at least 1 and 0")
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            _wait()
            start = time.perf_counter()
            contenders[name]()
            _wait()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Spread(tuple(values)) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Cost:
    """Cost, measured on this machine.

    ``gallery_size`` is the number of items for hours and bytes, ``images_per_second`` the rates of both
    models with decoding, ``query`` the milliseconds of a single text query: the tower of each model, and the
    method. Without encoders there is no device and no rate. ``dims`` are those of the old and the new
    vectors.
    """

    gallery_size: int
    device: str | None
    images_per_second: dict[str, float] | None
    query: dict[str, Spread]
    needs_old: bool
    dims: tuple[int, int]
    method_bytes: int

    @property
    def backfill_hours(self) -> float | None:
        """Hours of a full backfill with the new model at the measured rate."""
        rates = self.images_per_second
        return None if rates is None else self.gallery_size / rates["new"] / _HOUR

    @property
    def gallery_bytes(self) -> dict[str, int]:
        """Bytes of the gallery's vectors in fp16, under the old and the new model."""
        old, new = (self.gallery_size * dim * BYTES_PER_VALUE for dim in self.dims)
        return {"old": old, "new": new}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "gallery_size": self.gallery_size,
            "device": self.device,
            "images_per_second": self.images_per_second,
            "backfill_hours": self.backfill_hours,
            "query_milliseconds": {
                name: {"median": time.median, "min": time.min, "max": time.max}
                for name, time in self.query.items()
            },
            "needs_old_model": self.needs_old,
            "bytes": {
                **{f"gallery_{k}": v for k, v in self.gallery_bytes.items()},
                "method": self.method_bytes,
            },
        }


def measure_cost(sample: Sample, measured: Measured, gallery_size: int) -> Cost:
    """Time single text queries, and report the time that embedding the sample took.

    Without encoders only the method is timed.
    """
    decision = measured.decision
    new, old = (side[:1] for side in measured.pairs.queries("T2I"))
    method = "method (projection and combination)"
    work: dict[str, Callable[[], object]] = {method: lambda: decision.queries(new, old, "T2I")}
    rates, device = None, None
    sides = {"old": sample.old, "new": sample.new}
    for name, side in sides.items():
        if side.encoder is not None:
            work[f"{name} text tower"] = partial(side.encoder.encode_texts, [sample.shown.text(0, 0)])
            device = str(side.encoder.device)
    if all(side.seconds_per_image for side in sides.values()):
        rates = {name: 1 / side.seconds_per_image for name, side in sides.items() if side.seconds_per_image}
    timings = side_by_side(work, ROUNDS)
    query = {name: Spread(tuple(1000 * second for second in time.values)) for name, time in timings.items()}
    needs_old = any(decision.deployed(d) and decision.ensemble.needs_old(d) for d in measured.directions)
    dims = (sample.old.dim, sample.new.dim)
    tensors = [*decision.projection.state_dict().values(), *decision.ensemble.state_dict().values()]
    method_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Cost(gallery_size, device, rates, query, needs_old, dims, method_bytes)
