from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xbt.errors import DataError
from xbt.evaluation import Cell, RetrievalReport
from xbt.report import draw_backfill_curve, draw_recall_bars, draw_search_comparison
from xbt.report.figures import MARGIN, RIGHT, TEXT_WIDTH, WIDTH

GREEN = tuple(int(RIGHT[i : i + 2], 16) for i in (1, 3, 5))
COLOURS = [(200, 30, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200), (120, 90, 60)]


def flat(colour, size=(8, 8)):
    return Image.new("RGB", size, colour)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count(picture, colour):
    return int((np.abs(picture - np.array(colour)).max(axis=2) <= 2).sum())


def comparison(path, queries=("a red circle", "two words"), k=3, **options):
    columns = {
        name: [[flat(COLOURS[(c + row + place) % 6]) for place in range(k)] for row in range(len(queries))]
        for c, name in enumerate(("old/old", "new/old"))
    }
    return draw_search_comparison(list(queries), columns, path, **options)


def test_every_image_is_drawn_at_the_same_size_without_smoothing(tmp_path):
    path = draw_search_comparison(["q"], {"a": [[flat(c) for c in COLOURS[:3]]]}, tmp_path / "deep" / "x.png")
    assert path == tmp_path / "deep" / "x.png"
    picture = pixels(path)
    areas = [count(picture, colour) for colour in COLOURS[:3]]
    assert len(set(areas)) == 1
    assert areas[0] >= 140 * 140
    checks = Image.fromarray((np.indices((4, 4)).sum(0) % 2 * 255).astype(np.uint8))
    picture = pixels(draw_search_comparison(["q"], {"a": [[checks]]}, tmp_path / "y.png"))
    corner = picture[-MARGIN - 100 : -MARGIN - 5, -MARGIN - 100 : -MARGIN - 5]
    assert set(np.unique(corner)) == {0, 255}


def test_the_shape_of_an_image_is_kept(tmp_path):
    picture = pixels(
        draw_search_comparison(["q"], {"a": [[flat(COLOURS[0], (400, 200))]]}, tmp_path / "x.png")
    )
    rows, columns = np.nonzero(np.abs(picture - np.array(COLOURS[0])).max(axis=2) <= 2)
    assert (np.ptp(columns) + 1) / (np.ptp(rows) + 1) == pytest.approx(2.0, abs=0.06)


def test_the_page_is_white_and_not_too_wide(tmp_path):
    columns = {name: [[flat(COLOURS[0])] * 5] for name in ("old/old", "new/old", "new/new")}
    picture = pixels(draw_search_comparison(["q"], columns, tmp_path / "x.png"))
    assert 1400 <= picture.shape[1] <= WIDTH
    for edge in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]):
        assert (edge == 255).all()


def test_correct_images_get_a_green_frame(tmp_path):
    none = pixels(comparison(tmp_path / "a.png"))
    assert count(none, GREEN) == 0
    marks = {"old/old": [[False, True, False], [False] * 3], "new/old": [[False] * 3, [False] * 3]}
    one = count(pixels(comparison(tmp_path / "b.png", correct=marks)), GREEN)
    marks["new/old"] = [[True, False, True], [False, False, True]]
    four = count(pixels(comparison(tmp_path / "c.png", correct=marks)), GREEN)
    assert one > 4 * 3 * 100
    assert four == pytest.approx(4 * one, rel=0.02)


def test_long_queries_are_wrapped_inside_their_column(tmp_path):
    long = (
        "it costs $5 or $6 to see "
        + "Donaudampfschifffahrtsgesellschaftskapitaensmuetze" * 3
        + " "
        + "word " * 60
    )
    picture = pixels(comparison(tmp_path / "x.png", queries=(long, "second")))
    short = pixels(comparison(tmp_path / "y.png", queries=("first", "second")))
    assert picture.shape[0] > short.shape[0] + 100  # the row grew with the text
    gap = picture[:, MARGIN + TEXT_WIDTH + 4 : MARGIN + TEXT_WIDTH + 30]
    assert (gap == 255).all()  # nothing runs into the images


def test_a_title_moves_the_rest_down(tmp_path):
    plain = pixels(comparison(tmp_path / "x.png"))
    titled = pixels(comparison(tmp_path / "y.png", title="What the search finds"))
    assert titled.shape[0] > plain.shape[0] + 20


def test_rows_may_have_fewer_images(tmp_path):
    columns = {"a": [[flat(COLOURS[0])] * 3, [flat(COLOURS[1])]], "b": [[], [flat(COLOURS[1])]]}
    picture = pixels(draw_search_comparison(["x", "y"], columns, tmp_path / "x.png"))
    assert count(picture, COLOURS[0]) == pytest.approx(1.5 * count(picture, COLOURS[1]), rel=0.01)


