from __future__ import annotations

import json

import pytest
import tiny

from xbt.compatible import CompatibleEncoder
from xbt.data import PairSource, make_scenes
from xbt.encoders import load_encoder
from xbt.evaluation_job import EvaluationConfig, run_evaluation
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
