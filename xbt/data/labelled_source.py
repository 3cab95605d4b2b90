"""Where images with classes come from: what a backbone is trained and judged on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from xbt.data.captions import check_source
from xbt.data.class_labels import HubColumns, Labelled, read_class_folders, read_hub_labels
from xbt.data.hf_folders import HUB_PREFIX
from xbt.data.image_text_pairs import SelectedImages, choose_subset
from xbt.data.labelled_images import LabelledImages
from xbt.errors import ConfigError, DataError

PRESETS: dict[str, tuple[str, HubColumns]] = {
    "cifar100": ("hf:uoft-cs/cifar100", HubColumns("img", "fine_label")),
    "imagenet-1k": ("hf:ILSVRC/imagenet-1k", HubColumns("image", "label")),
}
"""Data sets known by name: where the Hub has them, and their columns."""


@dataclass
class LabelledSource:
    """Where images with classes come from, and which part of them is taken.

    First the classes are chosen, then the fraction of each class, then the limit; the order stays the
    source's.

    Raises:
        ConfigError: If ``source`` is empty, a number is out of range, or an option does not apply to this
            kind of source.
    """

    source: str
    """cifar100; imagenet-1k (its Hub repository is gated: accept the terms there and log in, or give root);
    hf: and a Hub data set or a local directory; or a local directory, with a folder for every class or with
    the files of a Hub data set."""
    root: str | None = None
    """Local directory that holds the files of cifar100 or imagenet-1k, so that nothing is downloaded."""
    split: str | None = None
    """Split to read; in a directory of class folders, the folder below it that holds them."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    image_column: str | None = None
    """Column that holds the image; where none is named, the only one that holds images."""
    label_column: str | None = None
    """Column that holds the class; where none is named, the only one of classes, or label."""
    classes: int | None = None
    """Take only the first so many classes, in the data set's own order (a class split)."""
    fraction: float | None = None
    """Take only this part of every class, at least one image, chosen with the seed (a data split); the choice
    for a smaller fraction is part of the one for a larger."""
    limit: int | None = None
    """Take only so many images in all, chosen at random with the seed."""
    seed: int = 0
    """Seed of these choices."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_source(self.source, self.limit)
        if self.classes is not None and self.classes < 1:
            raise ConfigError(f"classes is {self.classes}, but must be at least 1; leave it out to take all")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}, but must lie above 0 and be at most 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but must not be negative")
        if self.root is not None and self.source not in PRESETS:
            raise ConfigError(
                f"root {self.root!r} was given with {self.source}, but only {' and '.join(PRESETS)} have "
                "one; make the directory the source"
            )


def load_labelled(source: LabelledSource | str) -> LabelledImages:
    """Opens images with classes; none is decoded.

    Args:
        source: What to read; a plain string stands for ``LabelledSource(string)``.

    Returns:
        The selected images. Labels are the data set's own numbers; where classes are folders or words, their
        rank in alphabetical order.

    Raises:
        ConfigError: If an option does not apply to this kind of source.
        DataError: If the source cannot be read or holds no image, a label is missing or no class of the data
            set, or more classes are asked for than there are; the message names the place and the fix.

    Example:
        >>> load_labelled("flowers/")
        >>> load_labelled(LabelledSource("imagenet-1k", split="train", classes=500))
    """
    if isinstance(source, str):
        source = LabelledSource(source)
    ids, images, labels, class_names = _read(source)
    total = len(class_names)
    if source.classes is not None and source.classes > total:
        raise DataError(
            f"classes is {source.classes}, but {source.source} has only {total}; ask for at most that many"
        )
    n_classes = source.classes or total
    rows = _choose(labels, n_classes, source)
    if not len(rows):
        raise DataError(f"{source.source} holds no image of its first {n_classes} classes; take more classes")
    if len(rows) == len(labels):
        return LabelledImages(ids, images, torch.from_numpy(labels), class_names, n_classes)
    chosen = rows.tolist()
    return LabelledImages(
        [ids[row] for row in chosen],
        SelectedImages(images, chosen),
        torch.from_numpy(labels[rows]),
        class_names,
        n_classes,
    )


def _read(source: LabelledSource) -> Labelled:
    name, usual = PRESETS.get(source.source, (source.source, HubColumns(None, None)))
    if source.root is not None:
        name = source.root
    directory = Path(name).expanduser()
    if not name.startswith(HUB_PREFIX) and not directory.is_dir():
        raise DataError(
            f"{name} is no directory; give a directory of class folders or of parquet files, hf: and a data "
            f"set, or one of {', '.join(PRESETS)}"
        )
    if name.startswith(HUB_PREFIX) or _holds_dataset(directory):
        columns = HubColumns(source.image_column or usual.image, source.label_column or usual.label)
        return read_hub_labels(name, source.subset, source.split, columns)
    for option in ("subset", "image_column", "label_column"):
        value = getattr(source, option)
        if value is not None:
            raise ConfigError(
                f"{option} {value!r} was given with {name}, a directory of class folders, which has no such "
                "option; leave it out"
            )
    return read_class_folders(directory, source.split)


def _holds_dataset(directory: Path) -> bool:
    """Whether a directory holds a data set's files, and not class folders."""
    names = ("state.json", "dataset_dict.json")
    return any((directory / name).exists() for name in names) or any(
        next(directory.glob(pattern), None) is not None for pattern in ("*.parquet", "*/*.parquet")
    )


def _choose(labels: NDArray[np.int64], n_classes: int, source: LabelledSource) -> NDArray[np.int64]:
    """The rows that are taken, ascending."""
    kept = labels < n_classes
    if source.fraction is not None:
        for label in np.unique(labels[kept]):
            members = np.flatnonzero(labels == label)
            count = max(1, round(source.fraction * len(members)))
            # Drawn by class and cut from one order: neither other classes nor the fraction change it.
            order = np.random.default_rng([source.seed, int(label)]).permutation(len(members))
            kept[members[order[count:]]] = False
    rows = np.flatnonzero(kept)
    return rows[choose_subset(len(rows), source.limit, source.seed)]
