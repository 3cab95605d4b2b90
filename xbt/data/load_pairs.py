"""Loading of image–text pairs from caption files, tars, Hugging Face data sets and the built-in scenes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from xbt.data.files import DEFAULT_COUNT, is_unicode
from xbt.data.huggingface import read_hub_pairs
from xbt.data.image_folder import find_images
from xbt.data.items import Rejected, choose_subset, readable
from xbt.data.pair_formats import read_pair_file, read_retrieval_folder
from xbt.data.pairs import ImageTextPairs, PairSource
from xbt.data.scenes import make_scenes
from xbt.errors import DataError
from xbt.images import ImageSource

__all__ = ["ImageTextPairs", "PairSource", "Rejected", "load_pairs", "load_readable_pairs"]


def load_pairs(source: PairSource | str) -> ImageTextPairs:
    """Load images with their captions; no image is decoded yet.

    Captions are stripped. Captions that are blank or not valid Unicode are left out, as are images without a
    caption. A warning counts them.

    Args:
        source: The source; a plain string means ``PairSource(string)``.

    Returns:
        The pairs in the source's order.

    Raises:
        ConfigError: If an option does not apply to this kind of source.
        DataError: If the source cannot be read, image files are missing or lie outside of the image root, an
            image occurs twice, or no image has a caption.

    Warns:
        UserWarning: If captions or images were left out.

    Example:
        >>> load_pairs(PairSource("dataset_flickr30k.json", image_root="flickr30k-images", split="test"))
        >>> load_pairs(PairSource("dataset_coco.json", image_root="coco", split="val+restval"))
        >>> load_pairs(PairSource("hf://datasets/clip-benchmark/wds_mscoco_captions", split="test"))
        >>> load_pairs("hf:royokong/coco_test")
    """
    if isinstance(source, str):
        source = PairSource(source)
    source.check_options()
    if source.kind == "scenes":
        count = source.limit or DEFAULT_COUNT
        return make_scenes(count, source.seed, source.split or "train", source.image_size)
    fix = "name the caption column" if source.kind == "hf" else "give a source that has captions"
    pairs = _with_captions(*_read(source), source.source, fix)
    return pairs.select(choose_subset(len(pairs), source.limit, source.seed)) if source.limit else pairs


def load_readable_pairs(
    source: PairSource | str, progress: bool = False
) -> tuple[ImageTextPairs, list[Rejected]]:
    """Load pairs and leave out images that cannot be decoded, with a warning that names and counts them.

    Args:
        source: The source; a plain string means ``PairSource(string)``.
        progress: Whether to show a progress bar while every image is decoded once.

    Returns:
        The pairs with a readable image, and the rejected images with the reason.

    Raises:
        DataError: If the source cannot be used or no image can be read.

    Warns:
        UserWarning: If images were left out.
    """
    return keep_readable(load_pairs(source), progress)


def keep_readable(pairs: ImageTextPairs, progress: bool = False) -> tuple[ImageTextPairs, list[Rejected]]:
    """Leave out images that cannot be decoded; see :func:`load_readable_pairs`."""
    pairs, rejected = pairs.drop_unreadable(progress=progress)
    if rejected:
        listed = "; ".join(image.reason for image in rejected[:5])
        more = f"; and {len(rejected) - 5} more" if len(rejected) > 5 else ""
        count = len(pairs) + len(rejected)
        warnings.warn(f"skipped {len(rejected)} of {count} images: {listed}{more}", stacklevel=3)
    return pairs, rejected


def _read(source: PairSource) -> tuple[list[str], Sequence[ImageSource], list[list[str]]]:
    """Read ids, undecoded images and unchanged captions."""
    if source.kind == "hf":
        return read_hub_pairs(source)
    if source.kind == "tars":
        return read_retrieval_folder(source.source, source.split)
    path = Path(source.source).expanduser()
    root = path.parent if source.image_root is None else Path(source.image_root).expanduser()
    columns = source.image_column, source.caption_column
    names, captions = read_pair_file(path, source.split, root, *columns)
    return names, find_images(names, root), captions


def _with_captions(
    ids: list[str], images: Sequence[ImageSource], captions: list[list[str]], source: str, fix: str
) -> ImageTextPairs:
    """Make pairs of the images with a caption, and warn about the captions and images left out."""
    if not ids:
        raise DataError(f"{source} is empty: it holds no image; give a source with image–text pairs")
    nonblank = [[stripped for text in texts if (stripped := text.strip())] for texts in captions]
    kept = [[text for text in texts if is_unicode(text)] for texts in nonblank]
    captionless = [name for name, texts in zip(ids, kept, strict=True) if not texts]
    if len(captionless) == len(ids):
        raise DataError(f"none of the {len(ids)} images of {source} has a caption; {fix}")
    blank, invalid = (
        sum(map(len, before)) - sum(map(len, after))
        for before, after in ((captions, nonblank), (nonblank, kept))
    )
    left_out = []
    if captionless:
        left_out.append(
            f"{len(captionless)} of {len(ids)} images of {source} have no caption and are left out, first "
            f"{captionless[0]}"
        )
    if blank:
        left_out.append(f"{blank} of the captions of {source} are blank and are left out")
    if invalid:
        first = next(name for name, before, after in zip(ids, nonblank, kept, strict=True) if before != after)
        left_out.append(
            f"{invalid} of the captions of {source}, first one of {readable(first)!r}, are not valid Unicode "
            "(half of a surrogate pair, as in a text that was cut short) and are left out"
        )
    if left_out:
        warnings.warn("; ".join(left_out), stacklevel=3)
    # The placeholder [""] keeps rows aligned until select() removes the images without a caption.
    pairs = ImageTextPairs(ids, images, [texts or [""] for texts in kept])
    return pairs.select([row for row, texts in enumerate(kept) if texts]) if captionless else pairs
