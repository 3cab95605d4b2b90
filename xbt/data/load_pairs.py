"""Loading of image–text pairs from caption files, tars, Hugging Face data sets and the built-in scenes.

Layout of a tar folder (LAION's CLIP_benchmark, ``clip_benchmark_export_wds``; ``clip-benchmark/wds_*`` on the
Hub)::

    dataset_type.txt      retrieval
    test/nshards.txt      2
    test/0.tar            s0000000.jpg, s0000000.txt (one caption a line), s0000001.jpg, ...
    test/1.tar
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
from huggingface_hub import snapshot_download

from xbt.data.caption_tables import TABLE_KINDS, read_table
from xbt.data.captions import is_karpathy, parse_karpathy
from xbt.data.files import (
    ALL_SPLITS,
    DEFAULT_COUNT,
    as_captions,
    check_is_file,
    choose_splits,
    is_unicode,
    kind_of,
    name_within,
    one_line,
    read_json,
    read_text,
    refuse_split,
    unpacked,
)
from xbt.data.huggingface import read_hub_pairs
from xbt.data.image_folder import find_images
from xbt.data.items import LazyImages, RawPairs, Rejected, choose_subset, readable
from xbt.data.pairs import ImageTextPairs, PairSource
from xbt.data.scenes import make_scenes
from xbt.data.tars import DAMAGE, missing, read_samples
from xbt.errors import DataError

__all__ = ["ImageTextPairs", "PairSource", "Rejected", "load_pairs", "load_readable_pairs"]

_HUB_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?(/.*)?")
_MAX_DIGITS = 18
_NUMBER = re.compile(r"0|[1-9]\d*", re.ASCII)
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz"}
NamedCaptions = tuple[list[str], list[list[str]]]
"""File names of images, with their folders if there are any, and the unchanged captions of each image."""


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
    pairs = _with_captions(_read(source), source.source, fix)
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


def _read(source: PairSource) -> RawPairs:
    """Read ids, undecoded images and unchanged captions."""
    if source.kind == "hf":
        return read_hub_pairs(source)
    if source.kind == "tars":
        return read_retrieval_folder(source.source, source.split)
    path = Path(source.source).expanduser()
    root = path.parent if source.image_root is None else Path(source.image_root).expanduser()
    columns = source.image_column, source.caption_column
    names, captions = read_pair_file(path, source.split, root, *columns)
    return RawPairs(names, find_images(names, root), captions)


def _with_captions(raw: RawPairs, source: str, fix: str) -> ImageTextPairs:
    """Make pairs of the images with a caption, and warn about the captions and images left out."""
    ids, images, captions = raw
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
        some = f"{len(captionless)} of {len(ids)} images of {source}"
        left_out.append(f"{some} have no caption and are left out, first {captionless[0]}")
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


def read_pair_file(
    path: Path,
    split: str | None,
    root: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> NamedCaptions:
    """Read image names, which may not leave the folder ``root``, and captions from a file, plain or gzipped.

    The file is a Karpathy split file or in COCO's caption format (``.json``), or text with an image name and
    a caption on each line (``.txt``, ``.token``, ``.csv``, ``.tsv``). Columns of usual names are found.
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
        return [image.name for image in records], [list(image.sentences) for image in records]
    refuse_split(split, path)
    if kind == ".json":
        return read_coco_captions(content, path, root)
    return read_image_lines(path, root, image_column, caption_column)


def read_image_lines(
    path: Path, root: Path, image_column: str | None = None, caption_column: str | None = None
) -> NamedCaptions:
    """Read text with an image name and a caption on each line; images are in order of first occurrence."""
    captions: dict[str, list[str]] = {}
    for row in read_table(read_text(path), path, image_column, caption_column, pairs=True) or []:
        where = f"{path}, line {row.number}"
        if not row.image:
            raise DataError(
                f"{where}: no image is named; give a file with an image and a caption on each line"
            )
        name_within(root, row.image, where)
        captions.setdefault(row.image, []).extend(
            caption or "" for caption in as_captions(unpacked(row.caption, where), where, "fix the line")
        )
    if not captions:
        raise DataError(
            f"{path} names no image: captions alone are no pairs; write name.jpg,caption on every line, or "
            "use it as captions"
        )
    return list(captions), list(captions.values())


