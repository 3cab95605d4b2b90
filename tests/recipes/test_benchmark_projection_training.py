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
    found = {row["what"]: row["throughput, of the products'"]["rounds"] for row in result["rows"]}
    assert list(found) == [
        "matrix products",
        "training",
        "matrix products, relational loss too",
        "training, relational loss too",
    ]
    seconds = {name: each["rounds"] for name, each in result["seconds"]["16 rows, 1 threads"].items()}
    for loss in ("", ", relational loss too"):
        products, trained = seconds[f"matrix products{loss}"], seconds[f"training{loss}"]
        assert found[f"matrix products{loss}"] == [1.0, 1.0]
        assert found[f"training{loss}"] == [a / b for a, b in zip(products, trained, strict=True)]
    assert capsys.readouterr().out == (tmp_path / "r.md").read_text()


def test_the_products_are_those_that_a_step_needs():
    """Training multiplies what the bare products multiply, and nothing else."""
    script = runpy.run_path(str(SCRIPT))
    config = script["ProjectionTrainingBenchmark"](12, 8, 20, 16, [], 50, steps=1)

    def flops(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    b, new, old, hidden = 16, 12, 8, 20
    of_map = 2 * b * (new * old + 2 * hidden * new + 3 * hidden * old + 2 * b * old)
    for weight, expected in ((0.0, of_map), (100.0, of_map + 5 * 2 * b * old * old)):
        loss = script["TextLoss"](relational_weight=weight)
        assert flops(script["bare_products"](config, loss)) == expected
        assert flops(script["training"](config, loss)) == expected


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
