from __future__ import annotations

import dataclasses
import json

import labelled
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn.functional import normalize

from xbt.backbones import CompatibleBackbone, ImagePreprocessing
from xbt.data import LabelledSource, load_labelled
from xbt.errors import ConfigError, DataError
from xbt.hub import SavedPartError
from xbt.store import EmbeddingStore
from xbt.training import (
    BackboneTraining,
    CompatibleBackboneConfig,
    LossWeights,
    train_compatible_backbone,
)
from xbt.training import backbone as teachers_module
from xbt.training.loop import TrainingLoop

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six classes in folders, of which the old model saw three, and the two models that others need."""
    root = tmp_path_factory.mktemp("world")
    labelled.write_folders(root / "data", classes=6, train=16, test=5)
    old = settings(root, "old", "independent", classes=3, new_dim=12, epochs=6)
    train_compatible_backbone(old)
    train_compatible_backbone(settings(root, "independent", "independent", new_dim=12, epochs=6))
    return root


def settings(root, name, method, *, classes=None, epochs=2, out=None, **changes):
    if method in ("bct", "bt2", "oca"):
        changes = {"old": str(root / "old/model"), **changes}
    if method == "bt2":
        changes = {"independent": str(root / "independent/model"), **changes}
    base = {
        "method": method, "backbone": "small_resnet", "new_dim": 12,
        "data": LabelledSource(str(root / "data"), split="train", classes=classes),
        "test": LabelledSource(str(root / "data"), split="test"),
        "output_dir": str((out or root) / name),
        "preprocessing": ImagePreprocessing(16, augmentation="crop_flip"),
        "training": BackboneTraining(
            epochs=epochs, warmup_epochs=1, batch_size=16, lr=3e-3, checkpoint_every=2
        ),
    }  # fmt: skip
    return CompatibleBackboneConfig(**{**base, **changes})


def result_of(config):
    with open(f"{config.output_dir}/result.json", encoding="utf-8") as file:  # noqa: PTH123
        return json.load(file)


def mean_average_precision(queries, gallery, labels):
    """By scikit-learn, an image's own copy left out."""
    scores, own = (queries.double() @ gallery.double().T).numpy(), torch.eye(len(labels)).bool()
    right = (labels[:, None] == labels[None]).numpy()
    keep = (~own).numpy()
    found = [
        average_precision_score(right[row][keep[row]], scores[row][keep[row]]) for row in range(len(labels))
    ]
    return sum(found) / len(found)


