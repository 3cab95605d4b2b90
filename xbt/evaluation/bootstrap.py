"""Significance of a gain: queries fixed and broken, and paired bootstrap intervals.

Two query models are compared on the same queries, so their hits are paired: each query contributes its change
of hit. Queries about one image, such as its five captions, are correlated and are drawn together (a cluster
bootstrap; Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and
13; for retrieval, Sakai, "Evaluating evaluation metrics based on the bootstrap", SIGIR 2006).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from xbt.errors import ConfigError, DataError

_DRAWS_AT_ONCE = 16 * 2**20
"""Maximum number of counts in memory while groups are drawn."""
_DRAWS_KEPT = 4 * 2**20


class Interval(NamedTuple):
    """An estimate and its two-sided confidence interval, as fractions.

    Attributes:
        estimate: The measured value.
        low: Lower end.
        high: Upper end.
    """

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.estimate:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Difference:
    """Change of R@k from the old query model to the new one.

    The gain is exactly ``fixed - broken`` (positive and negative flips; Yan et al., "Positive-Congruent
    Training", CVPR 2021).

    Attributes:
        gain: R@k of the new queries minus R@k of the old ones, with its interval.
        fixed: Share of the queries that miss with the old model and hit with the new one.
        broken: Share of the queries that hit with the old model and miss with the new one.
    """

    gain: Interval
    fixed: float
    broken: float

    def to_dict(self) -> dict[str, object]:
        """A JSON-able form."""
        return {"gain": list(self.gain), "fixed": self.fixed, "broken": self.broken}


def compare_ranks(
    new_ranks: Tensor,
    old_ranks: Tensor,
    k: int,
    groups: Tensor | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
    interval: Callable[..., Interval] | None = None,
) -> Difference:
    """Compare two query models at one k on the same queries.

    Args:
        new_ranks: (n,) ranks from 0, of :func:`xbt.evaluation.best_positive_ranks`.
        old_ranks: (n,) ranks of the same queries under the old model.
        k: The cut-off.
        groups: (n,) integers; queries of a group are drawn together. ``None``: all are independent.
        confidence: Level of the two-sided interval.
        samples: Number of bootstrap samples.
        seed: Seed of the samples.
        interval: Function for the interval of the gain; by default :func:`bootstrap_interval`.

    Raises:
        DataError, ConfigError: See :func:`bootstrap_means`; also if the lengths differ.
    """
    if new_ranks.shape != old_ranks.shape:
        raise DataError(
            f"there are {len(new_ranks)} new ranks and {len(old_ranks)} old ones; rank the same queries"
        )
    new_hits, old_hits = new_ranks < k, old_ranks < k
    change = new_hits.double() - old_hits.double()
    return Difference(
        (interval or bootstrap_interval)(change, groups, confidence, samples, seed),
        fixed=float((new_hits & ~old_hits).double().mean()),
        broken=float((old_hits & ~new_hits).double().mean()),
    )


def bootstrap_interval(
    values: Tensor, groups: Tensor | None = None, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of one value per query with its percentile bootstrap interval.

    Args:
        values: (n,) one value per query: a hit (0 or 1), or a change of hit (-1, 0 or 1).
        groups: (n,) integers; queries of a group are drawn together.
        confidence: Level of the two-sided interval, between 0 and 1.
        samples: Number of bootstrap samples.
        seed: Seed of the samples.

    Raises:
        DataError, ConfigError: See :func:`bootstrap_means`.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}, but must lie between 0 and 1, such as 0.95")
    means = bootstrap_means(values, groups, samples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.double().mean()), float(low), float(high))


def cautious_interval(
    values: Tensor, groups: Tensor | None = None, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """Mean change of hits with an interval that is also valid for few groups, clipped to [-1, 1].

    The percentile bootstrap underestimates the spread of few groups and assumes normal tails: for 20 groups
    its interval is too narrow by a tenth. So each end is the farther one of two: the end of the bootstrap,
    moved away from the mean by √(n/(n−1)) and by the ratio of Student's quantile to the normal one, and the
    end of Student's t, mean ± quantile · standard error. For a few hundred groups or more they differ from
    :func:`bootstrap_interval` by some hundredths of the width; arguments and errors are the same. For one
    group the interval is [-1, 1].
    """
    plain = bootstrap_interval(values, groups, confidence, samples, seed)
    group_ids = torch.arange(len(values)) if groups is None else groups
    count = len(torch.unique(group_ids))
    if count == 1:
        return Interval(plain.estimate, -1.0, 1.0)
    _, error = means_and_errors(values.double()[:, None], group_ids)
    quantile = float(stdtrit(count - 1, (1 + confidence) / 2))
    factor = quantile / NormalDist().inv_cdf((1 + confidence) / 2) * (count / (count - 1)) ** 0.5
    margin = quantile * float(error[0])
    below, above = factor * (plain.estimate - plain.low), factor * (plain.high - plain.estimate)
    return Interval(
        plain.estimate,
        max(-1.0, plain.estimate - max(below, margin)),
        min(1.0, plain.estimate + max(above, margin)),
    )


def means_and_errors(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(m,) means of (n, m) values and their standard errors, clustered by group."""
    group_ids = torch.unique(groups, return_inverse=True)[1]
    count = int(group_ids.max()) + 1
    mean = values.mean(dim=0)
    by_group = torch.zeros(count, values.shape[1], dtype=torch.float64)
    by_group.index_add_(0, group_ids, values - mean)
    error = (by_group.square().sum(dim=0) * count / max(1, count - 1)).sqrt() / len(values)
    return mean, error


def bootstrap_means(
    values: Tensor, groups: Tensor | None = None, samples: int = 2000, seed: int = 0
) -> NDArray[np.float64]:
    """Means of ``values`` over queries drawn with replacement, group by group.

    Args:
        values: (n,) one value per query.
        groups: (n,) integers; queries of a group are drawn together. ``None``: all are independent.
        samples: Number of means.
        seed: Seed of the samples.

    Returns:
        (samples,) float64 means over the drawn queries.

    Raises:
        DataError: If there are no values, one is NaN, or ``groups`` is not of their length.
        ConfigError: If ``samples`` is less than 1.
    """
    if values.ndim != 1:
        raise DataError(f"the bootstrap needs one value per query, got the shape {tuple(values.shape)}")
    return _means(values[:, None], groups, samples, seed)[:, 0]


def bootstrap_intervals(
    values: Tensor, groups: Tensor | None = None, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> list[Interval]:
    """Intervals of :func:`bootstrap_interval` for every column of (n, m) values, drawn once for all."""
    tail = (1 - confidence) / 2
    ends = np.quantile(_means(values, groups, samples, seed), [tail, 1 - tail], axis=0)
    means = values.double().mean(dim=0).tolist()
    return [Interval(mean, *map(float, end)) for mean, end in zip(means, ends.T, strict=True)]


def _means(values: Tensor, groups: Tensor | None, samples: int, seed: int) -> NDArray[np.float64]:
    """(samples, m) means of (n, m) values; see :func:`bootstrap_means`."""
    rows = values.double().numpy()
    if len(rows) == 0:
        raise DataError(f"the bootstrap needs one value per query, got the shape {tuple(values.shape)}")
    if not np.isfinite(rows).all():
        raise DataError(
            f"value {int(np.argmin(np.isfinite(rows).all(axis=1)))} of the bootstrap is NaN or infinite"
        )
    if samples < 1:
        raise ConfigError(f"samples is {samples}, but the bootstrap needs at least 1")
    if groups is not None and groups.shape != values.shape[:1]:
        raise DataError(f"there are {len(groups)} groups for {len(rows)} queries; give one group per query")
    group_ids = np.arange(len(rows)) if groups is None else np.unique(groups.numpy(), return_inverse=True)[1]
    totals = np.stack([np.bincount(group_ids, weights=column) for column in rows.T], axis=1)
    sizes = np.bincount(group_ids).astype(np.float64)
    count = len(totals)
    means = np.empty((samples, rows.shape[1]))
    first = 0
    draws = _kept_draws if samples * count <= _DRAWS_KEPT else _drawn
    for drawn in draws(count, samples, seed):
        part = slice(first, first + len(drawn))
        means[part] = (drawn @ totals) / (drawn @ sizes)[:, None]
        first = part.stop
    return means


@lru_cache(maxsize=2)
def _kept_draws(count: int, samples: int, seed: int) -> tuple[NDArray[np.float64], ...]:
    return tuple(_drawn(count, samples, seed))


def _drawn(count: int, samples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Counts of how often each group is drawn, in blocks of samples."""
    rng, step = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // count)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        yield rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)


def hits_at(ranks: Tensor, ks: tuple[int, ...]) -> Tensor:
    """(n, len(ks)) booleans: True where a query has a positive among its first k."""
    return ranks[:, None] < torch.tensor(ks)
