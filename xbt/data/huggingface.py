"""Data sets of the Hugging Face Hub and local directories in its formats.

Copies of Flickr30k and COCO on the Hub differ in their layout. The captions are a list under ``caption``,
``text`` or ``alt_text``, or Karpathy's structure under ``sentences``. There is one row per image, or one per
caption. The splits are those of the data set, or a column next to the captions.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from xbt.data.files import ALL_SPLITS, as_captions, choose_splits, one_line, unpacked
from xbt.data.hf_folders import HUB_PREFIX, directory_of, open_builder, open_folder, translated, was_saved
from xbt.data.image_folder import as_spelled, refuse_urls
from xbt.data.items import (
    Entry,
    Item,
    LazyImages,
    RawPairs,
    Rejected,
    SelectedImages,
    SourceShard,
    digest_of,
    readable,
)
from xbt.data.pairs import PairSource
from xbt.errors import DataError
from xbt.images import ImageSource, ListedPath, is_url

SPLIT_COLUMN = "split"
_URL_COLUMN = re.compile(r"(?:^|_)(?:url|uri|link)s?$", re.IGNORECASE)
_HEAD = 1_000
_ADVICE = "check its name and subset, and that it holds parquet or jsonl files rather than a loading script"
IMAGE_COLUMNS = ("image", "images", "jpg", "jpeg", "png", "webp", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentences", "sentences_raw", "original_alt_text")
"""Known names of caption columns. ``alt_text`` may hold rewritten captions, so it is used only if none of
these exists."""
ID_COLUMNS = ("image_id", "img_id", "imgid", "cocoid", "filename", "file_name", "image_name")
"""Known names of columns that identify the image of a row, in the order in which they are tried."""


def open_dataset(source: str, subset: str | None = None, split: str | None = None) -> Any:
    """Open one split of a data set as a ``datasets.Dataset``; nothing is decoded.

    The source is ``hf:`` and the name of a Hub data set, or a local directory that was written by
    ``Dataset.save_to_disk`` or holds parquet or jsonl files. The split is optional if there is only one;
    ``+`` joins several, ``all`` takes all.
    """
    opened = _open(directory_of(source), source, subset, split)
    return _choose_split(opened, source, split)


def open_rows(source: str, subset: str | None, split: str | None, split_column: str | None) -> Any:
    """Open the rows of some splits; the splits are those of the data set or the values of a column.

    A data set with a single split and a column ``split`` is a Karpathy file as a table. The column then takes
    precedence: the single split may be named ``"test"`` and still hold the training images. ``split_column``
    is needed if the column is not called ``split`` or the data set also has several splits. See
    :func:`open_dataset`.
    """
    directory = directory_of(source)
    if directory is None:
        with translated(source, _ADVICE):
            single = len(datasets.get_dataset_split_names(source.removeprefix(HUB_PREFIX), subset)) == 1
        opened = _open(None, source, subset, ALL_SPLITS if single or split_column is not None else split)
    else:
        opened = _open(directory, source, subset, None)
    if split_column is None:
        split_column = _default_split_column(opened, split)
    if split_column is None:
        return _choose_split(opened, source, split)
    rows = _choose_split(opened, source, ALL_SPLITS)
    split_of_row = [str(value) for value in read_column(rows, split_column, source)]
    wanted = choose_splits(split, sorted(set(split_of_row)), f"{source}, column {split_column!r},")
    return rows.select([row for row, name in enumerate(split_of_row) if name in wanted])


def _default_split_column(opened: Any, split: str | None) -> str | None:
    if isinstance(opened, datasets.DatasetDict):
        if len(opened) > 1:
            return None
        opened = next(iter(opened.values()))
    return SPLIT_COLUMN if split is not None and SPLIT_COLUMN in opened.column_names else None


def _open(directory: Path | None, source: str, subset: str | None, split: str | None) -> Any:
    with translated(source, _ADVICE):
        if directory is None:
            # With a split, only its part of a Hub data set is downloaded.
            requested = None if split == ALL_SPLITS else split
            return datasets.load_dataset(source.removeprefix(HUB_PREFIX), subset, split=requested)
        return open_folder(directory, subset)


def _choose_split(opened: Any, source: str, split: str | None) -> Any:
    if not isinstance(opened, datasets.DatasetDict):
        only_split = None if opened.split is None else str(opened.split)
        if split in (None, ALL_SPLITS, only_split):
            return opened
        if only_split is None:
            raise DataError(f"{source} has no splits, but {split!r} was asked for; leave split out")
        raise DataError(f"{source} has no split {split!r}; it has only {only_split}")
    chosen = [opened[name] for name in choose_splits(split, list(opened), source, required=True)]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def check_column(column: str, columns: Sequence[str], where: str, hint: str = "") -> None:
    """Check that a column exists; the message lists the existing ones and ends with the hint."""
    if column not in columns:
        raise DataError(f"{where} has no column {column!r}; it has {', '.join(map(str, columns))}{hint}")


def read_column(dataset: Any, column: str, source: str) -> list[Any]:
    """Read one value per row of a column without reading the others, above all the images."""
    check_column(column, dataset.column_names, source)
    with translated(f"{source}, column {column!r},", "copy or download the data set again"):
        return list(dataset.select_columns([column]).with_format(None)[:][column])


def read_ids(dataset: Any, column: str | None, source: str) -> list[str]:
    """Return one id per row: the column's values, or ``"row-0"``, ``"row-1"``, ... without a column."""
    if column is None:
        return [f"row-{row}" for row in range(len(dataset))]
    values = read_column(dataset, column, source)
    if None in values:
        raise DataError(
            f"{source}, row {values.index(None)}: no id in the column {column!r}; name another one"
        )
    return [str(value) for value in values]


