"""Where image–text pairs come from: Karpathy's splits, Hugging Face data sets or the built-in scenes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xbt.data.caption_files import as_captions
from xbt.data.captions import check_source
from xbt.data.files import check_is_file, kind_of
from xbt.data.hf_datasets import HUB_PREFIX, HubImages, open_dataset, read_column
from xbt.data.image_text_pairs import ImageTextPairs, Rejected, choose_subset
from xbt.data.karpathy import find_images, read_karpathy
from xbt.data.scenes import DEFAULT_COUNT, make_scenes
from xbt.errors import ConfigError, DataError
from xbt.images import ImageSource

__all__ = ["ImageTextPairs", "PairSource", "Rejected", "load_pairs", "load_readable_pairs"]


@dataclass
class PairSource:
    """Where images with captions come from.

    Raises:
        ConfigError: If ``limit`` is below 1 or ``source`` is empty.
    """

    source: str
    """A Karpathy split file (dataset_*.json or .json.gz), hf: and a Hub data set or a local directory, or
    scenes for the built-in world."""
    image_root: str | None = None
    """Folder that image names are relative to; for a Karpathy file, the file's own folder by default."""
    split: str | None = None
    """Split to read; a + joins two of Karpathy's."""
    image_column: str = "image"
    """Column of an hf: source that holds the image, its bytes or its path."""
    caption_column: str = "caption"
    """Column of an hf: source that holds a caption or a list of captions."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    limit: int | None = None
    """Take only so many images, chosen at random with the seed, in the original order."""
    seed: int = 0
    """Seed of that choice."""
    image_size: int = 32
    """Side in pixels of the built-in scenes; other sources ignore it."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_source(self.source, self.limit)


def load_pairs(source: PairSource | str) -> ImageTextPairs:
    """Loads images with their captions; no image is decoded yet.

    Images without a caption are left out, with a warning that counts them.

    Args:
        source: What to load; a plain string stands for ``PairSource(string)``.

    Returns:
        The pairs in the source's order.

    Raises:
        ConfigError: If an option does not apply to this kind of source.
        DataError: If the source cannot be read, image files are missing, or no image has a caption.

    Example:
        >>> load_pairs(PairSource("dataset_flickr30k.json", image_root="flickr30k-images", split="test"))
        >>> load_pairs(PairSource("hf:royokong/coco_test", caption_column="text"))
    """
    if isinstance(source, str):
        source = PairSource(source)
    if source.subset is not None and not source.source.startswith(HUB_PREFIX):
        raise ConfigError(
            f"subset {source.subset!r} was given with {source.source}, but only hf: sources have subsets; "
            "leave it out"
        )
    if source.source == "scenes":
        count = source.limit or DEFAULT_COUNT
        return make_scenes(count, source.seed, source.split or "train", source.image_size)
    pairs = _load_hub(source) if source.source.startswith(HUB_PREFIX) else _load_karpathy(source)
    return pairs.select(choose_subset(len(pairs), source.limit, source.seed)) if source.limit else pairs


def load_readable_pairs(
    source: PairSource | str, progress: bool = False
) -> tuple[ImageTextPairs, list[Rejected]]:
    """Loads pairs and leaves out, by name and count, the images that cannot be decoded.

    Args:
        source: What to load.
        progress: Whether to show a bar while every image is decoded once.

    Returns:
        The readable pairs, and the others with the reason.

    Raises:
        DataError: If the source cannot be used or no image can be read.

    Warns:
        UserWarning: If images were left out.
    """
    pairs, rejected = load_pairs(source).drop_unreadable(progress=progress)
    if rejected:
        listed = "; ".join(each.reason for each in rejected[:5])
        more = f"; and {len(rejected) - 5} more" if len(rejected) > 5 else ""
        count = len(pairs) + len(rejected)
        warnings.warn(f"skipped {len(rejected)} of {count} images: {listed}{more}", stacklevel=2)
    return pairs, rejected


def _load_karpathy(source: PairSource) -> ImageTextPairs:
    path = Path(source.source).expanduser()
    check_is_file(path)
    if kind_of(path) != ".json":
        raise DataError(
            f"pairs cannot be loaded from {path}: give a Karpathy split file (.json or .json.gz), hf: and a "
            "data set, or scenes"
        )
    records = read_karpathy(path, source.split)
    root = path.parent if source.image_root is None else Path(source.image_root).expanduser()
    paths = find_images(records, root)
    captions = [[told for told in record.sentences if told] for record in records]
    return _with_captions([record.name for record in records], paths, captions, source.source)


def _load_hub(source: PairSource) -> ImageTextPairs:
    dataset = open_dataset(source.source, source.subset, source.split)
    images = HubImages(dataset, source.image_column, source.source, source.image_root)
    captions = []
    for row, value in enumerate(read_column(dataset, source.caption_column, source.source)):
        where = f"{source.source}, row {row}, column {source.caption_column!r}"
        told = [caption.strip() for caption in as_captions(value, where) if caption is not None]
        captions.append([caption for caption in told if caption])
    return _with_captions([f"row-{row}" for row in range(len(images))], images, captions, source.source)


def _with_captions(
    ids: list[str], images: Sequence[ImageSource], captions: list[list[str]], source: str
) -> ImageTextPairs:
    """Makes pairs of the images that have a caption and warns about the others."""
    if not ids:
        raise DataError(f"{source} is empty: it holds no image; give a source with image–text pairs")
    silent = [name for name, told in zip(ids, captions, strict=True) if not told]
    if len(silent) == len(ids):
        raise DataError(f"none of the {len(ids)} images of {source} has a caption; name the caption column")
    if silent:
        warnings.warn(
            f"{len(silent)} of {len(ids)} images of {source} have no caption and are left out, first "
            f"{silent[0]}",
            stacklevel=4,
        )
    # The placeholder never leaves this function: it keeps rows aligned until the silent ones are gone.
    pairs = ImageTextPairs(ids, images, [told or [""] for told in captions])
    return pairs.select([row for row, told in enumerate(captions) if told]) if silent else pairs
