"""Files that name images and give their captions: Karpathy's and COCO's JSON, and lines of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from xbt.data.caption_files import as_captions, unpacked
from xbt.data.caption_tables import TABLE_KINDS, read_table
from xbt.data.files import check_is_file, kind_of, name_within, read_json, read_text
from xbt.data.karpathy import is_karpathy, parse_karpathy
from xbt.errors import ConfigError, DataError


class NamedImages(NamedTuple):
    """What such a file holds.

    Attributes:
        names: The file name of each image, with its folder where the file gives one.
        captions: The captions of each image as they stand, blank ones included.
    """

    names: list[str]
    captions: list[list[str]]


def read_pair_file(
    path: Path,
    split: str | None,
    root: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> NamedImages:
    """Reads images and captions from a file, plain or gzipped.

    Args:
        path: A Karpathy split file or a file in COCO's caption format (``.json``), or text with an image's
            name and a caption on each line (``.txt``, ``.token``, ``.csv``, ``.tsv``); see
            :mod:`~xbt.data.caption_tables`.
        split: Splits of a Karpathy file; the other formats hold one split each.
        root: Folder that the names are relative to, and may not leave.
        image_column: Column of the names in a table, where it has an unusual name.
        caption_column: Column of the captions, likewise.

    Returns:
        The images in the file's order.

    Raises:
        ConfigError: If a split is given for a file that has none.
        DataError: If the file cannot be read, is of another format, or a name leaves the folder; the message
            gives the place.
    """
    check_is_file(path)
    kind = kind_of(path)
    if kind not in (".json", ".txt", *TABLE_KINDS):
        raise DataError(
            f"pairs cannot be loaded from {path}: give a Karpathy split file or COCO captions (.json), text "
            "with name.jpg,caption on each line (.txt, .csv, .tsv, .token; each may end in .gz), a folder of "
            "CLIP_benchmark's tars, hf: and a data set, or scenes"
        )
    content = read_json(path) if kind == ".json" else None
    if is_karpathy(content):
        records = parse_karpathy(content, path, split, root)
        return NamedImages([each.name for each in records], [list(each.sentences) for each in records])
    if split is not None:
        raise ConfigError(
            f"split {split!r} was given, but {path} has no splits: it is one; leave split out and name the "
            "file of the split that you mean"
        )
    if kind == ".json":
        return read_coco_captions(content, path, root)
    return read_image_lines(path, root, image_column, caption_column)


def read_image_lines(
    path: Path, root: Path, image_column: str | None = None, caption_column: str | None = None
) -> NamedImages:
    """Reads text with an image's name and a caption on each line.

    Args:
        path: The file; its first line may be a header.
        root: Folder that the names are relative to, and may not leave.
        image_column: Column of the names, where it has an unusual name.
        caption_column: Column of the captions, likewise.

    Returns:
        The images in the order in which they first occur.

    Raises:
        DataError: If the file cannot be read, holds no image, or a line does not name one.
    """
    captions: dict[str, list[str]] = {}
    for row in read_table(read_text(path), path, image_column, caption_column, pairs=True) or []:
        where = f"{path}, line {row.number}"
        if not row.image:
            raise DataError(
                f"{where}: no image is named; give a file with an image and a caption on each line"
            )
        name_within(root, row.image, where)
        captions.setdefault(row.image, []).extend(
            each or "" for each in as_captions(unpacked(row.caption, where), where, "fix the line")
        )
    if not captions:
        raise DataError(
            f"{path} names no image: captions alone are no pairs; write name.jpg,caption on every line, or "
            "use it as captions"
        )
    return NamedImages(list(captions), list(captions.values()))


def read_coco_captions(content: Any, path: Path, root: Path) -> NamedImages:
    """Joins the images and the annotations of a file in COCO's caption format; nocaps uses it as well.

    Args:
        content: What the file holds: ``images`` with ``id`` and ``file_name``, and ``annotations`` with
            ``image_id`` and ``caption``.
        path: The file, for errors.
        root: Folder that the names are relative to, and may not leave.

    Returns:
        The images in the file's order.

    Raises:
        DataError: If a record lacks a key, an id is no number or string or occurs twice, a name leaves the
            folder, or a caption belongs to no image of the file; the message gives the position.
    """
    names: dict[Any, str] = {}
    for position, image in enumerate(_records(content, "images", path)):
        where = f"{path}: record {position} of 'images'"
        identity, name = _values(image, ("id", "file_name"), where, "image")
        if not isinstance(name, str):
            raise DataError(
                f"{where} has a {type(name).__name__} under 'file_name' instead of a name; fix the record"
            )
        if identity in names:
            raise DataError(f"{where}: the image id {identity!r} occurs more than once; ids must be unique")
        name_within(root, name, where)
        names[identity] = name
    captions: dict[Any, list[str]] = {identity: [] for identity in names}
    for position, annotation in enumerate(_records(content, "annotations", path)):
        where = f"{path}: record {position} of 'annotations'"
        identity, caption = _values(annotation, ("image_id", "caption"), where, "caption")
        if identity not in captions:
            raise DataError(
                f"{where} is a caption of the image {identity!r}, which is not among the file's 'images'; "
                "give a complete file"
            )
        captions[identity] += [each or "" for each in as_captions(caption, where, "fix the record")]
    return NamedImages(list(names.values()), list(captions.values()))


def _records(content: Any, key: str, path: Path) -> list[Any]:
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise DataError(
            f"{path} holds no list of {key!r}: it is neither in Karpathy's format (a dataset_*.json file) "
            "nor in COCO's caption format with 'images' and 'annotations'; give a complete file"
        )
    return records


def _values(record: Any, keys: tuple[str, str], where: str, kind: str) -> tuple[Any, Any]:
    for key in keys:
        if not isinstance(record, dict) or key not in record:
            raise DataError(f"{where} lacks the key {key!r}; give a file with COCO's {kind} records")
    identity = record[keys[0]]
    is_number = isinstance(identity, int | float) and not isinstance(identity, bool)
    if not isinstance(identity, str) and not (is_number and abs(identity) < float("inf")):
        raise DataError(
            f"{where} has the image id {str(identity)[:40]}, a {type(identity).__name__}, where a number "
            "should be; fix the record"
        )
    return identity, record[keys[1]]
