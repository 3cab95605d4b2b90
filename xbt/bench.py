"""Timing two ways to do the same thing side by side, and writing down what came out.

On a shared machine the seconds of one run mean little. Contenders are therefore timed in turns, in one
process, and compared round by round: what disturbs a round disturbs all of it.
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
    """What was measured in every round: seconds, or ratios of them."""

    values: tuple[float, ...]

    @property
    def min(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def median(self) -> float:
        """The one in the middle."""
        return statistics.median(self.values)

    @property
    def max(self) -> float:
        """The greatest."""
        return max(self.values)

    def over(self, other: Spread) -> Spread:
        """This divided by another one, round by round."""
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def minus(self, other: Spread) -> Spread:
        """This less another one, round by round."""
        return Spread(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.min:.2f}, {self.max:.2f}]"


Timings = dict[str, Spread]
"""Seconds of every round, per contender."""


def side_by_side(contenders: Mapping[str, Callable[[], object]], rounds: int = 5, warmup: int = 1) -> Timings:
    """Times contenders in turns; every round starts with the next one.

    Args:
        contenders: Name → what to run. On CUDA each is waited for.
        rounds: Rounds that count; every contender runs once in each.
        warmup: Rounds before them that do not count.

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
    """How many times as long one contender took as another, round by round.

    Args:
        timings: What :func:`side_by_side` measured.
        slow: The contender in the numerator.
        fast: The one in the denominator.

    Returns:
        The spread of the rounds' ratios; above 1 where ``fast`` was faster.
    """
    return timings[slow].over(timings[fast])


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """The context in which ``"bf16"`` computes, as the encoders do it; ``"fp32"`` changes nothing."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def machine_rates(device: torch.device, precision: str) -> dict[str, float]:
    """What the machine itself does: TFLOP/s of a large matrix product, GB/s of a copy within its memory."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    n = 8192 if device.type == "cuda" else 2048
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
    """Writes ``STEM.json`` with everything and ``STEM.md`` with a table for people.

    Args:
        path_stem: The two files' path without suffix.
        title: Heading of the Markdown file.
        rows: The table: every row has the keys of the first. A :class:`Spread` is shown as median [min, max].
        notes: Text below the table: what was measured, and how.
        **record: What else belongs into the JSON file: config, seeds, timings.

    Returns:
        The JSON file's path.

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
    # Names may hold dots, so suffixes are appended rather than replaced.
    written = write_json(stem.with_name(f"{stem.name}.json"), _plain(result))
    stem.with_name(f"{stem.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return written


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Spreads as dictionaries, everywhere in a result."""
    if isinstance(value, Spread):
        return {"min": value.min, "median": value.median, "max": value.max, "rounds": list(value.values)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
