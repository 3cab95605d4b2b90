"""Checks of an encoder's inputs and outputs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from xbt.encoders.image_batching import NamedImage
from xbt.errors import ConfigError, DataError
from xbt.images import ImageSource


def as_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list.

    Raises:
        DataError: If they are a single string, or one of them is not valid text.
    """
    if isinstance(texts, str | bytes):
        raise DataError(f"texts must be a list of strings, got the single text {texts!r}; write [text]")
    items = list(texts)
    for number, text in enumerate(items):
        if not isinstance(text, str):
            raise DataError(f"texts[{number}] is {text!r}, a {type(text).__name__}, but must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"texts[{number}] is not valid Unicode: {text!r} has a lone surrogate") from error
    return items


def as_images(images: Sequence[ImageSource]) -> Sequence[ImageSource]:
    """The images as a sequence.

    Raises:
        DataError: If they are a single image, or a Dataset without a length or with a wrong one.
    """
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        raise DataError(f"images must be a list, got a single {type(images).__name__}; write [image]")
    # A sequence is not copied: it may read its images lazily.
    if isinstance(images, Sequence) or not hasattr(images, "__getitem__"):
        return images if isinstance(images, Sequence) else list(images)
    # Iterating over a torch Dataset may never end, so its length is needed.
    if not hasattr(images, "__len__"):
        raise DataError(
            f"images is a {type(images).__name__} without a length; give a list, or define __len__"
        )
    try:
        return [images[row] for row in range(len(images))]
    except IndexError as error:
        raise DataError(
            f"images has the length {len(images)}, but fewer entries; correct its __len__"
        ) from error


def numbered(images: Sequence[ImageSource], batch_size: int) -> Iterator[list[NamedImage]]:
    """Batches of images; those without a path are named by their number."""
    for start in range(0, len(images), batch_size):
        batch: list[NamedImage] = []
        for number in range(start, min(start + batch_size, len(images))):
            source = images[number]
            batch.append((source, None if isinstance(source, str | os.PathLike) else f"number {number}"))
        yield batch


def require_positive(batch_size: int) -> None:
    """Refuse a batch size below 1 with a ConfigError."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, but it must be at least 1")


def not_finite(vectors: Tensor) -> list[int]:
    """Rows that hold NaN or infinite values."""
    rows: list[int] = torch.nonzero(~torch.isfinite(vectors).all(dim=1)).flatten().tolist()
    return rows
