"""Image–text pairs, any number of captions per image, and the options of their source."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

from PIL import Image
from tqdm import tqdm

from xbt.data.files import check_source, kind_of
from xbt.data.hf_folders import HUB_PREFIX
from xbt.data.items import Rejected, SelectedImages, choose_subset, require_unique
from xbt.errors import ConfigError, DataError, ImageError
from xbt.images import ImageSource, load_image

_T = TypeVar("_T")


class ImageTextPairs:
    """Images and their captions, any number of captions per image.

    Images stay on disk, encoded, or in an array until they are accessed, so a copy for data-loading workers
    is cheap.

    Attributes:
        ids: One unique name per image.
        images: One source per image, read lazily.
        captions: The captions of each image, at least one.

    Example:
        >>> pairs = make_scenes(100)
        >>> pairs.image(0).size, pairs.captions[0][0]
    """

    def __init__(
        self, ids: Sequence[str], images: Sequence[ImageSource], captions: Sequence[Sequence[str]]
    ) -> None:
        """Check that ids, images and captions match.

        Args:
            ids: One name per image, unique.
            images: One path, PIL image or encoded image each; indexed only when an image is read.
            captions: The captions of each image.

        Raises:
            DataError: If the lengths differ, there is no image, an id occurs twice, or an image has no
                caption.
        """
        require_lengths(ids=ids, images=images, captions=captions)
        if not len(ids) == len(images) == len(captions):
            raise DataError(
                f"ids, images and captions must have one entry per image, but there are {len(ids)} ids, "
                f"{len(images)} images and {len(captions)} lists of captions"
            )
        if len(ids) == 0:
            raise DataError("there are no image–text pairs: give at least one image with a caption")
        ids = as_listed(ids, "ids")
        require_unique(ids, "image–text pairs")
        captions = as_listed(captions, "captions")
        for name, texts in zip(ids, captions, strict=True):
            if isinstance(texts, str) or not texts:
                raise DataError(f"the captions of image {name!r} must be a list of at least one string")
        self.ids = ids
        self.images = images
        self.captions = [list(texts) for texts in captions]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ImageTextPairs({len(self)} images, {len(self.texts)} captions)"

    def image(self, index: int) -> Image.Image:
        """Decode one image.

        Args:
            index: Row of the image.

        Returns:
            An RGB image.

        Raises:
            ImageError: If it cannot be decoded; the message names its id.
            DataError: If ``images`` has fewer entries than its length says.
        """
        return load_image(image_at(self.images, index), name=self.ids[index])

    @cached_property
    def texts(self) -> list[str]:
        """All captions in one list, in the order of the images."""
        return [caption for texts in self.captions for caption in texts]

    @cached_property
    def text_image(self) -> list[int]:
        """Row of the image for each of ``texts``."""
        return [row for row, texts in enumerate(self.captions) for _ in texts]

    @property
    def positives_t2i(self) -> list[list[int]]:
        """Rows of the relevant images for each of ``texts``."""
        return [[row] for row in self.text_image]

    @property
    def positives_i2t(self) -> list[list[int]]:
        """Positions in ``texts`` of the relevant captions for each image."""
        positives: list[list[int]] = [[] for _ in self.ids]
        for position, row in enumerate(self.text_image):
            positives[row].append(position)
        return positives

    def select(self, indices: Sequence[int]) -> ImageTextPairs:
        """Return some of the images with their captions, in the given order; no image is read.

        Args:
            indices: Rows, not negative and without repetition.

        Returns:
            A new collection that shares the image sources.

        Raises:
            DataError: If there is no index, or one is out of range or occurs twice.
        """
        rows = [int(row) for row in indices]
        for row in rows:
            if not 0 <= row < len(self):
                raise DataError(f"image {row} was selected, but the rows go from 0 to {len(self) - 1}")
        images = SelectedImages(self.images, rows)
        return ImageTextPairs([self.ids[row] for row in rows], images, [self.captions[row] for row in rows])

    def split(self, fraction: float, seed: int = 0) -> tuple[ImageTextPairs, ImageTextPairs]:
        """Hold out a random part of the images, with all their captions.

        Args:
            fraction: Fraction to hold out, above 0 and below 1; either side gets at least one image.
            seed: Random seed.

        Returns:
            The remaining pairs and the held-out pairs, disjoint, both in the original order.

        Raises:
            ConfigError: If ``fraction`` is not between 0 and 1.
            DataError: If there are fewer than two images.
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"the held-out fraction is {fraction}, but must lie between 0 and 1")
        if len(self) < 2:
            raise DataError("one image cannot be split into two parts; give at least two")
        count = min(max(round(fraction * len(self)), 1), len(self) - 1)
        held_out = choose_subset(len(self), count, seed)
        excluded = set(held_out)
        return self.select([row for row in range(len(self)) if row not in excluded]), self.select(held_out)

    def drop_unreadable(
        self, workers: int = 4, progress: bool = False
    ) -> tuple[ImageTextPairs, list[Rejected]]:
        """Decode every image once and leave out those that cannot be decoded.

        Args:
            workers: Number of decoding threads.
            progress: Whether to show a progress bar.

        Returns:
            The pairs with a readable image, and the rejected images with the reason, in the original order.

        Raises:
            DataError: If no image can be read; the message gives the reason of the first.
        """
        if workers < 1:
            raise ConfigError(f"workers is {workers}, but must be at least 1")
        with ThreadPoolExecutor(workers) as pool:
            checks = pool.map(self._problem, range(len(self)))
            problems = list(tqdm(checks, total=len(self), desc="checking images", disable=not progress))
        rejected = [
            Rejected(name, problem)
            for name, problem in zip(self.ids, problems, strict=True)
            if problem is not None
        ]
        if len(rejected) == len(self):
            raise DataError(f"none of the {len(self)} images can be read; the first: {rejected[0].reason}")
        if not rejected:
            return self, []
        return self.select([row for row, problem in enumerate(problems) if problem is None]), rejected

    def _problem(self, row: int) -> str | None:
        try:
            self.image(row)
        except ImageError as error:
            return str(error)
        return None


