"""Test sets with the counts that identify them, and comparison with published values.

Sources of the counts and conventions: Karpathy & Fei-Fei's splits (CVPR 2015) for Flickr30k and COCO; nocaps
(Agrawal et al., ICCV 2019); the mean over five folds of COCO's test split (VSE++, Faghri et al., BMVC 2018);
the three large sets of Jang & Lim, "Towards Cross-modal Backward-compatible Representation Learning for
Vision-Language Models" (ICCV 2025).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from xbt.errors import ConfigError, DataError
from xbt.evaluation.cells import DIRECTIONS, Cell, RetrievalReport

if TYPE_CHECKING:
    from xbt.data import ImageTextPairs


@dataclass(frozen=True)
class Protocol:
    """A test set and its computation of recall.

    Attributes:
        name: Name in configs.
        images: Number of images.
        captions: Number of captions of all images, as published.
        pitfalls: Usual causes of a wrong count, for the error message.
        folds: Number of folds of equal size, in the data's order, over which recall is averaged. A query is
            only searched in its fold.
        captions_per_image: Number of captions to use per image, the first ones; ``None`` uses all.

    Raises:
        ConfigError: If a number is below 1 or the images cannot be cut into folds of equal size.

    Example:
        >>> PROTOCOLS["coco_5k"].prepare(pairs)  # [pairs], or a DataError
    """

    name: str
    images: int
    captions: int
    pitfalls: str
    folds: int = 1
    captions_per_image: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.images, self.captions, self.folds, self.captions_per_image or 1) < 1:
            raise ConfigError(f"the protocol {self.name!r} has a number below 1; give positive numbers")
        if self.images % self.folds:
            raise ConfigError(
                f"the protocol {self.name!r} cannot cut {self.images} images into {self.folds} folds of "
                "equal size"
            )

    def prepare(self, pairs: ImageTextPairs, where: str = "the source") -> list[ImageTextPairs]:
        """Check the counts and make the folds.

        Args:
            pairs: The loaded pairs.
            where: Their name in error messages.

        Returns:
            One collection per fold, in the data's order.

        Raises:
            DataError: If the number of images or captions differs, or an image has too few captions.
        """
        if (len(pairs), len(pairs.texts)) != (self.images, self.captions):
            raise DataError(
                f"the protocol {self.name!r} has {self.images:,} images with {self.captions:,} captions, but "
                f"{where} holds {len(pairs):,} images with {len(pairs.texts):,} captions; {self.pitfalls}"
            )
        size = self.images // self.folds
        folds = [pairs.select(range(start, start + size)) for start in range(0, self.images, size)]
        return folds if self.captions_per_image is None else [self._cut(fold, where) for fold in folds]

    def _cut(self, pairs: ImageTextPairs, where: str) -> ImageTextPairs:
        count = self.captions_per_image
        for name, captions in zip(pairs.ids, pairs.captions, strict=True):
            if len(captions) < (count or 1):
                raise DataError(
                    f"the protocol {self.name!r} takes {count} captions of every image, but {name!r} of "
                    f"{where} has only {len(captions)}; {self.pitfalls}"
                )
        return type(pairs)(pairs.ids, pairs.images, [captions[:count] for captions in pairs.captions])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form: the name and the counts."""
        return {name: value for name, value in asdict(self).items() if name != "pitfalls"}


_NOT_COCO = (
    "check that these are Karpathy's 5,000 test images with all their captions: COCO val2017 has 5,000 other "
    "images, copies without duplicate captions have fewer, and five captions an image are 25,000"
)
_NOT_FLICKR = "check that this is Karpathy's {} with five captions an image: {}"


PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "flickr30k_1k",
            1000,
            5000,
            _NOT_FLICKR.format("test split", "without split=test the file holds 31,014 images"),
        ),
        Protocol("coco_5k", 5000, 25010, _NOT_COCO),
        Protocol("coco_1k", 5000, 25010, _NOT_COCO, folds=5, captions_per_image=5),
        Protocol(
            "flickr30k_all",
            31014,
            155070,
            _NOT_FLICKR.format(
                "train, val and test splits together",
                "the original release has 31,783 images, and split=test alone 1,000",
            ),
        ),
        Protocol(
            "coco_2014_val",
            35504,
            177644,
            "check that these are Karpathy's splits val and restval (split=val+restval): COCO's own val2014 "
            "has 40,504 images, the 5,000 of Karpathy's test split among them",
        ),
        Protocol(
            "nocaps_val",
            4500,
            45000,
            "check that these are the 4,500 validation images with ten captions each: its test captions are "
            "not public, and parts such as in-domain have fewer images",
        ),
    )
}
"""Protocols that configs can name."""


def find_protocol(name: str, protocols: Mapping[str, Protocol] = PROTOCOLS) -> Protocol:
    """Find a protocol by name.

    Raises:
        ConfigError: If there is none; the message lists the existing names.
    """
    if name not in protocols:
        raise ConfigError(f"there is no protocol {name!r}; there are {', '.join(protocols)}")
    return protocols[name]


