"""One metric of a series of model versions, and what is read from it.

Entry (i, j) of the lower triangle belongs to queries by version i against a gallery of version j; the
diagonal holds the self tests. The criterion is Shen et al.'s ("Towards backward-compatible representation
learning", CVPR 2020); the two averages are Biondi et al.'s ("CoReS: Compatible representations via
stationarity", TPAMI 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xbt.errors import DataError


class AverageCompatibility(NamedTuple):
    """In how many pairs of versions the newer one may query the older one's gallery.

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
            diagonal. A mapping ``(i, j) → value`` of the lower triangle may be given instead. Fractions or
            percentages: nothing here depends on it.
        metric: What was measured, for the heading of a table.
    """

    names: Sequence[str]
    values: NDArray[np.float64] | Mapping[tuple[int, int], float]
    metric: str = ""

    def __post_init__(self) -> None:
        """Checks the entries and brings them to one form.

        Raises:
            DataError: If there is no version, a name occurs twice, or an entry of the lower triangle is
                missing; the message names it.
        """
        names = tuple(self.names)
        if not names or len(set(names)) != len(names):
            raise DataError(f"the versions are {list(names)}; give at least one, each with a name of its own")
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
        """The value of (query version, gallery version), both counted from 0."""
        return float(np.asarray(self.values)[entry])

    def criterion(self) -> dict[tuple[int, int], bool]:
        """For every pair i > j of versions, whether i/j is strictly better than j/j."""
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
        """Lays the matrix out as a table with AC and AM below it.

        Args:
            markdown: Whether to write Markdown instead of plain text.
            scale: What entries are multiplied with: 100 makes percentages of fractions.

        Returns:
            A row per query version and a column per gallery version; an entry that misses the criterion
            carries an ``x``. No newline at the end.
        """
        verdicts, size = self.criterion(), len(self.names)
        # A name with a bar in it would open another column.
        names = [name.replace("|", chr(92) + "|") if markdown else name for name in self.names]
        head = ["query \\ gallery" + (f" ({self.metric})" if self.metric else ""), *names]
        rows = [
            [name, *(self._entry(i, j, verdicts, scale) for j in range(size))] for i, name in enumerate(names)
        ]
        notes = [f"AM {scale * self.average_metric():.2f}"]
        if size > 1:
            notes.insert(0, f"AC {self.average_compatibility()} (x: does not beat the gallery's own model)")
        if markdown:
            lines = [f"| {' | '.join(each)} |" for each in (head, *rows)]
            lines.insert(1, f"|---|{'---:|' * size}")
            return "\n".join([*lines, "", *(f"- {note}" for note in notes)])
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(size + 1)]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in (head, *rows)]
        return "\n".join([*lines, "", *notes])

    def _entry(self, i: int, j: int, verdicts: Mapping[tuple[int, int], bool], scale: float) -> str:
        if j > i:
            return ""
        return f"{scale * self[i, j]:.1f}" + ("" if verdicts.get((i, j), True) else " x")


def lower_triangle(count: int) -> list[tuple[int, int]]:
    """The entries (query version, gallery version) of so many versions, row by row."""
    return [(row, column) for row in range(count) for column in range(row + 1)]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        row[0].ljust(widths[0]),
        *(each.rjust(width) for each, width in zip(row[1:], widths[1:], strict=True)),
    ]