def require_lengths(**columns: object) -> None:
    """Check that each argument has a length; a torch Dataset without one may never end.

    Raises:
        DataError: If one has none; the message names the argument.
    """
    for name, column in columns.items():
        if not hasattr(column, "__len__"):
            raise DataError(f"{name} must have a length, but a {type(column).__name__} has none; give a list")


def as_listed(values: Sequence[_T], name: str) -> list[_T]:
    """Return the values as a list; its length must equal ``len(values)``.

    Raises:
        DataError: If there are more or fewer.
    """
    listed = list(islice(iter(values), len(values) + 1))
    if len(listed) != len(values):
        raise DataError(
            f"{name} has the length {len(values)}, but more or fewer entries; correct its __len__"
        )
    return listed


def image_at(images: Sequence[ImageSource], row: int) -> ImageSource:
    """Return one image source.

    Raises:
        DataError: If there are fewer images than their length says.
    """
    try:
        return images[row]
    except IndexError as error:
        raise DataError(
            f"images has the length {len(images)}, but no entry {row}; correct its __len__"
        ) from error


_HUB_OPTIONS = ("subset", "image_column", "caption_column", "id_column", "split_column")
_TABLE_OPTIONS = ("image_column", "caption_column")


@dataclass
class PairSource:
    """Source of image–text pairs.

    Raises:
        ConfigError: If ``limit`` is below 1 or ``source`` is empty.
    """

    source: str
    """A Karpathy split file (dataset_*.json), a file in COCO's caption format (.json; nocaps too) or text
    with an image name and a caption on each line (.txt, .csv, .tsv, .token; the formats of CLIP_benchmark,
    Flickr and Kaggle), each optionally with .gz; a folder of CLIP_benchmark's tars, local or at
    hf://datasets/ORG/NAME; hf: and a Hub data set or a local directory of parquet files; or scenes (built
    in)."""
    image_root: str | None = None
    """Base folder of the image names; the folder of the file by default."""
    split: str | None = None
    """Split to read; + joins several (val+restval), all takes all of them."""
    image_column: str | None = None
    """Column with the images, their bytes or paths (hf:), or with their names (.csv, .tsv); found by its name
    if left out."""
    caption_column: str | None = None
    """Column with a caption or a list of captions (hf:, .csv, .tsv); found by its name if left out."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    limit: int | None = None
    """Maximum number of images; they are drawn at random with the seed and keep the original order."""
    seed: int = 0
    """Seed of the random draw."""
    image_size: int = 32
    """Side of the built-in scenes in pixels; other sources ignore it."""
    id_column: str | None = None
    """Column of an hf: source that identifies the image; rows with the same value are one image."""
    split_column: str | None = None
    """Column of an hf: source with the split of each row, if the data set does not have separate splits."""

    def __post_init__(self) -> None:
        """Check the values."""
        check_source(self.source, self.limit)

    @property
    def kind(self) -> str:
        """``"scenes"``, ``"hf"``, ``"tars"`` (a folder or URL of CLIP_benchmark's tars) or ``"file"``."""
        if self.source == "scenes":
            return "scenes"
        if "://" in self.source:  # before hf:, which hf:// begins with
            return "tars"
        if self.source.startswith(HUB_PREFIX):
            return "hf"
        return "tars" if Path(self.source).expanduser().is_dir() else "file"

    def check_options(self) -> None:
        """Check that every option applies to this kind of source.

        Raises:
            ConfigError: If an option does not apply.
        """
        table = self.kind == "file" and kind_of(Path(self.source)) in (".csv", ".tsv")
        for name in _HUB_OPTIONS if self.kind != "hf" else ():
            value = getattr(self, name)
            if value is not None and not (table and name in _TABLE_OPTIONS):
                raise ConfigError(
                    f"{name} {value!r} was given with {self.source}, but only hf: sources have {name}s"
                    f"{' (and .csv and .tsv files)' if name in _TABLE_OPTIONS else ''}; leave it out"
                )
        if self.image_root is not None and self.kind == "tars":
            raise ConfigError(
                f"image_root {self.image_root!r} was given with {self.source}, whose tars hold the images; "
                "leave it out"
            )
