"""Image–text pairs, any number of captions per image, and the options of their source."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from xbt.data.files import check_source, kind_of, refuse_options
from xbt.data.hf_folders import HUB_PREFIX
from xbt.data.items import Rejected, SelectedImages, choose_subset, require_unique
from xbt.errors import ConfigError, DataError, ImageError
from xbt.images import ImageSource, load_image

_T = TypeVar("_T")


class ImagesWithIds:
    """Images with unique ids and one more column; base of :class:`ImageTextPairs` and of labelled images.

    ``what`` names the images in messages.
    """

    def __init__(
        self, what: str, ids: Sequence[str], images: Sequence[ImageSource], **columns: Sequence[Any] | Tensor
    ) -> None:
        columns = {"ids": ids, "images": images, **columns}
        for name, column in columns.items():  # a torch Dataset without a length may never end
            if not hasattr(column, "__len__"):
                raise DataError(
                    f"{name} must have a length, but a {type(column).__name__} has none; give a list"
                )
        lengths = [f"{len(column)} {name}" for name, column in columns.items()]
        if len({len(column) for column in columns.values()}) > 1:
            raise DataError(
                f"{', '.join(columns)} must have one entry per image, but there are {', '.join(lengths)}"
            )
        if not len(ids):
            raise DataError(f"there are no {what}: give at least one image")
        self.ids, self.images = as_listed(ids, "ids"), images
        require_unique(self.ids, what)

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, row: int) -> Image.Image:
        """Decode one image to RGB.

        Raises:
            ImageError: If it cannot be decoded; the message names its id.
            DataError: If ``images`` has fewer entries than its length says.
        """
        try:
            image = self.images[row]
        except IndexError as error:
            raise DataError(
                f"images has the length {len(self.images)}, but no entry {row}; correct its __len__"
            ) from error
        return load_image(image, name=self.ids[row])

    def _checked_rows(self, rows: Sequence[int]) -> list[int]:
        chosen = [int(row) for row in rows]
        for row in chosen:
            if not 0 <= row < len(self):
                raise DataError(f"image {row} was selected, but the rows go from 0 to {len(self) - 1}")
        return chosen


class ImageTextPairs(ImagesWithIds):
    """Images and their captions, any number of captions per image.

    Images stay on disk, encoded, or in an array until they are accessed, so a copy for data-loading workers
    is cheap.

    Args:
        ids: One unique name per image.
        images: One path, PIL image or encoded image each; indexed only when an image is read.
        captions: The captions of each image, at least one.

    Raises:
        DataError: If the lengths differ, there is no image, an id occurs twice, or an image has no caption.

    Example:
        >>> pairs = make_scenes(100)
        >>> pairs.image(0).size, pairs.captions[0][0]
    """

    def __init__(
        self, ids: Sequence[str], images: Sequence[ImageSource], captions: Sequence[Sequence[str]]
    ) -> None:
        super().__init__("image–text pairs", ids, images, captions=captions)
        captions = as_listed(captions, "captions")
        for name, texts in zip(self.ids, captions, strict=True):
            if isinstance(texts, str) or not texts:
                raise DataError(f"the captions of image {name!r} must be a list of at least one string")
        self.captions = [list(texts) for texts in captions]

    def __repr__(self) -> str:
        return f"ImageTextPairs({len(self)} images, {len(self.texts)} captions)"

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
        rows = self._checked_rows(indices)
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
        listed = zip(self.ids, problems, strict=True)
        rejected = [Rejected(name, problem) for name, problem in listed if problem is not None]
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


def as_listed(values: Sequence[_T], name: str) -> list[_T]:
    """Return the values as a list; its length must equal ``len(values)``."""
    listed = list(islice(iter(values), len(values) + 1))
    if len(listed) != len(values):
        raise DataError(
            f"{name} has the length {len(values)}, but more or fewer entries; correct its __len__"
        )
    return listed


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
        if self.kind != "hf":
            refuse_options(self, ("subset", "id_column", "split_column"), "but only hf: sources have {}s")
        if self.kind != "hf" and not (self.kind == "file" and kind_of(Path(self.source)) in (".csv", ".tsv")):
            reason = "but only hf: sources have {}s (and .csv and .tsv files)"
            refuse_options(self, ("image_column", "caption_column"), reason)
        if self.kind == "tars":
            refuse_options(self, ("image_root",), "whose tars hold the images")
