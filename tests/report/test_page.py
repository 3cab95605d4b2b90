"""The page: one file that needs nothing else, that nothing in a caption can break, and that can be read."""

from __future__ import annotations

import base64
import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from upgrade_worlds import HOSTILE

from xbt.evaluation import Interval
from xbt.report import figures
from xbt.report.curve import ExpectedCurve
from xbt.report.page import curve_chart, render_page, thumbnail

STYLE = (Path(figures.__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")
LIGHT, DARK = (
    dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{([^}]*)\}", STYLE)
)

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page; complains of tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(self.texts)


@pytest.fixture(scope="module")
def source(made):
    return (made[1] / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def test_nothing_is_fetched_and_nothing_runs(page, source):
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "base", "a"}
    )
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("href", "srcset", "action")
            if name == "src":
                assert value.startswith("data:image/")
    style = source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(each for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")


def test_hostile_captions_are_shown_as_they_are(page, source):
    assert HOSTILE in page.text
    assert "<script" not in source
    assert "&lt;script&gt;" in source
    assert "<img src=http" not in source
    assert any(HOSTILE in image["alt"] for image in page.all("img"))


def test_characters_that_html_does_not_have(made):
    odd = replace(made[0], limits=["a\x00b\x0bc\ud800d", "<&>"])
    text = render_page(odd)
    assert "<li>a\ufffdb\ufffdc\ufffdd</li><li>&lt;&amp;&gt;</li>" in text
    text.encode("utf-8")


def test_the_page_can_be_read_by_all(page):
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert any(each.get("name") == "viewport" for each in page.all("meta"))
    images = page.all("img")
    assert images
    assert all(image["alt"].strip() for image in images)
    charts = page.all("svg")
    assert len(charts) == 4  # recall in two directions, gains, the backfill
    assert all(chart["role"] == "img" for chart in charts)
    assert len(page.all("title")) == 1 + len(charts)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scroll" in box["class"] for box in page.all("div") if box.get("role") == "region")
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))


def test_the_verdict_comes_first(page, made):
    verdict = made[0].verdict
    assert page.text.index(verdict.headline) < page.text.index("Results of new queries in the old gallery")
    assert verdict.reason[1:] in page.text


def test_every_figure_of_the_main_table_is_on_the_page(page, made):
    for row in made[0].rows:
        for value in row.cells():
            assert value in page.text


def test_colours_have_contrast():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colours in (LIGHT, DARK):
        for ground in ("paper", "panel"):
            for name in ("ink", "quiet", "good", "bad", "open"):
                low, high = sorted((luminance(colours[ground]), luminance(colours[name])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ground, name)
    assert LIGHT.keys() == DARK.keys()
    assert set(re.findall(r"var\(--(\w+)\)", STYLE)) <= LIGHT.keys()
    cells = {"old": figures.OLD, "upgraded": figures.UPGRADED, "new": figures.NEW, "ink": figures.INK}
    assert LIGHT.items() >= cells.items()


def test_colours_of_charts_are_the_page_s(source):
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    assert set(re.findall(r"var\(--(\w+)\)", drawn)) <= LIGHT.keys()
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b", drawn)


@pytest.mark.parametrize(("size", "kind", "most"), [((32, 32), "PNG", 32), ((400, 200), "JPEG", 120)])
def test_thumbnails(size, kind, most):
    head, data = thumbnail(Image.new("RGB", size, (200, 10, 10))).split(",")
    assert head == f"data:image/{kind.lower()};base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == kind
        assert max(image.size) == most
        assert image.width * size[1] == image.height * size[0]


def test_a_curve_rises_upwards():
    points = tuple(Interval(value, value - 0.02, value + 0.02) for value in (0.2, 0.3, 0.5))
    curve = ExpectedCurve((0.0, 0.5, 1.0), {"random order": points}, None, 10)
    drawn = curve_chart(curve, "A curve")
    line = re.search(r'<polyline points="([^"]*)"', drawn)[1].split()
    heights = [float(point.split(",")[1]) for point in line]
    assert heights == sorted(heights, reverse=True)
    assert "0 % 20.0 [18.0, 22.0]" in drawn
