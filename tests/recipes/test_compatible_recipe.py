"""The recipe that trains backbones: the papers' configs on small data in public formats, and bad input."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import datasets
import labelled
import pyarrow.parquet
import pytest

from xbt.backbones import CompatibleBackbone

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/train_compatible_backbone.py"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache for each test: in a common one, data sets of the same name are taken for each other."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Two hundred training images of each data set in its public format."""
    made = {name: tmp_path_factory.mktemp(name) / "data" for name in labelled.SETS}
    for name, (write, _, _) in labelled.SETS.items():
        write(made[name])
    return made


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the recipe as a script in this process; return its exit status and the last line on stderr."""

    def call(arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [str(each) for each in arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(RECIPE), run_name="__main__")
        output = capsys.readouterr().err
        assert "Traceback" not in output
        lines = [line for line in output.replace("\r", "\n").splitlines() if "error:" in line]
        assert len(lines) == 1, output
        return caught.value.code, lines[0]

    return call


def train(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(each) for each in arguments])
    runpy.run_path(str(RECIPE), run_name="__main__")


@pytest.mark.parametrize("name", list(labelled.SETS))
def test_the_papers_configs_run_on_their_data_sets_format(roots, tmp_path, monkeypatch, name):
    _, half, whole = labelled.SETS[name]
    for role in ("old", "independent", "bct", "bt2", "oca"):
        train(labelled.paper(name, role, roots[name], tmp_path), monkeypatch)
    dims = {"old": 128, "independent": 128, "bct": 128, "bt2": 160, "oca": 160}
    for role, dim in dims.items():
        model = CompatibleBackbone.from_pretrained(tmp_path / role / "model")
        result = json.loads((tmp_path / role / "result.json").read_text())
        assert model.dim == result["out_dim"] == dim
        assert len(model.class_names) == (half if role == "old" else whole)
        assert result["train_images"] == (100 if role == "old" else 200)
        assert result["best_step"] == result["train_images"] // 40
        assert result["evaluation"]["n_images"] == 60  # all classes, also for the old model
        cells = set(result["evaluation"]["cells"])
        alone = role in ("old", "independent")
        assert cells == ({"new/new"} if alone else {
            "old/old", "new/old", "new/new", "independent/old", "independent/independent",
        })  # fmt: skip


def test_a_chain_of_three_versions(roots, tmp_path, monkeypatch):
    """Each is the old one of the next: the whole vectors of the second are what the third begins with."""
    root = roots["cifar100"]
    train(labelled.paper("cifar100", "old", root, tmp_path), monkeypatch)
    old = tmp_path / "old/model"
    for number in (1, 2):
        flags = ["--old", old, "--independent", "null", "--output_dir", tmp_path / f"v{number}"]
        train(labelled.paper("cifar100", "oca", root, tmp_path, *flags), monkeypatch)
        old = tmp_path / f"v{number}/model"
    versions = [CompatibleBackbone.from_pretrained(tmp_path / f"{v}/model") for v in ("old", "v1", "v2")]
    assert [(each.old_dim, each.dim) for each in versions] == [(0, 128), (128, 160), (160, 192)]
    assert versions[2].old_space.same_as(versions[1].space)


@pytest.mark.parametrize(
    ("role", "flags", "words"),
    [
        ("bct", ["--old", "null"], "--method bct needs --old"),
        ("bct", ["--old", "runs/no/model"], "runs/no/model does not exist"),
        ("bt2", ["--independent", "null"], "--method bt2 needs --independent"),
        ("old", ["--test.classes", "1000"], "classes is 1000, but cifar100 has only 100"),
        ("old", ["--data.root", "nowhere"], "nowhere is no directory"),
        ("old", ["--data.label_column", "fein_label"], "fein_label"),
        ("old", ["--new_dims", "3"], "--new_dims"),
        ("old", ["--training.epochen", "3"], "--training.epochen"),
        ("old", ["--weights.influenz", "3"], "influenz"),
        ("old", ["--method", "btt"], "btt"),
        ("old", ["--backbone", "timm:resnet19"], "resnet19"),
        ("old", ["--training.batch_size", "101"], "fewer than --training.batch_size 101"),
    ],
)
def test_bad_input_is_one_sentence(roots, tmp_path, run, role, flags, words):
    code, line = run(labelled.paper("cifar100", role, roots["cifar100"], tmp_path, *flags))
    assert code == 2
    assert words in line
    assert not (tmp_path / role).exists()


def test_another_run_in_the_output_directory(roots, tmp_path, run, monkeypatch):
    train(labelled.paper("cifar100", "old", roots["cifar100"], tmp_path), monkeypatch)
    train(labelled.paper("cifar100", "old", roots["cifar100"], tmp_path), monkeypatch)  # the same one again
    code, line = run(labelled.paper("cifar100", "old", roots["cifar100"], tmp_path, "--new_dim", "64"))
    assert code == 2
    assert "holds a run with other settings (new_dim was 128 and is 64)" in line


def test_a_corrupt_image_in_parquet_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    root = labelled.write_cifar100(tmp_path / "data")
    file = root / "cifar100/train-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(file)
    cells = table["img"].to_pylist()
    cells[7]["bytes"] = cells[7]["bytes"][:60]
    column = pyarrow.array(cells, type=table.schema.field("img").type)
    table = table.set_column(table.schema.get_field_index("img"), table.schema.field("img"), column)
    pyarrow.parquet.write_table(table, file)
    train(labelled.paper("cifar100", "independent", root, tmp_path), monkeypatch)
    output = capsys.readouterr().err
    assert "warning: skipped 1 of 200 training images: image row-7 cannot be decoded" in output
    assert json.loads((tmp_path / "independent/result.json").read_text())["train_images"] == 199
