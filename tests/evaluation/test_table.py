from __future__ import annotations

from xbt.evaluation import Cell, RetrievalReport, format_markdown, format_table


def report():
    old = Cell("old/old", {1: 0.3041, 5: 0.55, 10: 0.66}, {1: 0.5, 5: 0.75, 10: 0.84}, 5000, 25010)
    up = Cell("new/old (A|B)", {1: 0.3342, 5: 0.58, 10: 0.7}, {1: 0.52, 5: 0.76, 10: 0.84}, 5000, 25010)
    new = Cell("new/new", {1: 0.3643, 5: 0.61, 10: 0.71}, {1: 0.56, 5: 0.75, 10: 1.0}, 5000, 25010)
    return RetrievalReport([old, up, new])


def test_table():
    assert format_table(report()).splitlines() == [
        "query/gallery  |  T2I   R@1    R@5   R@10  |  I2T   R@1    R@5   R@10",
        "---------------|---------------------------|-------------------------",
        "old/old        |       30.4   55.0   66.0  |       50.0   75.0   84.0",
        "new/old (A|B)  |       33.4   58.0   70.0  |       52.0   76.0   84.0",
        "new/new        |       36.4   61.0   71.0  |       56.0   75.0  100.0",
        "",
        "R@k in percent over 5,000 images and 25,010 texts",
        "criterion (new/old (A|B) > old/old): T2I met at R@1, R@5, R@10; I2T met at R@1, R@5 - not at R@10",
        "recovered gain (new/old (A|B)): T2I 50% at R@1, 50% at R@5, 80% at R@10; "
        "I2T 33% at R@1, - at R@5, 0% at R@10",
    ]


def test_table_says_when_nothing_is_met_and_judges_only_upgrades():
    cells = report().cells
    none_met = Cell("new/old", dict(cells[0].t2i), dict(cells[0].i2t), 5000, 25010)
    text = format_table(RetrievalReport([cells[0], none_met]))
    assert "T2I not met at R@1, R@5, R@10; I2T not met" in text
    assert "recovered gain" not in text
    assert "criterion" not in format_table(RetrievalReport([cells[0], cells[2]]))


def test_large_k_keeps_columns_aligned():
    cells = [Cell("old/old", {1: 0.5, 1000: 1.0}, {1: 0.5, 1000: 1.0}, 2000, 2000)]
    head, rule, row = format_table(RetrievalReport(cells)).splitlines()[:3]
    assert len(head) == len(rule) == len(row)
    assert head.index("R@1000") + len("R@1000") == row.index("100.0") + len("100.0")


def test_markdown():
    lines = format_markdown(report()).splitlines()
    assert lines[:3] == [
        "| query/gallery | T2I R@1 | T2I R@5 | T2I R@10 | I2T R@1 | I2T R@5 | I2T R@10 |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| old/old | 30.4 | 55.0 | 66.0 | 50.0 | 75.0 | 84.0 |",
    ]
    assert lines[3].startswith("| new/old (A\\|B) | 33.4 |")
    assert lines[5] == ""
    assert [line[:2] for line in lines[6:]] == ["- "] * 3
