from __future__ import annotations

import pytest

from xbt.errors import ConfigError, DataError
from xbt.evaluation import (
    PROTOCOLS,
    Cell,
    Expectation,
    RetrievalReport,
    check_report,
    format_markdown,
    format_table,
)
from xbt.evaluation.protocols import require_comparable


def report(upgrade="new/old"):
    old = Cell("old/old", {1: 0.3058, 5: 0.5550}, {1: 0.50, 5: 0.75}, 5000, 25010)
    new = Cell(upgrade, {1: 0.3342, 5: 0.58}, {1: 0.52, 5: 0.76}, 5000, 25010)
    return RetrievalReport([old, new])


def expected(cell="old/old", **values):
    return Expectation(cell, "a paper, table 3", **{"T2I": {"R@1": 30.64}, **values})


def test_a_published_value_beside_a_measured_one():
    checked = check_report(report(), None, [expected(I2T={"R@1": 50.0, "R@5": 75.3})], "a", "b")
    first, second, third = checked.comparisons
    assert (first.cell, first.direction, first.k, first.expected) == ("old/old", "T2I", 1, 30.64)
    assert first.measured == pytest.approx(30.58)
    assert str(first) == "expected 30.64, got 30.58 (-0.06, agrees)"
    assert str(second) == "expected 50.00, got 50.00 (+0.00, agrees)"
    assert str(third) == "expected 75.30, got 75.00 (-0.30, DISAGREES)"
    assert [each.agrees for each in checked.comparisons] == [True, True, False]
    saved = checked.to_dict()
    assert saved["expected"][2]["difference"] == pytest.approx(-0.3)
    assert saved["expected"][2]["source"] == "a paper, table 3"
    assert saved["cells"] == report().to_dict()["cells"]
    with pytest.raises(DataError, match=r"1 of 3 published .* old/old I2T R@5 expected 75\.30, got 75\.00"):
        checked.require_agreement()
    check_report(report(), None, [expected()], "a", "b").require_agreement()


@pytest.mark.parametrize(("tolerance", "agrees"), [(0.06, True), (0.059, False), (0.0, False), (1.0, True)])
def test_tolerance(tolerance, agrees):
    checked = check_report(report(), None, [expected(tolerance=tolerance)], "a", "b")
    assert checked.comparisons[0].agrees is agrees


def test_values_of_other_models_are_passed_over_and_other_ks_are_unmeasured():
    values = [
        expected(old=["a", "alias of a"]),
        expected(old=["x"]),
        expected(old=["a"], new=["x"]),
        expected(new=["b"], T2I={"R@1": 30.0, "R@100": 99.0}),
    ]
    checked = check_report(report(), None, values, "a", "b")
    assert [each.expected for each in checked.comparisons] == [30.64, 30.0]
    assert checked.unmeasured == ["old/old T2I R@100"]
    assert "not measured here: old/old T2I R@100" in format_table(checked)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "no published value was compared, because --expected has none for these models"),
        ([expected(old=["x"])], "no published value was compared"),
        ([expected(T2I={"R@7": 99.0})], r"expected of old/old T2I R@7, which .* add the k to --ks"),
        ([expected(), expected(I2T={"R@7": 9.0})], r"expected of old/old I2T R@7, which"),
        (
            [expected(), expected("new/new"), expected("new/new")],
            r"expected of new/new, which .* --upgraded\.LABEL",
        ),
    ],
)
def test_what_was_not_compared_does_not_agree(values, message):
    checked = check_report(report(), None, values, "a", "b")
    with pytest.raises(ConfigError, match=message):
        checked.require_agreement()
    with pytest.raises(ConfigError, match=message):
        require_comparable(values, "a", "b", {"old/old", "new/old"}, (1, 5))


def test_what_can_be_compared_is_known_beforehand():
    names = {"new/old (Procrustes)": "new/old"}
    require_comparable([expected("new/old (Procrustes)")], "a", "b", {"new/old"}, (1,), names)
    require_comparable([expected(), expected("new/new", new=["x"])], "a", "b", {"old/old"}, (1,))


def test_a_single_upgrade_is_found_by_its_label():
    values = [expected("new/old (Procrustes)", T2I={"R@1": 33.4}), expected("new/new")]
    checked = check_report(report(), None, values, "a", "b", {"new/old (Procrustes)": "new/old"})
    assert [(each.cell, each.agrees) for each in checked.comparisons] == [("new/old", True)]
    assert checked.unmeasured == ["new/new"]
    labelled = check_report(report("new/old (Procrustes)"), None, values, "a", "b")
    assert [each.cell for each in labelled.comparisons] == ["new/old (Procrustes)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "old"}, "names the cell 'old'; write old/old"),
        ({"source": " "}, "have no source"),
        ({"tolerance": -1.0}, "the tolerance for old/old is -1.0"),
        ({"tolerance": float("nan")}, "the tolerance for old/old is nan"),
        ({"T2I": {}}, "nothing is expected of old/old"),
        ({"T2I": {"R1": 3.0}}, "T2I: 'R1': 3.0 cannot be"),
        ({"T2I": {"R@0": 3.0}}, "'R@0'"),
        ({"I2T": {"R@1": 101.0}}, "I2T: 'R@1': 101.0 cannot be; write percentages"),
    ],
)
def test_expectations_that_make_no_sense(change, message):
    with pytest.raises(ConfigError, match=message):
        Expectation(**{"cell": "old/old", "source": "a paper", "T2I": {"R@1": 30.0}, **change})


def test_in_the_table():
    values = [expected(T2I={"R@1": 30.64, "R@5": 56.0}), expected("new/new")]
    checked = check_report(report(), PROTOCOLS["coco_5k"], values, "a", "b")
    lines = format_table(checked).splitlines()
    assert "R@k in percent over 5,000 images and 25,010 texts (protocol coco_5k)" in lines
    assert lines[-3:] == [
        "published values: 1 of 2 agree within 0.2 points",
        "  old/old T2I: R@1 expected 30.64, got 30.58 (-0.06, agrees); "
        "R@5 expected 56.00, got 55.50 (-0.50, DISAGREES) [a paper, table 3]",
        "published, but not measured here: new/new",
    ]
    plain = format_table(report()).splitlines()
    assert [line.replace(" (protocol coco_5k)", "") for line in lines[:-3]] == plain


def test_in_markdown():
    values = [Expectation("old/old", "a|b", {"R@1": 30.64, "R@5": 56.0}), expected("new/new")]
    lines = format_markdown(check_report(report(), PROTOCOLS["coco_1k"], values, "a", "b")).splitlines()
    assert (
        "- R@k in percent over 5,000 images and 25,010 texts per fold, mean over 5 folds, the first 5 "
        "captions of every image (protocol coco_1k)"
    ) in lines
    assert lines[-6:] == [
        "|---|---|---:|---:|---:|---|---|",
        "| old/old | T2I R@1 | 30.64 | 30.58 | -0.06 | agrees | a\\|b |",
        "| old/old | T2I R@5 | 56.00 | 55.50 | -0.50 | **disagrees** | a\\|b |",
        "",
        "- published values: 1 of 2 agree within 0.2 points",
        "- published, but not measured here: new/new",
    ]
    only = check_report(report(), None, [expected("new/new")], "a", "b")
    assert format_markdown(only).splitlines()[-1] == "- published, but not measured here: new/new"
