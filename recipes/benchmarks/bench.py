"""Rates and reports of the benchmarks, which time alternatives side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xbt.errors import ConfigError
from xbt.report.cost import Spread, Timings, side_by_side
from xbt.run_dir import versions, write_json

__all__ = ["Spread", "Timings", "autocast", "machine_rates", "ratio", "side_by_side", "write_report"]


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
