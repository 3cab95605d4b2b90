"""Captions without images: the text corpora that projections are trained on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xbt.data.caption_files import Row, named_rows, read_rows
from xbt.data.files import is_unicode
from xbt.data.hf_datasets import open_dataset, read_column, read_ids
from xbt.data.hf_folders import HUB_PREFIX
from xbt.data.image_text_pairs import choose_subset
from xbt.data.scenes import DEFAULT_COUNT, scene_captions
from xbt.errors import ConfigError, DataError


@dataclass
class CaptionSource:
    """Where captions come from.

    Raises:
        ConfigError: If ``limit`` is below 1 or ``source`` is empty.
    """

    source: str
    """A .txt, .jsonl, .csv, .tsv, .token or .json file (Karpathy's splits or COCO captions; each may end in
    .gz), a .parquet file, hf: and a Hub data set or a local directory, or scenes for the built-in world. Of a
    file that names images, such as Flickr8k.token.txt, the captions alone are read."""
    column: str = "caption"
    """Column or key that holds a caption, or a list of captions, per row (.jsonl, .parquet, .csv, .tsv,
    hf:)."""
    split: str | None = None
    """Split to read (Karpathy's .json, hf:, scenes); a + joins two of Karpathy's."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    limit: int | None = None
    """Take only so many captions, chosen at random with the seed, in the original order."""
    seed: int = 0
    """Seed of that choice."""
    id_column: str | None = None
    """Column of an hf: source that holds a unique id per row; otherwise the position makes the id."""

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
            where there is one, and the fix.

    Warns:
        UserWarning: If captions were left out that are not valid Unicode, or captions seem to be quoted in a
            file that is not.

    Example:
        >>> read_captions("captions.txt.gz")
        >>> read_captions(CaptionSource("dataset_coco.json", split="train+restval", limit=100_000))
        >>> read_captions(CaptionSource("hf:umaru97/flickr30k_train_val_test", split="train"))
    """
    if isinstance(source, str):
        source = CaptionSource(source)
    found, broken = 0, []
    captions = []
    for name, caption in _rows(source):
        found += 1
        if caption is None or not caption.strip():
            continue
        if is_unicode(caption):
            captions.append(caption.strip())
        else:
            broken.append(name)
    _refuse_empty(source, found, len(captions))
    if broken:
        warnings.warn(
            f"{len(broken)} of the {found} captions of {source.source}, first {broken[0]!r}, are not valid "
            "Unicode (half of a surrogate pair, as in a text that was cut short) and are left out",
            stacklevel=2,
        )
    return [captions[i] for i in choose_subset(len(captions), source.limit, source.seed)]


def read_caption_rows(source: CaptionSource) -> tuple[list[str], list[str | None]]:
    """Reads captions with an id each: what :func:`read_captions` reads, and the blank ones.

    Args:
        source: What to read.

    Returns:
        Ids and captions. An id is ``"<image name>#<position>"`` in Karpathy's files and the scenes, as
        Flickr30k's own token files write it, and in other text that names images; the annotation's id in
        COCO's; otherwise the row's, with a position where a row holds a list: ``"row-17"``, ``"row-17#0"``.
        With a limit, captions that are blank or not valid Unicode are left out.

    Raises:
        ConfigError: As :func:`read_captions`.
        DataError: As :func:`read_captions`, or if an id occurs twice.
    """
    rows = list(_rows(source))
    usable = [row for row in rows if row[1] is not None and row[1].strip() and is_unicode(row[1])]
    _refuse_empty(source, len(rows), len(usable))
    if source.limit is not None:
        rows = [usable[i] for i in choose_subset(len(usable), source.limit, source.seed)]
    ids = [name for name, _ in rows]
    require_unique(ids, source.source)
    return ids, [caption for _, caption in rows]


def require_unique(ids: Sequence[str], source: str) -> None:
    """Checks that no id occurs twice.

    Raises:
        DataError: If one does; the message names it.
    """
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise DataError(f"{source}: the id {name!r} occurs more than once; ids must be unique")
        seen.add(name)


def _refuse_empty(source: CaptionSource, found: int, usable: int) -> None:
    if not found:
        raise DataError(f"{source.source} is empty: it holds no caption; give a source with captions")
    if not usable:
        raise DataError(
            f"{source.source} holds {found} captions, but all are only spaces or not valid Unicode; give one "
            "with words"
        )


def _rows(source: CaptionSource) -> Iterator[Row]:
    for option in ("subset", "id_column"):
        value = getattr(source, option)
        if value is not None and not source.source.startswith(HUB_PREFIX):
            raise ConfigError(
                f"{option} {value!r} was given with {source.source}, but only hf: sources have {option}s; "
                "leave it out"
            )
    if source.source == "scenes":
        return _read_scenes(source)
    return (
        _read_hub(source)
        if source.source.startswith(HUB_PREFIX)
        else read_rows(Path(source.source).expanduser(), source.column, source.split)
    )


def _read_scenes(source: CaptionSource) -> Iterator[Row]:
    split, count = source.split or "train", source.limit or DEFAULT_COUNT
    for number, caption in enumerate(scene_captions(count, source.seed, split)):
        yield f"scene-{split}-{source.seed}-{number:06d}#0", caption


def _read_hub(source: CaptionSource) -> Iterator[Row]:
    dataset = open_dataset(source.source, source.subset, source.split)
    ids = read_ids(dataset, source.id_column, source.source)
    values = read_column(dataset, source.column, source.source)
    for row, (name, value) in enumerate(zip(ids, values, strict=True)):
        yield from named_rows(value, name, f"{source.source}, row {row}")