def test_an_independent_model_learns_its_classes(world):
    result = result_of(settings(world, "independent", "independent", epochs=6))
    cell = result["evaluation"]["cells"]["new/new"]
    assert cell["mAP"] > 0.5  # at random: about 0.2
    assert result["best_step"] == 6 * (96 // 16)
    assert result["evaluation"]["criterion"] == {}
    old = CompatibleBackbone.from_pretrained(world / "old/model")
    assert old.class_names == ["class_0", "class_1", "class_2"]
    assert (old.dim, old.old_dim, old.old_space) == (12, 0, None)


@pytest.mark.parametrize(
    ("method", "changes", "dim"),
    [
        ("bct", {}, 12),
        ("bct", {"extra_dims": 4}, 16),
        ("bt2", {"extra_dims": 4}, 16),
        ("oca", {"extra_dims": 4}, 16),
        ("oca", {"extra_dims": 0, "orthogonal": False}, 12),
    ],
)
def test_every_method_runs_and_says_what_it_is_worth(world, tmp_path, method, changes, dim):
    changes = {"independent": str(world / "independent/model"), **changes}
    config = settings(world, "run", method, out=tmp_path, **changes)
    trained = train_compatible_backbone(config)
    assert (trained.dim, trained.old_dim) == (dim, 12)
    loaded = CompatibleBackbone.from_pretrained(tmp_path / "run/model")
    old, independent = (
        CompatibleBackbone.from_pretrained(world / name / "model") for name in ("old", "independent")
    )
    assert loaded.old_space.same_as(old.space)
    assert loaded.class_names == [f"class_{number}" for number in range(6)]

    test = load_labelled(LabelledSource(str(world / "data"), split="test"))
    full, query = loaded.encode_images(test.images), loaded.encode_images(test.images, space="old")
    assert torch.equal(full, trained.encode_images(test.images))
    assert (normalize(full[:, :12], dim=1) - query).abs().max() < 1e-6
    theirs, best = old.encode_images(test.images), independent.encode_images(test.images)
    expected = {
        "old/old": (theirs, theirs), "new/old": (query, theirs), "new/new": (full, full),
        "independent/old": (best, theirs), "independent/independent": (best, best),
    }  # fmt: skip
    evaluation = result_of(config)["evaluation"]
    assert list(evaluation["cells"]) == list(expected)
    values = {name: mean_average_precision(*sides, test.labels) for name, sides in expected.items()}
    for name, value in values.items():
        assert evaluation["cells"][name]["mAP"] == pytest.approx(value, abs=1e-6), name
    assert evaluation["criterion"]["mAP"] == (values["new/old"] > values["old/old"])
    gained, possible = (values[name] - values["old/old"] for name in ("new/old", "independent/independent"))
    assert evaluation["update_gain"]["mAP"] == pytest.approx(gained / possible, abs=1e-4)
    tax = values["independent/independent"] - values["new/new"]
    assert evaluation["compatibility_tax"]["mAP"] == pytest.approx(tax, abs=1e-6)
    report = (tmp_path / "run/report.md").read_text()
    assert f"| new/old | {100 * evaluation['cells']['new/old']['top1']:.1f} |" in report
    assert "update gain" in report


@pytest.mark.parametrize("method", ["bct", "bt2", "oca"])
def test_compatible_training_makes_the_cross_test_work(world, tmp_path, method):
    """An independent model's queries are worth nothing on the old gallery; a compatible one's are."""
    changes = {"epochs": 12, "extra_dims": 0 if method == "bct" else 4}
    config = settings(world, "run", method, out=tmp_path, **changes)
    train_compatible_backbone(config)
    cells = result_of(config)["evaluation"]["cells"]
    changes = {"extra_dims": changes["extra_dims"], "independent": str(world / "independent/model")}
    untrained = settings(world, "chance", method, out=tmp_path, **changes)
    untrained = dataclasses.replace(untrained, training=BackboneTraining(steps=0, batch_size=16))
    train_compatible_backbone(untrained)
    chance = result_of(untrained)["evaluation"]["cells"]["independent/old"]["mAP"]
    assert cells["new/old"]["mAP"] > chance + 0.15
    assert cells["new/old"]["mAP"] > 0.9 * cells["old/old"]["mAP"]


def test_teachers_are_embedded_once_and_without_augmentation(world, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers_module, "SHARD_ROWS", 20)
    config = settings(world, "run", "bt2", out=tmp_path, extra_dims=4)
    train_compatible_backbone(config)
    train = load_labelled(config.data)
    for name in ("old", "independent"):
        model = CompatibleBackbone.from_pretrained(world / name / "model")
        store = EmbeddingStore.open(tmp_path / f"run/vectors/{name}_train", space=model.space)
        assert store.ids == train.ids
        assert len(store.shards) == 5
        assert (torch.from_numpy(store.read()) - model.encode_images(train.images)).abs().max() < 1e-6
    monkeypatch.setattr(CompatibleBackbone, "encode_images", no_encoding(CompatibleBackbone.encode_images))
    config = dataclasses.replace(config, test=None, overwrite=True)
    train_compatible_backbone(config)


def no_encoding(original):
    """Lets the probe's few images pass, and nothing else."""

    def encode(self, images, *args, **options):
        assert len(images) < 10, "embedded again"
        return original(self, images, *args, **options)

    return encode


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["oca", "bt2"])
def test_a_killed_run_ends_like_an_uninterrupted_one(world, tmp_path, monkeypatch, method):
    monkeypatch.setattr(teachers_module, "SHARD_ROWS", 20)
    whole = train_compatible_backbone(settings(world, "whole", method, out=tmp_path, extra_dims=4))
    config = settings(world, "killed", method, out=tmp_path, extra_dims=4)

    embed, calls = CompatibleBackbone.encode_images, []

    def embed_until_killed(self, images, *args, **options):
        calls.append(len(images))
        if calls.count(20) == 3:
            raise Killed
        return embed(self, images, *args, **options)

    monkeypatch.setattr(CompatibleBackbone, "encode_images", embed_until_killed)
    with pytest.raises(Killed):
        train_compatible_backbone(config)
    monkeypatch.setattr(CompatibleBackbone, "encode_images", embed)

    step = TrainingLoop._step

    def step_until_killed(self, batch):
        if self.state.step == 9:
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(TrainingLoop, "_step", step_until_killed)
    with pytest.raises(Killed):
        train_compatible_backbone(config)
    monkeypatch.setattr(TrainingLoop, "_step", step)
    continued = train_compatible_backbone(config)

    ours = continued.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    assert any("running_var" in name for name in ours)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("method", "dims"), [("bct", [12, 12, 12]), ("oca", [12, 16, 20]), ("bt2", [12, 16, 20])]
)
def test_a_chain_of_three_versions(world, tmp_path, method, dims):
    """Each version is compatible with the whole vectors of the one before, and so with all before it."""
    first = CompatibleBackbone.from_pretrained(world / "old/model")
    versions, directory = [first], world / "old/model"
    for number in (1, 2):
        changes = {"old": str(directory), "extra_dims": 0 if method == "bct" else 4, "epochs": 1}
        config = settings(world, f"v{number}", method, out=tmp_path, **changes)
        versions.append(train_compatible_backbone(config))
        directory = tmp_path / f"v{number}/model"
    assert [version.dim for version in versions] == dims
    assert [version.old_dim for version in versions] == [0, *dims[:-1]]
    for version, before in zip(versions[1:], versions, strict=False):
        assert version.old_space.same_as(before.space)


