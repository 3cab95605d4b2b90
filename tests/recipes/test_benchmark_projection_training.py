"""The benchmark of training φ at a tiny size: what it counts as bare products, and what it writes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "projection_training.py"
TINY = ["--new_dim", "12", "--old_dim", "8", "--hidden_dim", "20", "--batch_size", "16", "--rows", "50",
        "--more_batch_sizes", "[]"]  # fmt: skip


def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_report_is_complete(monkeypatch, tmp_path, capsys):
    call(monkeypatch, "--threads", "[1]", "--steps", "2", "--rounds", "2", "--results", str(tmp_path / "r"))
    result = json.loads((tmp_path / "r.json").read_text())
    bare, trained = result["rows"]
    assert (bare["what"], trained["what"]) == ("matrix products", "training")
    assert bare["throughput, of the products'"]["rounds"] == [1.0, 1.0]
    seconds = result["seconds"]["16 rows, 1 threads"]
    ratios = [
        a / b
        for a, b in zip(seconds["matrix products"]["rounds"], seconds["training"]["rounds"], strict=True)
    ]
    assert trained["throughput, of the products'"]["rounds"] == ratios
    assert capsys.readouterr().out == (tmp_path / "r.md").read_text()


def test_the_products_are_those_that_a_step_needs():
    """All that training multiplies on top of the bare products is the relational loss."""
    script = runpy.run_path(str(SCRIPT))
    config = script["ProjectionTrainingBenchmark"](12, 8, 20, 16, [], 50, steps=1)

    def flops(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    loss = script["TextLoss"]
    bare = flops(script["bare_products"](config))
    b, new, old, hidden = 16, 12, 8, 20
    assert bare == 2 * b * (new * old + 2 * hidden * new + 3 * hidden * old + 2 * b * old)
    assert flops(script["training"](config, loss(relational_weight=0.0))) == bare
    with_all = flops(script["training"](config, loss(relational_weight=100.0)))
    assert 0 < with_all - bare <= 6 * 2 * b * old * old


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rows", "3"], "--rows 3 is less than --batch_size 16"),
        (["--threads", "[]"], "--threads must be numbers of at least 1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
    ],
)
def test_wrong_input_is_one_sentence(monkeypatch, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *flags)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
