"""``xbt backfill``: the job, its result and its picture."""

from __future__ import annotations

import pytest
from backfills import COUNT
from PIL import Image

from xbt.backfill import BackfillConfig, run_backfill
from xbt.data import PairSource
from xbt.data.image_collection import ImageCollection
from xbt.index import Gallery


@pytest.fixture
def flags(gallery, specs, tmp_path):
    scenes = {"source": "scenes", "split": "test", "limit": COUNT, "seed": 5}
    options = {
        "gallery": gallery, "encoder": specs[1], "old": specs[0], "output_dir": tmp_path / "out",
        "commit_every": 20, "evaluate_every": 20, "batch_size": 20, "num_workers": 0, "max_items": 40,
        **{f"images.{name}": value for name, value in scenes.items()},
        **{f"evaluation.{name}": value for name, value in scenes.items()},
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def test_a_budget_and_then_the_rest(run, flags, gallery, specs, stores, tmp_path):
    ran = run("backfill", *flags)
    assert ran.status == 0, ran.err
    assert ran.out.startswith("backfilled 40 items; 40 of the order's 60")
    assert ran.out.count("backfilled") == 1
    assert "backfilled 40" not in ran.err
    with Image.open(tmp_path / "out" / "curve.png") as picture:
        assert min(picture.size) > 400
    rest = run("backfill", *flags, "--max_items", "60", "--json")
    assert rest.document["items"] == 20
    assert Gallery.open(gallery).fraction_backfilled == rest.document["fraction"] == 1
    other = BackfillConfig(
        str(tmp_path / "other"), specs[1], ImageCollection("scenes", split="test", limit=COUNT, seed=5),
        str(tmp_path / "o"), store=str(stores / "old_images"), old=specs[0], commit_every=20, batch_size=20,
        evaluate_every=20, num_workers=0, evaluation=PairSource("scenes", split="test", limit=COUNT, seed=5),
    )  # fmt: skip
    result = run_backfill(other).to_dict()
    assert rest.document["curve"] == result["curve"]
    assert {**result, "items": 20} == {**rest.document, "curve": result["curve"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--order", "best"], "best"),
        (["--gallery", "nowhere"], "nowhere holds no gallery"),
        (["--imags.source", "x"], "imags"),
    ],
)
def test_wrong_input_is_one_sentence(run, flags, words, message):
    ran = run("backfill", *flags, *words, "--json")
    assert ran.status == 2
    assert message in ran.document["error"]["message"]