def read_coco_captions(content: Any, path: Path, root: Path) -> NamedCaptions:
    """Join the images and annotations of a file in COCO's caption format, which nocaps also uses.

    ``images`` have ``id`` and ``file_name``, and ``annotations`` have ``image_id`` and ``caption``.
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
        captions[identity] += [text or "" for text in as_captions(caption, where, "fix the record")]
    return list(names.values()), list(captions.values())


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


class TarredImages(LazyImages):
    """Images read from uncompressed tars on any file system of fsspec, by (tar, offset, size)."""

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int, int]] = []

    def __len__(self) -> int:
        return len(self.ranges)

    def source_at(self, row: int) -> bytes:
        """One image, encoded."""
        tar, start, size = self.ranges[row]
        files, path = fsspec.core.url_to_fs(tar)
        return bytes(files.cat_file(path, start=start, end=start + size))


def read_retrieval_folder(source: str, split: str | None) -> RawPairs:
    """List the images and captions of a tar folder, with the ids ``"<split>/<shard>/<key>"``.

    The source is a folder, a URL that fsspec opens, or ``hf://datasets/org/name``, optionally with
    ``@revision`` and a folder in the repository, whose requested splits are downloaded to the Hub cache.
    """
    hub = _HUB_URL.fullmatch(source)
    root = source.rstrip("/") if hub is None else _fetch_splits(hub, split)
    files, base = _file_system(root)
    present = _splits(files, base)
    if not present:
        raise DataError(
            f"{source} is a directory without a split of CLIP_benchmark's, such as test/ with nshards.txt "
            "and 0.tar in it; name a file, or write hf: before a directory of parquet files"
        )
    kind = _read_text(files, f"{base}/dataset_type.txt")
    if kind is not None and kind.strip().lower() != "retrieval":
        raise DataError(
            f"{source} has the type {kind.strip()!r} in its dataset_type.txt; give a data set of the type "
            "'retrieval'"
        )
    images = TarredImages()
    pairs = RawPairs([], images, [])
    for name in choose_splits(split, present, source, required=True):
        for number in range(_shard_count(files, f"{base}/{name}", f"{source}/{name}")):
            tar = f"{root}/{name}/{number}.tar"
            images.ranges += _read_shard(pairs, tar, f"{name}/{number}")
    return pairs


def _fetch_splits(hub: re.Match[str], split: str | None) -> str:
    """Download the requested splits of a Hub data set; return the local folder."""
    repo, revision, folder = hub[1], hub[2], (hub[3] or "").strip("/")
    prefix = f"{folder}/" if folder else ""
    # Download the small files first: they list the splits.
    patterns = [f"{prefix}dataset_type.txt", f"{prefix}*/nshards.txt"]
    snapshot = _snapshot(repo, revision, patterns)
    root = f"{snapshot}/{folder}".rstrip("/")
    present = _splits(*_file_system(root))
    if split is not None or len(present) == 1:
        wanted = choose_splits(split or ALL_SPLITS, present, f"hf://datasets/{repo}")
        patterns += [f"{prefix}{name}/*" for name in wanted]
        _snapshot(repo, revision, patterns)
    return root


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> str:
    try:
        return snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except Exception as error:  # errors of the HTTP library and of huggingface_hub have no common base
        at = f" at revision {revision}" if revision else ""
        raise DataError(
            f"the Hub data set {repo}{at} cannot be fetched ({one_line(error)}); check its name and "
            "your connection, or give a local copy"
        ) from error


def _file_system(root: str) -> tuple[Any, str]:
    try:
        files, base = fsspec.core.url_to_fs(root)
        return files, str(base).rstrip("/")
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"{root} cannot be opened ({one_line(error)}); check the URL") from error


def _splits(files: Any, base: str) -> list[str]:
    return [str(path).rsplit("/", 2)[1] for path in sorted(files.glob(f"{base}/*/nshards.txt"))]


def _read_text(files: Any, path: str) -> str | None:
    if not files.exists(path):
        return None
    return str(files.cat_file(path).decode("utf-8", "replace"))


def _shard_count(files: Any, base: str, where: str) -> int:
    """Number of shards of a split, from nshards.txt; all must exist."""
    text = (_read_text(files, f"{base}/nshards.txt") or "").strip()
    if not text.isdecimal() or len(text) > _MAX_DIGITS or int(text) < 1:
        raise DataError(f"{where}/nshards.txt says {text[:40]!r}, which is not a number of tars; correct it")
    count = int(text)
    present = {str(path).rsplit("/", 1)[-1] for path in files.glob(f"{base}/*.tar")}
    # Loop over the existing tars, not up to count, which may be huge.
    numbers = {stem for name in present if _NUMBER.fullmatch(stem := name.removesuffix(".tar"))}
    absent = count - sum(int(stem) < count for stem in numbers)
    if absent:
        first = next(number for number in range(count) if str(number) not in numbers)
        raise DataError(
            f"{where}/nshards.txt says {count} tars, but {absent} of them are missing, first {first}.tar; "
            "copy or download them"
        )
    if len(present) > count:
        raise DataError(
            f"{where}/nshards.txt says {count} tars, but {len(present)} exist; remove the surplus or "
            "correct the number"
        )
    return count


def _read_shard(pairs: RawPairs, tar: str, name: str) -> list[tuple[str, int, int]]:
    """Add ids and captions of a tar to the pairs; return tar, offset and size of each image."""
    try:
        with fsspec.open(tar, "rb") as file:
            packed = _PACKED.get(file.read(2))
        if packed is not None:
            raise DataError(
                f"{tar} is compressed ({packed}), so images cannot be read from it by offset; unpack it"
            )
        captions = dict(_captions(tar))
        ranges: list[tuple[str, int, int]] = []
        for sample in read_samples(tar, "image"):
            if sample.fault == missing("image"):
                raise DataError(
                    f"{tar}, sample {sample.key}: a caption file without an image; write the tar again"
                )
            if sample.fault is not None:
                raise DataError(f"{tar}, sample {sample.key}: {sample.fault}; write the tar again")
            ranges.append((tar, *sample.range))
            pairs.ids.append(readable(f"{name}/{sample.key}"))
            pairs.captions.append(captions.get(sample.key, []))
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(
            f"{tar} cannot be read to its end ({one_line(error)}); copy or download it again"
        ) from error
    return ranges


def _captions(tar: str) -> Iterator[tuple[str, list[str]]]:
    for sample in read_samples(tar, "caption"):
        if sample.fault == missing("caption"):
            continue  # an image without captions is allowed, as in other formats
        if sample.fault is not None:
            raise DataError(f"{tar}, sample {sample.key}: {sample.fault}; write the tar again")
        try:
            text = sample.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{tar}: {sample.member} is not UTF-8; write the tar again") from error
        # CLIP_benchmark exports a line break within a caption as a backslash and an n.
        yield sample.key, [line.replace("\\n", "\n") for line in text.splitlines()]
