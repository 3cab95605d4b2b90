"""Old and new models judged against each other: every version's queries against every earlier gallery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xbt.errors import DataError
from xbt.evaluation.label_retrieval import Ids, Labels, evaluate_labels
from xbt.evaluation.significance import Interval, bootstrap_interval
from xbt.evaluation.version_matrix import CompatibilityMatrix, lower_triangle
from xbt.vectors import Vectors, as_vectors, unit_rows


def compatibility_matrix(
    versions: Mapping[str, Vectors],
    labels: Labels,
    *,
    ids: Ids | None = None,
    ks: Sequence[int] = (1, 5),
    chunk_size: int | None = None,
) -> dict[str, CompatibilityMatrix]:
    """Measures every version against its own and every earlier version's vectors of the same test images.

    The test set is query and gallery at once; an image is left out of its own ranking. Where dimensions
    differ both sides are cut to their common prefix.

    Args:
        versions: Name → (n, dim) vectors of one version, oldest first; row r is the same image in all.
        labels: (n,) integers.
        ids: One name per image, unique; rows by default.
        ks: Cut-offs of CMC.
        chunk_size: As in :func:`xbt.evaluation.evaluate_labels`.

    Returns:
        One matrix of fractions per metric: ``"top1"``, ``"top5"``, ..., ``"mAP"``.

    Raises:
        DataError: As :func:`xbt.evaluation.evaluate_labels`, or if there is no version or their numbers of
            rows differ.

    Example:
        >>> matrices = compatibility_matrix({"v1": old_vectors, "v2": new_vectors}, labels)
        >>> print(matrices["mAP"].format())
    """
    names = list(versions)
    counts = {name: len(versions[name]) for name in names}
    if len(set(counts.values())) > 1:
        raise DataError(f"the versions have {counts} vectors; embed the same images with each")
    entries: dict[str, dict[tuple[int, int], float]] = {}
    for i, j in lower_triangle(len(names)):
        queries, gallery = prefix_vectors(versions[names[i]], versions[names[j]])
        own = range(len(queries)) if ids is None else ids
        measured = evaluate_labels(
            queries, labels, gallery, labels, query_ids=own, gallery_ids=own, ks=ks, chunk_size=chunk_size
        )
        for metric, value in measured.metrics().items():
            entries.setdefault(metric, {})[i, j] = value
    if not entries:
        raise DataError("there are no versions to compare; give at least one")
    return {metric: CompatibilityMatrix(names, values, metric) for metric, values in entries.items()}


def prefix_vectors(query_vectors: Vectors, gallery_vectors: Vectors) -> tuple[Tensor, Tensor]:
    """Cuts both sides to the leading coordinates that they share, and normalises the rows.

    Heads that add dimensions put those that the old model knows first, so that an old gallery is compared
    with the leading part of a new vector.

    Args:
        query_vectors: (n_queries, d_q) torch tensor or numpy array of any float dtype.
        gallery_vectors: (n_gallery, d_g) likewise.

    Returns:
        Two float CPU tensors of dimension min(d_q, d_g) with unit rows.

    Raises:
        DataError: If a side is empty or holds NaN.
    """
    queries, gallery = as_vectors(query_vectors, "queries"), as_vectors(gallery_vectors, "gallery")
    dim = min(queries.shape[1], gallery.shape[1])
    return unit_rows(queries[:, :dim]), unit_rows(gallery[:, :dim])


def update_gain(new_old: float, old_old: float, new_new_independent: float) -> float | None:
    """Γ = (M(new/old) − M(old/old)) / (M(new′/new′) − M(old/old)), the share of the possible gain.

    Args:
        new_old: The compatible new model's queries against the old gallery.
        old_old: The old model's self test.
        new_new_independent: Self test of a new model that was trained without regard to the old one.

    Returns:
        1 for as good as re-embedding everything, negative for worse than the old model, and ``None`` where
        re-embedding gains nothing.
    """
    possible = new_new_independent - old_old
    return (new_old - old_old) / possible if possible > 0 else None


def compatibility_tax(new_new_independent: float, new_new: float) -> float:
    """M(new′/new′) − M(new/new): what compatibility costs the new model in its own space."""
    return new_new_independent - new_new


def over_seeds(
    values: Sequence[float], confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of one value per training seed, with its bootstrap interval over the seeds.

    With few seeds such intervals are too narrow; five are little, two say almost nothing.

    Args:
        values: One fraction per seed.
        confidence: Of the two-sided interval.
        samples: Bootstrap samples.
        seed: Fixes them.

    Raises:
        DataError: If there are fewer than two values, or one is NaN.
        ConfigError: If ``confidence`` or ``samples`` is out of range.
    """
    if len(values) < 2:
        raise DataError(f"an interval over seeds needs at least two values, got {len(values)}; train again")
    return bootstrap_interval(torch.as_tensor(values, dtype=torch.float64), None, confidence, samples, seed)


def difference_over_seeds(
    values: Sequence[float],
    baseline: Sequence[float],
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of ``values − baseline``, paired by seed, with its bootstrap interval.

    Args:
        values: One fraction per seed.
        baseline: What to compare with, of the same seeds in the same order.
        confidence: Of the two-sided interval.
        samples: Bootstrap samples.
        seed: Fixes them.

    Raises:
        DataError, ConfigError: As :func:`over_seeds`, or if the numbers of seeds differ.
    """
    if len(values) != len(baseline):
        raise DataError(
            f"there are {len(values)} values and {len(baseline)} to compare with; give the same seeds"
        )
    changes = [float(value) - float(other) for value, other in zip(values, baseline, strict=True)]
    return over_seeds(changes, confidence, samples, seed)
