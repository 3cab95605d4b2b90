"""Compatibility of a series of model versions: every version's queries against every earlier gallery.

Entry (i, j) of the lower triangle belongs to queries of version i against a gallery of version j. The
diagonal holds the self tests. The criterion is Shen et al.'s ("Towards backward-compatible representation
learning", CVPR 2020); the two averages are Biondi et al.'s ("CoReS: Compatible representations via
stationarity", TPAMI 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError
from xbt.evaluation.bootstrap import Interval, bootstrap_interval
from xbt.evaluation.classes import Ids, Labels, evaluate_labels
from xbt.vectors import Vectors, as_vectors, unit_rows


class AverageCompatibility(NamedTuple):
    """Number of pairs of versions in which the newer one may query the gallery of the older one.

    Attributes:
        met: Number of pairs that meet the criterion.
        pairs: Number of pairs, T(T − 1) / 2 for T versions.
        fraction: ``met / pairs``.
    """

    met: int
    pairs: int
    fraction: float

    def __str__(self) -> str:
        return f"{self.met}/{self.pairs}"


@dataclass(frozen=True, eq=False)
class CompatibilityMatrix:
    """One metric of every version's queries against its own and every earlier version's gallery.

    Attributes:
        names: The T versions, oldest first.
        values: (T, T) float64; row i is the query version, column j the gallery version, NaN above the
            diagonal. A mapping ``(i, j) → value`` of the lower triangle works too. Values are fractions or
            percentages.
        metric: Name of the metric, for the heading of a table.
    """

    names: Sequence[str]
    values: NDArray[np.float64] | Mapping[tuple[int, int], float]
    metric: str = ""

    def __post_init__(self) -> None:
        """Check the entries and convert them to an array.

        Raises:
            DataError: If there is no version, a name occurs twice, or an entry of the lower triangle is
                missing; the message names it.
        """
        names = tuple(self.names)
        if not names or len(set(names)) != len(names):
            raise DataError(f"the versions are {list(names)}; give at least one, each with its own name")
        table = np.full((len(names), len(names)), np.nan)
        if isinstance(self.values, Mapping):
            for (row, column), value in self.values.items():
                if not 0 <= column <= row < len(names):
                    raise DataError(
                        f"({row}, {column}) is no entry of {len(names)} versions; give (query version, "
                        "gallery version), counted from 0, the gallery's not later than the query's"
                    )
                table[row, column] = value
        else:
            given = np.asarray(self.values, dtype=np.float64)
            if given.shape != table.shape:
                raise DataError(f"{len(names)} versions need a {table.shape} matrix, but it is {given.shape}")
            lower = np.tril_indices(len(names))
            table[lower] = given[lower]
        for row, column in lower_triangle(len(names)):
            if not np.isfinite(table[row, column]):
                raise DataError(
                    f"the entry {names[row]}/{names[column]} is missing; measure every query version against "
                    "its own and every earlier gallery"
                )
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "values", table)

    def __getitem__(self, entry: tuple[int, int]) -> float:
        """Value of (query version, gallery version), both counted from 0."""
        return float(np.asarray(self.values)[entry])

    def criterion(self) -> dict[tuple[int, int], bool]:
        """True for every pair i > j of versions where i/j is strictly better than j/j."""
        pairs = [(row, column) for row, column in lower_triangle(len(self.names)) if row > column]
        return {(row, column): self[row, column] > self[column, column] for row, column in pairs}

    def average_compatibility(self) -> AverageCompatibility:
        """AC = 2 / (T(T − 1)) · Σ_{i>j} 1[C_ij > C_jj].

        Raises:
            DataError: If there is only one version.
        """
        verdicts = self.criterion()
        if not verdicts:
            raise DataError(f"{self.names[0]} is the only version, but compatibility needs at least two")
        met = sum(verdicts.values())
        return AverageCompatibility(met, len(verdicts), met / len(verdicts))

    def average_metric(self) -> float:
        """AM = 2 / (T(T + 1)) · Σ_{i≥j} C_ij, the mean over self tests and cross tests."""
        return float(np.mean([self[entry] for entry in lower_triangle(len(self.names))]))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form: the entries and verdicts by ``"query/gallery"``, and the averages."""
        names = self.names
        entries = {f"{names[i]}/{names[j]}": self[i, j] for i, j in lower_triangle(len(names))}
        return {
            "metric": self.metric,
            "versions": list(names),
            "entries": entries,
            "criterion": {f"{names[i]}/{names[j]}": met for (i, j), met in self.criterion().items()},
            "average_compatibility": self.average_compatibility().fraction if len(names) > 1 else None,
            "average_metric": self.average_metric(),
        }

    def format(self, markdown: bool = False, scale: float = 100.0) -> str:
        """Format the matrix as a table, with AC and AM below it.

        Args:
            markdown: Write Markdown instead of plain text.
            scale: Factor of the entries: 100 turns fractions into percentages.

        Returns:
            A row per query version and a column per gallery version; an ``x`` marks an entry that misses the
            criterion. No newline at the end.
        """
        verdicts, size = self.criterion(), len(self.names)
        # A bar in a name would open another column.
        names = [name.replace("|", chr(92) + "|") if markdown else name for name in self.names]
        head = ["query \\ gallery" + (f" ({self.metric})" if self.metric else ""), *names]
        rows = [[name, *[""] * size] for name in names]
        for i, j in lower_triangle(size):
            rows[i][1 + j] = f"{scale * self[i, j]:.1f}" + ("" if verdicts.get((i, j), True) else " x")
        notes = [f"AM {scale * self.average_metric():.2f}"]
        if size > 1:
            notes.insert(0, f"AC {self.average_compatibility()} (x: does not beat the gallery's own model)")
        if markdown:
            lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
            lines.insert(1, f"|---|{'---:|' * size}")
            return "\n".join([*lines, "", *(f"- {note}" for note in notes)])
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(size + 1)]
        lines = [
            f"{'  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])}".rstrip()
            for row in (head, *rows)
        ]
        return "\n".join([*lines, "", *notes])


