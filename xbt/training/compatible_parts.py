"""What a run that trains a backbone starts from: the images, the models it learns from, the new model."""

from __future__ import annotations

import torch

from xbt.backbones import CompatibleBackbone, load_backbone
from xbt.data import LabelledImages, load_labelled
from xbt.errors import ConfigError, DataError
from xbt.training.args import BackboneTraining
from xbt.training.compatible_config import CompatibleBackboneConfig
from xbt.training.compatible_methods import make_method_head

TRAIN, TEST = "train", "test"


def load_images(config: CompatibleBackboneConfig) -> dict[str, LabelledImages]:
    """Opens the training and the test images; none is decoded.

    Raises:
        DataError: If they cannot be read, or are of other classes than each other.
    """
    images = {TRAIN: load_labelled(config.data)}
    if config.test is not None:
        images[TEST] = load_labelled(config.test)
        _require_same_classes(
            images[TRAIN].class_names, images[TEST].class_names, f"--test {config.test.source}", "--data"
        )
    require_enough(images[TRAIN], config.training)
    return images


def load_teachers(config: CompatibleBackboneConfig, train: LabelledImages) -> dict[str, CompatibleBackbone]:
    """Loads the models that are learned from or measured against: ``"old"`` and ``"independent"``.

    Raises:
        SavedPartError: If one is missing or damaged.
        ConfigError: If the independent model does not have the new model's dimension (for BT²).
        DataError: If it was trained on other classes than the new model shall be.
    """
    teachers: dict[str, CompatibleBackbone] = {}
    for name, source in (("old", config.old), ("independent", config.independent)):
        if source is not None:
            teachers[name] = CompatibleBackbone.from_pretrained(source).eval().requires_grad_(False)
    independent = teachers.get("independent")
    if independent is not None:
        classes = train.class_names[: train.n_classes]
        _require_same_classes(
            classes, independent.class_names, f"--independent {config.independent}", "--data"
        )
        if config.method == "bt2" and independent.dim != config.new_dim:
            raise ConfigError(
                f"--independent {config.independent} has vectors of {independent.dim} dimensions, but "
                f"--new_dim is {config.new_dim}; they must be the same for bt2"
            )
    return teachers


def make_backbone(
    config: CompatibleBackboneConfig, train: LabelledImages, old: CompatibleBackbone | None
) -> CompatibleBackbone:
    """Builds the model to be trained; its random weights depend on the seed alone.

    Raises:
        XbtError: If the architecture is not known, or its dimensions do not fit the old model's.
    """
    torch.manual_seed(config.training.seed)
    head = make_method_head(
        config.method,
        n_classes=train.n_classes,
        old_dim=0 if old is None else old.dim,
        new_dim=config.new_dim,
        extra_dims=config.extra_dims,
        scale=config.scale,
        orthogonal=config.orthogonal,
        orthogonal_map=config.orthogonal_map,
    )
    trunk = load_backbone(config.backbone, config.preprocessing.image_size, pretrained=config.pretrained)
    return CompatibleBackbone(
        trunk,
        head,
        config.preprocessing,
        train.class_names[: train.n_classes],
        old_space=None if old is None else old.space,
    )


def require_enough(train: LabelledImages, args: BackboneTraining) -> None:
    """Refuses a batch size that the images cannot fill.

    Raises:
        DataError: If there are fewer images than the batch size.
    """
    if len(train) < args.batch_size:
        raise DataError(
            f"there are {len(train)} training images, fewer than --training.batch_size {args.batch_size}; "
            "lower it or bring more images"
        )


def _require_same_classes(ours: list[str], theirs: list[str], what: str, where: str) -> None:
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        differ = f"{len(theirs)} classes, but {where} has {len(ours)}"
    else:
        number = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        differ = f"the class {theirs[number]!r} as number {number}, but {where} has {ours[number]!r}"
    raise DataError(f"{what} has {differ}; they must be of the same classes in the same order")
