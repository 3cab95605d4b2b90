"""Image–text pairs in Hugging Face data sets, under the column names that people give them.

Copies of Flickr30k and COCO on the Hub differ in everything but their pixels: the captions are a list under
``caption``, ``text`` or ``alt_text``, or Karpathy's structure under ``sentences``; there is a row for every
image, or one for every caption; the splits are the data set's own, or a column beside the captions.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from xbt.data.caption_files import as_captions, unpacked
from xbt.data.hf_datasets import HubImages, check_column, open_rows, read_column, read_ids, url_hint
from xbt.data.image_text_pairs import SelectedImages
from xbt.data.pair_source import PairSource
from xbt.errors import DataError
from xbt.images import ImageSource

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