def lower_triangle(count: int) -> list[tuple[int, int]]:
    """Entries (query version, gallery version) of ``count`` versions, row by row."""
    return [(row, column) for row in range(count) for column in range(row + 1)]


def compatibility_matrix(
    versions: Mapping[str, Vectors],
    labels: Labels,
    *,
    ids: Ids | None = None,
    ks: Sequence[int] = (1, 5),
    chunk_size: int | None = None,
) -> dict[str, CompatibilityMatrix]:
    """Measure every version against its own and every earlier version's vectors of the same test images.

    The test set is query and gallery; an image is left out of its own ranking. If dimensions differ, both
    sides are cut to their common prefix.

    Args:
        versions: Name → (n, dim) vectors of one version, oldest first; row r is the same image in all.
        labels: (n,) integers.
        ids: One unique id per image; row numbers by default.
        ks: Cut-offs of CMC.
        chunk_size: See :func:`xbt.evaluation.evaluate_labels`.

    Returns:
        One matrix of fractions per metric: ``"top1"``, ``"top5"``, ..., ``"mAP"``.

    Raises:
        DataError: See :func:`xbt.evaluation.evaluate_labels`; also if there is no version or the numbers of
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
        image_ids = range(len(queries)) if ids is None else ids
        measured = evaluate_labels(
            queries,
            labels,
            gallery,
            labels,
            query_ids=image_ids,
            gallery_ids=image_ids,
            ks=ks,
            chunk_size=chunk_size,
        )
        for metric, value in measured.metrics().items():
            entries.setdefault(metric, {})[i, j] = value
    if not entries:
        raise DataError("there are no versions to compare; give at least one")
    return {metric: CompatibilityMatrix(names, values, metric) for metric, values in entries.items()}


def prefix_vectors(query_vectors: Vectors, gallery_vectors: Vectors) -> tuple[Tensor, Tensor]:
    """Cut both sides to their common leading coordinates, and normalise the rows.

    Heads that add dimensions keep those of the old model first. An old gallery is thus compared with the
    leading part of a new vector.

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
        new_old: Queries of the compatible new model against the old gallery.
        old_old: Self test of the old model.
        new_new_independent: Self test of a new model that was trained independently of the old one.

    Returns:
        1 equals re-embedding everything, negative is worse than the old model, and ``None`` means that
        re-embedding gains nothing.
    """
    possible = new_new_independent - old_old
    return (new_old - old_old) / possible if possible > 0 else None


def compatibility_tax(new_new_independent: float, new_new: float) -> float:
    """M(new′/new′) − M(new/new): cost of compatibility for the new model in its own space."""
    return new_new_independent - new_new


def over_seeds(
    values: Sequence[float], confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of one value per training seed, with its bootstrap interval over the seeds.

    With few seeds these intervals are too narrow: five seeds are few, two are almost useless.

    Args:
        values: One fraction per seed.
        confidence: Level of the two-sided interval.
        samples: Number of bootstrap samples.
        seed: Seed of the samples.

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
        baseline: Values of the baseline for the same seeds in the same order.
        confidence: Level of the two-sided interval.
        samples: Number of bootstrap samples.
        seed: Seed of the samples.

    Raises:
        DataError, ConfigError: See :func:`over_seeds`; also if the numbers of seeds differ.
    """
    if len(values) != len(baseline):
        raise DataError(
            f"there are {len(values)} values and {len(baseline)} to compare with; give the same seeds"
        )
    changes = [float(value) - float(other) for value, other in zip(values, baseline, strict=True)]
    return over_seeds(changes, confidence, samples, seed)
