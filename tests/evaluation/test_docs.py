"""docs/evaluation.md, run from top to bottom with tiny models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from upgrades import TEXTS

from xbt.compatible import CompatibleEncoder
from xbt.encoders import load_encoder
from xbt.projections import fit_projection

PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:<!-- (not run: [^\n]+) -->\n)?```python\n(.*?)```", PAGE, re.S)


@pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")  # the tiny models spell words out
def test_every_block_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = load_encoder(tiny.tiny_open_clip(tmp_path / "models/old", context_length=96))
    new = load_encoder(tiny.tiny_transformers_clip(tmp_path / "models/new", seed=1, context_length=300))
    projection = fit_projection(
        new.encode_texts(TEXTS), old.encode_texts(TEXTS), new_space=new.space, old_space=old.space
    )
    CompatibleEncoder(new, projection).save_pretrained(tmp_path / "l14-speaks-b32")
    names = {}
    for excuse, text in BLOCKS:
        if not excuse:
            exec(compile(text, "docs/evaluation.md", "exec"), names)
    recall = names["recall_at_k"](names["queries"], names["gallery"], [[0], [2]], (1, 2))
    assert recall == {1: 0.5, 2: 1.0}  # as the comment says
    assert names["cell"].t2i[5] == pytest.approx(names["t2i"], abs=1e-6)
    assert names["cell"].i2t[5] == pytest.approx(names["i2t"], abs=1e-6)
    assert 0 < names["t2i"] < 1


def test_what_is_not_run_says_why():
    assert len(BLOCKS) == PAGE.count("```") // 2
    assert [excuse for excuse, _ in BLOCKS if excuse] == ["not run: reads COCO"]
