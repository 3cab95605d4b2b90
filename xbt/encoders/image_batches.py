"""Reading and preprocessing batches of images, if wanted in worker processes while the model computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from xbt.encoders.workers import run_ahead
from xbt.errors import EncoderError, ImageError
from xbt.images import ImageSource, ReadImage, blame_the_system, read_image

Transform = Callable[[Image.Image], Tensor]
"""From an RGB image to (3, height, width) float32 pixels."""

NamedImage = tuple[ImageSource, str | None]
"""An image and what an error calls it; a path names itself."""


class EncodedImages(NamedTuple):
    """The vectors of one batch of images, and what became of the images.

    Attributes:
        vectors: (m, dim) float32 CPU tensor with unit rows, without a graph.
        kept: The m positions in the batch that the rows belong to, ascending.
        rejected: Position → reason, for the images that could not be read.
        notes: Position → what was converted or dropped on reading, such as ``"CMYK converted to RGB"``.
    """

    vectors: Tensor
    kept: list[int]
    rejected: dict[int, str]
    notes: dict[int, str]


class DecodedImages(NamedTuple):
    """The pixels of one batch of images, (m, 3, height, width) float32; for the rest see EncodedImages."""

    pixels: Tensor
    kept: list[int]
    rejected: dict[int, str]
    notes: dict[int, str]


def decode_batches(
    batches: Iterable[Sequence[NamedImage]],
    transform: Transform,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[DecodedImages]:
    """Reads and preprocesses batches of images, in order; see :func:`xbt.encoders.workers.run_ahead`.

    Args:
        batches: Consumed in the calling process, at most ``2 * num_workers`` batches ahead.
        transform: The preprocessing; pickled where workers are spawned.
        num_workers: Worker processes that decode; with 0 it is done in this process.
        pin_memory: Whether the pixels are to lie in page-locked memory.

    Yields:
        One result per batch; images that cannot be read are reported in it.

    Raises:
        DataError: If the system, not an image, is at fault, or a worker process dies.
        EncoderError: If the preprocessing makes images of different sizes.
    """
    tasks = ([_ready(source, name) for source, name in batch] for batch in batches)
    yield from run_ahead(_Decoder(transform), tasks, num_workers, pin_memory=pin_memory)


_Ready = NamedImage | ReadImage | ImageError


def _ready(source: ImageSource, name: str | None) -> _Ready:
    # A PIL image may be a file that is not read yet. That would fail while it is pickled for a worker, in a
    # thread where nobody sees it, and the loader would wait forever.
    if not isinstance(source, Image.Image):
        return source, name
    try:
        return read_image(source, name)
    except ImageError as error:
        return error


class _Decoder:
    """A worker's job on one batch; it holds the preprocessing and no weights."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, batch: list[_Ready]) -> DecodedImages:
        pixels: list[Tensor] = []
        decoded = DecodedImages(torch.zeros(0), [], {}, {})
        for position, item in enumerate(batch):
            try:
                read = _read(item)
                pixels.append(self._preprocess(read.image, item))
            except ImageError as error:
                decoded.rejected[position] = str(error)
                continue
            decoded.kept.append(position)
            if read.note is not None:
                decoded.notes[position] = read.note
        if not pixels:
            return decoded
        sizes = sorted({tuple(each.shape) for each in pixels})
        if len(sizes) > 1:
            raise EncoderError(
                f"the preprocessing makes images of different sizes, {_size(sizes[0])} and "
                f"{_size(sizes[-1])} pixels; make it crop or squash all images to the model's size"
            )
        try:
            return decoded._replace(pixels=torch.stack(pixels))
        except Exception as error:
            blame_the_system(error, f"a batch of {len(pixels)} images")
            raise

    def _preprocess(self, image: Image.Image, item: _Ready) -> Tensor:
        try:
            return self._transform(image)
        except Exception as error:  # one freak image must not end a job of millions
            blame_the_system(error, f"image {_label(item, image)}")
            reason = f"cannot be preprocessed: {type(error).__name__}: {error}"
            raise ImageError(f"image {_label(item, image)} {reason}") from error


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[:0:-1]))


def _read(item: _Ready) -> ReadImage:
    if isinstance(item, ImageError):
        raise item
    return item if isinstance(item, ReadImage) else read_image(*item)


def _label(item: _Ready, image: Image.Image) -> str:
    size = f"of {image.width} x {image.height} pixels"
    if isinstance(item, ReadImage | ImageError):
        return size
    source, name = item
    if name is None and isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return name or size
