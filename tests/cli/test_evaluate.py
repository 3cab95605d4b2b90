"""``xbt evaluate``: published values that are not reproduced or not measured."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")


@pytest.fixture
def flags(specs, tmp_path):
    return ["--old", specs[0], "--new", specs[1], "--pairs.source", "scenes", "--pairs.limit", "8",
            "--output_dir", tmp_path / "out", "--fail_on_mismatch", "true"]  # fmt: skip


def expecting(cell, **recall):
    return json.dumps([{"cell": cell, "source": "a paper", "T2I": recall}])


def test_a_mismatch_comes_after_the_table(run, flags, tmp_path):
    wrong = expecting("old/old", **{"R@1": 99.5})
    result = run("evaluate", *flags, "--expected", wrong)
    assert result.status == 2
    assert result.out.startswith("query/gallery  |")
    assert "old/old T2I: R@1 expected 99.50, got" in result.out
    assert result.err.splitlines()[-1].startswith(
        "xbt evaluate: error: 1 of 1 published values are not repro"
    )
    assert (tmp_path / "out" / "retrieval.json").is_file()
    result = run("evaluate", *flags, "--expected", wrong, "--json")
    assert (result.status, result.document["error"]["kind"]) == (2, "DataError")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (expecting("old/old", **{"R@7": 99}), "old/old T2I R@7"),
        (expecting("new/old", **{"R@1": 99}), "expected of new/old, which no cell"),
        ("[]", "no published value was compared"),
    ],
)
def test_what_will_not_be_compared_ends_the_job_before_it_begins(run, flags, tmp_path, expected, message):
    result = run("evaluate", *flags, "--expected", expected)
    assert (result.status, result.out) == (2, "")
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_written_is_named_before_anything_is_opened(run):
    words = ["--old", "no", "--new", "no", "--pairs.source", "nowhere.json", "--output_dir", "/proc/nope"]
    result = run("evaluate", *words)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("xbt evaluate: error: --output_dir /proc/nope cannot be written: ")
