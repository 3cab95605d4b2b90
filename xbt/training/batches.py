"""Batches of image–text pairs: pixels, one caption's tokens per image, and what else is known of it.

Batches of labelled images: augmented pixels, classes, and what frozen teachers make of each image.
"""

from __future__ import annotations

import hashlib
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
from xbt.store import EmbeddingStore

CACHE_BYTES = 512 * 2**20
"""Preprocessed pixels kept in memory per process: small sets are decoded once, large ones as they come."""
TOKEN_CACHE_BYTES = 64 * 2**20
"""Tokens kept in memory per process; the captions beyond are tokenised as they come (0.1 ms a caption)."""


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
        room = max(1, TOKEN_CACHE_BYTES // row_bytes)
        self._tokens = encoder.tokenize(self._texts[:room]).int()

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


_NAMED, _THREADS, _ROWS_AT_ONCE = 5, 4, 4096


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
    """Decodes every image once, split over the processes, and leaves out those that cannot be decoded.

    Args:
        accelerator: The run's Accelerate object.
        images: The images, the same in every process.
        record: JSON file that keeps the outcome, so that a run that continues need not look again; what it
            lists was left out, with the reasons.
        what: What to call the images, such as ``"training images"``.

    Returns:
        The readable ones.

    Raises:
        DataError: If none can be read, or the system rather than an image is at fault.

    Warns:
        UserWarning: If images were left out; it counts them and names the first.
    """
    key = {"images": ids_digest(images.ids), "count": len(images)}
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if {name: known.get(name) for name in key} != key:
        known = {**key, "unreadable": _find_unreadable(accelerator, images)}
        if accelerator.is_main_process:
            write_json(record, known)
    accelerator.wait_for_everyone()
    found: dict[str, str] = known["unreadable"]
    if not found:
        return images
    listed = "; ".join(list(found.values())[:_NAMED])
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    if len(found) == len(images):
        raise DataError(f"none of the {len(found)} {what} can be read: {listed}{more}")
    warnings.warn(f"skipped {len(found)} of {len(images)} {what}: {listed}{more}", stacklevel=2)
    return images.select([row for row, name in enumerate(images.ids) if name not in found])


def _find_unreadable(accelerator: Accelerator, images: LabelledImages) -> dict[str, str]:
    """Ids of images that cannot be decoded, with the reasons, in order; the same in every process."""
    rows = range(len(images))[accelerator.process_index :: accelerator.num_processes]
    mine: list[tuple[int, str]] = []
    hidden = not accelerator.is_main_process
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(rows), desc="checking images", disable=hidden) as bar,
    ):
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[start : start + _ROWS_AT_ONCE]
            problems = pool.map(lambda row: _problem(images, row), block)
            mine += [(row, told) for row, told in zip(block, problems, strict=True) if told is not None]
            bar.update(len(block))
    everyones = gather_object(mine) if accelerator.num_processes > 1 else mine
    return {images.ids[row]: problem for row, problem in sorted(everyones)}


def _problem(images: LabelledImages, row: int) -> str | None:
    try:
        images.image(row)
    except ImageError as error:
        return str(error)
    return None


def ids_digest(ids: list[str]) -> str:
    """A fingerprint of a list of ids, in their order."""
    digest = hashlib.sha256()
    for name in ids:
        digest.update(name.encode("utf-8") + b"\0")
    return digest.hexdigest()
