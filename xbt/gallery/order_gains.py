"""What backfilling one item adds to recall, measured on a sample whose answers and new vectors are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import ConfigError
from xbt.gallery.backfill_ranks import MixedScores
from xbt.gallery.merge import Merge

STATES = 20


def moving_gains(
    scores: MixedScores,
    merge: Merge,
    *,
    ks: Sequence[int] = (1, 5, 10),
    states: int = STATES,
    seed: int = 0,
) -> Tensor:
    """(m,) what moving each item to the new part adds to the queries' hits, on average over random states.

    A state backfills a fraction drawn uniformly of items drawn at random. The item counts both as the answer
    to its own queries and as a wrong answer to all others, and every pair of a query and one of its positives
    as a query of one answer. This is the Banzhaf value of the items, by sampling.

    Raises:
        ConfigError: If the merge compares no scores.
    """
    if merge.by_rank:
        raise ConfigError(
            f"a merge of kind {merge.kind!r} compares no scores; give an affine or isotonic one"
        )
    old, new = scores.calibrated(merge)
    starts, positive = scores.positives
    query = np.repeat(np.arange(len(scores)), np.diff(starts))
    own_old, own_new = old[query, positive][:, None], new[query, positive][:, None]
    wrong = ~scores.relevant()[query]
    old, new = old[query], new[query]
    rng, gains = np.random.default_rng(seed), np.zeros(old.shape[1])
    for _ in range(states):
        mask: NDArray[np.bool_] = np.less(rng.random(old.shape[1]), rng.random())
        mixed = np.where(mask, new, old)
        before, after = (_hits(((mixed >= own) & wrong).sum(axis=1), ks) for own in (own_old, own_new))
        np.add.at(gains, positive, after - before)
        own = np.where(mask[positive][:, None], own_new, own_old)
        gains += _competing(mixed >= own, old >= own, new >= own, wrong, ks)
    return torch.from_numpy(gains / (states * len(query)))


def _competing(
    there: NDArray[np.bool_],
    if_old: NDArray[np.bool_],
    if_new: NDArray[np.bool_],
    wrong: NDArray[np.bool_],
    ks: Sequence[int],
) -> NDArray[np.float64]:
    """(m,) change of all queries' hits when each item's score, as a wrong answer, is the new one."""
    ranks = (there & wrong).sum(axis=1)[:, None]
    # Only an item that comes before the answer under one model and not under the other changes a rank.
    change = np.where(wrong, if_new.astype(np.int8) - if_old.astype(np.int8), 0)
    without = ranks - (there & wrong)
    rows, items = np.nonzero(change)
    rank = without[rows, items]
    shift = np.zeros(len(rows))
    for k in ks:
        # Ranks below k hit: the item takes the place k away where it comes before, and gives it back.
        shift -= change[rows, items] * (rank == k - 1)
    return np.bincount(items, weights=shift / len(ks), minlength=there.shape[1]).astype(np.float64)


def _hits(ranks: NDArray[np.int64], ks: Sequence[int]) -> NDArray[np.float64]:
    hits: NDArray[np.float64] = np.mean([ranks < k for k in ks], axis=0)
    return hits