@pytest.mark.parametrize(
    ("queries", "columns", "correct", "message"),
    [
        ([], {"a": []}, None, "queries is"),
        ("text", {"a": [[flat(COLOURS[0])]] * 4}, None, "queries is 'text'"),
        (["q"], {}, None, "columns is empty"),
        (["q"], {"a": []}, None, "column 'a' has 0 rows for 1 queries"),
        (["q"], {"a": [[]]}, None, "no column has an image"),
        (["q"], {"a": [[flat(COLOURS[0])]]}, {}, r"correct\['a'\]"),
        (["q"], {"a": [[flat(COLOURS[0])]]}, {"a": [[True, False]]}, r"correct\['a'\]"),
        (["q"], {"a": [[flat(COLOURS[0])] * 100]}, None, "1 columns of 100 images do not fit"),
    ],
)
def test_refuses_what_does_not_fit(queries, columns, correct, message, tmp_path):
    with pytest.raises(DataError, match=message):
        draw_search_comparison(queries, columns, tmp_path / "x.png", correct)


def make_report(*cells):
    return RetrievalReport(
        [Cell(name, {1: t2i, 5: 1.0}, {1: i2t, 5: 1.0}, 10, 10) for name, t2i, i2t in cells]
    )


def column_height(picture, colour):
    """Heights in pixels of the two bars of a colour, left to right."""
    mask = np.abs(picture - np.array(colour)).max(axis=2) <= 2
    columns = np.flatnonzero(mask.sum(axis=0) > 10)
    halves = np.split(columns, [int(np.argmax(np.diff(columns))) + 1])
    return [int(np.median(mask[:, half].sum(axis=0))) for half in halves]


def test_bars_are_as_high_as_their_values(tmp_path):
    report = make_report(("old/old", 0.2, 0.4), ("new/old", 0.3, 0.5), ("new/new", 0.4, 0.6))
    picture = pixels(draw_recall_bars(report, tmp_path / "deep" / "bars.png"))
    left, right = column_height(picture, (0x2F, 0x6D, 0xB5))
    assert left / right == pytest.approx(0.4 / 0.6, abs=0.02)


def test_bars_of_a_hopeless_model(tmp_path):
    assert draw_recall_bars(make_report(("old/old", 0.0, 0.0)), tmp_path / "bars.png").is_file()


def test_many_upgrades_make_a_wider_figure(tmp_path):
    upgrades = [(f"new/old (variant {i})", 0.3, 0.5) for i in range(6)]
    few = make_report(("old/old", 0.2, 0.4), ("new/new", 0.4, 0.6))
    many = make_report(("old/old", 0.2, 0.4), *upgrades, ("new/new", 0.4, 0.6))
    widths = [pixels(draw_recall_bars(report, tmp_path / "bars.png")).shape[1] for report in (few, many)]
    assert widths[1] > widths[0] + 300


def test_pyplot_is_left_alone(tmp_path):
    code = (
        "import sys; from PIL import Image; from xbt.report import draw_search_comparison as draw;"
        "assert 'matplotlib' not in sys.modules;"
        f"draw(['q'], {{'a': [[Image.new('RGB', (4, 4))]]}}, {str(tmp_path / 'x.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_backfill_curve_is_drawn(tmp_path):
    recall = {"R@1": [0.3, 0.4, 0.45], "R@10": [0.6, 0.7, 0.8]}
    path = draw_backfill_curve([0, 0.5, 1], recall, tmp_path / "a" / "curve.png", stop=0.5)
    with Image.open(path) as picture:
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(2**20)) > 50


@pytest.mark.parametrize(
    ("fractions", "recall", "words"),
    [
        ([], {"R@1": []}, "there is no curve to draw"),
        ([0], {}, "there is no curve to draw"),
        ([0, 1], {"R@1": [0.1]}, "the line 'R@1' has 1 points for 2 fractions; give one each"),
    ],
)
def test_a_backfill_curve_that_cannot_be_drawn(tmp_path, fractions, recall, words):
    with pytest.raises(DataError, match=words):
        draw_backfill_curve(fractions, recall, tmp_path / "curve.png")


def test_labels_of_lines_that_end_together_do_not_lie_on_each_other(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    places = []
    annotate = Axes.annotate
    monkeypatch.setattr(
        Axes,
        "annotate",
        lambda self, text, place, **how: (places.append(place), annotate(self, text, place, **how)),
    )
    draw_backfill_curve([0, 1], {"a": [0.1, 0.8], "b": [0.2, 0.8], "c": [0.1, 0.5]}, tmp_path / "c.png")
    heights = sorted(height for _, height in places)
    assert heights[:2] == [50.0, 80.0]
    assert 82 < heights[2] < 85
