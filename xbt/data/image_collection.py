"""Sources of an embedding job: images without captions from folders, files, tars and data sets; captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xbt.data.captions import CaptionSource, read_caption_rows, read_karpathy
from xbt.data.files import DEFAULT_COUNT, check_is_file, check_source, find_file, kind_of, refuse_options
from xbt.data.hf_folders import HUB_PREFIX
from xbt.data.huggingface import HubImages, open_dataset, read_ids, stream_images
from xbt.data.image_folder import JoinedPaths, list_images, refuse_urls
from xbt.data.items import (
    ItemSource,
    ListedImages,
    ListedTexts,
    SelectedImages,
    SourceShard,
    choose_subset,
    require_unique,
)
from xbt.data.scenes import make_scenes
from xbt.data.tars import TarCaptions, TarImages, find_tars, is_tar, tar_names
from xbt.errors import ConfigError, DataError
from xbt.images import ImageSource

_OPTIONS: dict[str, set[str]] = {
    "folder": {"limit", "include_hidden"},
    "karpathy": {"image_root", "split", "limit"},
    "tars": set(),
    "hf": {"image_root", "split", "subset", "image_column", "id_column", "streaming", "limit"},
    "scenes": {"split", "limit", "image_size"},
}
"""Options of each kind of source, besides the seed."""


@dataclass
class ImageCollection:
    """Source of images.

    Raises:
        ConfigError: If ``source`` is empty, ``limit`` is below 1, or an option does not apply to this kind of
            source.
    """

    source: str
    """A folder, searched with its subfolders; a Karpathy split file (dataset_*.json or .json.gz); WebDataset
    tars (a path or URL, a glob, or a pattern such as shards/{000..099}.tar); hf: and a Hub data set or a
    local directory; or scenes (built in)."""
    image_root: str | None = None
    """Base folder of the image names, which no name may leave. The default is the folder of a Karpathy file,
    and the folder of an hf: data set with paths."""
    split: str | None = None
    """Split to read (Karpathy's files, hf:, scenes); + joins several splits of a Karpathy file."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    image_column: str = "image"
    """Column of an hf: source with the images, their bytes or their paths."""
    id_column: str | None = None
    """Column of an hf: source with a unique id per row; by default the id is the row number."""
    streaming: bool = False
    """Read an hf: source as a stream, without downloading it first. Processes then share the work by the
    files of the data set."""
    limit: int | None = None
    """Maximum number of images, drawn at random with the seed, in the original order; not for streams."""
    seed: int = 0
    """Seed of the random draw."""
    image_size: int = 32
    """Side of the built-in scenes in pixels."""
    include_hidden: bool = False
    """Also take hidden files of a folder: names that begin with a dot, and files in system folders for
    thumbnails and attributes (.thumbnails, @eaDir, __MACOSX)."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_source(self.source, self.limit)
        others = sorted(set.union(*_OPTIONS.values()) - _OPTIONS[self.kind])
        refuse_options(self, others, f"which is of the kind {self.kind!r} and has no such option")
        if self.streaming and self.limit is not None:
            raise ConfigError(
                f"limit {self.limit} was given, but the length of a stream is not known; leave it out"
            )

    @property
    def kind(self) -> str:
        """``"folder"``, ``"karpathy"``, ``"tars"``, ``"hf"`` or ``"scenes"``."""
        if self.source == "scenes":
            return "scenes"
        if is_tar(self.source):
            return "tars"
        if self.source.startswith(HUB_PREFIX):
            return "hf"
        return "karpathy" if kind_of(Path(self.source)) == ".json" else "folder"


def open_images(images: ImageCollection) -> ItemSource:
    """Open a collection of images; none is decoded, and a missing file is only noticed when it is read.

    Their ids are the path relative to the folder; the image name in a Karpathy file; the tar's name and the
    sample's key; the value of the id column, or ``"row-17"`` (``"shard-3/row-17"`` in streams).

    Example:
        >>> open_images(ImageCollection("photos/"))
        >>> open_images(ImageCollection("hf://datasets/clip-benchmark/wds_flickr30k/test/*.tar"))
    """
    if images.kind == "tars":
        return ItemSource(images.source, "image", _tars(images.source, TarImages))
    if images.streaming:
        columns = (images.image_column, images.id_column, images.image_root)
        streams = stream_images(images.source, images.subset, images.split, *columns)
        return ItemSource(images.source, "image", streams)
    ids, listed = _list(images)
    if not ids:
        raise DataError(f"{images.source} is empty: it holds no image; give a source with images")
    require_unique(ids, images.source)
    if images.limit is not None and images.limit < len(ids):
        rows = choose_subset(len(ids), images.limit, images.seed)
        ids, listed = [ids[row] for row in rows], SelectedImages(listed, rows)
    return ItemSource(images.source, "image", [ListedImages(ids, listed)])


def open_captions(captions: CaptionSource) -> ItemSource:
    """Open a caption corpus, or the captions of WebDataset tars.

    For the ids see :func:`~xbt.data.captions.read_caption_rows`. For tars, an id consists of the tar's name,
    the sample's key and the line: ``"000/000017#0"``.
    """
    if not is_tar(captions.source):
        return ItemSource(captions.source, "text", [ListedTexts(*read_caption_rows(captions))])
    refuse_options(captions, ("split", "subset", "limit", "id_column"), "but tars have no such option")
    return ItemSource(captions.source, "text", _tars(captions.source, TarCaptions))


def _tars(source: str, kind: type[TarImages] | type[TarCaptions]) -> list[SourceShard]:
    tars = find_tars(source)
    names = tar_names([tar.url for tar in tars])
    return [kind(tar.url, name, tar.state) for tar, name in zip(tars, names, strict=True)]


def _list(images: ImageCollection) -> tuple[list[str], Sequence[ImageSource]]:
    path = Path(images.source).expanduser()
    if images.kind == "scenes":
        count = images.limit or DEFAULT_COUNT
        scenes = make_scenes(count, images.seed, images.split or "train", images.image_size)
        return scenes.ids, scenes.images
    if images.kind == "hf":
        dataset = open_dataset(images.source, images.subset, images.split)
        column = HubImages(dataset, images.image_column, images.source, images.image_root)
        return read_ids(dataset, images.id_column, images.source), column
    if images.kind == "karpathy":
        check_is_file(path)
        root = path.parent if images.image_root is None else Path(images.image_root).expanduser()
        names = [image.name for image in read_karpathy(path, images.split, root)]
        refuse_urls(names[:1], str(path))
        if not any(find_file(root, name) for name in names):
            raise DataError(
                f"none of the {len(names)} image files is there, first {names[0]}, under {root}; set "
                "image_root to the folder that holds the images"
            )
        return names, JoinedPaths(root, names)
    if not path.exists():
        raise DataError(f"{images.source} does not exist; check the path")
    if not path.is_dir():
        raise DataError(
            f"images cannot be listed from {path}: give a folder, a Karpathy split file (.json or .json.gz), "
            "tar files, hf: and a data set, or scenes"
        )
    names = list_images(path, images.include_hidden)
    return names, JoinedPaths(path, names)
