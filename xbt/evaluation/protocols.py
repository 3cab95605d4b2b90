"""The test sets that papers mean by a name, with the counts that tell them from their look-alikes.

Sources of the counts and conventions: Karpathy & Fei-Fei's splits (CVPR 2015) for Flickr30k and COCO; nocaps
(Agrawal et al., ICCV 2019); the mean over five folds of COCO's test split (VSE++, Faghri et al., BMVC 2018);
the three large sets of Jang & Lim, "Towards Cross-modal Backward-compatible Representation Learning for
Vision-Language Models" (ICCV 2025).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from xbt.errors import ConfigError, DataError
from xbt.evaluation.cells import DIRECTIONS, Cell, RetrievalReport

if TYPE_CHECKING:
    from xbt.data import ImageTextPairs


@dataclass(frozen=True)
class Protocol:
    """A test set and how recall is computed on it.

    Attributes:
        name: What configs call it.
        images: How many images it has.
        captions: How many captions these have together, as published.
        pitfalls: What a wrong count usually comes from, for the error.
        folds: Over how many parts of equal size, in the data's order, recall is averaged. A query of a part
            is only searched in that part.
        captions_per_image: Take only the first so many captions of every image; ``None`` takes them all.

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
        """Checks the numbers."""
        if min(self.images, self.captions, self.folds, self.captions_per_image or 1) < 1:
            raise ConfigError(f"the protocol {self.name!r} has a number below 1; give positive numbers")
        if self.images % self.folds:
            raise ConfigError(
                f"the protocol {self.name!r} cannot cut {self.images} images into {self.folds} folds of "
                "equal size"
            )

    def prepare(self, pairs: ImageTextPairs, where: str = "the source") -> list[ImageTextPairs]:
        """Checks the counts and makes the folds.

        Args:
            pairs: What was loaded.
            where: What to call it in the error.

        Returns:
            One collection per fold, in the data's order.

        Raises:
            DataError: If images or captions are more or fewer, or an image has too few captions.
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
        for name, told in zip(pairs.ids, pairs.captions, strict=True):
            if len(told) < (count or 1):
                raise DataError(
                    f"the protocol {self.name!r} takes {count} captions of every image, but {name!r} of "
                    f"{where} has only {len(told)}; {self.pitfalls}"
                )
        return type(pairs)(pairs.ids, pairs.images, [told[:count] for told in pairs.captions])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form: the name and the counts."""
        return {
            "name": self.name,
            "images": self.images,
            "captions": self.captions,
            "folds": self.folds,
            "captions_per_image": self.captions_per_image,
        }


_NOT_COCO = (
    "check that these are Karpathy's 5,000 test images with all their captions: COCO val2017 has 5,000 other "
    "images, copies without duplicate captions have fewer, and five captions an image are 25,000"
)
_NOT_FLICKR = "check that this is Karpathy's {} with five captions an image: {}"


def _by_name(protocols: Iterable[Protocol]) -> dict[str, Protocol]:
    return {protocol.name: protocol for protocol in protocols}


PROTOCOLS: Mapping[str, Protocol] = _by_name(
    [
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
    ]
)
"""By name, the protocols that configs can ask for."""


def find_protocol(name: str, protocols: Mapping[str, Protocol] = PROTOCOLS) -> Protocol:
    """Looks a protocol up.

    Raises:
        ConfigError: If there is none of that name; the message lists those there are.
    """
    if name not in protocols:
        raise ConfigError(f"there is no protocol {name!r}; there are {', '.join(protocols)}")
    return protocols[name]


def average_folds(reports: Sequence[RetrievalReport]) -> RetrievalReport:
    """The mean over folds: every R@k is averaged, and the queries are put side by side for the intervals.

    Args:
        reports: One per fold, with the same cells; the folds have equally many images and equally many texts.

    Returns:
        A report whose cells have the counts of one fold.

    Raises:
        DataError: If there is no report, or they differ in cells, ks or counts.
    """
    if not reports:
        raise DataError("there are no folds to average; give at least one report")
    first = reports[0]
    if len(reports) == 1:
        return first
    shapes = [
        [(cell.name, cell.n_images, cell.n_texts, *cell.t2i) for cell in each.cells] for each in reports
    ]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise DataError(
                f"fold {number} has other cells, cut-offs or counts than the first; evaluate folds of equal "
                "size in the same way"
            )
    cells = [_average([each.cells[position] for each in reports]) for position in range(len(first.cells))]
    groups = {}
    for direction in first.groups:
        parts = [each.groups[direction] for each in reports]
        # A group of one fold is another one than that of the same number in the next.
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
