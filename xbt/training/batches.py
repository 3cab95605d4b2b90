"""Training batches of image–text pairs and of labelled images, with the vectors of frozen teachers."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from xbt.backbones import ImagePreprocessing
from xbt.batches import Draw
from xbt.data import ImageTextPairs, LabelledImages
from xbt.encoders import DualEncoder
from xbt.errors import DataError, ImageError
from xbt.run_dir import write_json
from xbt.store.store import EmbeddingStore
from xbt.training.cached_vectors import list_digest

CACHE_BYTES = 512 * 2**20
"""Preprocessed pixels kept in memory per process: small sets are decoded once, large ones as they come."""
TOKEN_CACHE_BYTES = 64 * 2**20
"""Bytes of cached tokens per process; further captions are tokenised on demand (0.1 ms per caption)."""


class PairBatches(Dataset[dict[str, Tensor]]):
    """Image–text pairs as training batches.

    Which of an image's captions is shown depends on (seed, step, position) alone, so that runs can be split
    over processes and continued. As many captions as fit into :data:`TOKEN_CACHE_BYTES` are tokenised
    once, and as many images as fit into :data:`CACHE_BYTES` are preprocessed once.

    Args:
        pairs: The pairs; every image must be readable (``drop_unreadable`` sees to it).
        encoder: Its preprocessing and tokenizer are used.
        seed: Fixes the choice of captions.
        per_text: (n_texts, ...) rows that go with each caption of ``pairs.texts`` under a batch key each;
            those in stores are read as they are needed.
        per_image: (n_images, ...) rows that go with each image, likewise.
    """

    def __init__(
        self,
        pairs: ImageTextPairs,
        encoder: DualEncoder,
        seed: int,
        per_text: dict[str, Tensor | EmbeddingStore] | None = None,
        per_image: dict[str, Tensor | EmbeddingStore] | None = None,
    ) -> None:
        self._pairs, self._preprocess, self._seed = pairs, encoder.preprocess, seed
        self._texts, self._per_text, self._per_image = pairs.texts, per_text or {}, per_image or {}
        self._captions_of = pairs.positives_i2t
        self._pixels: dict[int, Tensor] = {}
        self._tokenize_more = encoder.text_transform
        row_bytes = encoder.context_length * torch.int32.itemsize
        cached_rows = max(1, TOKEN_CACHE_BYTES // row_bytes)
        self._tokens = encoder.tokenize(self._texts[:cached_rows]).int()

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Tensor]:
        pixels = [self._load(draw.item) for draw in draws]
        texts = np.array([self._choose(draw) for draw in draws])
        images = np.array([draw.item for draw in draws])
        batch = {key: _rows(source, texts) for key, source in self._per_text.items()}
        batch |= {key: _rows(source, images) for key, source in self._per_image.items()}
        return {"pixels": torch.stack(pixels), "tokens": self._tokenize(texts), **batch}

    def _load(self, item: int) -> Tensor:
        pixels = self._pixels.get(item)
        if pixels is None:
            pixels = self._preprocess(self._pairs.image(item))
            if (len(self._pixels) + 1) * pixels.nbytes <= CACHE_BYTES:
                self._pixels[item] = pixels
        return pixels

    def _choose(self, draw: Draw) -> int:
        captions = self._captions_of[draw.item]
        chooser = np.random.default_rng((self._seed, draw.step, draw.position))
        return captions[int(chooser.integers(len(captions)))]

    def _tokenize(self, texts: NDArray[np.int64]) -> Tensor:
        beyond = np.flatnonzero(texts >= len(self._tokens))
        tokens = self._tokens[torch.from_numpy(texts).clamp(max=len(self._tokens) - 1)].long()
        if len(beyond):
            tokens[torch.from_numpy(beyond)] = self._tokenize_more(
                [self._texts[row] for row in texts[beyond]]
            )[0]
        return tokens


def _rows(source: Tensor | EmbeddingStore, rows: NDArray[np.int64]) -> Tensor:
    return (
        source[torch.from_numpy(rows)] if isinstance(source, Tensor) else torch.from_numpy(source.rows(rows))
    )


_MAX_LISTED, _THREADS, _ROWS_AT_ONCE = 5, 4, 4096


class LabelledBatches(Dataset[dict[str, Tensor]]):
    """Labelled images as training batches.

    How an image is augmented depends on (seed, step, position) alone, so that runs can be split over
    processes and continued. Teachers' vectors are those of the image as it is, not of the augmented one: they
    are read from the store by the row of the image.

    Args:
        images: n images, all readable (:func:`leave_out_unreadable` sees to it).
        preprocessing: How to augment and normalise them.
        seed: The run's seed.
        teachers: (n, dim) vectors that go with the images, under a batch key each.
    """

    def __init__(
        self,
        images: LabelledImages,
        preprocessing: ImagePreprocessing,
        seed: int,
        teachers: dict[str, EmbeddingStore] | None = None,
    ) -> None:
        self._images, self._seed, self._teachers = images, seed, teachers or {}
        self._augment = preprocessing.training()
        for name, store in self._teachers.items():
            if len(store) != len(images):
                raise DataError(
                    f"the {name} vectors in {store.path} are {len(store)}, but there are {len(images)} "
                    "training images; remove that directory and run again"
                )

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Tensor]:
        rows = np.array([draw.item for draw in draws], np.int64)
        pixels = torch.stack([self._load(draw) for draw in draws])
        found = {name: torch.from_numpy(store.rows(rows)) for name, store in self._teachers.items()}
        positions = torch.from_numpy(rows)
        return {"pixels": pixels, "labels": self._images.labels[positions], "rows": positions, **found}

    def _load(self, draw: Draw) -> Tensor:
        image = self._images.image(draw.item)
        return self._augment(image, (self._seed, draw.step, draw.position))


def leave_out_unreadable(
    accelerator: Accelerator, images: LabelledImages, record: Path, what: str
) -> LabelledImages:
    """Decode every image once, split over the processes, and leave out those that cannot be decoded.

    Args:
        accelerator: The run's Accelerate object.
        images: The images, the same in every process.
        record: JSON file of the unreadable images with the reasons; a continued run reads it instead of the
            images.
        what: Name of the images in messages, such as ``"training images"``.

    Returns:
        The readable images.

    Warns:
        UserWarning: If images are left out; the message gives their number and the first ones.
    """
    key = {"images": list_digest(images.ids), "count": len(images)}
    checked = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if {name: checked.get(name) for name in key} != key:
        checked = {**key, "unreadable": _find_unreadable(accelerator, images)}
        if accelerator.is_main_process:
            write_json(record, checked)
    accelerator.wait_for_everyone()
    unreadable: dict[str, str] = checked["unreadable"]
    if not unreadable:
        return images
    listed = "; ".join(list(unreadable.values())[:_MAX_LISTED])
    more = f"; and {len(unreadable) - _MAX_LISTED} more" if len(unreadable) > _MAX_LISTED else ""
    if len(unreadable) == len(images):
        raise DataError(f"none of the {len(unreadable)} {what} can be read: {listed}{more}")
    warnings.warn(f"skipped {len(unreadable)} of {len(images)} {what}: {listed}{more}", stacklevel=2)
    return images.select([row for row, name in enumerate(images.ids) if name not in unreadable])


def _find_unreadable(accelerator: Accelerator, images: LabelledImages) -> dict[str, str]:
    """Reasons by the ids of images that cannot be decoded, in order; the same in every process."""
    rows = range(len(images))[accelerator.process_index :: accelerator.num_processes]
    local: list[tuple[int, str]] = []
    hidden = not accelerator.is_main_process
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(rows), desc="checking images", disable=hidden) as bar,
    ):
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[start : start + _ROWS_AT_ONCE]
            problems = pool.map(lambda row: _problem(images, row), block)
            local += [
                (row, reason) for row, reason in zip(block, problems, strict=True) if reason is not None
            ]
            bar.update(len(block))
    gathered = gather_object(local) if accelerator.num_processes > 1 else local
    return {images.ids[row]: reason for row, reason in sorted(gathered)}


def _problem(images: LabelledImages, row: int) -> str | None:
    try:
        images.image(row)
    except ImageError as error:
        return str(error)
    return None
