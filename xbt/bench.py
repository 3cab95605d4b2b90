"""Timing of alternatives side by side, and reports of the results.

On a shared machine the seconds of one run mean little. The contenders are therefore timed in turns in one
process and compared round by round, because a disturbance affects all contenders of a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xbt.errors import ConfigError
from xbt.run_dir import versions, write_json


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
    """Time contenders in turns; every round starts with the next one.

    Args:
        contenders: Functions by name. On CUDA the timer waits for each to finish.
        rounds: Measured rounds; every contender runs once in each.
        warmup: Rounds before them that are not measured.

    Returns:
        Seconds per contender and round.

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
            taken = _seconds(contenders[name])
            if number >= 0:
                seconds[name].append(taken)
    return {name: Spread(tuple(values)) for name, values in seconds.items()}


def _seconds(run: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(timings: Timings, slow: str, fast: str) -> Spread:
    """Ratio of the times of two contenders, round by round.

    Args:
        timings: Result of :func:`side_by_side`.
        slow: Contender in the numerator.
        fast: Contender in the denominator.

    Returns:
        The spread of the ratios; above 1 where ``fast`` was faster.
    """
    return timings[slow].over(timings[fast])


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Autocast context for ``"bf16"``, as in the encoders; ``"fp32"`` has no effect."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def machine_rates(device: torch.device, precision: str) -> dict[str, float]:
    """Measure the machine: TFLOP/s of a large matrix product, GB/s of a copy in memory."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    n = 8192 if device.type == "cuda" else 2048
    # Some CPUs multiply bf16 a thousand times slower than fp32: there, smaller matrices tell as much.
    small = torch.randn(256, 256, device=device, dtype=dtype)
    seconds = side_by_side({"matmul": lambda: small @ small}, rounds=1)["matmul"].median
    while n > 256 and seconds * (n / 256) ** 3 > 0.25:
        n //= 2
    a = torch.randn(n, n, device=device, dtype=dtype)
    source = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    timings = side_by_side({"matmul": lambda: a @ a, "copy": lambda: target.copy_(source)}, rounds=9)
    return {
        "matmul_tflops": 2 * n**3 / timings["matmul"].median / 1e12,
        "copy_gb_per_s": 2 * source.nbytes / timings["copy"].median / 1e9,
    }


def write_report(
    path_stem: str | Path, title: str, rows: Sequence[Mapping[str, Any]], notes: str = "", **record: Any
) -> Path:
    """Write ``STEM.json`` with all values and ``STEM.md`` with a table.

    Args:
        path_stem: Path of the two files without suffix.
        title: Heading of the Markdown file.
        rows: Rows of the table, with the same keys. A :class:`Spread` is shown as median [min, max].
        notes: Text below the table, such as the method of measurement.
        **record: Further values for the JSON file: config, seeds, timings.

    Returns:
        The path of the JSON file.

    Raises:
        ConfigError: If there are no rows.
    """
    if not rows:
        raise ConfigError(f"there are no results to write to {path_stem}")
    stem = Path(path_stem)
    heads = list(rows[0])
    lines = [f"# {title}", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(_shown(row[head]) for head in heads)} |" for row in rows]
    lines += ["", notes] if notes else []
    result = {"title": title, "rows": rows, "notes": notes, "versions": versions(), **record}
    # The stem may contain dots, so append the suffix instead of replacing one.
    written = write_json(stem.with_name(f"{stem.name}.json"), _plain(result))
    stem.with_name(f"{stem.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return written


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Replace spreads in a result by dictionaries."""
    if isinstance(value, Spread):
        return {"min": value.min, "median": value.median, "max": value.max, "rounds": list(value.values)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
