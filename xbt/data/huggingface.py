"""Data sets of the Hugging Face Hub, and local directories in their formats.

Image–text pairs in Hugging Face data sets, under the column names that people give them.

Copies of Flickr30k and COCO on the Hub differ in everything but their pixels: the captions are a list under
``caption``, ``text`` or ``alt_text``, or Karpathy's structure under ``sentences``; there is a row for every
image, or one for every caption; the splits are the data set's own, or a column beside the captions.

Hugging Face data sets read as streams, without downloading them first.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import datasets

from xbt.data.files import ALL_SPLITS, as_captions, choose_splits, unpacked
from xbt.data.hf_folders import HUB_PREFIX, directory_of, open_builder, open_folder, translated, was_saved
from xbt.data.image_folder import as_spelled, refuse_urls
from xbt.data.items import Entry, Item, Rejected, SelectedImages, SourceShard, digest_of, readable
from xbt.data.pairs import PairSource
from xbt.errors import DataError
from xbt.images import ImageSource, ListedPath, is_url

SPLIT_COLUMN = "split"
_URL_COLUMN = re.compile(r"(?:^|_)(?:url|uri|link)s?$", re.IGNORECASE)
_HEAD = 1_000
_ADVICE = "check its name and subset, and that it holds parquet or jsonl files rather than a loading script"


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
    opened = _open(directory_of(source), source, subset, split)
    return _choose_split(opened, source, split)


def open_rows(source: str, subset: str | None, split: str | None, split_column: str | None) -> Any:
    """Opens the wanted rows of a data set whose splits are its own, or are named by a column.

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
    directory = directory_of(source)
    if directory is None:
        with translated(source, _ADVICE):
            single = len(datasets.get_dataset_split_names(source.removeprefix(HUB_PREFIX), subset)) == 1
        opened = _open(None, source, subset, ALL_SPLITS if single or split_column is not None else split)
    else:
        opened = _open(directory, source, subset, None)
    if split_column is None:
        split_column = _telling_column(opened, split)
    if split_column is None:
        return _choose_split(opened, source, split)
    rows = _choose_split(opened, source, ALL_SPLITS)
    named = [str(value) for value in read_column(rows, split_column, source)]
    wanted = choose_splits(split, sorted(set(named)), f"{source}, column {split_column!r},")
    return rows.select([row for row, name in enumerate(named) if name in wanted])


def _telling_column(opened: Any, split: str | None) -> str | None:
    if isinstance(opened, datasets.DatasetDict):
        if len(opened) > 1:
            return None
        opened = next(iter(opened.values()))
    return SPLIT_COLUMN if split is not None and SPLIT_COLUMN in opened.column_names else None


def _open(directory: Path | None, source: str, subset: str | None, split: str | None) -> Any:
    with translated(source, _ADVICE):
        if directory is None:
            # Asking for the split lets a Hub data set be downloaded in part.
            part = None if split == ALL_SPLITS else split
            return datasets.load_dataset(source.removeprefix(HUB_PREFIX), subset, split=part)
        return open_folder(directory, subset)


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
        DataError: If there is no such column, or it is damaged.
    """
    check_column(column, dataset.column_names, source)
    with translated(f"{source}, column {column!r},", "copy or download the data set again"):
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
            image_root: Folder that relative paths in the column are relative to; the data set's own where
                it is local.

        Raises:
            DataError: If there is no such column or it cannot hold images, or it holds URLs.
        """
        self._dataset = undecoded(dataset, column, source)
        self._column = column
        self._source, self._roots = source, image_roots(source, image_root)

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> ImageSource: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageSource]: ...
    def __getitem__(self, index: int | slice) -> ImageSource | list[ImageSource]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        with translated(f"{self._source}, row {index}", "copy or download the data set again"):
            cell = self._dataset[index][self._column]
        return as_image(cell, self._roots)


