"""The report as one HTML file: no script, no network, every text escaped."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from xbt.report.upgrade.html_charts import curve_chart, gain_chart, recall_chart
from xbt.report.upgrade.html_elements import Child, element, listed, scrolling_table, to_html
from xbt.report.upgrade.html_examples import Cards
from xbt.report.upgrade.html_sections import cost_section, method_section
from xbt.report.upgrade.html_style import style_sheet
from xbt.report.upgrade.result import UpgradeReport
from xbt.report.upgrade.rows import HEADS
from xbt.report.upgrade.verdict import QUERIES
from xbt.version import __version__

NAMES = {"T2I": "T2I: text query, image gallery", "I2T": "I2T: image query, text gallery"}
# Nothing may be fetched and nothing run, whatever a caption says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_page(report: UpgradeReport) -> str:
    """The page as text.

    Args:
        report: What was found.
    """
    policy = element("meta", content=_POLICY)
    policy.set("http-equiv", "Content-Security-Policy")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        policy,
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"Upgrade report: {report.verdict.headline}"),
        element("style", style_sheet()),
    )
    sections = [
        _top(report),
        _recall(report),
        method_section(report),
        cost_section(report),
        *_curve(report),
        _section("What could not be known", listed(report.limits)),
        *_flips(report),
        element("footer", _footer(report), class_="small quiet"),
    ]
    return to_html(element("html", head, element("body", element("main", *sections)), lang="en"))


def _section(title: str, *children: Child) -> Element:
    return element("section", element("h2", title), *children)


def _top(report: UpgradeReport) -> Element:
    verdict, sample = report.verdict, report.sample
    answer = element(
        "p",
        element("strong", verdict.headline),
        _sentence(verdict.reason),
        class_=f"verdict {verdict.answer}",
    )
    facts = [
        f"Old model, which embedded the gallery: {sample.old.name} ({sample.old.dim} dimensions)",
        f"New model, which shall query it: {sample.new.name} ({sample.new.dim} dimensions)",
        f"Sample: {len(sample):,} of {sample.available:,} images with {len(sample.pairs.image_of_text):,} "
        f"texts; {report.measured.n_chosen:,} images chose the method, the other {len(report.shown):,} "
        "measured",
    ]
    parts: list[Child] = [element("h1", "Should you upgrade?"), answer]
    if report.thresholds:
        marks = [
            element("span", str(each), class_="good" if each.met else "bad") for each in report.thresholds
        ]
        parts.append(listed(marks))
    return element("header", *parts, listed(facts))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _recall(report: UpgradeReport) -> Element:
    charts = [
        recall_chart([row for row in report.rows if row.direction == direction], NAMES[direction])
        for direction in report.measured.directions
    ]
    charts.append(gain_chart(report.rows, "Gain of new/old over old/old in points, with 95 % intervals"))
    table = scrolling_table(
        HEADS,
        [row.cells() for row in report.rows],
        "R@k in percent with 95 % intervals; the gain's interval is paired. Fixed and broken are queries.",
    )
    parts: list[Child] = [
        element(
            "p",
            "A cell is named after the model of the queries, then that of the gallery. new/old is the "
            "upgrade: new queries in the gallery as it is. new/new is what embedding the gallery "
            "again would give.",
        ),
        element("div", *charts, class_="figures"),
        table,
    ]
    if any(row.alone is not None for row in report.rows):
        rows = [[f"{row.direction} R@{row.k}", str(row.old), str(row.alone), str(row.upgraded)]
                for row in report.rows]  # fmt: skip
        heads = ["", "old/old", "new/old, new model alone", "new/old, both models"]
        parts.append(scrolling_table(heads, rows, "If the old model may not run at search time, in percent."))
    return _section("What new queries find in the old gallery", *parts)


def _flips(report: UpgradeReport) -> list[Element]:
    cards, sections = Cards(report), []
    for direction, flips in report.flips.items():
        row = next(row for row in report.rows if row.direction == direction and row.k == flips.k)
        fixed, broken, count = row.counts
        parts: list[Child] = [
            element(
                "p",
                f"Of {count:,} {QUERIES[direction]}, {fixed:,} miss at R@{flips.k} with the old query and "
                f"hit with the new one; {broken:,} hit with the old query and miss with the new one.",
            )
        ]
        for title, examples in (("Best changes", flips.fixed), ("Worst changes", flips.broken)):
            if examples:
                parts += [element("h3", title), cards.grid(examples)]
        title = f"{_sentence(QUERIES[direction])} that change"
        sections.append(_section(title, *parts))
    return sections


def _curve(report: UpgradeReport) -> list[Element]:
    curve = report.curve
    if curve is None:
        return []
    heads = ["backfilled", *curve.recall]
    rows = [
        [f"{100 * fraction:.0f} %", *(str(points[place]) for points in curve.recall.values())]
        for place, fraction in enumerate(curve.fractions)
    ]
    ks = ", ".join(f"R@{k}" for k in report.measured.ks)
    title = f"Mean of {ks} of text queries, in percent, over the images backfilled"
    return [
        _section(
            "If the gallery is backfilled bit by bit",
            element(
                "p",
                "Images move to the new model one after another, and both parts are searched. At 0 % this is "
                "new/old, at 100 % new/new. The rehearsed order is learnt from the part of the sample that "
                "chose the method.",
            ),
            curve_chart(curve, title),
            scrolling_table(heads, rows, f"{title}, with 95 % intervals; {curve.n_queries:,} queries."),
        )
    ]


def _footer(report: UpgradeReport) -> str:
    config = report.config
    return (
        f"Made by xbt {__version__} with seed {config.seed}. The verdict's intervals hold with "
        f"{100 * config.confidence:g} % confidence at either end; worth an upgrade would be a mean gain "
        f"of R@k of {config.worthwhile:g} points or more. The numbers are in report.json, the settings in "
        "config.yaml beside it."
    )
