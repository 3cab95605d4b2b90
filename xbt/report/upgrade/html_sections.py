"""The sections on cost and method."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from xbt.projections.auto.decision import CandidateScore
from xbt.report.upgrade.cost import Cost
from xbt.report.upgrade.html_elements import Child, element, listed, scrolling_table
from xbt.report.upgrade.result import UpgradeReport


def cost_section(report: UpgradeReport) -> Element:
    """What the upgrade costs per query, and a backfill in hours and bytes."""
    cost = report.cost
    parts: list[Child] = [listed(cost_sentences(cost))]
    if cost.query:
        rows = [
            [name, f"{each.median:.2f}", f"{each.min:.2f} to {each.max:.2f}"]
            for name, each in cost.query.items()
        ]
        caption = "A single text query, in milliseconds, measured here in turns."
        parts.append(scrolling_table(["what", "median", "range"], rows, caption))
    return element("section", element("h2", "What it costs"), *parts)


def cost_sentences(cost: Cost) -> list[str]:
    """Hours, bytes and what runs at search time."""
    rates, hours = cost.images_per_second, cost.backfill_hours
    said = []
    if rates is not None and hours is not None:
        said.append(
            f"A full backfill of {cost.gallery_size:,} items would take {_hours(hours)} here ({cost.device}, "
            f"{rates['new']:,.1f} images per second with the new model, decoding included). The upgrade "
            "touches no item."
        )
    else:
        said.append(
            "The rate of embedding was not measured, because no encoder was given. The upgrade touches "
            "no item."
        )
    old, new = cost.gallery_bytes["old"], cost.gallery_bytes["new"]
    said.append(
        f"The gallery's vectors take {_bytes(old)} under the old model and would take {_bytes(new)} under "
        f"the new one (fp16); while a backfill runs, up to {_bytes(old + new)}. The method takes "
        f"{_bytes(cost.method_bytes)}."
    )
    said.append(
        "Every query runs both models: the old one's query is mixed in."
        if cost.needs_old
        else "A query runs the new model alone wherever new queries are used."
    )
    return said


def method_section(report: UpgradeReport) -> Element:
    """What to query with, why, and what else was tried."""
    decision = report.measured.decision
    parts: list[Child] = [listed(report.method)]
    if decision.candidates:
        tables = [
            _candidates(direction, [each for each in decision.candidates if each.direction == direction])
            for direction in report.measured.directions
            if any(each.direction == direction for each in decision.candidates)
        ]
        note = element(
            "p",
            "Measured on the part of the sample that chose, by fits that had not seen the query; the best "
            "candidate's figures flatter it, those above do not.",
            class_="small quiet",
        )
        summary = element("summary", "All candidates")
        parts.append(element("details", summary, note, *tables))
    if report.passed:
        parts.append(
            element(
                "p",
                "To make the encoder that does this, choose again with all the pairs you have: "
                "recipes/choose_projection.py.",
            )
        )
    return element("section", element("h2", "Recommended method, and why"), *parts)


def _candidates(direction: str, scores: Sequence[CandidateScore]) -> Element:
    heads = [direction, *(f"R@{k}" for k in scores[0].recall), "combined by"]
    rows = [
        [
            f"{score.name} (chosen)" if score.chosen else score.name,
            *(str(value) for value in score.recall.values()),
            str(score.combination or ""),
        ]
        for score in scores
    ]
    return scrolling_table(heads, rows, f"{direction}: candidates, in percent with 95 % intervals.")


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours:,.0f} hours ({hours / 24:,.0f} days)"
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