def image_roots(source: str, image_root: str | None) -> list[str]:
    """The folders that paths in an image column may lead into; relative ones are relative to the first.

    Args:
        source: The data set, whose own folder is the first unless ``image_root`` is given.
        image_root: Folder that relative paths are relative to.
    """
    directory = directory_of(source)
    given = directory or Path() if image_root is None else Path(image_root).expanduser()
    own = [directory] if directory is not None else []
    # What datasets has unpacked, and what the Hub's client has fetched.
    caches = [datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME]
    return [os.path.abspath(folder) for folder in (given, *own, *caches)]  # noqa: PTH100


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
        DataError: If there is no such column or it cannot hold images, or it holds URLs.
    """
    if column not in dataset.column_names and (hint := url_hint(dataset.column_names)):
        raise DataError(
            f"{source} has no column {column!r}; it has {', '.join(map(str, dataset.column_names))}{hint}"
        )
    for name in (column, *others):
        check_column(name, dataset.column_names, source)
    feature = dataset.features[column]
    dataset = dataset.select_columns([column, *others]).with_format(None)
    if isinstance(feature, datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
        _refuse_urls(dataset, column, source)
        return dataset
    # Where the table does not say that they are images, their structure does.
    if isinstance(feature, dict) and {"bytes"} <= set(feature) <= {"bytes", "path"}:
        feature = feature["bytes"]
    if getattr(feature, "dtype", None) not in ("string", "large_string", "binary", "large_binary"):
        raise DataError(
            f"{source}: the column {column!r} holds {feature}, not images, encoded images or paths; name "
            "the image column"
        )
    _refuse_urls(dataset, column, source)
    return dataset


def url_hint(columns: Sequence[str]) -> str:
    """What to do where no column holds images, but one may hold their URLs; empty if there is none."""
    urls = [name for name in columns if _URL_COLUMN.search(name)]
    if not urls:
        return ""
    return (
        f"; if {urls[0]!r} holds URLs, download the images first, for example with img2dataset, and give "
        "the tars or folder it writes"
    )


def _refuse_urls(dataset: Any, column: str, source: str) -> None:
    """Looks at the first rows: URLs in a later one are refused when it is its turn."""
    texts = getattr(dataset.features[column], "dtype", None) in ("string", "large_string")
    with translated(source, "copy or download it again"):
        if isinstance(dataset, datasets.IterableDataset):
            head = [row[column] for row in dataset.take(1)] if texts else []
        else:
            head = dataset[: _HEAD if texts else 1][column]
    paths = [
        cell.get("path") if isinstance(cell, dict) and cell.get("bytes") is None else cell for cell in head
    ]
    refuse_urls(paths, f"{source}, column {column!r},")


def as_image(cell: Any, roots: Sequence[str]) -> ImageSource:
    """An undecoded cell of an image column as encoded bytes, or as a path.

    Args:
        cell: The cell.
        roots: The folders that a path may lead into; see :func:`image_roots`.
    """
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if not isinstance(cell, str):
        # A row without an image becomes no bytes, which no decoder accepts: it is named like any other.
        return bytes(cell) if cell is not None else b""
    if is_url(cell):
        return cell
    path = os.path.join(roots[0], cell)  # noqa: PTH118 - no Path per image
    root = next((each for each in roots if path.startswith(f"{each}/")), roots[0])
    return ListedPath(as_spelled(path, root, os.path.relpath(path, root)), root)


IMAGE_COLUMNS = ("image", "images", "jpg", "jpeg", "png", "webp", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentences", "sentences_raw", "original_alt_text")
"""Names by which the columns are found. Where captions were rewritten as ``alt_text``, the original ones
count; ``alt_text`` is taken where it stands alone."""
ID_COLUMNS = ("image_id", "img_id", "imgid", "cocoid", "filename", "file_name", "image_name")
"""Columns that may tell rows of one image, in the order in which they are tried."""


class HubPairs(NamedTuple):
    """What such a data set holds.

    Attributes:
        ids: The id column's values, or ``"row-0"``, ...
        images: The undecoded images.
        captions: The captions of each image as they stand, blank ones included.
    """

    ids: list[str]
    images: Sequence[ImageSource]
    captions: list[list[str]]


def read_hub_pairs(source: PairSource) -> HubPairs:
    """Reads the captions of a data set and finds its images; none is decoded.

    Args:
        source: A source of the kind ``"hf"``.

    Returns:
        The pairs, in the data set's order.

    Raises:
        DataError: If it cannot be opened, a split or column does not exist, more than one column may be
            meant, a cell holds no caption, or rows of one id have several captions each.

    Warns:
        UserWarning: If rows with one caption each were joined by a column that nobody named.
    """
    dataset = open_rows(source.source, source.subset, source.split, source.split_column)
    image_column, caption_column = _find_columns(source, dataset.column_names)
    images = HubImages(dataset, image_column, source.source, source.image_root)
    captions = []
    for row, value in enumerate(read_column(dataset, caption_column, source.source)):
        where = f"{source.source}, row {row}, column {caption_column!r}"
        captions.append([told or "" for told in as_captions(unpacked(value), where)])
    return _join(source, dataset, images, captions)


def _find_columns(source: PairSource, columns: Sequence[str]) -> tuple[str, str]:
    if "__key__" in columns and "txt" in columns and source.caption_column is None:
        raise DataError(
            f"{source.source} is a WebDataset, one caption a line in 'txt'; write hf://datasets/"
            f"{source.source.removeprefix('hf:')} for a Hub data set, or the plain path of a folder"
        )
    found = []
    for given, known, option in (
        (source.image_column, IMAGE_COLUMNS, "image_column"),
        (source.caption_column, CAPTION_COLUMNS, "caption_column"),
    ):
        if given is not None:
            check_column(given, columns, source.source)
            found.append(given)
            continue
        there = [name for name in known if name in columns]
        if not there and known is CAPTION_COLUMNS and "alt_text" in columns:
            there = ["alt_text"]
        if len(there) != 1:
            what = (
                f"the columns {' and '.join(there)}, any of which may be" if there else "no column known as"
            )
            hint = url_hint(columns) if known is IMAGE_COLUMNS and not there else ""
            raise DataError(
                f"{source.source} has {what} the {option.removesuffix('_column')}; it has "
                f"{', '.join(columns)}: choose with {option}{hint}"
            )
        found.append(there[0])
    return found[0], found[1]


def _join(source: PairSource, dataset: Any, images: HubImages, captions: list[list[str]]) -> HubPairs:
    """Makes one image of the rows that show it."""
    plain = HubPairs([f"row-{row}" for row in range(len(images))], images, captions)
    one_each = all(len(told) <= 1 for told in captions)
    if source.id_column is not None:
        names = read_ids(dataset, source.id_column, source.source)
    else:
        column = _repeating(dataset, source.source)
        if column is None or not one_each:
            return plain
        names = read_ids(dataset, column, source.source)
        warnings.warn(
            f"the {len(names)} rows of {source.source} hold one caption each, and are joined to "
            f"{len(set(names))} images by the column {column!r}; name another one with id_column if that is "
            "wrong",
            stacklevel=5,
        )
    first: dict[str, int] = {}
    joined: dict[str, list[str]] = {}
    for row, name in enumerate(names):
        if name in first and not one_each:
            raise DataError(
                f"{source.source}: the image {name!r} occurs more than once, in the rows {first[name]} and "
                f"{row}, with several captions each; remove the duplicate, or name a column of unique ids"
            )
        first.setdefault(name, row)
        joined.setdefault(name, []).extend(captions[row])  # its rows need not stand side by side
    return HubPairs(list(first), SelectedImages(images, list(first.values())), list(joined.values()))


def _repeating(dataset: Any, source: str) -> str | None:
    """The first of the known id columns in which a value comes twice."""
    for column in ID_COLUMNS:
        if column in dataset.column_names:
            values = read_column(dataset, column, source)
            if None not in values and len(set(map(str, values))) < len(values):
                return column
    return None


class StreamedImages(SourceShard):
    """The images of one file (one shard) of a streamed data set."""

    def __init__(
        self,
        shard: Any,
        name: str,
        column: str,
        id_column: str | None,
        roots: Sequence[str],
        state: str = "",
    ) -> None:
        """Keeps what it is given.

        Args:
            shard: A ``datasets.IterableDataset`` with nothing but the columns that follow, undecoded.
            name: What ids begin with, unless a column gives them.
            column: The image column.
            id_column: The column of ids, if there is one.
            roots: Folders that paths in the image column may lead into, the one they are relative to first.
            state: What tells the data set's files from others in their place.
        """
        self.name, self._state = name, state
        self._shard, self._column, self._id_column, self._roots = shard, column, id_column, roots

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Reads rows ``start`` to ``stop``, undecoded.

        Raises:
            DataError: If the stream breaks off.
        """
        rows = iter(self._shard.skip(start) if start else self._shard)
        row = start
        while stop is None or row < stop:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the hub client, fsspec and pyarrow share no kind of error
                reason = " ".join(str(error).split())[:300]
                raise DataError(
                    f"{self.name} cannot be read beyond row {row} ({type(error).__name__}: {reason}); fix "
                    "that and run the same command again"
                ) from error
            yield self._entry(cells, row)
            row += 1

    def digest(self) -> str:
        """SHA-256 of the name and the state: after files were replaced, their rows would be mixed."""
        return digest_of([self.name, self._state])

    def _entry(self, cells: dict[str, Any], row: int) -> Entry:
        name = f"{self.name}/row-{row}"
        if self._id_column is not None:
            if cells[self._id_column] is None:
                return Rejected(name, f"the row has no id: its {self._id_column!r} is empty")
            name = readable(str(cells[self._id_column]))
        return Item(name, as_image(cells[self._column], self._roots), {})