def average_folds(reports: Sequence[RetrievalReport]) -> RetrievalReport:
    """Average the R@k of folds, and concatenate their queries for the intervals.

    Args:
        reports: One per fold, with the same cells; the folds have equal numbers of images and of texts.

    Returns:
        A report; its cells have the counts of one fold.

    Raises:
        DataError: If there is no report, or they differ in cells, ks or counts.
    """
    if not reports:
        raise DataError("there are no folds to average; give at least one report")
    first = reports[0]
    if len(reports) == 1:
        return first
    shapes = [
        [(cell.name, cell.n_images, cell.n_texts, *cell.t2i) for cell in report.cells] for report in reports
    ]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise DataError(
                f"fold {number} has other cells, cut-offs or counts than the first; evaluate folds of equal "
                "size in the same way"
            )
    cells = [_average([report.cells[position] for report in reports]) for position in range(len(first.cells))]
    groups = {}
    for direction in first.groups:
        parts = [report.groups[direction] for report in reports]
        # Each fold numbers its groups from 0.
        offsets = accumulate((int(part.max()) + 1 for part in parts[:-1]), initial=0)
        groups[direction] = torch.cat([part + offset for part, offset in zip(parts, offsets, strict=True)])
    return RetrievalReport(cells, groups)


def _average(cells: Sequence[Cell]) -> Cell:
    first = cells[0]
    ranked = all(cell.ranks for cell in cells)
    return Cell(
        first.name,
        t2i={k: sum(cell.t2i[k] for cell in cells) / len(cells) for k in first.t2i},
        i2t={k: sum(cell.i2t[k] for cell in cells) / len(cells) for k in first.i2t},
        n_images=first.n_images,
        n_texts=first.n_texts,
        ranks={d: torch.cat([cell.ranks[d] for cell in cells]) for d in DIRECTIONS} if ranked else {},
    )


_KEY = re.compile(r"R@([1-9]\d*)")
_CELL = re.compile(r"(old/old|new/old|new/new)( \(.+\))?")


@dataclass
class Expectation:
    """Published values of one cell.

    Raises:
        ConfigError: If a key, value or name is invalid.
    """

    cell: str
    """The cell: old/old, new/old, new/new, or with a label: new/old (Procrustes)."""
    source: str
    """Where the values were published."""
    T2I: dict[str, float] = field(default_factory=dict)
    """Text queries against the image gallery, in percent: {R@1: 30.44, R@5: 55.94}."""
    I2T: dict[str, float] = field(default_factory=dict)
    """Image queries against the text gallery, likewise."""
    tolerance: float = 0.2
    """Accepted difference in points: library versions and mixed precision change published values by 0.2."""
    old: list[str] = field(default_factory=list)
    """Specifications of the old model; the values are ignored for any other one. Empty: any model."""
    new: list[str] = field(default_factory=list)
    """The same for the new model."""

    def __post_init__(self) -> None:
        """Check the names and values."""
        if not _CELL.fullmatch(self.cell):
            raise ConfigError(
                f"expected names the cell {self.cell!r}; write old/old, new/old or new/new, or with a "
                "label: new/old (Procrustes)"
            )
        if not self.source.strip():
            raise ConfigError(f"the values expected of {self.cell} have no source; name the publication")
        if not self.tolerance >= 0:
            raise ConfigError(
                f"the tolerance for {self.cell} is {self.tolerance}; give points of at least 0, such as 0.2"
            )
        if not self.T2I and not self.I2T:
            raise ConfigError(f"nothing is expected of {self.cell}; give T2I or I2T, such as {{R@1: 30.44}}")
        for direction in DIRECTIONS:
            for key, value in self.values(direction).items():
                if not _KEY.fullmatch(key) or not 0 <= value <= 100:
                    raise ConfigError(
                        f"expected of {self.cell}, {direction}: {key!r}: {value} cannot be; write "
                        "percentages under keys such as R@1"
                    )

    def values(self, direction: str) -> dict[str, float]:
        """Percentages of ``"T2I"`` or ``"I2T"``, by keys such as ``"R@1"``."""
        return self.T2I if direction == "T2I" else self.I2T

    def applies(self, old: str, new: str) -> bool:
        """True if the values were published for these models."""
        return (not self.old or old in self.old) and (not self.new or new in self.new)


@dataclass(frozen=True)
class Comparison:
    """A published value and the measured one, in percent.

    Attributes:
        cell: The cell.
        direction: ``"T2I"`` or ``"I2T"``.
        k: The cut-off.
        expected: As published.
        measured: As measured.
        tolerance: Accepted difference in points.
        source: Where the value was published.
    """

    cell: str
    direction: str
    k: int
    expected: float
    measured: float
    tolerance: float
    source: str

    @property
    def difference(self) -> float:
        """Points measured above the expected value."""
        return self.measured - self.expected

    @property
    def agrees(self) -> bool:
        """True if the difference is within the tolerance."""
        return abs(self.difference) <= self.tolerance + 1e-9  # 30.64 - 30.44 is a little more than 0.2

    def __str__(self) -> str:
        verdict = "agrees" if self.agrees else "DISAGREES"
        return f"expected {self.expected:.2f}, got {self.measured:.2f} ({self.difference:+.2f}, {verdict})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {**asdict(self), "difference": self.difference, "agrees": self.agrees}


