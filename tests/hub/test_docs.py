"""docs/hub.md, run from top to bottom against a local Hub server."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import ModelCard

from xbt.evaluation.cells import Cell, RetrievalReport

PAGE = (Path(__file__).parents[2] / "docs/hub.md").read_text(encoding="utf-8")


def test_every_block_runs_in_order(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recall = {1: 0.25, 5: 0.5}
    report = RetrievalReport([Cell(name, recall, recall, 10, 50) for name in ("old/old", "new/old")])
    Path("retrieval.json").write_text(json.dumps(report.to_dict()))
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.S)
    assert len(blocks) == PAGE.count("```") // 2 == 5
    names = {"__name__": "hub"}
    for language, text in blocks:
        assert language == "python"
        exec(compile(text, "docs/hub.md", "exec"), names)
    assert names["queries"].shape == (2, 8)
    assert "LinearProjection" in capsys.readouterr().out
    assert hub.repos["org/adapter"].private
    assert len(ModelCard.load("org/adapter").data.eval_results) == 8