def test_a_corrupt_image_is_named_counted_and_left_out(world, tmp_path):
    labelled.write_folders(tmp_path / "data", classes=6, train=6, test=3)
    (tmp_path / "data/train/class_2/001.png").write_bytes(b"no picture")
    (tmp_path / "data/test/class_3/002.png").write_bytes(b"")
    config = settings(tmp_path, "run", "oca", old=str(world / "old/model"), extra_dims=4, epochs=1)
    with pytest.warns(UserWarning, match="skipped") as caught:
        train_compatible_backbone(config)
    messages = [str(each.message) for each in caught if "skipped" in str(each.message)]
    assert messages[0].startswith("skipped 1 of 36 training images: image class_2/001.png cannot be decoded")
    assert messages[1].startswith("skipped 1 of 18 test images: image class_3/002.png cannot be decoded")
    result = result_of(config)
    assert (result["train_images"], result["evaluation"]["n_images"]) == (35, 17)


def test_a_class_without_images_takes_no_part(world, tmp_path):
    labelled.write_folders(tmp_path / "data", classes=6, train=6, test=3)
    for path in (tmp_path / "data/train/class_5").iterdir():
        path.unlink()
    config = settings(tmp_path, "run", "oca", old=str(world / "old/model"), extra_dims=4, epochs=1)
    with pytest.warns(UserWarning, match="1 of 6 classes have no sample and so no prototype: 5"):
        train_compatible_backbone(config)
    assert result_of(config)["evaluation"]["cells"]["new/old"]["mAP"] > 0


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("bct", {"old": None}, "--method bct needs --old"),
        ("bt2", {"independent": None}, "--method bt2 needs --independent.*or set --weights.new 0"),
        ("independent", {"old": "x"}, "--old x was given, but an independent model is trained without"),
        ("independent", {"extra_dims": 3}, "--extra_dims 3 was given, but an independent model has none"),
        ("oca", {"independent": "x", "test": None}, "--independent x is needed by oca only to measure"),
        (
            "oca",
            {"weights": LossWeights(new=1.0)},
            r"--weights.new is no part of the loss of oca \(it has cl",
        ),
        ("independent", {"weights": LossWeights(old=1.0)}, r"--weights.old is no part .* \(it has none\)"),
        (
            "bct",
            {"weights": LossWeights(influence=-1.0)},
            "--weights.influence must be a number of at least 0",
        ),
        ("bct", {"weights": LossWeights(influence=0.0, classification=0.0)}, "are all 0; raise one"),
        ("bct", {"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ("bct", {"new_dim": 0}, "--new_dim must be at least 1, got 0"),
        ("bct", {"new_dim": 8}, "raise extra_dims to at least 4"),
        (
            "bt2",
            {"extra_dims": 13},
            "--extra_dims 13 is more than BT² can use.* the smaller of --new_dim 12 and the old model's 12",
        ),
        ("bt2", {"new_dim": 10}, "has vectors of 12 dimensions, but --new_dim is 10"),
        ("oca", {"output_dir": " "}, "--output_dir is missing"),
        ("oca", {"embed_batch_size": 0}, "--embed_batch_size must be at least 1"),
        ("oca", {"backbone": "resnet"}, "'resnet' is not a backbone"),
    ],
)
def test_refusals(world, tmp_path, method, changes, words):
    with pytest.raises(ConfigError, match=words):
        train_compatible_backbone(settings(world, "run", method, out=tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_models_and_data_that_do_not_fit(world, tmp_path):
    with pytest.raises(SavedPartError, match="nowhere"):
        train_compatible_backbone(settings(world, "run", "oca", out=tmp_path, old=str(tmp_path / "nowhere")))
    with pytest.raises(
        DataError, match=r"--independent .*old/model has 3 classes, but --data has 6; give both the same"
    ):
        train_compatible_backbone(
            settings(world, "run", "bt2", out=tmp_path, independent=str(world / "old/model"))
        )
    labelled.write_folders(tmp_path / "other", classes=5)
    test = LabelledSource(str(tmp_path / "other"), split="test")
    with pytest.raises(DataError, match=r"--test .*other has 5 classes, but --data has 6"):
        train_compatible_backbone(settings(world, "run", "oca", out=tmp_path, test=test))
    (tmp_path / "other/test/class_4").rename(tmp_path / "other/test/klasse_4")
    (tmp_path / "other/test/class_5").mkdir()
    with pytest.raises(DataError, match="has the class 'class_5' as number 4, but --data has 'class_4'"):
        train_compatible_backbone(settings(world, "run", "oca", out=tmp_path, test=test))
    few = LabelledSource(str(world / "data"), split="train", limit=10)
    with pytest.raises(DataError, match=r"there are 10 training images, fewer than --training.batch_size 16"):
        train_compatible_backbone(settings(world, "run", "oca", out=tmp_path, data=few))
    assert not (tmp_path / "run").exists()


def test_bt2_without_the_independent_model(world, tmp_path):
    config = settings(
        world,
        "run",
        "bt2",
        out=tmp_path,
        extra_dims=4,
        independent=None,
        weights=LossWeights(new=0.0),
        epochs=1,
    )
    train_compatible_backbone(config)
    assert "independent/independent" not in result_of(config)["evaluation"]["cells"]


def test_weights_are_those_of_the_papers():
    assert LossWeights().of("independent") == {}
    assert LossWeights().of("bct") == {"influence_weight": 10.0, "classification_weight": 1.0}
    assert LossWeights(new=5.0).of("bt2") == {
        "classification_weight": 1.0, "new_weight": 5.0, "influence_weight": 10.0, "old_weight": 5.0,
    }  # fmt: skip
    assert LossWeights().of("oca") == {
        "classification_weight": 5.0, "influence_weight": 10.0, "prototype_weight": 5.0,
    }  # fmt: skip
