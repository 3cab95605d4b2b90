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
    said = run("report", *flags(vectors), "--output_dir", tmp_path / "out", "--json")
    assert said.status == 0, said.err
    assert said.document["passed"] is True
    assert said.document == json.loads((tmp_path / "out" / "report.json").read_text())
    report = write_upgrade_report(
        UpgradeReportConfig(str(tmp_path / "other"), vectors=VectorSource(**vectors))
    )
    told = run("report", *flags(vectors), "--overwrite", "true", "--output_dir", tmp_path / "out")
    assert (told.status, told.out) == (0, f"{report.format()}\n")


def test_a_threshold_that_is_missed_is_status_1(run, vectors, tmp_path):
    said = run(
        "report", *flags(vectors), "--fail_under.T2I", "99", "--output_dir", tmp_path / "out", "--json"
    )
    assert said.status == 1
    assert said.document["passed"] is False
    assert said.document["verdict"]["answer"] in ("yes", "ensemble")


@pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")
def test_a_small_sample_without_captions_is_a_report_too(run, specs, tmp_path):
    words = ["--old", specs[0], "--new", specs[1], "--pairs.source", "scenes", "--sample", "30"]
    said = run("report", *words, "--output_dir", tmp_path / "out")
    assert said.status == 1, said.err
    assert said.out.startswith("Upgrade: cannot be told from so few queries")
    assert "warning: the sample is too small for intervals" in said.err
    assert {"report.html", "report.json"} <= {each.name for each in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "give --old, --new and --pairs"), (["--fail_undr.T2I", "1"], "fail_undr")],
)
def test_wrong_input_is_status_2(run, tmp_path, words, told):
    said = run("report", "--output_dir", tmp_path / "out", *words)
    assert (said.status, said.out) == (2, "")
    assert told in said.err