@dataclass
class CheckedReport(RetrievalReport):
    """A report with its protocol and a comparison with published values.

    Attributes:
        protocol: The protocol, if any.
        comparisons: Published values that were measured.
        unmeasured: Published values for these models that were not measured: a cell, ``"new/old"``, or one
            value of a cell, ``"old/old T2I R@7"``.
    """

    protocol: Protocol | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """See :meth:`RetrievalReport.to_dict`; adds ``"protocol"`` and ``"expected"``."""
        return {
            **super().to_dict(),
            "protocol": self.protocol.to_dict() if self.protocol is not None else None,
            "expected": [comparison.to_dict() for comparison in self.comparisons],
            "expected_but_not_measured": self.unmeasured,
        }

    def require_agreement(self) -> None:
        """Check that every value published for these models was measured and reproduced.

        Raises:
            DataError: If a value was not reproduced; the message gives the number and the first three.
            ConfigError: If a value was not measured, or there is none for these models.
        """
        wrong = [value for value in self.comparisons if not value.agrees]
        if wrong:
            listed = "; ".join(f"{value.cell} {value.direction} R@{value.k} {value}" for value in wrong[:3])
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise DataError(
                f"{len(wrong)} of {len(self.comparisons)} published values are not reproduced: "
                f"{listed}{more}; check the models' names, the preprocessing and the data, or raise the "
                "tolerance"
            )
        _require_all_measured(len(self.comparisons), self.unmeasured)


def check_report(
    report: RetrievalReport,
    protocol: Protocol | None,
    expected: Sequence[Expectation],
    old: str,
    new: str,
    names: Mapping[str, str] | None = None,
) -> CheckedReport:
    """Compare a report with published values.

    Args:
        report: The measured cells.
        protocol: Its protocol, if any.
        expected: The published values; those of other models are ignored.
        old: Specification of the old model.
        new: Specification of the new model.
        names: Cells with another name in ``expected``: ``{"new/old (Procrustes)": "new/old"}`` if there is
            only one upgrade, because its cell has no label.
    """
    cells = {cell.name: cell for cell in report.cells}
    applicable = [values for values in expected if values.applies(old, new)]
    comparable, unmeasured = _partition(applicable, cells, report.ks, names or {})
    comparisons = [
        Comparison(name, direction, k, value, 100 * cells[name].recall(direction)[k], values.tolerance,
                   values.source)
        for values, name, direction, k, value in comparable
    ]  # fmt: skip
    return CheckedReport(report.cells, report.groups, protocol, comparisons, unmeasured)


def require_comparable(
    expected: Sequence[Expectation],
    old: str,
    new: str,
    cells: Collection[str],
    ks: Sequence[int],
    names: Mapping[str, str] | None = None,
) -> None:
    """Check before the measurement that all values published for these models will be measured.

    ``cells`` are the names of those that will be measured at ``ks``; the rest is as in :func:`check_report`.

    Raises:
        ConfigError: If a value will not be measured, or nothing was published for these models.
    """
    applicable = [values for values in expected if values.applies(old, new)]
    comparable, unmeasured = _partition(applicable, cells, ks, names or {})
    _require_all_measured(len(comparable), unmeasured)


_Value = tuple[Expectation, str, str, int, float]
"""One published value: its expectation, the cell's name, the direction, k and the percentage."""


def _partition(
    expected: Sequence[Expectation], cells: Collection[str], ks: Sequence[int], names: Mapping[str, str]
) -> tuple[list[_Value], list[str]]:
    """Split published values into those that are measured, and the names of the others without repetition."""
    comparable: list[_Value] = []
    unmeasured: list[str] = []
    for values in expected:
        name = names.get(values.cell, values.cell)
        if name not in cells:
            unmeasured.append(values.cell)
            continue
        for direction in DIRECTIONS:
            for key, value in values.values(direction).items():
                k = int(key.removeprefix("R@"))
                if k in ks:
                    comparable.append((values, name, direction, k, value))
                else:
                    unmeasured.append(f"{name} {direction} {key}")
    return comparable, list(dict.fromkeys(unmeasured))


def _require_all_measured(compared: int, unmeasured: Sequence[str]) -> None:
    if unmeasured:
        raise ConfigError(
            f"published values are expected of {', '.join(unmeasured)}, which no cell or k of this "
            "evaluation measures; name the upgrade with --upgraded.LABEL, add the k to --ks, or take them "
            "out of --expected"
        )
    if not compared:
        raise ConfigError(
            "no published value was compared, because --expected has none for these models; give some, with "
            "the models' names under old and new, or leave --fail_on_mismatch out"
        )
