"""Captions without images: the text corpora that projections are trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xbt.data.files import check_is_file, kind_of, read_json, read_text
from xbt.data.hf_datasets import HUB_PREFIX, check_column, open_dataset, read_column
from xbt.data.image_text_pairs import choose_subset
from xbt.data.karpathy import is_karpathy, parse_karpathy
from xbt.data.scenes import DEFAULT_COUNT, scene_captions
from xbt.errors import ConfigError, DataError


@dataclass
class CaptionSource:
    """Where captions come from.

    Raises:
        ConfigError: If ``limit`` is below 1 or ``source`` is empty.
    """

    source: str
    """A .txt, .jsonl, .json (Karpathy's splits or COCO captions; each may end in .gz) or .parquet file,
    hf: and a Hub data set or a local directory, or scenes for the built-in world."""
    column: str = "caption"
    """Column or key that holds a caption, or a list of captions, per row (.jsonl, .parquet, hf:)."""
    split: str | None = None
    """Split to read (Karpathy's .json, hf:, scenes); a + joins two of Karpathy's."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    limit: int | None = None
    """Take only so many captions, chosen at random with the seed, in the original order."""
    seed: int = 0
    """Seed of that choice."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_source(self.source, self.limit)


def check_source(source: str, limit: int | None) -> None:
    """Checks what caption and pair sources share.

    Raises:
        ConfigError: If ``limit`` is below 1 or ``source`` is empty.
    """
    if not source.strip():
        raise ConfigError("source is empty; name a file, hf:REPOSITORY or scenes")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, but must be at least 1; leave it out to take everything")


def read_captions(source: CaptionSource | str) -> list[str]:
    """Reads captions from a file, a Hugging Face data set or the built-in scenes.

    Args:
        source: What to read; a plain string stands for ``CaptionSource(string)``.

    Returns:
        The captions, stripped, without blank ones, in the source's order.

    Raises:
        ConfigError: If an option does not apply to this kind of source.
        DataError: If the source cannot be read or holds no caption; the message names the file, the line
            where there is one, and the mend.

    Example:
        >>> read_captions("captions.txt.gz")
        >>> read_captions(CaptionSource("dataset_coco.json", split="train+restval", limit=100_000))
        >>> read_captions(CaptionSource("hf:umaru97/flickr30k_train_val_test", split="train"))
    """
    if isinstance(source, str):
        source = CaptionSource(source)
    if source.subset is not None and not source.source.startswith(HUB_PREFIX):
        raise ConfigError(
            f"subset {source.subset!r} was given with {source.source}, but only hf: sources have subsets; "
            "leave it out"
        )
    if source.source == "scenes":
        return scene_captions(source.limit or DEFAULT_COUNT, source.seed, source.split or "train")
    found = _read_all(source)
    captions = [caption.strip() for caption in found if caption is not None and caption.strip()]
    if not found:
        raise DataError(f"{source.source} is empty: it holds no caption; give a source with captions")
    if not captions:
        raise DataError(
            f"{source.source} holds {len(found)} captions, but all are only spaces; give one with words"
        )
    return [captions[i] for i in choose_subset(len(captions), source.limit, source.seed)]


def _read_all(source: CaptionSource) -> list[str | None]:
    if source.source.startswith(HUB_PREFIX):
        return _read_hub(source)
    path = Path(source.source).expanduser()
    check_is_file(path)
    kind = kind_of(path)
    if kind not in (".txt", ".jsonl", ".json", ".parquet") or path.name.lower().endswith(".parquet.gz"):
        raise DataError(
            f"captions cannot be read from {path}: its suffix must be .txt, .jsonl or .json (each may be "
            "followed by .gz) or .parquet; for a Hub data set, write hf: before its name"
        )
    if kind == ".json":
        return _read_json(path, source.split)
    if source.split is not None:
        raise ConfigError(f"split {source.split!r} was given, but {path} has no splits; leave it out")
    if kind == ".parquet":
        return _read_parquet(path, source.column)
    # Only line feeds end a line: a caption may contain other characters that str.splitlines splits at.
    lines: list[str | None] = list(read_text(path).removesuffix("\n").split("\n"))
    return _parse_jsonl(lines, path, source.column) if kind == ".jsonl" else lines


def _parse_jsonl(lines: list[str | None], path: Path, column: str) -> list[str | None]:
    captions: list[str | None] = []
    for number, line in enumerate(lines, start=1):
        if line is None or not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON; mend or remove the line") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object; write one object with the key {column!r} a line")
        check_column(column, list(row), where)
        captions += as_captions(row[column], f"{where}, column {column!r}")
    return captions


def _read_json(path: Path, split: str | None) -> list[str | None]:
    content = read_json(path)
    if is_karpathy(content):
        return [told for image in parse_karpathy(content, path, split) for told in image.sentences]
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(
            f"{path} is neither a Karpathy split file (key 'images') nor official COCO captions (key "
            "'annotations'); convert it to .jsonl"
        )
    if split is not None:
        raise ConfigError(f"split {split!r} was given, but {path} has no splits; leave it out")
    captions: list[str | None] = []
    for position, annotation in enumerate(annotations):
        where = f"{path}: record {position} of 'annotations'"
        if not isinstance(annotation, dict) or "caption" not in annotation:
            raise DataError(f"{where} lacks the key 'caption'; give the captions_*.json file")
        captions += as_captions(annotation["caption"], where)
    return captions


def _read_parquet(path: Path, column: str) -> list[str | None]:
    try:
        with pq.ParquetFile(path) as table:
            check_column(column, table.schema_arrow.names, str(path))
            values = table.read(columns=[column])[column].to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable parquet file ({reason}); write it again") from error
    return [told for row, value in enumerate(values) for told in as_captions(value, f"{path}, row {row}")]


def _read_hub(source: CaptionSource) -> list[str | None]:
    dataset = open_dataset(source.source, source.subset, source.split)
    values = read_column(dataset, source.column, source.source)
    return [
        told for row, value in enumerate(values) for told in as_captions(value, f"{source.source}, row {row}")
    ]


def as_captions(value: Any, where: str) -> list[str | None]:
    """Returns a cell as a list of captions: it may hold a string, a list of strings, or nothing.

    Args:
        value: The cell.
        where: Its place, for the error.

    Returns:
        Its captions; None where the data has none.

    Raises:
        DataError: If it holds something else.
    """
    told = value if isinstance(value, list) else [value]
    for item in told:
        if item is not None and not isinstance(item, str):
            raise DataError(
                f"{where}: a {type(item).__name__} ({str(item)[:40]!r}) where a caption should be; name the "
                "column that holds text"
            )
    return told
