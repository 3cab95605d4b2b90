"""The compatible backbones on real images: small networks, the old one on the first half of the classes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from compatible_worlds import Values, cells
from torch import Tensor

from xbt.backbones import ImagePreprocessing
from xbt.data import LabelledSource, load_labelled
from xbt.projections import fit_projection
from xbt.store import EmbeddingStore
from xbt.training import (
    BackboneTraining,
    CompatibleBackboneConfig,
    LossWeights,
    train_compatible_backbone,
)


@dataclass
class ImagesConfig:
    """A labelled data set of Hugging Face's on disk, with the splits train and test."""

    source: str | None = None
    """Its directory; without one the images are left out."""
    train_split: str = "train"
    """The split to train on."""
    test_split: str = "test"
    """The split to measure on."""
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    """One set of models per seed."""
    old_classes: int = 50
    """The old model knows the first so many classes."""
    backbone: str = "small_resnet"
    """Every model's architecture."""
    image_size: int = 32
    """Side of the images in pixels."""
    dim: int = 128
    """Dimension of the vectors."""
    extra_dims: int = 32
    """Extra dimensions of BT² and OCA."""
    new_weight: float = 5.0
    """BT²'s λ1; the paper's 1 underfits on small data."""
    oca_weight: float = 1.0
    """OCA's classification weight in a row of its own; the authors have 5."""
    epochs: int = 30
    """Epochs of every model."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    num_workers: int = 0
    """Processes that load images."""
    precision: str = "bf16"
    """Precision of the training: bf16 (autocast; the heads stay in float32) or no."""
    runs_dir: str = "runs/benchmarks/compatible_images"
    """Folder of the models; existing ones are reused."""

    def describe(self) -> str:
        """Describe the table in a sentence."""
        precision = "bf16 autocast" if self.precision == "bf16" else "float32"
        return (
            f"{Path(self.source or '').name}: {self.backbone}, {self.image_size}×{self.image_size} pixels, "
            f"{self.dim} dimensions and {self.extra_dims} extra ones, {self.epochs} epochs in {precision}; "
            f"the old model knows {self.old_classes} classes."
        )


def image_cells(config: ImagesConfig, seed: int) -> dict[str, Values]:
    """Every method on one upgrade, by name: top-1 and mAP of old/old, new/old and new/new."""
    # What `accelerate launch --mixed_precision` sets for the processes that it starts.
    os.environ["ACCELERATE_MIXED_PRECISION"] = config.precision
    out = Path(config.runs_dir) / f"seed_{seed}"
    old = _train(config, seed, out / "old", method="independent", classes=config.old_classes)
    independent = _train(config, seed, out / "independent", method="independent")
    weights = LossWeights(new=config.new_weight)
    lighter = LossWeights(classification=config.oca_weight)
    paths = {
        "BCT": _train(config, seed, out / "bct", method="bct", old=old),
        f"BT², λ1 = {config.new_weight:g}": _train(
            config, seed, out / "bt2", method="bt2", old=old, independent=independent, weights=weights
        ),
        "OCA": _train(config, seed, out / "oca", method="oca", old=old),
        f"OCA, classification weight {config.oca_weight:g}": _train(
            config, seed, out / "oca_lighter", method="oca", old=old, weights=lighter
        ),
    }
    found = {name: _measured(Path(path).parent) for name, path in paths.items()}
    found = {"independent": _measured(out / "bt2", "independent"), **found}
    return {**found, "procrustes": _procrustes(config, out / "bt2")}


def _train(config: ImagesConfig, seed: int, out: Path, classes: int | None = None, **options: object) -> str:
    """Train one model unless it exists, and return its folder."""
    assert config.source is not None
    source = LabelledSource(config.source, split=config.train_split, classes=classes)
    extra = None if options["method"] in ("independent", "bct") else config.extra_dims
    settings = CompatibleBackboneConfig(
        backbone=config.backbone,
        data=source,
        test=LabelledSource(config.source, split=config.test_split),
        output_dir=str(out),
        new_dim=config.dim,
        extra_dims=extra,
        orthogonal_map="cayley",
        preprocessing=ImagePreprocessing(image_size=config.image_size, augmentation="crop_flip"),
        training=BackboneTraining(
            epochs=config.epochs,
            warmup_epochs=1,
            batch_size=config.batch_size,
            lr=config.lr,
            weight_decay=3.05e-5,
            seed=1000 * seed + sum(map(ord, out.name)),
            num_workers=config.num_workers,
        ),
        **options,  # type: ignore[arg-type]
    )
    if not _finished(out):
        train_compatible_backbone(settings)
    return str(out / "model")


def _finished(out: Path) -> bool:
    result = out / "result.json"
    return result.is_file() and "evaluation" in json.loads(result.read_text(encoding="utf-8"))


def _measured(out: Path, new: str = "new") -> Values:
    """Measured values of a run, for its own model or for the independent one that it learned from."""
    evaluation = json.loads((out / "result.json").read_text(encoding="utf-8"))["evaluation"]
    names = {"top1": "top-1", "mAP": "mAP"}
    cells = {"old/old": "old/old", "new/old": f"{new}/old", "new/new": f"{new}/{new}"}
    return {
        f"{names[metric]} {cell}": value
        for cell, measured in cells.items()
        for metric, value in evaluation["cells"][measured].items()
        if metric in names
    }


def _procrustes(config: ImagesConfig, out: Path) -> Values:
    """The independent model behind a rotation that its vectors of the training images give."""
    vectors: dict[str, Tensor] = {
        name: torch.from_numpy(EmbeddingStore.open(out / "vectors" / name).read())
        for name in ("old_train", "old_test", "independent_train", "independent_test")
    }
    rotation = fit_projection(vectors["independent_train"], vectors["old_train"])
    assert config.source is not None
    labels = load_labelled(replace(LabelledSource(config.source), split=config.test_split)).labels
    new = vectors["independent_test"]
    with torch.no_grad():
        return cells(vectors["old_test"], rotation(new), new, labels)
