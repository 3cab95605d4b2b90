"""The report from two encoders, and the recipe's exit status."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny
from upgrade_worlds import KEYS

from xbt.data import CaptionSource, PairSource, load_pairs
from xbt.encoders import load_encoder
from xbt.errors import ConfigError
from xbt.evaluation import evaluate_retrieval
from xbt.report import UpgradeReportConfig, write_upgrade_report

pytestmark = pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")
RECIPE = Path(__file__).parents[2] / "recipes/upgrade_report.py"


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny.tiny_open_clip(root / "old", seed=0), tiny.tiny_open_clip(root / "new", seed=1)


def config(specs, out, **changes):
    values = {
        "old": specs[0],
        "new": specs[1],
        "pairs": PairSource("scenes", split="test", limit=44),
        "captions": CaptionSource("scenes", limit=60, seed=1),
        "examples": 2,
        "gallery_size": 1000,
        **changes,
    }
    return UpgradeReportConfig(str(out), **values)


@pytest.fixture(scope="module")
def made(specs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    return write_upgrade_report(config(specs, out)), out


def test_the_cells_are_those_of_the_evaluation(specs, made):
    report, out = made
    old, new = (load_encoder(spec) for spec in specs)
    pairs = load_pairs(PairSource("scenes", split="test", limit=44))
    measured = pairs.select([pairs.ids.index(name) for name in report.shown.shown.ids])
    expected = evaluate_retrieval(measured, old, new, {})
    cells = json.loads((out / "report.json").read_text())["measured"]["cells"]
    for name in ("old/old", "new/new"):
        for direction in ("T2I", "I2T"):
            for k, value in expected.cell(name).recall(direction).items():
                assert cells[name][direction][f"R@{k}"]["recall"] == pytest.approx(value)


def test_cost_is_measured(made):
    report, _ = made
    cost = report.cost.to_dict()
    rates = cost["images_per_second"]
    assert cost["backfill_hours"] == pytest.approx(1000 / rates["new"] / 3600)
    assert cost["bytes"]["gallery_old"] == 1000 * report.sample.old.dim * 2
    assert {"old text tower", "new text tower"} < set(cost["query_milliseconds"])
    assert not any("No encoder" in limit for limit in report.limits)


def test_random_models_are_not_worth_it(made):
    report, _ = made
    assert report.verdict.answer in ("no", "unknown")
    assert not report.passed
    assert report.to_dict()["old"]["space"]["model"] == report.sample.old.space.model


def test_unreadable_pictures_are_skipped_and_recorded(specs, tmp_path):
    scenes, images = load_pairs(PairSource("scenes", limit=44)), []
    for row in range(44):
        scenes.image(row).save(tmp_path / f"{row}.png")
        sentences = [{"raw": text, "tokens": text.split()} for text in scenes.captions[row]]
        images.append({"filename": f"{row}.png", "split": "test", "sentences": sentences})
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images, "dataset": "toy"}))
    pairs = PairSource(str(tmp_path / "dataset.json"), split="test")
    with pytest.warns(UserWarning, match=r"skipped 1 of the sample's images: .*3\.png"):
        report = write_upgrade_report(config(specs, tmp_path / "out", pairs=pairs, captions=None))
    assert len(report.sample) == 43
    assert [name for name, _ in report.sample.skipped] == ["3.png"]
    assert any("No text corpus was given" in limit for limit in report.limits)


def test_a_corpus_of_the_pairs_own_captions(specs, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(load_pairs(PairSource("scenes", split="test", limit=44)).texts))
    with pytest.raises(ConfigError, match="every caption is one of the pairs' own"):
        write_upgrade_report(config(specs, tmp_path / "out", captions=CaptionSource(str(file))))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def status(monkeypatch, capsys):
    """Run the recipe as a script; return its exit status, what it printed, and its errors."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["upgrade_report.py", *flags])
        code = 0
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
        except SystemExit as caught:
            code = caught.code
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def flags(file, out, *more):
    named = [part for role, key in KEYS.items() for part in (f"--vectors.{role}", key)]
    return ["--vectors.file", file, *named, "--output_dir", str(out), "--examples", "0", *more]


def test_status_0_where_it_is_worth_it_and_1_where_a_threshold_is_missed(status, better, tmp_path):
    code, output, _ = status(*flags(better, tmp_path / "out", "--fail_under.T2I", "0.5"))
    assert code == 0
    assert output.startswith("Upgrade: ")
    assert "met: fail_under.T2I 0.5" in output
    # A threshold changes no figure, so that the directory may be used again.
    code, output, _ = status(*flags(better, tmp_path / "out", "--fail_under.T2I", "99"))
    assert code == 1
    assert "missed: fail_under.T2I 99" in output
    assert "missed: fail_under.T2I 99" in (tmp_path / "out/report.html").read_text()
    # Another sample does.
    code, _, err = status(*flags(better, tmp_path / "out", "--seed", "5"))
    assert code == 2
    assert "holds a run with other settings" in err


def test_status_1_where_the_answer_is_not_yes(status, better, tmp_path):
    code, output, err = status(*flags(better, tmp_path / "out", "--sample", "10"))
    assert code == 1
    assert output.startswith("Upgrade: too few queries to decide")
    assert "too small for intervals" in err


def test_status_2_for_a_wrong_input(status, better, tmp_path):
    code, output, err = status(*flags(better, tmp_path / "out", "--vectors.old_images", "nothing"))
    assert code == 2
    assert output == ""
    assert "--vectors.old_images nothing is neither a key" in err
    assert "Traceback" not in err
