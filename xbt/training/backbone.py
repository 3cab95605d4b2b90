"""Training of compatible backbones (BCT, BT², OCA) and of independent ones, the baseline.

A run loads images and teachers, embeds the images with the frozen teachers once, trains the backbone, and
measures old/old, new/old and new/new retrieval with criterion, update gain and compatibility tax.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xbt.backbones import CompatibleBackbone, load_backbone
from xbt.data import LabelledImages, load_labelled
from xbt.errors import ConfigError, DataError
from xbt.evaluation import compatibility_tax, evaluate_labels, prefix_vectors, update_gain
from xbt.heads import HeadLoss, Prototypes, Targets, class_prototypes
from xbt.run_dir import RunDirectory
from xbt.store.builder import StoreBuilder
from xbt.store.store import EmbeddingStore
from xbt.training.args import BackboneTraining
from xbt.training.batches import LabelledBatches, leave_out_unreadable
from xbt.training.cached_vectors import embed_split, list_digest, remove_other_vectors
from xbt.training.loop import TrainingLoop, make_accelerator
from xbt.training.methods import CompatibleBackboneConfig

TRAIN, TEST = "train", "test"


def load_images(config: CompatibleBackboneConfig) -> dict[str, LabelledImages]:
    """Open the training and the test images; none is decoded."""
    images = {TRAIN: load_labelled(config.data)}
    if config.test is not None:
        images[TEST] = load_labelled(config.test)
        _require_same_classes(
            images[TRAIN].class_names, images[TEST].class_names, f"--test {config.test.source}", "--data"
        )
    require_enough(images[TRAIN], config.training)
    return images


def load_teachers(config: CompatibleBackboneConfig, train: LabelledImages) -> dict[str, CompatibleBackbone]:
    """Load the teachers and baselines: ``"old"`` and ``"independent"``."""
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
    """Build the new model; its random weights depend only on the seed."""
    torch.manual_seed(config.training.seed)
    head = config.make_head(train.n_classes, 0 if old is None else old.dim)
    trunk = load_backbone(config.backbone, config.preprocessing.image_size, pretrained=config.pretrained)
    return CompatibleBackbone(
        trunk,
        head,
        config.preprocessing,
        train.class_names[: train.n_classes],
        old_space=None if old is None else old.space,
    )


def require_enough(train: LabelledImages, args: BackboneTraining) -> None:
    """Refuse a batch size that the images cannot fill."""
    if len(train) < args.batch_size:
        raise DataError(
            f"there are {len(train)} training images, fewer than --training.batch_size {args.batch_size}; "
            "lower it or add images"
        )


def _require_same_classes(ours: list[str], theirs: list[str], what: str, where: str) -> None:
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        differ = f"{len(theirs)} classes, but {where} has {len(ours)}"
    else:
        number = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        differ = f"the class {theirs[number]!r} as number {number}, but {where} has {ours[number]!r}"
    raise DataError(f"{what} has {differ}; give both the same classes in the same order")


METRICS = {"top1": "CMC top-1", "top5": "CMC top-5", "mAP": "mAP"}
_PAIRS = (
    ("old", "old"),
    ("new", "old"),
    ("new", "new"),
    ("independent", "old"),
    ("independent", "independent"),
)


@dataclass(frozen=True)
class BackboneReport:
    """Retrieval within a labelled test set; every image is a query, and all other images are its gallery.

    Attributes:
        cells: ``"query/gallery"`` → metric → value, fractions; old galleries are compared with the leading
            coordinates of new vectors.
        criterion: Metric → True if new/old is strictly better than old/old; empty without an old model.
        update_gain: Metric → (new/old − old/old) / (independent/independent − old/old), ``None`` where the
            independent model is not better than the old one; empty without these models.
        compatibility_tax: Metric → independent/independent − new/new; empty without an independent model.
        n_images: Number of test images.
    """

    cells: dict[str, dict[str, float]]
    criterion: dict[str, bool]
    update_gain: dict[str, float | None]
    compatibility_tax: dict[str, float]
    n_images: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return dict(vars(self))

    def format(self) -> str:
        """Format as a Markdown table in percent, with a line per other measure; no newline at the end."""
        lines = [f"| query/gallery | {' | '.join(METRICS.values())} |", f"|---|{'---:|' * len(METRICS)}"]
        for name, cell in self.cells.items():
            lines.append(f"| {name} | {' | '.join(f'{100 * cell[metric]:.1f}' for metric in METRICS)} |")
        lines += ["", f"- percent, over {self.n_images:,} images, each a query among all the others"]
        measures: list[tuple[str, Mapping[str, float | bool | None]]] = [
            ("criterion (new/old > old/old)", self.criterion),
            ("update gain", self.update_gain),
            ("compatibility tax, in points", self.compatibility_tax),
        ]
        for title, values in measures:
            if values:
                parts = ", ".join(
                    f"{METRICS[metric]} {_shown(value, title)}" for metric, value in values.items()
                )
                lines.append(f"- {title}: {parts}")
        return "\n".join(lines)


def measure_backbones(vectors: Mapping[str, Tensor], images: LabelledImages) -> BackboneReport:
    """Measure every cell with available vectors.

    Args:
        vectors: ``"new"`` and optionally ``"old"`` and ``"independent"`` → (n, dim) full vectors of the test
            images.
        images: The n test images, for their labels.
    """
    cells: dict[str, dict[str, float]] = {}
    ids = range(len(images))
    for query, gallery in _PAIRS:
        if query in vectors and gallery in vectors:
            queries, items = prefix_vectors(vectors[query], vectors[gallery])
            retrieval = evaluate_labels(
                queries, images.labels, items, images.labels, query_ids=ids, gallery_ids=ids, ks=(1, 5)
            )
            cells[f"{query}/{gallery}"] = retrieval.metrics()
    new, old = cells["new/new"], cells.get("old/old", {})
    across, best = cells.get("new/old", {}), cells.get("independent/independent", {})
    return BackboneReport(
        cells,
        {metric: across[metric] > old[metric] for metric in old},
        {metric: update_gain(across[metric], old[metric], best[metric]) for metric in old if best},
        {metric: compatibility_tax(best[metric], new[metric]) for metric in best},
        len(images),
    )


def _shown(value: float | bool | None, title: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "met" if value else "not met"
    return f"{100 * value:.1f}" + ("%" if "gain" in title else "")


SHARD_ROWS = 4096
"""Images per shard; a killed run repeats at most one shard per process."""


def embed_images_once(
    accelerator: Accelerator,
    backbone: CompatibleBackbone,
    images: LabelledImages,
    path: Path,
    batch_size: int = 64,
    num_workers: int = 0,
) -> EmbeddingStore:
    """Embed images into a store in the run's directory; continues an earlier, killed run.

    The images are preprocessed as for evaluation, without augmentation. Shards are split over the processes.

    Args:
        accelerator: The run's Accelerate object.
        backbone: The frozen model; its full vectors are stored.
        images: n images, all readable.
        path: The store's directory. A record beside it names the images and the model; vectors of others are
            replaced.
        batch_size: Images per forward pass.
        num_workers: Number of decoding processes per process of the run.

    Returns:
        The store of n float32 unit rows, with the images' ids.
    """
    builder = StoreBuilder(path, modality="image", space=backbone.space, dtype="float32")
    if accelerator.is_main_process:
        space = json.dumps(backbone.space.to_dict(), sort_keys=True)
        model = hashlib.sha256(space.encode("utf-8")).hexdigest()
        key = {"images": list_digest(images.ids), "count": len(images), "model": model}
        remove_other_vectors(path, key)
        builder.prepare()
    accelerator.wait_for_everyone()
    starts = range(0, len(images), SHARD_ROWS)
    names = {f"{number:06d}": start for number, start in enumerate(starts)}
    pending = [name for name in names if name not in builder.committed()]
    accelerator.wait_for_everyone()  # all must see the same list before one of them writes a shard
    for name in pending[accelerator.process_index :: accelerator.num_processes]:
        part = images.select(range(names[name], min(names[name] + SHARD_ROWS, len(images))))
        show = accelerator.is_main_process
        vectors = backbone.encode_images(
            part.images, batch_size=batch_size, progress=show, num_workers=num_workers
        )
        builder.write(name, vectors, part.ids)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        builder.finish(names)
    accelerator.wait_for_everyone()
    return EmbeddingStore.open(path)


_WHAT = {TRAIN: "training images", TEST: "test images"}


class BackboneObjective(nn.Module):
    """The method's loss over a batch of labelled images.

    Args:
        backbone: The model to train.
        loss: The loss over its output; see :mod:`xbt.heads`.
    """

    def __init__(self, backbone: CompatibleBackbone, loss: HeadLoss) -> None:
        super().__init__()
        self.backbone, self.loss = backbone, loss

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts for ``{"pixels", "labels"}`` and, for BT², ``{"old", "new"}``."""
        targets = Targets(batch["labels"], batch.get("old"), batch.get("new"))
        loss, parts = self.loss(self.backbone(batch["pixels"]), targets)
        return loss, parts


