"""The files of a job after damage: they are read as they were written, or refused in one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from backfills import lines
from fuzzing import damaged, damaged_json, dump, fuzzed, loads_or_refuses
from hypothesis import given

from xbt.backfill import load_merge, save_merge
from xbt.backfill.curve import CurveLog, CurvePoint, JsonLines
from xbt.backfill.plan import read_order, write_order
from xbt.errors import DataError, StoreError
from xbt.index import AffineMerge, IsotonicMerge, Merge

POINT = CurvePoint(20, 0.25, {1: 0.5, 5: 0.5, 10: 1.0}, 2 / 3, (0.1, 0.9), 12.5, (3, 1)).to_dict()
REJECTED = {"id": "photos/é.jpg", "reason": "it cannot be decoded"}
ISOTONIC = IsotonicMerge((-0.5, 0.25), (0.0, 0.75), (0.0, 0.75), (0.25, 0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def as_lines(*entries):
    return b"".join(dump(entry) + b"\n" for entry in entries)


@fuzzed
@given(content=damaged(as_lines(POINT, POINT)))
def test_fuzz_a_damaged_curve(folder, content):
    (folder / "curve.jsonl").write_bytes(content)
    loads_or_refuses(lambda: CurveLog(folder / "curve.jsonl"), len(content))


@fuzzed
@given(entry=damaged_json(POINT))
def test_fuzz_a_curve_of_odd_values(folder, entry):
    (folder / "odd.jsonl").write_bytes(content := as_lines(POINT, entry))
    loads_or_refuses(lambda: CurveLog(folder / "odd.jsonl"), len(content))


@fuzzed
@given(entry=damaged_json(REJECTED))
def test_fuzz_rejections_of_odd_values(folder, entry):
    (folder / "rejected.jsonl").write_bytes(content := as_lines(REJECTED, entry))
    found = loads_or_refuses(lambda: JsonLines(folder / "rejected.jsonl", {"id": str}), len(content))
    assert found is None or all(isinstance(each["id"], str) for each in found.entries)


@fuzzed
@given(content=damaged(dump({"order": "random", "seed": 0, "ids": ["a", "é", "c"]})))
def test_fuzz_a_damaged_order(folder, content):
    (folder / "order.json").write_bytes(content)
    found = loads_or_refuses(lambda: read_order(folder / "order.json"), len(content))
    assert found is None or all(isinstance(name, str) for name in found[0])


@fuzzed
@given(value=damaged_json({"order": "random", "seed": 0, "ids": ["a", "é", "c"]}))
def test_fuzz_an_order_of_odd_values(folder, value):
    (folder / "order.json").write_bytes(content := dump(value))
    found = loads_or_refuses(lambda: read_order(folder / "order.json"), len(content))
    assert found is None or all(isinstance(name, str) for name in found[0])


@fuzzed
@given(content=damaged(dump(ISOTONIC.to_dict())))
def test_fuzz_a_damaged_merge(folder, content):
    (folder / "merge.json").write_bytes(content)
    merge = loads_or_refuses(lambda: load_merge(folder), len(content))
    assert merge is None or np.isfinite(merge.calibrate("new", np.float32([0.25, 0.5]))).all()


@fuzzed
@given(value=damaged_json({**AffineMerge(2.0, -0.5).to_dict(), "old_space": None, "new_space": None}))
def test_fuzz_a_merge_of_odd_values(folder, value):
    (folder / "merge.json").write_bytes(content := dump(value))
    merge = loads_or_refuses(lambda: load_merge(folder), len(content))
    assert merge is None or isinstance(merge, Merge)


def test_an_order_is_read_back(tmp_path):
    assert read_order(tmp_path / "order.json") is None
    write_order(tmp_path / "order.json", ["b", "a"], {"seed": 3})
    assert read_order(tmp_path / "order.json") == (["b", "a"], {"seed": 3})
    (tmp_path / "order.json").write_text(json.dumps({"ids": ["a", 1]}))
    with pytest.raises(StoreError, match="holds no order; restore the file, or pass --overwrite true"):
        read_order(tmp_path / "order.json")


def test_a_merge_is_read_back(tmp_path):
    save_merge(tmp_path, ISOTONIC)
    assert load_merge(tmp_path) == ISOTONIC


def test_lines_grow_and_forget_a_line_that_was_cut(tmp_path):
    path = tmp_path / "lines.jsonl"
    made = JsonLines(path)
    made.append([])
    assert not path.exists()
    made.append([{"id": "a\nü\x85"}, {"id": "b"}])
    path.write_bytes(path.read_bytes() + b'{"id"')
    again = JsonLines(path)
    assert again.entries == [{"id": "a\nü\x85"}, {"id": "b"}]
    again.append([{"id": "c"}])
    assert JsonLines(path).entries == [{"id": "a\nü\x85"}, {"id": "b"}, {"id": "c"}]
    for content, words in (
        (b"{}\nno\n", "line 2, is no JSON"),
        (b"[]\n", "line 1, is no JSON object;"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            JsonLines(path)
    with pytest.raises(StoreError, match="cannot be written"):
        JsonLines(tmp_path / "nowhere" / "lines.jsonl").append([{}])


def test_a_curve_with_a_line_of_another_kind_is_refused(tmp_path):
    (tmp_path / "curve.jsonl").write_bytes(as_lines(POINT, {**POINT, "interval": [0.1]}))
    with pytest.raises(DataError, match=r"curve\.jsonl, line 2, is no point of a curve .*; restore the file"):
        CurveLog(tmp_path / "curve.jsonl")
    assert lines(tmp_path / "curve.jsonl")[0] == POINT
