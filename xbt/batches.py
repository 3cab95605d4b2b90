"""Batches that depend on the seed and the step alone, so that any run can be split, killed and continued."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler

_NOISE_BLOCK = 32


class Draw(NamedTuple):
    """One item of one global batch."""

    step: int
    position: int
    item: int


class SeededBatches(BatchSampler):
    """Yields the global batches of steps ``first_step`` … ``last_step − 1``.

    Every epoch is a permutation seeded by (seed, epoch), and its incomplete last batch is left out. A run
    continued at step k therefore sees what an uninterrupted run sees from step k on,
    and N processes that take slices of a batch see together what one process sees alone.

    Args:
        n_items: Number of items to draw from.
        batch_size: Global batch size; at most ``n_items``.
        seed: Fixes the order.
        first_step: First step to yield.
        last_step: First step not to yield.
    """

    def __init__(self, n_items: int, batch_size: int, seed: int, first_step: int, last_step: int) -> None:
        super().__init__(SequentialSampler(range(n_items)), batch_size, drop_last=True)
        self.n_items, self.seed = n_items, seed
        self.first_step, self.last_step = first_step, last_step

    def __len__(self) -> int:
        return max(self.last_step - self.first_step, 0)

    def __iter__(self) -> Iterator[list[Draw]]:  # type: ignore[override]
        per_epoch = self.n_items // self.batch_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, self.last_step):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng((self.seed, epoch)).permutation(self.n_items)
            start = (step % per_epoch) * self.batch_size
            chosen = order[start : start + self.batch_size]
            yield [Draw(step, position, int(index)) for position, index in enumerate(chosen)]


def gaussian_noise(draws: list[Draw], dim: int, seed: int) -> Tensor:
    """Gaussian noise for a slice of a batch, the same whichever process draws it.

    Rows are drawn in blocks seeded by (seed, step, block), so that a process pays for its own part only.

    Args:
        draws: The slice: consecutive positions of one step's global batch.
        dim: Dimension of the vectors.
        seed: The run's seed.

    Returns:
        (len(draws), dim) float32 rows of independent N(0, 1/dim) values: their expected squared norm is 1.
    """
    step, first, last = draws[0].step, draws[0].position, draws[-1].position
    blocks = range(first // _NOISE_BLOCK, last // _NOISE_BLOCK + 1)
    rows = [
        np.random.default_rng((seed, step, block)).standard_normal((_NOISE_BLOCK, dim), dtype=np.float32)
        for block in blocks
    ]
    offset = first - blocks[0] * _NOISE_BLOCK
    noise = np.concatenate(rows)[offset : offset + len(draws)]
    return torch.as_tensor(noise / np.sqrt(dim, dtype=np.float32))
