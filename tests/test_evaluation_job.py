from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import yaml
from retrieval_formats import (
    of_split,
    photos,
    table,
    write_coco_captions,
    write_image_lines,
    write_karpathy,
    write_parquet,
    write_wds,
)

from xbt.compatible import CompatibleEncoder
from xbt.config import parse_config
from xbt.data import PairSource, load_pairs, make_scenes
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, EncoderError
from xbt.evaluation import Expectation, Protocol, evaluate_retrieval
from xbt.evaluation.job import EvaluationConfig, run_evaluation
from xbt.projections import fit_projection

pytestmark = pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An old and a new specification, and both forms of what makes the new one speak the old space."""
    root = tmp_path_factory.mktemp("job")
    specs = tiny.tiny_open_clip(root / "old", seed=0), tiny.tiny_open_clip(root / "new", seed=1)
    old, new = (load_encoder(spec) for spec in specs)
    texts = make_scenes(30).texts
    projection = fit_projection(
        new.encode_texts(texts), old.encode_texts(texts), new_space=new.space, old_space=old.space
    )
    projection.save_pretrained(root / "projection")
    CompatibleEncoder(new, projection).save_pretrained(root / "compatible")
    return *specs, {"alone": str(root / "projection"), "whole": str(root / "compatible")}


def test_projections_and_compatible_encoders_give_the_same_cell(models, tmp_path):
    old, new, upgraded = models
    config = EvaluationConfig(old, new, PairSource("scenes", limit=20), str(tmp_path / "out"), upgraded)
    report = run_evaluation(config)
    alone, whole = report.cell("new/old (alone)"), report.cell("new/old (whole)")
    assert (alone.t2i, alone.i2t) == (whole.t2i, whole.i2t)
    saved = json.loads((tmp_path / "out/retrieval.json").read_text())
    assert [cell["name"] for cell in saved["cells"]] == [cell.name for cell in report.cells]
    assert saved["skipped_images"] == []
    assert "new/old (alone)" in (tmp_path / "out/retrieval.md").read_text()
    assert {"config.yaml", "versions.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_corrupt_images_are_skipped_and_recorded(models, tmp_path):
    old, new, _ = models
    scenes, images = make_scenes(6), []
    for row in range(6):
        scenes.image(row).save(tmp_path / f"{row}.jpg")
        sentences = [{"raw": text, "tokens": text.split()} for text in scenes.captions[row]]
        images.append({"filename": f"{row}.jpg", "split": "test", "sentences": sentences})
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:150])
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images, "dataset": "toy"}))
    pairs = PairSource(str(tmp_path / "dataset.json"), split="test")
    with pytest.warns(UserWarning, match=r"skipped 1 of 6 images: .*3\.jpg"):
        report = run_evaluation(EvaluationConfig(old, new, pairs, str(tmp_path / "out")))
    assert report.cell("old/old").n_images == 5
    saved = json.loads((tmp_path / "out/retrieval.json").read_text())
    assert [each["id"] for each in saved["skipped_images"]] == ["3.jpg"]


SMALL = {
    "whole": Protocol("whole", 6, 31, "look again"),
    "folded": Protocol("folded", 6, 31, "look again", folds=3, captions_per_image=5),
}
"""Protocols of the six photos of retrieval_formats, whose second has a sixth caption."""


def test_a_protocol_is_checked_and_recorded(models, tmp_path):
    old, new, upgraded = models
    pairs = PairSource(str(write_karpathy(tmp_path, photos())), split="all")
    config = EvaluationConfig(old, new, pairs, str(tmp_path / "out"), upgraded, protocol="whole")
    report = run_evaluation(config, protocols=SMALL)
    saved = json.loads((tmp_path / "out/retrieval.json").read_text())
    assert saved["protocol"] == {
        "name": "whole",
        "images": 6,
        "captions": 31,
        "folds": 1,
        "captions_per_image": None,
    }
    assert {(cell["n_images"], cell["n_texts"]) for cell in saved["cells"]} == {(6, 31)}
    assert (saved["expected"], saved["expected_but_not_measured"]) == ([], [])
    assert "(protocol whole)" in (tmp_path / "out/retrieval.md").read_text()
    assert report.protocol == SMALL["whole"]


def test_folds_are_evaluated_apart_and_averaged(models, tmp_path):
    old, new, _ = models
    pairs = PairSource(str(write_karpathy(tmp_path, photos())))
    config = EvaluationConfig(old, new, pairs, str(tmp_path / "out"), ks=[1, 2], protocol="folded")
    report = run_evaluation(config, protocols=SMALL)
    encoders = load_encoder(old), load_encoder(new)
    apart = [
        evaluate_retrieval(fold, *encoders, {}, (1, 2)) for fold in SMALL["folded"].prepare(load_pairs(pairs))
    ]
    for cell in report.cells:
        assert (cell.n_images, cell.n_texts) == (2, 10)
        for direction in ("T2I", "I2T"):
            mean = sum(each.cell(cell.name).recall(direction)[1] for each in apart) / 3
            assert cell.recall(direction)[1] == pytest.approx(mean)
    assert "per fold, mean over 3 folds" in (tmp_path / "out/retrieval.md").read_text()


def test_wrong_data_is_refused_before_any_encoder_is_loaded(models, tmp_path):
    path = write_karpathy(tmp_path, photos())

    def refuse(kind, message, source=None, name="whole", encoders=("no", "no")):
        pairs = source or PairSource(str(path))
        config = EvaluationConfig(*encoders, pairs, str(tmp_path / "out"), protocol=name)
        with pytest.raises(kind, match=message):
            run_evaluation(config, protocols=SMALL)

    test_alone = PairSource(str(path), split="test")
    refuse(DataError, "has 6 images with 31 captions, but .* holds 3 images with 15 captions", test_alone)
    refuse(ConfigError, "limit 2 was given with the protocol 'whole'", PairSource(str(path), limit=2))
    refuse(ConfigError, "no protocol 'coco_5k'; there are whole, folded", name="coco_5k")
    (tmp_path / "val2014" / photos()[4].name).write_bytes(b"not a picture")
    unread = "takes every image, but 1 of 6 cannot be read, first: image val2014/COCO_val2014_0"
    refuse(DataError, unread, encoders=models[:2])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", [None, "whole"])
def test_a_misspelt_encoder_is_refused_before_any_image_is_decoded(models, tmp_path, protocol):
    path = write_karpathy(tmp_path, photos())
    for photo in photos():
        (tmp_path / "val2014" / photo.name).write_bytes(b"not a picture")
    for encoders in (("open_clip:local-dir:nowhere", models[1]), (models[0], "transformer:x")):
        config = EvaluationConfig(*encoders, PairSource(str(path)), str(tmp_path / "out"), protocol=protocol)
        with pytest.raises(EncoderError):
            run_evaluation(config, protocols=SMALL)
    assert not (tmp_path / "out").exists()


def test_published_values_are_compared_and_may_end_the_job(models, tmp_path):
    old, new, upgraded = models
    pairs, out, shown = PairSource("scenes", limit=20), tmp_path / "out", []
    right = run_evaluation(EvaluationConfig(old, new, pairs, str(tmp_path / "first")))
    truth = round(100 * right.cell("old/old").t2i[1], 2)
    expected = [
        Expectation("old/old", "measured before", T2I={"R@1": truth}, old=[old]),
        Expectation("new/old (alone)", "made up", {"R@1": 99.0, "R@100": 100.0}, {"R@10": 3.0}, tolerance=0),
        Expectation("old/old", "other models", T2I={"R@1": truth}, old=["x"]),
    ]
    config = EvaluationConfig(old, new, pairs, str(out), {"alone": upgraded["alone"]}, expected=expected)
    report = run_evaluation(config)  # a single upgrade is called new/old
    assert [(each.cell, each.direction) for each in report.comparisons] == [
        ("old/old", "T2I"),
        ("new/old", "T2I"),
        ("new/old", "I2T"),
    ]
    assert [each.agrees for each in report.comparisons] == [True, False, False]
    saved = json.loads((out / "retrieval.json").read_text())
    assert [each["agrees"] for each in saved["expected"]] == [True, False, False]
    assert "| old/old | T2I R@1 |" in (out / "retrieval.md").read_text()
    config.fail_on_mismatch = True
    with pytest.raises(ConfigError, match=r"expected of new/old T2I R@100, which"):
        # Before anything is opened.
        run_evaluation(replace(config, new="no", pairs=PairSource("no.json"), output_dir=str(tmp_path / "b")))
    del config.expected[1].T2I["R@100"]
    with pytest.raises(DataError, match=r"2 of 3 published values .*: new/old T2I R@1 expected 99"):
        run_evaluation(config, show=shown.append)
    assert [each.comparisons for each in shown] == [report.comparisons]
    again = parse_config(EvaluationConfig, ["--config", str(out / "config.yaml")])
    assert again.expected == expected


def test_every_public_format_gives_the_same_cells(models, tmp_path):
    """Through the recipe's config: the file that a user writes."""
    old, new, _ = models
    made = of_split(photos(), "test")
    captions = [photo.captions for photo in made]
    sources = {
        "karpathy": {"source": str(write_karpathy(tmp_path / "a", photos())), "split": "test"},
        "lines": {"source": str(write_image_lines(tmp_path / "b", made))},
        "coco": {"source": str(write_coco_captions(tmp_path / "c", made))},
        "nocaps": {"source": str(write_coco_captions(tmp_path / "d", made, "nocaps_val_4500_captions.json"))},
        "wds": {"source": str(write_wds(tmp_path / "e", made)), "split": "test"},
        "parquet": {"source": f"hf:{write_parquet(tmp_path / 'f', test=table(made, text=captions))}"},
    }
    cells = {}
    for name, pairs in sources.items():
        path, out = tmp_path / f"{name}.yaml", str(tmp_path / name)
        written = {"old": old, "new": new, "protocol": "three", "pairs": pairs, "output_dir": out}
        path.write_text(yaml.safe_dump(written))
        config = parse_config(EvaluationConfig, ["--config", str(path)])
        run_evaluation(config, protocols={"three": Protocol("three", 3, 15, "look again")})
        cells[name] = json.loads((tmp_path / name / "retrieval.json").read_text())["cells"]
    assert all(each == cells["karpathy"] for each in cells.values())
