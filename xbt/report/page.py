"""The report as one HTML file without scripts or network access; every text is escaped.

The text of the page is in ``templates/page.html.jinja``. This module prepares its values.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, tostring

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from xbt.evaluation import Interval
from xbt.report.cost import Cost
from xbt.report.curve import ExpectedCurve
from xbt.report.measure import HEADS, Example, Row, points
from xbt.report.verdict import QUERIES
from xbt.version import __version__

if TYPE_CHECKING:
    from xbt.report.result import UpgradeReport

THUMBNAIL_SIDE = 120
"""Pixels of a thumbnail's longer side."""
_TINY = 64
_TITLES = {"T2I": "T2I: text query, image gallery", "I2T": "I2T: image query, text gallery"}
_NOT_IN_HTML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def render_page(report: UpgradeReport) -> str:
    """Render the page of a finished report."""
    environment = Environment(
        loader=PackageLoader("xbt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_controls,
    )
    environment.filters["thousands"] = "{:,}".format
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    return environment.get_template("page.html.jinja").render(
        report=report,
        version=__version__,
        heads=HEADS,
        rows=[row.cells() for row in report.rows],
        charts=_charts(report),
        alone=[
            [f"{row.direction} R@{row.k}", row.old, row.alone, row.upgraded]
            for row in report.rows
            if row.alone is not None
        ],
        candidates=_candidates(report),
        costs=cost_sentences(report.cost),
        times=[
            [name, f"{time.median:.2f}", f"{time.min:.2f} to {time.max:.2f}"]
            for name, time in report.cost.query.items()
        ],
        changes=_changes(report),
        **_curve(report),
    )


def _without_controls(value: Any) -> Any:
    """Replace characters that HTML does not allow; finished markup stays as it is."""
    if value is None or isinstance(value, Markup):
        return value
    return _NOT_IN_HTML.sub("\ufffd", str(value))


def _charts(report: UpgradeReport) -> list[Markup]:
    charts = [
        recall_chart([row for row in report.rows if row.direction == direction], _TITLES[direction])
        for direction in report.measured.directions
    ]
    title = "Gain of new/old over old/old in points, with 95 % intervals"
    return [*charts, gain_chart(report.rows, title)]


def _candidates(report: UpgradeReport) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Columns and rows of the table of candidates, for each direction that has candidates."""
    tables = {}
    for direction in report.measured.directions:
        scores = [score for score in report.measured.decision.candidates if score.direction == direction]
        if not scores:
            continue
        columns = [direction, *(f"R@{k}" for k in scores[0].recall), "combined by"]
        rows = [
            [
                f"{score.name} (chosen)" if score.chosen else score.name,
                *map(str, score.recall.values()),
                str(score.combination or ""),
            ]
            for score in scores
        ]
        tables[direction] = (columns, rows)
    return tables


def cost_sentences(cost: Cost) -> list[str]:
    """Sentences on hours, bytes and the models that run at search time."""
    rates, hours = cost.images_per_second, cost.backfill_hours
    if rates is not None and hours is not None:
        time = (
            f"A full backfill of {cost.gallery_size:,} items would take {_hours(hours)} here ({cost.device}, "
            f"{rates['new']:,.1f} images per second with the new model, decoding included)."
        )
    else:
        time = "The rate of embedding was not measured because no encoder was given."
    old, new = cost.gallery_bytes["old"], cost.gallery_bytes["new"]
    return [
        f"{time} The upgrade itself re-embeds no item.",
        f"The gallery's vectors take {_bytes(old)} under the old model and would take {_bytes(new)} under "
        f"the new one (fp16); while a backfill runs, up to {_bytes(old + new)}. The method takes "
        f"{_bytes(cost.method_bytes)}.",
        "Every query runs both models: the old one's query is mixed in."
        if cost.needs_old
        else "A query runs the new model alone wherever new queries are used.",
    ]


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


def _curve(report: UpgradeReport) -> dict[str, Any]:
    curve = report.curve
    if curve is None:
        return {"curve_chart": None}
    ks = ", ".join(f"R@{k}" for k in report.measured.ks)
    title = f"Mean of {ks} of text queries, in percent, over the images backfilled"
    rows = [
        [f"{100 * fraction:.0f} %", *(str(points[step]) for points in curve.recall.values())]
        for step, fraction in enumerate(curve.fractions)
    ]
    return {"curve_chart": curve_chart(curve, title), "curve_title": title, "curve_rows": rows}


def _changes(report: UpgradeReport) -> list[dict[str, Any]]:
    """Counts and examples of the queries that an upgrade fixes and breaks, for each direction."""
    thumbnails = Thumbnails(report)
    changes = []
    for direction, flips in report.flips.items():
        row = next(row for row in report.rows if row.direction == direction and row.k == flips.k)
        n_fixed, n_broken, count = row.counts
        examples = {
            title: [_example(report, thumbnails, example) for example in shown]
            for title, shown in (("Best changes", flips.fixed), ("Worst changes", flips.broken))
        }
        counts = {"k": flips.k, "count": count, "n_fixed": n_fixed, "n_broken": n_broken}
        named = {"direction": direction, "queries": QUERIES[direction]}
        changes.append({**named, **counts, "examples": examples})
    return changes


def _example(report: UpgradeReport, thumbnails: Thumbnails, example: Example) -> dict[str, Any]:
    texts = example.direction == "I2T"

    def shown(rows: Sequence[int]) -> list[dict[str, Any]]:
        results = [
            {"words": report.name_answer(example, row)} if texts else thumbnails.of(row) for row in rows
        ]
        return [{**result, "right": row in example.right} for row, result in zip(rows, results, strict=True)]

    query = thumbnails.of(example.query) if texts else report.name_query(example)
    ranks = {"old_rank": example.old_rank, "new_rank": example.new_rank}
    return {"query": query, **ranks, "before": shown(example.before), "after": shown(example.after)}


class Thumbnails:
    """Images of the sample as data URIs, each made once."""

    def __init__(self, report: UpgradeReport) -> None:
        self._sample = report.shown
        self._made: dict[int, dict[str, Any]] = {}

    def of(self, row: int) -> dict[str, Any]:
        """The ``source`` of an image (``None`` without a picture), its ``words``, and if it is ``tiny``."""
        if row not in self._made:
            image = self._sample.shown.picture(row)
            shown, owner = self._sample.shown, self._sample.pairs.image_of_text
            self._made[row] = {
                "source": None if image is None else thumbnail(image),
                "tiny": image is not None and max(image.size) <= _TINY,
                "words": shown.ids[row]
                if shown.texts is None
                else shown.texts[int((owner == row).nonzero()[0])],
            }
        return self._made[row]


def thumbnail(image: Image.Image) -> str:
    """Encode an image as a data URI: PNG for tiny ones, else a small JPEG."""
    file = io.BytesIO()
    if max(image.size) <= _TINY:
        image.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        small = image.copy()
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
        small.save(file, "JPEG", quality=80, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


WIDTH, LEFT, RIGHT = 360, 46, 40
_BAR, _GAP, _GROUP = 13, 3, 14
_DASHES = ("none", "6 4")
_LINES = ("new", "upgraded")


def recall_chart(rows: Sequence[Row], title: str) -> Markup:
    """Bars of old/old, new/old and new/new with their intervals, a group for each k of one direction."""
    highest = max(bar.high for row in rows for bar in _bars_of(row).values())
    scale, top, marks = _scale(0, highest), 30.0, []
    descriptions = []
    for row in rows:
        bars = _bars_of(row)
        height = len(bars) * (_BAR + _GAP) - _GAP
        marks.append(_text(LEFT - 8, top + height / 2 + 4, f"R@{row.k}", "end"))
        for name, value in bars.items():
            marks += _bar(name, value, scale, top)
            top += _BAR + _GAP
        top += _GROUP
        descriptions.append(f"R@{row.k}: " + ", ".join(f"{name} {value}" for name, value in bars.items()))
    return _figure(
        title, f"{'; '.join(descriptions)}, in percent.", top - 6, [*_legend(_bars_of(rows[0])), *marks]
    )


def gain_chart(rows: Sequence[Row], title: str) -> Markup:
    """The gain of new/old over old/old with its interval, a line for each direction and k."""
    gains = [row.change.gain for row in rows]
    scale = _scale(min(0, *(gain.low for gain in gains)), max(0, *(gain.high for gain in gains)), 92, 56)
    zero, step = scale(0), 24
    bottom = 14 + step * len(rows)
    marks = [_line(zero, 4, zero, bottom - 6, "rule", 1.5), _text(zero, bottom + 10, "0", "middle", "quiet")]
    for number, (row, gain) in enumerate(zip(rows, gains, strict=True)):
        middle = 16 + step * number
        marks += [
            _text(84, middle + 4, f"{row.direction} R@{row.k}", "end"),
            _line(scale(gain.low), middle, scale(gain.high), middle, "upgraded", 2.5),
            element(
                "circle", cx=_n(scale(gain.estimate)), cy=_n(middle), r="4.5", style="fill:var(--upgraded)"
            ),
            _text(WIDTH - 2, middle + 4, f"{100 * gain.estimate:+.1f}", "end"),
        ]
    description = "; ".join(
        f"{row.direction} R@{row.k} {points(gain)}" for row, gain in zip(rows, gains, strict=True)
    )
    return _figure(title, f"{description}, in points.", bottom + 16, marks)


def curve_chart(curve: ExpectedCurve, title: str) -> Markup:
    """Mean recall over the fraction backfilled, a line and a band for each order."""
    intervals = [interval for values in curve.recall.values() for interval in values]
    low, high = min(interval.low for interval in intervals), max(interval.high for interval in intervals)
    top, bottom = 34.0, 200.0
    margin = max(0.02, 0.08 * (high - low))
    low, high = max(0.0, low - margin), min(1.0, high + margin)

    def across(fraction: float) -> float:
        return LEFT + fraction * (WIDTH - LEFT - 12)

    def up(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    marks = []
    for tick in _ticks(low, high):
        marks += [
            _line(LEFT, up(tick), WIDTH - 12, up(tick), "rule", 0.7),
            _text(LEFT - 6, up(tick) + 4, f"{100 * tick:.0f}", "end", "quiet"),
        ]
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        anchor = "end" if fraction == 1 else "middle"
        marks.append(_text(across(fraction), bottom + 18, f"{100 * fraction:.0f} %", anchor, "quiet"))
    for number, (name, values) in enumerate(curve.recall.items()):
        xs = [across(fraction) for fraction in curve.fractions]
        left, style = LEFT + 150 * number, (_LINES[number], _DASHES[number])
        marks += [
            _band(xs, values, up, _LINES[number]),
            _path(xs, [up(point.estimate) for point in values], *style),
            _path([left, left + 24], [12, 12], *style),
            _text(left + 30, 16, name),
        ]
    description = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{100 * fraction:.0f} % {point}" for fraction, point in zip(curve.fractions, values, strict=True)
        )
        for name, values in curve.recall.items()
    )
    return _figure(title, f"{description}, in percent.", bottom + 26, marks)


def _scale(low: float, high: float, left: float = LEFT, right: float = RIGHT) -> Callable[[float], float]:
    """Map from values to horizontal positions."""
    unit = (WIDTH - left - right) / max(high - low, 1e-9)
    return lambda value: left + (value - low) * unit


def _bars_of(row: Row) -> dict[str, Interval]:
    bars = {"old/old": row.old, "new/old": row.upgraded}
    return bars if row.new is None else {**bars, "new/new": row.new}


_COLOURS = {"old/old": "old", "new/old": "upgraded", "new/new": "new"}


def _bar(name: str, value: Interval, scale: Callable[[float], float], top: float) -> list[Element]:
    middle = top + _BAR / 2
    colour = f"fill:var(--{_COLOURS[name]})"
    width = max(scale(value.estimate) - LEFT, 0.5)
    return [
        element("rect", x=str(LEFT), y=_n(top), width=_n(width), height=str(_BAR), style=colour),
        _line(scale(value.low), middle, scale(value.high), middle, "ink", 1.2),
        _text(scale(max(value.high, value.estimate)) + 5, top + _BAR - 2.5, f"{100 * value.estimate:.1f}"),
    ]


def _legend(names: Iterable[str]) -> list[Element]:
    marks = []
    for number, name in enumerate(names):
        left, colour = LEFT + 92 * number, f"fill:var(--{_COLOURS[name]})"
        marks += [
            element("rect", x=str(left), y="4", width="12", height="12", style=colour),
            _text(left + 17, 14, name),
        ]
    return marks


def _band(
    xs: Sequence[float], intervals: Sequence[Interval], up: Callable[[float], float], colour: str
) -> Element:
    edge = [(x, interval.high) for x, interval in zip(xs, intervals, strict=True)]
    edge += [(x, interval.low) for x, interval in reversed(list(zip(xs, intervals, strict=True)))]
    corners = " ".join(f"{_n(x)},{_n(up(value))}" for x, value in edge)
    return element("polygon", points=corners, style=f"fill:var(--{colour});fill-opacity:.14")


def _path(xs: Sequence[float], ys: Sequence[float], colour: str, dash: str) -> Element:
    corners = " ".join(f"{_n(x)},{_n(y)}" for x, y in zip(xs, ys, strict=True))
    style = f"fill:none;stroke:var(--{colour});stroke-width:2.2;stroke-dasharray:{dash}"
    return element("polyline", points=corners, style=style)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values within a range of fractions."""
    step = next(size for size in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / size <= 6 or size == 0.5)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _figure(title: str, description: str, height: float, marks: Sequence[Element]) -> Markup:
    heading = element("title", f"{title}. {description}")
    drawing = element("svg", heading, *marks, viewBox=f"0 0 {WIDTH} {_n(height)}", role="img")
    figure = element("figure", drawing, element("figcaption", title))
    return Markup(tostring(figure, encoding="unicode", method="html"))


def element(tag: str, *children: Element | str, **attributes: str) -> Element:
    """Element with a text or child elements; text is escaped when the figure is written."""
    made = Element(tag, attributes)
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        else:
            made.text = child
    return made


def _text(x: float, y: float, text: str, anchor: str = "start", class_: str = "") -> Element:
    made = element("text", text, x=_n(x), y=_n(y))
    made.set("text-anchor", anchor)
    if class_:
        made.set("class", class_)
    return made


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> Element:
    style = f"stroke:var(--{colour});stroke-width:{width:g}"
    return element("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), style=style)


def _n(value: float) -> str:
    return f"{value:.1f}"