def train_compatible_backbone(config: CompatibleBackboneConfig) -> CompatibleBackbone:
    """Train a backbone, save it, and measure it if there are test images.

    The last step is kept, as in the papers: the test images select nothing.

    Args:
        config: The settings.

    Returns:
        The backbone on the CPU in evaluation mode.

    Raises:
        XbtError: If the data, a model or a setting cannot be used.

    Warns:
        UserWarning: If images are left out because they cannot be decoded, or a class has no image.
    """
    run = RunDirectory(config.output_dir, config, config.overwrite)
    images = load_images(config)
    teachers = load_teachers(config, images[TRAIN])
    backbone = make_backbone(config, images[TRAIN], teachers.get("old"))
    accelerator = make_accelerator(config.training, run, config, "train_compatible_backbone")
    for split, listed in images.items():
        record = run.path / "images" / f"{split}.json"
        images[split] = leave_out_unreadable(accelerator, listed, record, _WHAT[split])
    require_enough(images[TRAIN], config.training)
    stores = embed_with_teachers(accelerator, run, config, images, teachers)
    result = _train(accelerator, run, config, backbone, images[TRAIN], stores)
    if accelerator.is_main_process:
        backbone.save_pretrained(run.path / "model")
    accelerator.wait_for_everyone()
    if TEST in images:
        vectors = _test_vectors(accelerator, config, backbone, images[TEST], stores)
        if accelerator.is_main_process:  # the others have nothing left to do and do not wait
            report = measure_backbones(vectors, images[TEST])
            run.write_json("result.json", {**result, "evaluation": report.to_dict()})
            (run.path / "report.md").write_text(report.format() + "\n", encoding="utf-8")
            print(report.format())
    return backbone.cpu().eval()


def embed_with_teachers(
    accelerator: Accelerator,
    run: RunDirectory,
    config: CompatibleBackboneConfig,
    images: dict[str, LabelledImages],
    teachers: dict[str, CompatibleBackbone],
) -> dict[str, EmbeddingStore]:
    """Embed the images with every frozen model, one model on the device at a time.

    Returns:
        ``"old_train"``, ``"independent_test"``, ... → the store.
    """
    stores: dict[str, EmbeddingStore] = {}
    for name, teacher in teachers.items():
        teacher.to(accelerator.device)
        for split, split_images in images.items():
            if split == TRAIN and name == "independent" and config.method != "bt2":
                continue
            stores[f"{name}_{split}"] = embed_images_once(
                accelerator,
                teacher,
                split_images,
                run.path / "vectors" / f"{name}_{split}",
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
    objective: nn.Module = BackboneObjective(backbone, config.make_loss(prototypes))
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
