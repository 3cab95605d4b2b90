"""Retrieval reports as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from xbt.evaluation.bootstrap import Difference
from xbt.evaluation.cells import DIRECTIONS, Cell, RetrievalReport
from xbt.evaluation.protocols import CheckedReport, Comparison


def format_table(report: RetrievalReport) -> str:
    """Format a report as plain text.

    Args:
        report: The report.

    Returns:
        A table of R@k in percent with one row per cell. Below it, for every ``new/old`` cell: the criterion,
        the recovered gain, and the queries fixed and broken with 95 % bootstrap intervals. A
        :class:`~xbt.evaluation.CheckedReport` ends with its published values. No newline at the end.
    """
    width = max(len("query/gallery"), *(len(cell.name) for cell in report.cells))
    columns = [f"R@{k}" for k in report.ks]
    widths = [max(5, len(column)) for column in columns]

    def block(values: list[str]) -> str:
        return "  ".join(value.rjust(size) for value, size in zip(values, widths, strict=True))

    heading = "  |  ".join(f"{direction} {block(columns)}" for direction in DIRECTIONS)
    lines = [f"{'query/gallery'.ljust(width)}  |  {heading}"]
    rule = "-" * (len(DIRECTIONS[0]) + 1 + len(block(columns)))
    lines.append("--|--".join(["-" * width, *(rule for _ in DIRECTIONS)]))
    for cell in report.cells:
        blocks = [f"{' ' * len(direction)} {block(_percents(cell, direction))}" for direction in DIRECTIONS]
        lines.append("  |  ".join([cell.name.ljust(width), *blocks]))
    return "\n".join([*lines, "", _counts(report), *_verdict_lines(report), *_expected_lines(report)])


def format_markdown(report: RetrievalReport) -> str:
    """Format a report as a Markdown table, with the lines of :func:`format_table` below it as a list.

    Args:
        report: The report.

    Returns:
        Markdown without a newline at the end.
    """
    heads = [f"{direction} R@{k}" for direction in DIRECTIONS for k in report.ks]
    lines = [f"| query/gallery | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for cell in report.cells:
        values = [value for direction in DIRECTIONS for value in _percents(cell, direction)]
        lines.append(f"| {_in_cell(cell.name)} | {' | '.join(values)} |")
    notes = [f"- {line}" for line in [_counts(report), *_verdict_lines(report)]]
    return "\n".join([*lines, "", *notes, *_expected_markdown(report)])


def _percents(cell: Cell, direction: str) -> list[str]:
    return [f"{100 * value:.1f}" for value in cell.recall(direction).values()]


def _counts(report: RetrievalReport) -> str:
    first = report.cells[0]
    counts = f"R@k in percent over {first.n_images:,} images and {first.n_texts:,} texts"
    protocol = report.protocol if isinstance(report, CheckedReport) else None
    if protocol is None:
        return counts
    if protocol.folds > 1:
        counts += f" per fold, mean over {protocol.folds} folds"
    if protocol.captions_per_image is not None:
        counts += f", the first {protocol.captions_per_image} captions of every image"
    return f"{counts} (protocol {protocol.name})"


def _verdict_lines(report: RetrievalReport) -> list[str]:
    lines, differences = [], report.differences
    for name, verdict in report.verdicts.items():
        parts = "; ".join(f"{direction} {_met(verdict[direction])}" for direction in DIRECTIONS)
        lines.append(f"criterion ({name} > old/old): {parts}")
        if name in report.gains:
            gain = report.gains[name]
            parts = "; ".join(f"{direction} {_recovered(gain[direction])}" for direction in DIRECTIONS)
            lines.append(f"recovered gain ({name}): {parts}")
        if name in differences:
            change = differences[name]
            parts = "; ".join(f"{direction} {_changed(change[direction])}" for direction in DIRECTIONS)
            lines.append(f"change to old/old ({name}): {parts}")
    return lines


def _met(verdict: Mapping[int, bool]) -> str:
    met = ", ".join(f"R@{k}" for k, good in verdict.items() if good)
    missed = ", ".join(f"R@{k}" for k, good in verdict.items() if not good)
    if not met:
        return f"not met at {missed}"
    return f"met at {met}" + (f" - not at {missed}" if missed else "")


def _recovered(gains: Mapping[int, float | None]) -> str:
    """Percentages; a dash where re-embedding gains nothing."""
    return ", ".join(f"{'-' if gain is None else f'{100 * gain:.0f}%'} at R@{k}" for k, gain in gains.items())


def _changed(changes: Mapping[int, Difference]) -> str:
    """Points gained with their 95 % interval, and the shares of queries fixed and broken."""
    return ", ".join(
        "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * share for share in change.gain)) + f" at R@{k} "
        f"(fixed {100 * change.fixed:.1f}, broken {100 * change.broken:.1f})"
        for k, change in changes.items()
    )


def _expected_lines(report: RetrievalReport) -> list[str]:
    """Summary of the published values, then one line per cell, direction and source."""
    if not isinstance(report, CheckedReport) or not report.comparisons + report.unmeasured:
        return []
    lines = [_summary(report)] if report.comparisons else []
    rows: dict[tuple[str, str, str], list[Comparison]] = {}
    for value in report.comparisons:
        rows.setdefault((value.cell, value.direction, value.source), []).append(value)
    for (cell, direction, source), values in rows.items():
        listed = "; ".join(f"R@{value.k} {value}" for value in values)
        lines.append(f"  {cell} {direction}: {listed} [{source}]")
    return [*lines, *_unmeasured(report)]


def _expected_markdown(report: RetrievalReport) -> list[str]:
    if not isinstance(report, CheckedReport) or not report.comparisons + report.unmeasured:
        return []
    lines = ["", "| cell | | expected | got | difference | | source |", "|---|---|---:|---:|---:|---|---|"]
    for value in report.comparisons:
        verdict = "agrees" if value.agrees else "**disagrees**"
        lines.append(
            f"| {_in_cell(value.cell)} | {value.direction} R@{value.k} | {value.expected:.2f} | "
            f"{value.measured:.2f} | {value.difference:+.2f} | {verdict} | {_in_cell(value.source)} |"
        )
    if not report.comparisons:
        return ["", *(f"- {line}" for line in _unmeasured(report))]
    return [*lines, "", *(f"- {line}" for line in [_summary(report), *_unmeasured(report)])]


def _summary(report: CheckedReport) -> str:
    agreeing = sum(value.agrees for value in report.comparisons)
    points = ", ".join(f"{points:g}" for points in sorted({value.tolerance for value in report.comparisons}))
    return f"published values: {agreeing} of {len(report.comparisons)} agree within {points} points"


def _unmeasured(report: CheckedReport) -> list[str]:
    return [f"published, but not measured here: {', '.join(report.unmeasured)}"] if report.unmeasured else []


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")  # a bar would open another column
