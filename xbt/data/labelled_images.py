"""Images with a class each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from xbt.data.captions import require_unique
from xbt.data.image_text_pairs import SelectedImages, as_listed, image_at, require_lengths
from xbt.errors import DataError
from xbt.images import ImageSource, load_image


class LabelledImages:
    """Images with a class each; images stay unread until one is asked for.

    Attributes:
        ids: One unique name per image: the path below the folder, or ``"row-17"`` of a Hub data set.
        images: One lazily read source per image.
        labels: (n,) int64 tensor with values from 0 to ``n_classes - 1``.
        class_names: The names of all the data set's classes, those without a selected image too.
        n_classes: Number of classes of the selection: 50 where the first 50 of 100 were asked for.

    Example:
        >>> images = load_labelled(LabelledSource("cifar100", split="train", classes=50))
        >>> len(images), images.n_classes, images.total_classes
        (25000, 50, 100)
    """

    def __init__(
        self,
        ids: Sequence[str],
        images: Sequence[ImageSource],
        labels: Tensor | Sequence[int],
        class_names: Sequence[str],
        n_classes: int | None = None,
    ) -> None:
        """Checks that ids, images and labels belong together.

        Args:
            ids: One name per image, unique.
            images: One path, PIL image or encoded image each; indexed only when an image is needed.
            labels: One class per image.
            class_names: The names of all classes.
            n_classes: Number of classes that may occur, all of them by default.

        Raises:
            DataError: If the lengths differ, there is no image, an id occurs twice, or a label is no class.
        """
        require_lengths(ids=ids, images=images, labels=labels)
        values = torch.as_tensor(labels)
        if not len(ids) == len(images) == len(values):
            raise DataError(
                f"ids, images and labels must have one entry per image, but there are {len(ids)} ids, "
                f"{len(images)} images and {len(values)} labels"
            )
        if len(ids) == 0:
            raise DataError("there are no labelled images: give at least one image with a class")
        ids = as_listed(ids, "ids")
        require_unique(ids, "labelled images")
        if values.ndim != 1 or values.is_floating_point() or values.dtype == torch.bool:
            raise DataError(
                f"labels must be one integer per image, got {values.dtype} of shape {tuple(values.shape)}"
            )
        self.n_classes = len(class_names) if n_classes is None else n_classes
        if not 1 <= self.n_classes <= len(class_names):
            raise DataError(
                f"n_classes is {self.n_classes}, but there are names for {len(class_names)} classes; name all"
            )
        self.ids = ids
        self.images = images
        self.labels = values.to(torch.int64)
        self.class_names = list(class_names)
        outside = torch.nonzero((self.labels < 0) | (self.labels >= self.n_classes)).flatten()
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"image {self.ids[row]!r} has the label {int(self.labels[row])}, but labels go from 0 to "
                f"{self.n_classes - 1}; leave it out, or read a split that has labels"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"LabelledImages({len(self)} images of {self.n_classes} of {self.total_classes} classes)"

    @property
    def total_classes(self) -> int:
        """Number of classes of the whole data set."""
        return len(self.class_names)

    def image(self, row: int) -> Image.Image:
        """Decodes one image to RGB.

        Raises:
            ImageError: If it cannot be decoded; the message names its id.
        """
        return load_image(image_at(self.images, row), name=self.ids[row])

    def select(self, rows: Sequence[int]) -> LabelledImages:
        """Returns some of the images in the given order; no image is read, and the classes stay.

        Args:
            rows: Rows, each at most once and not negative.

        Raises:
            DataError: If there is no row, or one is out of range or given twice.
        """
        chosen = [int(row) for row in rows]
        for row in chosen:
            if not 0 <= row < len(self):
                raise DataError(f"image {row} was selected, but the rows go from 0 to {len(self) - 1}")
        return LabelledImages(
            [self.ids[row] for row in chosen],
            SelectedImages(self.images, chosen),
            self.labels[torch.tensor(chosen, dtype=torch.int64)],
            self.class_names,
            self.n_classes,
        )
