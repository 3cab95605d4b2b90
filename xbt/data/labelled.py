"""Images with one class label each, from class folders or Hugging Face data sets: data for backbones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.data.files import check_source, refuse_options
from xbt.data.hf_folders import HUB_PREFIX, was_saved
from xbt.data.huggingface import HubImages, check_column, open_dataset, read_column, read_ids
from xbt.data.image_folder import JoinedPaths, is_hidden, list_images
from xbt.data.items import SelectedImages, choose_subset
from xbt.data.pairs import ImagesWithIds
from xbt.errors import ConfigError, DataError
from xbt.images import ImageSource

SPLIT_FOLDERS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing"])
"""Folder names that are read as splits if a directory holds no other folders."""
_MAX_CLASSES = 1 << 20
"""Number of classes above which a column of numbers is no column of classes."""


class LabelledImages(ImagesWithIds):
    """Images with one class each; images are read on access.

    Args:
        ids: One unique name per image: the path below the folder, or ``"row-17"`` for a Hub data set.
        images: One path, PIL image or encoded image each; indexed only when an image is read.
        labels: One class per image, from 0 to ``n_classes - 1``; the attribute is an (n,) int64 tensor.
        class_names: Names of all classes of the data set, including those without a selected image.
        n_classes: Number of classes in the selection, such as 50 for the first 50 of 100 classes; all by
            default.

    Raises:
        DataError: If the lengths differ, there is no image, an id occurs twice, or a label is out of range.

    Example:
        >>> images = load_labelled(LabelledSource("cifar100", split="train", classes=50))
        >>> len(images), images.n_classes, images.total_classes
        (25000, 50, 100)
    """

    def __init__(
        self,
        ids: Sequence[str],
        images: Sequence[ImageSource],
        labels: Tensor | Sequence[int],
        class_names: Sequence[str],
        n_classes: int | None = None,
    ) -> None:
        super().__init__("labelled images", ids, images, labels=labels)
        values = torch.as_tensor(labels)
        if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
            raise DataError(
                f"labels must be one integer per image, got {values.dtype} of shape {tuple(values.shape)}"
            )
        self.n_classes = len(class_names) if n_classes is None else n_classes
        if not 1 <= self.n_classes <= len(class_names):
            raise DataError(
                f"n_classes is {self.n_classes}, but there are {len(class_names)} class names; give all names"
            )
        self.labels = values.to(torch.int64)
        self.class_names = list(class_names)
        outside = torch.nonzero((self.labels < 0) | (self.labels >= self.n_classes)).flatten()
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"image {self.ids[row]!r} has the label {int(self.labels[row])}, but labels go from 0 to "
                f"{self.n_classes - 1}; leave it out, or read a split that has labels"
            )

    def __repr__(self) -> str:
        return f"LabelledImages({len(self)} images of {self.n_classes} of {self.total_classes} classes)"

    @property
    def total_classes(self) -> int:
        """Number of classes of the whole data set."""
        return len(self.class_names)

    def select(self, rows: Sequence[int]) -> LabelledImages:
        """Return some of the images in the given order; no image is read, and the classes do not change.

        Args:
            rows: Rows, not negative and without repetition.

        Raises:
            DataError: If there is no row, or one is out of range or occurs twice.
        """
        chosen = self._checked_rows(rows)
        return LabelledImages(
            [self.ids[row] for row in chosen],
            SelectedImages(self.images, chosen),
            self.labels[torch.tensor(chosen, dtype=torch.int64)],
            self.class_names,
            self.n_classes,
        )


Labelled = tuple[list[str], Sequence[ImageSource], NDArray[np.int64], list[str]]
"""Ids, unread images, (n,) class of each image, and the names of all classes."""


def read_class_folders(directory: Path, split: str | None) -> Labelled:
    """Read a directory with one folder per class; images may be in subfolders.

    Ids are paths relative to the parent of the class folders, which is ``directory`` or its folder ``split``.
    Classes are the folders in alphabetical order, including empty ones, so that splits with the same folders
    have the same classes.
    """
    folder = directory if split is None else directory / split
    if not folder.is_dir():
        raise DataError(f"{directory} has no folder {split!r}; it has {_listed(_folders(directory))}")
    classes = _folders(folder)
    if split is None and classes and {name.lower() for name in classes} <= SPLIT_FOLDERS:
        raise DataError(f"{folder} has the splits {_listed(classes)}; choose one with split")
    names = list_images(folder)
    number = {name: position for position, name in enumerate(classes)}
    labels = np.empty(len(names), dtype=np.int64)
    for row, name in enumerate(names):
        first, slash, _ = name.partition("/")
        if not slash:
            raise DataError(f"{folder / name} lies in no class folder; move it into the folder of its class")
        labels[row] = number[first]
    return names, JoinedPaths(folder, names), labels, classes


def _folders(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir() and not is_hidden(path.name))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def read_hub_labels(
    source: str, subset: str | None, split: str | None, image_column: str | None, label_column: str | None
) -> Labelled:
    """Read the classes of a Hugging Face data set; no image is decoded.

    Ids are ``"row-0"``, ... Class names are those of a ``ClassLabel`` column, the distinct strings of a
    string column in alphabetical order, or otherwise the numbers up to the largest label.
    """
    dataset = open_dataset(source, subset, split)
    image = _column(dataset, image_column, datasets.Image, "image", source)
    label = _column(dataset, label_column, datasets.ClassLabel, "label", source)
    labels, class_names = _labels(dataset, label, source)
    return read_ids(dataset, None, source), HubImages(dataset, image, source), labels, class_names


def _column(dataset: Any, chosen: str | None, kind: type, usual: str, source: str) -> str:
    """Return the chosen column, else the only column of the type, else the column with the usual name."""
    if chosen is not None:
        check_column(chosen, dataset.column_names, source)
        return chosen
    matches: list[str] = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(matches) == 1:
        return matches[0]
    if usual in dataset.column_names:
        return usual
    none = f"no such column among {_listed(dataset.column_names)}"
    what = f"the columns {_listed(matches)}" if matches else none
    raise DataError(f"{source} has {what} for the {usual}; choose one with {usual}_column")


def _labels(dataset: Any, column: str, source: str) -> tuple[NDArray[np.int64], list[str]]:
    feature = dataset.features[column]
    values = read_column(dataset, column, source)
    if not values:
        raise DataError(f"{source} is empty: it holds no image; give a source with images")
    if None in values:
        raise DataError(
            f"{source}, row {values.index(None)}: no class in the column {column!r}; leave such rows out"
        )
    dtype = str(getattr(feature, "dtype", feature))
    if dtype in ("string", "large_string"):
        names = sorted(set(values))
        number = {name: position for position, name in enumerate(names)}
        return np.array([number[value] for value in values], dtype=np.int64), names
    if "int" not in dtype:
        raise DataError(f"{source}: the column {column!r} holds {dtype}, not classes; name the label column")
    class_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    count = _MAX_CLASSES if class_names is None else len(class_names)
    row = next((row for row, value in enumerate(values) if not 0 <= value < count), None)
    if row is not None:  # checked as Python's numbers, before anything is allocated by them
        raise DataError(
            f"{source}, row {row}: the class in the column {column!r} is {values[row]}, but classes go from "
            f"0 to {max(count - 1, 0)}; read a split that has labels, or leave such rows out"
        )
    return np.array(values, dtype=np.int64), class_names or [str(number) for number in range(max(values) + 1)]


PRESETS = {
    "cifar100": ("hf:uoft-cs/cifar100", "img", "fine_label"),
    "imagenet-1k": ("hf:ILSVRC/imagenet-1k", "image", "label"),
}
"""Data sets with a short name: their Hub repository, image column and label column."""


@dataclass
class LabelledSource:
    """Source of labelled images, and the selection from it.

    The classes are selected first, then the fraction of each class, then the limit. The source's order is
    kept.

    Raises:
        ConfigError: If ``source`` is empty, a number is out of range, or an option does not apply to this
            kind of source.
    """

    source: str
    """cifar100; imagenet-1k (its Hub repository is gated: accept the terms there and log in, or give root);
    hf: and a Hub data set or a local directory; or a local directory with one folder per class or with the
    files of a Hub data set."""
    root: str | None = None
    """Local directory with the files of cifar100 or imagenet-1k; nothing is downloaded."""
    split: str | None = None
    """Split to read; in a local directory, the subfolder that holds the class folders."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    image_column: str | None = None
    """Column with the images; by default the only column of images."""
    label_column: str | None = None
    """Column with the classes; by default the only column of classes, or label."""
    classes: int | None = None
    """Take only this many classes, the first ones in the data set's order (a class split)."""
    fraction: float | None = None
    """Take only this fraction of every class, at least one image, drawn with the seed (a data split). The
    draw for a smaller fraction is a subset of the draw for a larger one."""
    limit: int | None = None
    """Maximum number of images; they are drawn at random with the seed."""
    seed: int = 0
    """Seed of the random draws."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_source(self.source, self.limit)
        if self.classes is not None and self.classes < 1:
            raise ConfigError(f"classes is {self.classes}, but must be at least 1; leave it out to take all")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}, but must be above 0 and at most 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but must not be negative")
        if self.source not in PRESETS:
            reason = f"but only {' and '.join(PRESETS)} have this option: give the directory as the source"
            refuse_options(self, ("root",), reason)


def load_labelled(source: LabelledSource | str) -> LabelledImages:
    """Open labelled images; none is decoded.

    Args:
        source: The source; a plain string means ``LabelledSource(string)``.

    Returns:
        The selected images. Labels are the data set's own numbers. For folders or strings, they are the
        positions in alphabetical order.

    Raises:
        ConfigError: If an option does not apply to this kind of source.
        DataError: If the source cannot be read or holds no image, a label is missing or out of range, or more
            classes are requested than exist; the message names the row and the fix.

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
            f"classes is {source.classes}, but {source.source} has only {total}; request at most that many"
        )
    n_classes = source.classes or total
    rows = _choose(labels, n_classes, source)
    if not len(rows):
        raise DataError(f"{source.source} holds no image of its first {n_classes} classes; take more classes")
    chosen = rows.tolist()
    return LabelledImages(
        [ids[row] for row in chosen],
        SelectedImages(images, chosen),
        torch.from_numpy(labels[rows]),
        class_names,
        n_classes,
    )


