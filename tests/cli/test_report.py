"""``xbt report``: the document, what people read, and the verdict as exit status."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xbt.report import UpgradeReportConfig, VectorSource, write_upgrade_report


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def vectors(tmp_path):
    """A world in which the new model is the old one without its noise, and so plainly better."""
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(size=(80, 16)), rng.normal(size=(4, 80, 16))
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    corpus = rng.normal(size=(400, 16))
    np.savez(
        tmp_path / "pairs.npz",
        old_images=unit(truth + 0.2 * noise[0]),
        old_texts=unit(truth + 1.5 * noise[1]),
        new_images=unit((truth + 0.1 * noise[2]) @ rotation),
        new_texts=unit((truth + 0.1 * noise[3]) @ rotation),
        old_corpus=unit(corpus),
        new_corpus=unit(corpus @ rotation),
    )
    keys = ("old_images", "old_texts", "new_texts", "new_images", "old_corpus", "new_corpus")
    return {**{key: key for key in keys}, "file": str(tmp_path / "pairs.npz")}


def flags(vectors):
    return [word for key, value in vectors.items() for word in (f"--vectors.{key}", value)]


def test_the_document_is_the_report_and_the_status_its_verdict(run, vectors, tmp_path):
    result = run("report", *flags(vectors), "--output_dir", tmp_path / "out", "--json")
    assert result.status == 0, result.err
    assert result.document["passed"] is True
    assert result.document == json.loads((tmp_path / "out" / "report.json").read_text())
    report = write_upgrade_report(
        UpgradeReportConfig(str(tmp_path / "other"), vectors=VectorSource(**vectors))
    )
    result = run("report", *flags(vectors), "--overwrite", "true", "--output_dir", tmp_path / "out")
    assert (result.status, result.out) == (0, f"{report.format()}\n")


def test_a_threshold_that_is_missed_is_status_1(run, vectors, tmp_path):
    result = run(
        "report", *flags(vectors), "--fail_under.T2I", "99", "--output_dir", tmp_path / "out", "--json"
    )
    assert result.status == 1
    assert result.document["passed"] is False
    assert result.document["verdict"]["answer"] in ("yes", "ensemble")


@pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")
def test_a_small_sample_without_captions_is_a_report_too(run, specs, tmp_path):
    words = ["--old", specs[0], "--new", specs[1], "--pairs.source", "scenes", "--sample", "30"]
    result = run("report", *words, "--output_dir", tmp_path / "out")
    assert result.status == 1, result.err
    assert result.out.startswith("Upgrade: too few queries to decide")
    assert "warning: the sample is too small for intervals" in result.err
    assert {"report.html", "report.json"} <= {each.name for each in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "give --old, --new and --pairs"), (["--fail_undr.T2I", "1"], "fail_undr")],
)
def test_wrong_input_is_status_2(run, tmp_path, words, message):
    result = run("report", "--output_dir", tmp_path / "out", *words)
    assert (result.status, result.out) == (2, "")
    assert message in result.err
