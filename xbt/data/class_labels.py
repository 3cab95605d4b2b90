"""Reading which class every image has: from class folders, and from Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray

from xbt.data.hf_datasets import HubImages, check_column, open_dataset, read_column, read_ids
from xbt.data.image_folder import JoinedPaths, is_hidden, list_images
from xbt.errors import DataError
from xbt.images import ImageSource

SPLIT_FOLDERS = frozenset(["train", "training", "val", "valid", "validation", "test", "testing"])
"""Names of folders that are taken for splits when a directory holds nothing else."""

Labelled = tuple[list[str], Sequence[ImageSource], NDArray[np.int64], list[str]]
"""Ids, unread images, the class of each image, and the names of all classes."""


class HubColumns(NamedTuple):
    """The columns of a data set that hold image and class; ``None`` where they are to be found out."""

    image: str | None
    label: str | None


def read_class_folders(directory: Path, split: str | None) -> Labelled:
    """Reads a directory in which every class has a folder, with its images in and below it.

    Args:
        directory: Where the class folders are, or the folders of the splits.
        split: The folder below ``directory`` that holds the class folders.

    Returns:
        Ids are paths relative to the class folders' own folder. Classes are the folders in alphabetical
        order, empty ones too, so that two splits agree as long as they have the same folders.

    Raises:
        DataError: If there is no such folder or no image, an image lies in no class folder, or the folders
            are splits and none is chosen.
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


def read_hub_labels(source: str, subset: str | None, split: str | None, columns: HubColumns) -> Labelled:
    """Reads the classes of a Hugging Face data set; images stay encoded where they are.

    Args:
        source: ``hf:`` and the name of a Hub data set, or a local directory.
        subset: Configuration of a Hub data set.
        split: Which split; may be left out where there is only one.
        columns: The columns of image and class.

    Returns:
        Ids are the rows' numbers. Class names are those of the label column where it has them
        (``ClassLabel``), the distinct words in alphabetical order, or the numbers up to the largest label.

    Raises:
        DataError: If it cannot be opened, a column does not exist, is ambiguous or holds something else, or a
            row has no class.
    """
    dataset = open_dataset(source, subset, split)
    image = _column(dataset, columns.image, datasets.Image, "image", source)
    label = _column(dataset, columns.label, datasets.ClassLabel, "label", source)
    labels, class_names = _labels(dataset, label, source)
    return read_ids(dataset, None, source), HubImages(dataset, image, source), labels, class_names


def _column(dataset: Any, chosen: str | None, kind: type, usual: str, source: str) -> str:
    """The chosen column, or else the only one of the kind, or else the one with the usual name."""
    if chosen is not None:
        check_column(chosen, dataset.column_names, source)
        return chosen
    found: list[str] = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if usual in dataset.column_names:
        return usual
    what = (
        f"the columns {_listed(found)}" if found else "no such column among " + _listed(dataset.column_names)
    )
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
    labels = np.array(values, dtype=np.int64)
    named = isinstance(feature, datasets.ClassLabel)
    names = list(feature.names) if named else [str(number) for number in range(int(labels.max()) + 1)]
    _check_range(labels, len(names), column, source)
    return labels, names


def _check_range(labels: NDArray[np.int64], count: int, column: str, source: str) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{source}, row {row}: the class in the column {column!r} is {labels[row]}, but classes go from "
            f"0 to {max(count - 1, 0)}; read a split that has labels, or leave such rows out"
        )
