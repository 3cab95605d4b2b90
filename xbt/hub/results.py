"""Retrieval results as a model card tells them: a table for people, an index for the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from huggingface_hub import EvalResult

from xbt.errors import ConfigError
from xbt.hub.fetching import is_repository
from xbt.hub.files import read_json

DIRECTIONS = {"T2I": "text-to-image-retrieval", "I2T": "image-to-text-retrieval"}
"""The two directions of search, as a report and as a card's index call them."""


@runtime_checkable
class Report(Protocol):
    """Whatever has results to tell: a :class:`~xbt.evaluation.RetrievalReport`."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form with the key ``"cells"``."""


@dataclass(frozen=True)
class ResultCell:
    """R@k of one pairing of query model and gallery model.

    Attributes:
        name: Such as ``"new/old"``.
        n_images: Images in the gallery.
        n_texts: Texts in the gallery.
        recall: Direction → ``"R@1"`` → fraction.
    """

    name: str
    n_images: int
    n_texts: int
    recall: Mapping[str, Mapping[str, float]]


def read_cells(report: Report | Mapping[str, Any] | str | Path) -> list[ResultCell]:
    """Reads the cells of a report, of its dictionary, or of the ``retrieval.json`` it was written to.

    Raises:
        SavedPartError: If a file is missing or is not JSON.
        ConfigError: If there are no cells, or one is malformed.
    """
    what = str(report) if isinstance(report, str | Path) else "the report"
    if isinstance(report, str | Path):
        report = read_json(Path(report))
    values = report.to_dict() if isinstance(report, Report) else report
    try:
        cells = [
            ResultCell(
                str(each["name"]),
                int(each["n_images"]),
                int(each["n_texts"]),
                {way: {str(k): _fraction(value) for k, value in each[way].items()} for way in DIRECTIONS},
            )
            for each in values["cells"]
        ]
        if not cells:
            raise ValueError("it has no cells")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{what} is not a retrieval report ({type(error).__name__}: {error}); give the retrieval.json "
            "that recipes/evaluate_retrieval.py wrote"
        ) from error
    return cells


def eval_results(cells: list[ResultCell], evaluated_on: str | None) -> list[EvalResult]:
    """The cells as entries of a card's ``model-index``, as fractions."""
    first = cells[0]
    name = " ".join((evaluated_on or "").split()) or f"{first.n_images:,} images and {first.n_texts:,} texts"
    kind = name if is_repository(name) else "image-text-pairs"
    return [
        EvalResult(
            task_type=task,
            task_name=f"{way}, query model / gallery model",
            dataset_type=kind,
            dataset_name=name,
            metric_type=f"recall_at_{k.rpartition('@')[2]}",
            metric_name=" ".join(f"{cell.name} {way} {k}".split()),
            metric_value=value,
        )
        for way, task in DIRECTIONS.items()
        for cell in cells
        for k, value in cell.recall[way].items()
    ]


def cells_table(cells: list[ResultCell]) -> str:
    """The cells as a Markdown table in percent, with a line of what they were measured on."""
    columns = [(way, k) for way in DIRECTIONS for k in cells[0].recall[way]]
    lines = [
        f"| query/gallery | {' | '.join(one_line(f'{way} {k}') for way, k in columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for cell in cells:
        values = [f"{100 * cell.recall[way][k]:.1f}" if k in cell.recall[way] else "" for way, k in columns]
        lines.append(f"| {one_line(cell.name)} | {' | '.join(values)} |")
    return "\n".join(lines)


def one_line(text: str) -> str:
    """A label as text of a page: on one line, and without opening a column, code, a link or a tag."""
    return re.sub(r"([\\|`\[\]<*])", r"\\\1", " ".join(text.split()))


def _fraction(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a fraction between 0 and 1")
    return float(value)
