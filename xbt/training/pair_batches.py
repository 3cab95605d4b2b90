"""Batches of image–text pairs: pixels, one caption's tokens per image, and what else is known of it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from xbt.batches import Draw
from xbt.data import ImageTextPairs
from xbt.encoders import DualEncoder
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
