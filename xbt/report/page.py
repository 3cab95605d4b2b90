"""The report as one HTML file without scripts or network access; every text is escaped.

The text of the page is in ``templates/page.html.jinja``. This module prepares its values.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from xbt.report.charts import curve_chart, gain_chart, recall_chart
from xbt.report.cost import Cost
from xbt.report.examples import Example
from xbt.report.measure import HEADS
from xbt.report.result import UpgradeReport
from xbt.report.verdict import QUERIES
from xbt.version import __version__

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
        changes.append(
            {
                "direction": direction,
                "queries": QUERIES[direction],
                "k": flips.k,
                "count": count,
                "n_fixed": n_fixed,
                "n_broken": n_broken,
                "examples": examples,
            }
        )
    return changes


def _example(report: UpgradeReport, thumbnails: Thumbnails, example: Example) -> dict[str, Any]:
    texts = example.direction == "I2T"

    def shown(rows: Sequence[int]) -> list[dict[str, Any]]:
        results = [
            {"words": report.name_answer(example, row)} if texts else thumbnails.of(row) for row in rows
        ]
        return [{**result, "right": row in example.right} for row, result in zip(rows, results, strict=True)]

    return {
        "query": thumbnails.of(example.query) if texts else report.name_query(example),
        "old_rank": example.old_rank,
        "new_rank": example.new_rank,
        "before": shown(example.before),
        "after": shown(example.after),
    }


class Thumbnails:
    """Images of the sample as data URIs, each made once."""

    def __init__(self, report: UpgradeReport) -> None:
        self._sample = report.shown
        self._made: dict[int, dict[str, Any]] = {}

    def of(self, row: int) -> dict[str, Any]:
        """The ``source`` of an image (``None`` without a picture), its ``words``, and if it is ``tiny``."""
        if row not in self._made:
            image = self._sample.shown.picture(row)
            self._made[row] = {
                "source": None if image is None else thumbnail(image),
                "tiny": image is not None and max(image.size) <= _TINY,
                "words": self._words(row),
            }
        return self._made[row]

    def _words(self, row: int) -> str:
        """First text of an image, or its id if no text is known."""
        shown, owner = self._sample.shown, self._sample.pairs.image_of_text
        if shown.texts is None:
            return shown.ids[row]
        return shown.texts[int((owner == row).nonzero()[0])]


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
