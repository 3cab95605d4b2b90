"""Captions without images: the text corpora for training projections, and the readers of caption files.

Published results on Flickr30k and COCO use Karpathy's split files, ``dataset_{flickr8k,flickr30k,coco}.json``
with ``raw`` sentences. COCO's images have five, six or seven captions, and all of them count.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from xbt.data.caption_tables import TABLE_KINDS, read_table
from xbt.data.files import (
    COLUMN_HINT,
    DEFAULT_COUNT,
    as_captions,
    check_is_file,
    check_source,
    check_unpacked,
    choose_splits,
    is_unicode,
    kind_of,
    name_within,
    parse_json,
    read_json,
    read_text,
    refuse_options,
    refuse_split,
    unpacked,
)
from xbt.data.hf_folders import HUB_PREFIX
from xbt.data.huggingface import check_column, open_dataset, read_column, read_ids
from xbt.data.items import choose_subset, require_unique
from xbt.data.scenes import scene_captions
from xbt.errors import DataError

Row = tuple[str, str | None]
"""An id, and its caption or None."""
_USUAL_COLUMN = "caption"


def read_rows(path: Path, column: str, split: str | None) -> Iterator[Row]:
    """Read ids and captions, blank ones included, of a file; errors may be raised during iteration."""
    check_is_file(path)
    kind = kind_of(path)
    kinds = (".txt", *TABLE_KINDS, ".jsonl", ".json", ".parquet")
    if kind not in kinds or path.name.lower().endswith(".parquet.gz"):
        raise DataError(
            f"captions cannot be read from {path}: its suffix must be .txt, .token, .csv, .tsv, .jsonl or "
            ".json (each may be followed by .gz) or .parquet; for a Hub data set, write hf: before its name"
        )
    if kind == ".json":
        return _read_json(path, split)
    refuse_split(split, path)
    if kind == ".parquet":
        return _read_parquet(path, column)
    return _read_jsonl(path, column) if kind == ".jsonl" else _read_lines(path, column)


def _read_lines(path: Path, column: str) -> Iterator[Row]:
    wanted = None if column == _USUAL_COLUMN else column
    text = read_text(path)
    table = read_table(text, path, caption_column=wanted)
    if table is None:
        for position, line in enumerate(_split_lines(text)):
            yield f"row-{position}", line
        return
    seen: Counter[str] = Counter()
    for position, row in enumerate(table):
        where = f"{path}, line {row.number}"
        value = unpacked(row.caption, where)
        if row.image is None:
            yield from named_rows(value, f"row-{position}", where)
            continue
        for caption in as_captions(value, where):
            yield f"{row.image}#{seen[row.image]}", caption
            seen[row.image] += 1


def _split_lines(text: str) -> list[str]:
    # Only line feeds end a line: captions may contain other characters that str.splitlines splits at.
    return text.removesuffix("\n").split("\n")


def _read_jsonl(path: Path, column: str) -> Iterator[Row]:
    lines = _split_lines(read_text(path))
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, where, first_line=None)
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object; write one object with the key {column!r} per line")
        check_column(column, list(row), where)
        yield from named_rows(row[column], f"row-{count}", f"{where}, column {column!r}")
        count += 1


def _read_json(path: Path, split: str | None) -> Iterator[Row]:
    content = read_json(path)
    if is_karpathy(content):
        for image in parse_karpathy(content, path, split):
            for position, sentence in enumerate(image.sentences):
                yield f"{image.name}#{position}", sentence
        return
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(
            f"{path} is neither a Karpathy split file (key 'images') nor official COCO captions (key "
            "'annotations'); convert it to .jsonl"
        )
    refuse_split(split, path)
    for position, annotation in enumerate(annotations):
        where = f"{path}: record {position} of 'annotations'"
        if not isinstance(annotation, dict) or "caption" not in annotation:
            raise DataError(f"{where} lacks the key 'caption'; give the captions_*.json file")
        name = str(annotation.get("id", f"row-{position}"))
        yield from named_rows(annotation["caption"], name, where, "fix the record")


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
    """Parse the JSON content of a split file, all splits by default; COCO's train set is ``train+restval``.

    ``root`` is the base folder of the names, which a name may not leave; ``None`` if no image will be read.
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
    raw = [_field(item, "raw", str, f"{where}, sentence {number}") for number, item in enumerate(sentences)]
    return KarpathyImage(name, _field(record, "split", str, where), tuple(text.strip() for text in raw))