def stream_images(
    source: str,
    subset: str | None,
    split: str | None,
    column: str,
    id_column: str | None,
    image_root: str | None = None,
) -> list[StreamedImages]:
    """Opens an image column of a data set as streams, one for each of its own shards.

    Args:
        source: ``hf:`` and the name of a Hub data set, or a local directory with parquet or jsonl files.
        subset: Configuration of a Hub data set.
        split: Which split; may be left out where there is only one.
        column: The image column.
        id_column: A column of unique ids; otherwise shard and row make the id.
        image_root: Folder that paths in the image column are relative to; the data set's own where it is
            local.

    Returns:
        The streams, in the data set's order.

    Raises:
        DataError: If it cannot be opened as a stream, or lacks the split or a column.
    """
    dataset, state = _open_hf_streams(source, subset, split)
    if dataset.column_names is None:
        raise DataError(f"{source} does not say which columns it has; leave out streaming")
    dataset = undecoded(dataset, column, source, *([id_column] if id_column is not None else []))
    count = dataset.num_shards
    width = len(str(count - 1))
    return [
        StreamedImages(
            dataset.shard(num_shards=count, index=number),
            f"shard-{number:0{width}d}",
            column,
            id_column,
            image_roots(source, image_root),
            state,
        )
        for number in range(count)
    ]


def _open_hf_streams(source: str, subset: str | None, split: str | None) -> tuple[Any, str]:
    """The stream, and the state of its files."""
    directory = directory_of(source)
    if directory is not None and was_saved(directory):
        raise DataError(f"{source} was made by save_to_disk and cannot be streamed; leave out streaming")
    with translated(source, "check its name and subset, or leave out streaming"):
        if directory is None:
            builder = datasets.load_dataset_builder(source.removeprefix(HUB_PREFIX), subset)
        else:
            builder = open_builder(directory, subset)
        opened = builder.as_streaming_dataset()
    names = ", ".join(opened)
    if split is None and len(opened) > 1:
        raise DataError(f"{source} has the splits {names}; choose one with split")
    split = split or next(iter(opened))
    if split not in opened:
        raise DataError(f"{source} has no split {split!r}; it has {names}")
    return opened[split], _state((builder.config.data_files or {}).get(split))


def _state(files: Any) -> str:
    """Sizes and times of local files; names, revisions and ETags of others."""
    local = [Path(file) for file in files or ()]
    if all(path.is_file() for path in local):
        return " ".join(f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in local)
    return f"{list(files)} {files.origin_metadata}"
