"""Loading image–text pairs: caption files, CLIP_benchmark's tars, Hugging Face data sets, the scenes."""

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
    """Loads images with their captions; no image is decoded yet.

    Captions are stripped. Blank ones, those that are not valid Unicode, and images without a caption are left
    out, with a warning that counts them: a blank query has no answer, and an image without captions none that
    asks for it.

    Args:
        source: What to load; a plain string stands for ``PairSource(string)``.

    Returns:
        The pairs in the source's order.

    Raises:
        ConfigError: If an option does not apply to this kind of source.
        DataError: If the source cannot be read, image files are missing or lie outside of the image root, an
            image comes twice, or no image has a caption.

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
    return keep_readable(load_pairs(source), progress)


def keep_readable(pairs: ImageTextPairs, progress: bool = False) -> tuple[ImageTextPairs, list[Rejected]]:
    """Leaves out of loaded pairs what cannot be decoded; see :func:`load_readable_pairs`."""
    pairs, rejected = pairs.drop_unreadable(progress=progress)
    if rejected:
        listed = "; ".join(each.reason for each in rejected[:5])
        more = f"; and {len(rejected) - 5} more" if len(rejected) > 5 else ""
        count = len(pairs) + len(rejected)
        warnings.warn(f"skipped {len(rejected)} of {count} images: {listed}{more}", stacklevel=3)
    return pairs, rejected


def _read(source: PairSource) -> tuple[list[str], Sequence[ImageSource], list[list[str]]]:
    """Ids, undecoded images, and the captions as they stand."""
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
    """Makes pairs of the images that have a caption and warns about what is left out."""
    if not ids:
        raise DataError(f"{source} is empty: it holds no image; give a source with image–text pairs")
    spoken = [[words for caption in each if (words := caption.strip())] for each in captions]
    kept = [[words for words in each if is_unicode(words)] for each in spoken]
    silent = [name for name, each in zip(ids, kept, strict=True) if not each]
    if len(silent) == len(ids):
        raise DataError(f"none of the {len(ids)} images of {source} has a caption; {fix}")
    blank, invalid = (
        sum(map(len, before)) - sum(map(len, after)) for before, after in ((captions, spoken), (spoken, kept))
    )
    left_out = []
    if silent:
        left_out.append(
            f"{len(silent)} of {len(ids)} images of {source} have no caption and are left out, first "
            f"{silent[0]}"
        )
    if blank:
        left_out.append(f"{blank} of the captions of {source} are blank and are left out")
    if invalid:
        first = next(name for name, *each in zip(ids, spoken, kept, strict=True) if each[0] != each[1])
        left_out.append(
            f"{invalid} of the captions of {source}, first one of {readable(first)!r}, are not valid Unicode "
            "(half of a surrogate pair, as in a text that was cut short) and are left out"
        )
    if left_out:
        warnings.warn("; ".join(left_out), stacklevel=3)
    # The placeholder never leaves this function: it keeps rows aligned until the silent ones are gone.
    pairs = ImageTextPairs(ids, images, [each or [""] for each in kept])
    return pairs.select([row for row, each in enumerate(kept) if each]) if silent else pairs