def _field(record: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise DataError(f"{where} lacks the key {key!r}; give a file in Karpathy's format")
    if not isinstance(record[key], kind):
        raise DataError(
            f"{where} has a {type(record[key]).__name__} under {key!r} instead of a {kind.__name__}; "
            "give a file in Karpathy's format"
        )
    return record[key]


def _read_parquet(path: Path, column: str) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            check_column(column, names, str(path))
            if names.count(column) > 1:
                raise DataError(f"{path} has two columns {column!r}; rename one and write it again")
            check_unpacked(path, _column_size(table.metadata, column))
            cells = table.read(columns=[column])[column]
            values = _values(cells, path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable parquet file ({reason}); write it again") from error
    for row, value in enumerate(values):
        yield from named_rows(value, f"row-{row}", f"{path}, row {row}")


def _column_size(metadata: Any, column: str) -> int:
    """Uncompressed size of a column in bytes, as stated in the file's metadata."""
    groups = (metadata.row_group(row) for row in range(metadata.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column
    )


def _values(cells: Any, path: Path) -> list[Any]:
    try:
        return cells.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        for row, cell in enumerate(cells):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {row}: not UTF-8; write the file again") from error
        raise


def named_rows(value: Any, name: str, where: str, fix: str = COLUMN_HINT) -> Iterator[Row]:
    """Captions of one cell with their ids: the row's id, followed by ``#<position>`` for a list."""
    captions = as_captions(value, where, fix)
    if len(captions) == 1 and not isinstance(value, list):
        yield name, captions[0]
        return
    for position, caption in enumerate(captions):
        yield f"{name}#{position}", caption


@dataclass
class CaptionSource:
    """Source of captions.

    Raises:
        ConfigError: If ``limit`` is below 1 or ``source`` is empty.
    """

    source: str
    """A .txt, .jsonl, .csv, .tsv, .token or .json file (Karpathy's splits or COCO captions; each may end in
    .gz), a .parquet file, hf: and a Hub data set or a local directory, or scenes (built in). From a file that
    names images, such as Flickr8k.token.txt, only the captions are read."""
    column: str = "caption"
    """Column or key that holds a caption, or a list of captions, per row (.jsonl, .parquet, .csv, .tsv,
    hf:)."""
    split: str | None = None
    """Split to read (Karpathy's .json, hf:, scenes); + joins several splits of a Karpathy file."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    limit: int | None = None
    """Maximum number of captions; they are drawn at random with the seed and keep the original order."""
    seed: int = 0
    """Seed of the random draw."""
    id_column: str | None = None
    """Column of an hf: source that holds a unique id per row; by default the id is the row number."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_source(self.source, self.limit)


def read_captions(source: CaptionSource | str) -> list[str]:
    """Read captions from a file, a Hugging Face data set or the built-in scenes.

    Args:
        source: The source; a plain string means ``CaptionSource(string)``.

    Returns:
        The captions in the source's order, stripped, without blank ones.

    Raises:
        ConfigError: If an option does not apply to this kind of source.
        DataError: If the source cannot be read or holds no caption; the message names the file, the line
            if there is one, and the fix.

    Warns:
        UserWarning: If captions were left out because they are not valid Unicode, or if captions look quoted
            but the file is not quoted CSV.

    Example:
        >>> read_captions("captions.txt.gz")
        >>> read_captions(CaptionSource("dataset_coco.json", split="train+restval", limit=100_000))
        >>> read_captions(CaptionSource("hf:umaru97/flickr30k_train_val_test", split="train"))
    """
    if isinstance(source, str):
        source = CaptionSource(source)
    total, invalid = 0, []
    captions = []
    for name, caption in _rows(source):
        total += 1
        if caption is None or not caption.strip():
            continue
        if is_unicode(caption):
            captions.append(caption.strip())
        else:
            invalid.append(name)
    _refuse_empty(source, total, len(captions))
    if invalid:
        warnings.warn(
            f"{len(invalid)} of the {total} captions of {source.source}, first {invalid[0]!r}, are not valid "
            "Unicode (half of a surrogate pair, as in a text that was cut short) and are left out",
            stacklevel=2,
        )
    return [captions[i] for i in choose_subset(len(captions), source.limit, source.seed)]


def read_caption_rows(source: CaptionSource) -> tuple[list[str], list[str | None]]:
    """Read ids and captions, including the blank ones that :func:`read_captions` leaves out.

    In Karpathy's files, the scenes, and text files that name images, an id is ``"<image name>#<position>"``,
    as in Flickr30k's token files. In COCO's files it is the annotation's id. Otherwise it is the row's id,
    followed by a position if the row holds a list: ``"row-17"``, ``"row-17#0"``. With a limit, captions that
    are blank or not valid Unicode are left out.
    """
    rows = list(_rows(source))
    usable = [row for row in rows if row[1] is not None and row[1].strip() and is_unicode(row[1])]
    _refuse_empty(source, len(rows), len(usable))
    if source.limit is not None:
        rows = [usable[i] for i in choose_subset(len(usable), source.limit, source.seed)]
    ids = [name for name, _ in rows]
    require_unique(ids, source.source)
    return ids, [caption for _, caption in rows]


def _refuse_empty(source: CaptionSource, total: int, usable: int) -> None:
    if not total:
        raise DataError(f"{source.source} is empty: it holds no caption; give a source with captions")
    if not usable:
        raise DataError(
            f"{source.source} holds {total} captions, but all are only spaces or not valid Unicode; give a "
            "source with text"
        )


def _rows(source: CaptionSource) -> Iterator[Row]:
    if source.source.startswith(HUB_PREFIX):
        dataset = open_dataset(source.source, source.subset, source.split)
        ids = read_ids(dataset, source.id_column, source.source)
        values = read_column(dataset, source.column, source.source)
        for row, (name, value) in enumerate(zip(ids, values, strict=True)):
            yield from named_rows(value, name, f"{source.source}, row {row}")
        return
    refuse_options(source, ("subset", "id_column"), "but only hf: sources have {}s")
    if source.source == "scenes":
        split, count = source.split or "train", source.limit or DEFAULT_COUNT
        for number, caption in enumerate(scene_captions(count, source.seed, split)):
            yield f"scene-{split}-{source.seed}-{number:06d}#0", caption
    else:
        yield from read_rows(Path(source.source).expanduser(), source.column, source.split)
