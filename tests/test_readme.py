"""README and docs/benchmarks.md show the tables that the benchmarks wrote, to the last digit."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "recipes/benchmarks/results").glob("*.md"))


def test_there_are_results():
    assert len(RESULTS) >= 5


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.stem)
def test_every_row_of_a_result_is_shown(result):
    pages = [ROOT / "README.md", ROOT / "docs/benchmarks.md"]
    shown = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    rows = [line for line in result.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) >= 3
    for row in rows:
        assert row in shown


@pytest.mark.parametrize("result", RESULTS, ids=lambda path: path.stem)
def test_every_table_has_its_record_and_its_script(result):
    assert result.with_suffix(".json").is_file()
    scripts = [path.stem for path in (ROOT / "recipes/benchmarks").glob("*.py")]
    assert any(result.stem.startswith(script) for script in scripts)
