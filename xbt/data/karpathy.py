"""Reader of Karpathy's split files, ``dataset_{flickr8k,flickr30k,coco}.json``.

Published results on Flickr30k and COCO use these splits and the ``raw`` sentences. COCO's images have five,
six or seven captions, and all of them count.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from xbt.data.files import choose_splits, name_within, read_json
from xbt.errors import DataError


class KarpathyImage(NamedTuple):
    """One record of a split file: file name with its folder if there is one, split, and stripped captions."""

    name: str
    split: str
    sentences: tuple[str, ...]


def is_karpathy(content: Any) -> bool:
    """Return True for Karpathy's format: an object with images but without COCO's annotations."""
    return isinstance(content, dict) and "images" in content and "annotations" not in content


def read_karpathy(path: Path, split: str | None = None, root: Path | None = None) -> list[KarpathyImage]:
    """Read a Karpathy split file, plain or gzipped; see :func:`parse_karpathy`."""
    content = read_json(path)
    if not is_karpathy(content):
        raise DataError(
            f"{path} is not in Karpathy's format, an object with the key 'images'; give a dataset_*.json file"
        )
    return parse_karpathy(content, path, split, root)


def parse_karpathy(
    content: Any, path: Path, split: str | None = None, root: Path | None = None
) -> list[KarpathyImage]:
    """Parse the JSON content of a split file.

    Args:
        content: The content; see :func:`is_karpathy`.
        path: The file, for error messages.
        split: Name of a split; ``+`` joins several; ``all`` or None takes all of them. COCO's train set is
            ``train+restval``.
        root: Base folder of the names, which a name may not leave; ``None`` if no image will be read.
    """
    records = content["images"]
    if not isinstance(records, list) or not records:
        raise DataError(f"{path} is empty: its 'images' hold no record; give a complete split file")
    images = [_parse_record(record, position, path, root) for position, record in enumerate(records)]
    if split is None:
        return images
    wanted = choose_splits(split, sorted({image.split for image in images}), str(path))
    return [image for image in images if image.split in wanted]


def _parse_record(record: Any, position: int, path: Path, root: Path | None) -> KarpathyImage:
    where = f"{path}: record {position} of 'images'"
    filename = _field(record, "filename", str, where)
    folder = _field(record, "filepath", str, where) if "filepath" in record else ""
    name = f"{folder}/{filename}" if folder else filename
    if root is not None:
        name_within(root, name, where)
    sentences = _field(record, "sentences", list, where)
    raw = [
        _field(sentence, "raw", str, f"{where}, sentence {number}")
        for number, sentence in enumerate(sentences)
    ]
    return KarpathyImage(
        name=name,
        split=_field(record, "split", str, where),
        sentences=tuple(text.strip() for text in raw),
    )


def _field(record: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise DataError(f"{where} lacks the key {key!r}; give a file in Karpathy's format")
    if not isinstance(record[key], kind):
        raise DataError(
            f"{where} has a {type(record[key]).__name__} under {key!r} instead of a {kind.__name__}; "
            "give a file in Karpathy's format"
        )
    return record[key]
