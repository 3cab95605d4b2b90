"""Backbones that are born compatible (BCT, BT², OCA), and the independent ones they are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xbt.backbones import CompatibleBackbone
from xbt.data import LabelledImages
from xbt.heads import HeadLoss, Prototypes, Targets, class_prototypes
from xbt.run_dir import RunDirectory
from xbt.store import EmbeddingStore
from xbt.training.compatible_cells import BackboneReport, measure_backbones
from xbt.training.compatible_config import CompatibleBackboneConfig
from xbt.training.compatible_methods import make_method_loss
from xbt.training.compatible_parts import (
    TEST,
    TRAIN,
    load_images,
    load_teachers,
    make_backbone,
    require_enough,
)
from xbt.training.embedding import embed_split
from xbt.training.labelled_batches import LabelledBatches, leave_out_unreadable
from xbt.training.loop import TrainingLoop, make_accelerator
from xbt.training.teachers import embed_images_once

_WHAT = {TRAIN: "training images", TEST: "test images"}


class BackboneObjective(nn.Module):
    """The method's loss over a batch of labelled images.

    Args:
        backbone: What is trained.
        loss: The loss over its output; see :mod:`xbt.heads`.
    """

    def __init__(self, backbone: CompatibleBackbone, loss: HeadLoss) -> None:
        super().__init__()
        self.backbone, self.loss = backbone, loss

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts for ``{"pixels", "labels"}`` and, for BT², ``{"old", "new"}``."""
        targets = Targets(batch["labels"], batch.get("old"), batch.get("new"))
        loss, parts = self.loss(self.backbone(batch["pixels"]), targets)
        return loss, parts


def train_compatible_backbone(config: CompatibleBackboneConfig) -> CompatibleBackbone:
    """Trains a backbone, saves it, and measures it if there are test images.

    The last step is kept, as in the papers: nothing is chosen by the test images.

    Args:
        config: What to do.

    Returns:
        The backbone on the CPU in evaluation mode.

    Raises:
        XbtError: If the data, a model or a setting cannot be used.

    Warns:
        UserWarning: If images were left out because they cannot be decoded, or a class has no image.
    """
    run = RunDirectory(config.output_dir, config, config.overwrite)
    images = load_images(config)
    teachers = load_teachers(config, images[TRAIN])
    backbone = make_backbone(config, images[TRAIN], teachers.get("old"))
    accelerator = make_accelerator(config.training, run, config, "train_compatible_backbone")
    for part, found in images.items():
        record = run.path / "images" / f"{part}.json"
        images[part] = leave_out_unreadable(accelerator, found, record, _WHAT[part])
    require_enough(images[TRAIN], config.training)
    stores = embed_with_teachers(accelerator, run, config, images, teachers)
    result = _train(accelerator, run, config, backbone, images[TRAIN], stores)
    if accelerator.is_main_process:
        backbone.save_pretrained(run.path / "model")
    accelerator.wait_for_everyone()
    if TEST in images:
        vectors = _test_vectors(accelerator, config, backbone, images[TEST], stores)
        if accelerator.is_main_process:  # the others have nothing left to do, and need not wait
            _write_report(run, measure_backbones(vectors, images[TEST]), result)
    return backbone.cpu().eval()


def embed_with_teachers(
    accelerator: Accelerator,
    run: RunDirectory,
    config: CompatibleBackboneConfig,
    images: dict[str, LabelledImages],
    teachers: dict[str, CompatibleBackbone],
) -> dict[str, EmbeddingStore]:
    """Embeds with every frozen model what is needed of it, one model on the device at a time.

    Returns:
        ``"old_train"``, ``"independent_test"``, ... → the store.
    """
    stores: dict[str, EmbeddingStore] = {}
    for name, teacher in teachers.items():
        teacher.to(accelerator.device)
        for part, found in images.items():
            if part == TRAIN and name == "independent" and config.method != "bt2":
                continue
            stores[f"{name}_{part}"] = embed_images_once(
                accelerator,
                teacher,
                found,
                run.path / "vectors" / f"{name}_{part}",
                config.embed_batch_size,
                config.training.num_workers,
            )
        teacher.cpu()
    return stores


def _train(
    accelerator: Accelerator,
    run: RunDirectory,
    config: CompatibleBackboneConfig,
    backbone: CompatibleBackbone,
    train: LabelledImages,
    stores: dict[str, EmbeddingStore],
) -> dict[str, Any]:
    prototypes: Prototypes | None = None
    if "old_train" in stores:
        prototypes = class_prototypes(stores["old_train"], train.labels, train.n_classes)
    loss = make_method_loss(config.method, config.weights, config.label_smoothing, prototypes)
    objective: nn.Module = BackboneObjective(backbone, loss)
    if config.sync_batchnorm and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # type: ignore[no-untyped-call]
    named = {"old": "old_train", "new": "independent_train"} if config.method == "bt2" else {}
    per_image = {key: stores[name] for key, name in named.items() if name in stores}
    loop = TrainingLoop(
        accelerator,
        run,
        config.training.in_steps(len(train)),
        objective,
        LabelledBatches(train, config.preprocessing, config.training.seed, per_image),
        no_decay=backbone.head.no_decay,
    )
    loop.fit()
    backbone.eval().invalidate_space()
    return {
        **loop.result(),
        "method": config.method,
        "n_classes": train.n_classes,
        "train_images": len(train),
        "old_dim": backbone.old_dim,
        "out_dim": backbone.dim,
    }


def _test_vectors(
    accelerator: Accelerator,
    config: CompatibleBackboneConfig,
    backbone: CompatibleBackbone,
    test: LabelledImages,
    stores: dict[str, EmbeddingStore],
) -> dict[str, Tensor]:
    def embed(rows: Sequence[int]) -> Tensor:
        if not rows:  # more processes than images
            return torch.zeros(0, backbone.dim)
        return backbone.encode_images(
            test.select(rows).images,
            batch_size=config.embed_batch_size,
            progress=accelerator.is_main_process,
            num_workers=config.training.num_workers,
        )

    vectors = {"new": embed_split(accelerator, range(len(test)), embed)}
    for name in ("old", "independent"):
        if f"{name}_{TEST}" in stores:
            vectors[name] = torch.from_numpy(stores[f"{name}_{TEST}"].read())
    return vectors


def _write_report(run: RunDirectory, report: BackboneReport, result: dict[str, Any]) -> None:
    run.write_json("result.json", {**result, "evaluation": report.to_dict()})
    (run.path / "report.md").write_text(report.format() + "\n", encoding="utf-8")
    print(report.format())