def _read(source: LabelledSource) -> Labelled:
    name, *preset = PRESETS.get(source.source, (source.source, None, None))
    name = str(name if source.root is None else source.root)
    directory = Path(name).expanduser()
    on_hub = name.startswith(HUB_PREFIX)
    if not on_hub and not directory.is_dir():
        raise DataError(
            f"{name} is no directory; give a directory of class folders or of parquet files, hf: and a data "
            f"set, or one of {', '.join(PRESETS)}"
        )
    if on_hub or was_saved(directory) or any(any(directory.glob(f"{at}*.parquet")) for at in ("", "*/")):
        columns = source.image_column or preset[0], source.label_column or preset[1]
        return read_hub_labels(name, source.subset, source.split, *columns)
    hub_options = ("subset", "image_column", "label_column")
    refuse_options(source, hub_options, "a directory of class folders, which has no such option")
    return read_class_folders(directory, source.split)


def _choose(labels: NDArray[np.int64], n_classes: int, source: LabelledSource) -> NDArray[np.int64]:
    """Select rows, in ascending order."""
    kept = labels < n_classes
    if source.fraction is not None:
        for label in np.unique(labels[kept]):
            members = np.flatnonzero(labels == label)
            count = max(1, round(source.fraction * len(members)))
            # One permutation per class: the draw depends neither on other classes nor on the fraction.
            order = np.random.default_rng([source.seed, int(label)]).permutation(len(members))
            kept[members[order[count:]]] = False
    rows = np.flatnonzero(kept)
    return rows[choose_subset(len(rows), source.limit, source.seed)]
