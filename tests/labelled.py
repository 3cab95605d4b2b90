"""Small labelled data sets for tests, on disk in public formats."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def draw(label: int, number: int, size: int = 16) -> Image.Image:
    """Draw a noisy image of a class, with the colour and stripe of the class."""
    own, random = np.random.default_rng(label), np.random.default_rng((label, number))
    pixels = np.tile(own.integers(60, 200, 3), (size, size, 1)).astype(float)
    stripe = own.integers(0, size - 3)
    pixels[:, stripe : stripe + 3] = own.integers(0, 255, 3)
    pixels += random.normal(0, 25, pixels.shape) + random.normal(0, 20)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_folders(root: Path, classes: int = 4, train: int = 12, test: int = 4, size: int = 16) -> Path:
    """``root/train/class_0/0.png``, ...; training and test images differ."""
    for split, first, count in (("train", 0, train), ("test", 1000, test)):
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                draw(label, first + number, size).save(folder / f"{number:03d}.png")
    return root


def write_cifar100(root: Path, train: int = 200, test: int = 60) -> Path:
    """Parquet files as of uoft-cs/cifar100: ``img``, ``fine_label`` (100 classes), ``coarse_label`` (20)."""
    fine = datasets.ClassLabel(names=[f"fine_{number}" for number in range(100)])
    coarse = datasets.ClassLabel(names=[f"coarse_{number}" for number in range(20)])
    features = datasets.Features({"img": datasets.Image(), "fine_label": fine, "coarse_label": coarse})
    (root / "cifar100").mkdir(parents=True)
    for split, count, first in (("train", train, 0), ("test", test, 1000)):
        # Twenty classes on both sides of 50, where the old model's classes end.
        labels = [5 * (number % 20) for number in range(count)]
        rows = {
            "img": [_png(draw(label, first + number, 32)) for number, label in enumerate(labels)],
            "fine_label": labels,
            "coarse_label": [label // 5 for label in labels],
        }
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(root / "cifar100" / f"{split}-00000-of-00001.parquet")
    _write_card(root, "cifar100", {"train": "cifar100/train-*", "test": "cifar100/test-*"})
    return root


def write_imagenet(root: Path, train: int = 200, validation: int = 60, size: int = 48) -> Path:
    """Parquet files as of ILSVRC/imagenet-1k: ``image`` (JPEG) and ``label`` of 1000 classes, in shards."""
    names = datasets.ClassLabel(names=[f"n{number:08d}" for number in range(1000)])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    (root / "data").mkdir(parents=True)
    for split, count, first in (("train", train, 0), ("validation", validation, 1000)):
        for shard in range(2):
            numbers = range(shard * count // 2, (shard + 1) * count // 2)
            labels = [50 * (number % 20) for number in numbers]
            pictures = [draw(label, first + n, size) for n, label in zip(numbers, labels, strict=True)]
            pictures = [image.resize((size + 16, size)) for image in pictures]  # not square, as in ImageNet
            rows = {"image": [_jpeg(each) for each in pictures], "label": labels}
            made = datasets.Dataset.from_dict(rows, features=features)
            made.to_parquet(root / "data" / f"{split}-{shard:05d}-of-00002.parquet")
    _write_card(root, "default", {"train": "data/train-*", "validation": "data/validation-*"})
    return root


SETS = {"cifar100": (write_cifar100, 50, 100), "imagenet": (write_imagenet, 500, 1000)}
"""Data sets of the papers: writer of a small version, number of old classes, number of all classes."""


def paper(name, role, root, out, *flags):
    """The command line of a shipped config, with a small backbone, small images and the local files."""
    arguments = [
        str(ROOT / "recipes/train_compatible_backbone.py"),
        "--config", f"recipes/configs/compatible_{name}_{role}.yaml",
        "--data.root", str(root), "--test.root", str(root), "--output_dir", str(out / role),
        "--backbone", "small_resnet", "--preprocessing.image_size", "32",
        "--training.epochs", "1", "--training.num_workers", "0", "--training.batch_size", "40",
    ]  # fmt: skip
    if role not in ("old", "independent"):
        arguments += ["--old", str(out / "old/model"), "--independent", str(out / "independent/model")]
    return [*arguments, *flags]


def _png(image: Image.Image) -> dict[str, object]:
    return {"bytes": _encoded(image, "PNG"), "path": None}


def _jpeg(image: Image.Image) -> dict[str, object]:
    return {"bytes": _encoded(image, "JPEG"), "path": "n00000000_1.JPEG"}


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _write_card(root: Path, name: str, files: dict[str, str]) -> None:
    lines = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    for split, path in files.items():
        lines += [f"  - split: {split}", f"    path: {path}"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))
