"""Data sets of the Hugging Face Hub, and local directories in their formats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import datasets

from xbt.data.splits import ALL_SPLITS, choose_splits
from xbt.errors import DataError
from xbt.images import ImageSource, ListedPath

HUB_PREFIX = "hf:"
SPLIT_COLUMN = "split"


def open_dataset(source: str, subset: str | None = None, split: str | None = None) -> Any:
    """Opens one split of a data set.

    Args:
        source: ``hf:`` and the name of a Hub data set, or a local directory that ``Dataset.save_to_disk``
            made or that holds parquet or jsonl files.
        subset: Configuration of a Hub data set.
        split: Which split; may be left out where there is only one. Several are joined by ``+``, and ``all``
            takes every one.

    Returns:
        A ``datasets.Dataset``, nothing of it decoded.

    Raises:
        DataError: If it cannot be opened, there is no such split, or there are several and none is chosen.
    """
    opened = _open(_directory(source), source, subset, split)
    return _choose_split(opened, source, split)


def open_rows(source: str, subset: str | None, split: str | None, split_column: str | None) -> Any:
    """Opens the wanted rows of a data set whose splits are its own, or are told by a column.

    A data set with a single split and a column ``split`` is Karpathy's file as a table: the column then has
    the last word, for its one split may be called ``"test"`` and hold the training images as well.

    Args:
        source: As for :func:`open_dataset`.
        subset: Configuration of a Hub data set.
        split: Which splits, as for :func:`open_dataset`.
        split_column: The column that tells them, where it has another name or there are several splits as
            well.

    Returns:
        A ``datasets.Dataset``, nothing of it decoded.

    Raises:
        DataError: As :func:`open_dataset`, or if there is no such column.
    """
    directory = _directory(source)
    if directory is None:
        with _opening(source):
            single = len(datasets.get_dataset_split_names(source.removeprefix(HUB_PREFIX), subset)) == 1
        opened = _open(None, source, subset, ALL_SPLITS if single or split_column is not None else split)
    else:
        opened = _open(directory, source, subset, None)
    if split_column is None:
        split_column = _telling_column(opened, split)
    if split_column is None:
        return _choose_split(opened, source, split)
    rows = _choose_split(opened, source, ALL_SPLITS)
    told = [str(value) for value in read_column(rows, split_column, source)]
    wanted = choose_splits(split, sorted(set(told)), f"{source}, column {split_column!r},")
    return rows.select([row for row, name in enumerate(told) if name in wanted])


def _telling_column(opened: Any, split: str | None) -> str | None:
    if isinstance(opened, datasets.DatasetDict):
        if len(opened) > 1:
            return None
        opened = next(iter(opened.values()))
    return SPLIT_COLUMN if split is not None and SPLIT_COLUMN in opened.column_names else None


def _directory(source: str) -> Path | None:
    """The local directory that a source names, if it names one."""
    name = source.removeprefix(HUB_PREFIX)
    directory = Path(name).expanduser()
    if directory.is_file():
        raise DataError(f"{source} is a file; leave out hf: to read it, or name its directory")
    if name.startswith(("/", ".", "~")) and not directory.exists():
        raise DataError(f"{source}: the directory {directory} does not exist; check the path")
    return directory if directory.is_dir() else None


@contextmanager
def _opening(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # The hub client, fsspec, pyarrow and the builders share no kind of error.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise DataError(
            f"{source} cannot be opened ({type(error).__name__}: {reason}); check its name and subset, "
            "and that it holds parquet or jsonl files rather than a loading script"
        ) from error


def _open(directory: Path | None, source: str, subset: str | None, split: str | None) -> Any:
    with _opening(source):
        if directory is None:
            # Asking for the split lets a Hub data set be downloaded in part.
            part = None if split == ALL_SPLITS else split
            return datasets.load_dataset(source.removeprefix(HUB_PREFIX), subset, split=part)
        if (directory / "state.json").exists() or (directory / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(directory))
        return datasets.load_dataset(str(directory), subset, cache_dir=str(_cache_of(directory)))


def _cache_of(directory: Path) -> Path:
    """A cache for these very files.

    Where a directory has a data set card, datasets (5.2) caches its data by the directory's name and card
    alone: another directory of that name, or other files in this one, would be answered from the cache.
    """
    resolved = directory.resolve()
    digest = hashlib.sha256(str(resolved).encode("utf-8", "surrogateescape"))
    for path in sorted(path for path in resolved.rglob("*") if path.is_file()):
        status = path.stat()
        name = path.relative_to(resolved).as_posix().encode("utf-8", "surrogateescape")
        digest.update(b"\0".join((name, str(status.st_size).encode(), str(status.st_mtime_ns).encode())))
    return Path(datasets.config.HF_DATASETS_CACHE) / "xbt-local" / digest.hexdigest()[:32]


def _choose_split(opened: Any, source: str, split: str | None) -> Any:
    if not isinstance(opened, datasets.DatasetDict):
        own = None if opened.split is None else str(opened.split)
        if split in (None, ALL_SPLITS, own):
            return opened
        if own is None:
            raise DataError(f"{source} has no splits, but {split!r} was asked for; leave split out")
        raise DataError(f"{source} has no split {split!r}; it has only {own}")
    if split is None and len(opened) > 1:
        raise DataError(f"{source} has the splits {', '.join(opened)}; choose one with split")
    chosen = [opened[name] for name in choose_splits(split, list(opened), source)]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def check_column(column: str, columns: Sequence[str], where: str) -> None:
    """Checks that a column exists.

    Raises:
        DataError: If it does not; the message lists the columns there are.
    """
    if column not in columns:
        raise DataError(f"{where} has no column {column!r}; it has {', '.join(map(str, columns))}")


def read_column(dataset: Any, column: str, source: str) -> list[Any]:
    """Reads one column of a data set and leaves the others, images above all, untouched.

    Args:
        dataset: A ``datasets.Dataset``.
        column: Its name.
        source: What to call the data set in the error.

    Returns:
        One value a row.

    Raises:
        DataError: If there is no such column.
    """
    check_column(column, dataset.column_names, source)
    return list(dataset.select_columns([column]).with_format(None)[:][column])


def read_ids(dataset: Any, column: str | None, source: str) -> list[str]:
    """One id a row: the column's values, or ``"row-0"``, ``"row-1"``, ... where no column is named.

    Raises:
        DataError: If there is no such column, or a row has no id.
    """
    if column is None:
        return [f"row-{row}" for row in range(len(dataset))]
    values = read_column(dataset, column, source)
    if None in values:
        raise DataError(
            f"{source}, row {values.index(None)}: no id in the column {column!r}; name another one"
        )
    return [str(value) for value in values]


class HubImages(Sequence[ImageSource]):
    """An image column, whose rows are handed out encoded, so that a damaged one can be named and left out."""

    def __init__(self, dataset: Any, column: str, source: str, image_root: str | None = None) -> None:
        """Takes the column without decoding it.

        Args:
            dataset: A ``datasets.Dataset``.
            column: A column of ``datasets.Image``, of encoded bytes, or of paths.
            source: What to call the data set in errors.
            image_root: Folder that relative paths in the column are relative to.

        Raises:
            DataError: If there is no such column or it cannot hold images.
        """
        self._dataset = undecoded(dataset, column, source)
        self._column = column
        self._root = Path(image_root).expanduser() if image_root is not None else Path()

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> ImageSource: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageSource]: ...
    def __getitem__(self, index: int | slice) -> ImageSource | list[ImageSource]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return as_image(self._dataset[index][self._column], self._root)


def undecoded(dataset: Any, column: str, source: str, *others: str) -> Any:
    """Leaves a data set its image column, encoded as it is stored, and the ``others``.

    Args:
        dataset: A ``datasets.Dataset`` or ``datasets.IterableDataset``.
        column: A column of ``datasets.Image``, of encoded bytes, or of paths.
        source: What to call the data set in errors.
        others: Columns to keep beside it.

    Returns:
        A data set of the same kind.

    Raises:
        DataError: If there is no such column or it cannot hold images.
    """
    for name in (column, *others):
        check_column(name, dataset.column_names, source)
    feature = dataset.features[column]
    dataset = dataset.select_columns([column, *others]).with_format(None)
    if isinstance(feature, datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    # Where the table does not say that they are images, their structure does.
    if isinstance(feature, dict) and {"bytes"} <= set(feature) <= {"bytes", "path"}:
        feature = feature["bytes"]
    if getattr(feature, "dtype", None) not in ("string", "large_string", "binary", "large_binary"):
        raise DataError(
            f"{source}: the column {column!r} holds {feature}, not images, encoded images or paths; name "
            "the image column"
        )
    return dataset


def as_image(cell: Any, root: Path) -> ImageSource:
    """An undecoded cell of an image column as encoded bytes or a path, which ``root`` goes before."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, str):
        # Beside an absolute path the root has nothing to tell.
        return str(root / cell) if Path(cell).is_absolute() else ListedPath(str(root / cell), str(root))
    # A row without an image becomes no bytes, which no decoder accepts: it is named like any other.
    return bytes(cell) if cell is not None else b""