class HubImages(LazyImages):
    """An image column that returns encoded images, so that a damaged one can be reported and left out."""

    def __init__(self, dataset: Any, column: str, source: str, image_root: str | None = None) -> None:
        self._dataset = undecoded(dataset, column, source)
        self._column = column
        self._source, self._roots = source, image_roots(source, image_root)

    def __len__(self) -> int:
        return len(self._dataset)

    def source_at(self, row: int) -> ImageSource:
        """One image, encoded."""
        with translated(f"{self._source}, row {row}", "copy or download the data set again"):
            cell = self._dataset[row][self._column]
        return as_image(cell, self._roots)


def image_roots(source: str, image_root: str | None) -> list[str]:
    """Folders that may contain the files of an image column; relative paths start at the first one.

    That is ``image_root``, or else the data set's own folder.
    """
    directory = directory_of(source)
    first = directory or Path() if image_root is None else Path(image_root).expanduser()
    local = [directory] if directory is not None else []
    # Files unpacked by datasets, and files downloaded by huggingface_hub.
    caches = [datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME]
    return [os.path.abspath(folder) for folder in (first, *local, *caches)]  # noqa: PTH100


def undecoded(dataset: Any, column: str, source: str, *others: str) -> Any:
    """Select the image column, encoded as stored, and the columns ``others``.

    The data set is a ``Dataset`` or ``IterableDataset``, and the column one of ``datasets.Image``, of encoded
    bytes, or of paths, but not of URLs.
    """
    check_column(column, dataset.column_names, source, url_hint(dataset.column_names))
    for name in others:
        check_column(name, dataset.column_names, source)
    feature = dataset.features[column]
    dataset = dataset.select_columns([column, *others]).with_format(None)
    if isinstance(feature, datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    else:
        # A column without the Image type may still have its structure.
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
    """Hint for a data set without images but with a column of URLs; empty if there is no such column."""
    urls = [name for name in columns if _URL_COLUMN.search(name)]
    if not urls:
        return ""
    return (
        f"; if {urls[0]!r} holds URLs, download the images first, for example with img2dataset, and give "
        "the tars or folder it writes"
    )


def _refuse_urls(dataset: Any, column: str, source: str) -> None:
    """Refuse URLs in the first rows; URLs in later rows are refused when they are read."""
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
    """Convert an undecoded cell of an image column to encoded bytes or a path; see :func:`image_roots`."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if not isinstance(cell, str):
        # A row without an image becomes empty bytes, which the decoder rejects with the row's id.
        return bytes(cell) if cell is not None else b""
    if is_url(cell):
        return cell
    path = os.path.join(roots[0], cell)  # noqa: PTH118 - no Path per image
    root = next((folder for folder in roots if path.startswith(f"{folder}/")), roots[0])
    return ListedPath(as_spelled(path, root, os.path.relpath(path, root)), root)


def read_hub_pairs(source: PairSource) -> RawPairs:
    """Read the captions of a data set and locate its images; no image is decoded.

    Ids are the id column's values, or ``"row-0"``, ...

    Warns:
        UserWarning: If rows with one caption each were joined by a column that was not given.
    """
    dataset = open_rows(source.source, source.subset, source.split, source.split_column)
    image_column, caption_column = _find_columns(source, dataset.column_names)
    images = HubImages(dataset, image_column, source.source, source.image_root)
    captions = []
    for row, value in enumerate(read_column(dataset, caption_column, source.source)):
        where = f"{source.source}, row {row}, column {caption_column!r}"
        captions.append([caption or "" for caption in as_captions(unpacked(value), where)])
    return _join(source, dataset, images, captions)


def _find_columns(source: PairSource, columns: Sequence[str]) -> tuple[str, str]:
    if "__key__" in columns and "txt" in columns and source.caption_column is None:
        raise DataError(
            f"{source.source} is a WebDataset, one caption a line in 'txt'; write hf://datasets/"
            f"{source.source.removeprefix('hf:')} for a Hub data set, or the plain path of a folder"
        )
    chosen = []
    for requested, usual_names, option in (
        (source.image_column, IMAGE_COLUMNS, "image_column"),
        (source.caption_column, CAPTION_COLUMNS, "caption_column"),
    ):
        if requested is not None:
            check_column(requested, columns, source.source)
            chosen.append(requested)
            continue
        candidates = [name for name in usual_names if name in columns]
        if not candidates and usual_names is CAPTION_COLUMNS and "alt_text" in columns:
            candidates = ["alt_text"]
        if len(candidates) != 1:
            several = f"the columns {' and '.join(candidates)}, any of which may be"
            hint = url_hint(columns) if usual_names is IMAGE_COLUMNS and not candidates else ""
            raise DataError(
                f"{source.source} has {several if candidates else 'no column known as'} the "
                f"{option.removesuffix('_column')}; it has {', '.join(columns)}: choose with {option}{hint}"
            )
        chosen.append(candidates[0])
    return chosen[0], chosen[1]


def _join(source: PairSource, dataset: Any, images: HubImages, captions: list[list[str]]) -> RawPairs:
    """Join rows that show the same image."""
    plain = RawPairs([f"row-{row}" for row in range(len(images))], images, captions)
    one_each = all(len(texts) <= 1 for texts in captions)
    if source.id_column is not None:
        names = read_ids(dataset, source.id_column, source.source)
    else:
        found = _repeated_ids(dataset, source.source) if one_each else None
        if found is None:
            return plain
        column, names = found
        warnings.warn(
            f"the {len(names)} rows of {source.source} hold one caption each, and are joined to "
            f"{len(set(names))} images by the column {column!r}; if that is wrong, name another one with "
            "id_column",
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
        joined.setdefault(name, []).extend(captions[row])  # rows of one image may be apart
    return RawPairs(list(first), SelectedImages(images, list(first.values())), list(joined.values()))


def _repeated_ids(dataset: Any, source: str) -> tuple[str, list[str]] | None:
    """First of the known id columns with a repeated value, and its values."""
    for column in filter(set(dataset.column_names).__contains__, ID_COLUMNS):
        values = read_column(dataset, column, source)
        if None not in values and len(set(map(str, values))) < len(values):
            return column, list(map(str, values))
    return None


class StreamedImages(SourceShard):
    """The images of one file (one shard) of a streamed data set.

    The name begins the ids unless a column gives them, and the state is the fingerprint of the files.
    """

    def __init__(
        self, shard: Any, name: str, column: str, id_column: str | None, roots: Sequence[str], state: str = ""
    ) -> None:
        self.name, self._state = name, state
        self._shard, self._column, self._id_column, self._roots = shard, column, id_column, roots

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Read rows ``start`` to ``stop`` without decoding them."""
        rows = iter(self._shard.skip(start) if start else self._shard)
        row = start
        while stop is None or row < stop:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the hub client, fsspec and pyarrow share no kind of error
                raise DataError(
                    f"{self.name} cannot be read beyond row {row} ({one_line(error)}); fix that and run the "
                    "same command again"
                ) from error
            yield self._entry(cells, row)
            row += 1

    def digest(self) -> str:
        """SHA-256 of the name and the state, so that a job does not continue with replaced files."""
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
    """Open an image column of a data set as streams, one per file of the data set, in order."""
    dataset, state = _open_stream(source, subset, split)
    if dataset.column_names is None:
        raise DataError(f"{source} does not state its columns; leave out streaming")
    dataset = undecoded(dataset, column, source, *([id_column] if id_column is not None else []))
    count, roots = dataset.num_shards, image_roots(source, image_root)
    names = [f"shard-{number:0{len(str(count - 1))}d}" for number in range(count)]
    shards = [dataset.shard(num_shards=count, index=number) for number in range(count)]
    return [
        StreamedImages(shard, name, column, id_column, roots, state)
        for shard, name in zip(shards, names, strict=True)
    ]


def _open_stream(source: str, subset: str | None, split: str | None) -> tuple[Any, str]:
    """Open a split as a stream; also return the fingerprint of its files."""
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
    return opened[split], _files_state((builder.config.data_files or {}).get(split))


def _files_state(files: Any) -> str:
    """Fingerprint of files: sizes and times if local, otherwise names, revisions and ETags."""
    local = [Path(file) for file in files or ()]
    if all(path.is_file() for path in local):
        return " ".join(f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in local)
    return f"{list(files)} {files.origin_metadata}"
