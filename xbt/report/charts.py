"""Charts of the report page as inline SVG, in CSS colours that follow light and dark mode.

They are 360 units wide, about the width of a phone, so that their text stays readable. Matplotlib's figures
have fixed colours and shrink as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

from markupsafe import Markup

from xbt.evaluation import Interval
from xbt.report.curve import ExpectedCurve
from xbt.report.measure import Row, points

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
