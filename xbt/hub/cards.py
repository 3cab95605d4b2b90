"""Model cards: facts of a saved artifact, data that its owner adds, and retrieval results as one page.

Results become a table for people and a ``model-index`` for the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from xbt.errors import ConfigError
from xbt.hub.files import is_repository, public_name, read_json
from xbt.space import EmbeddingSpace
from xbt.version import __version__

DIRECTIONS = {"T2I": "text-to-image-retrieval", "I2T": "image-to-text-retrieval"}
"""Search direction in a report → task name in a card's ``model-index``."""
MARK = "<!-- Written by xbt. Remove this line, and xbt keeps the card as it is. -->"
"""Marker of cards that xbt wrote and may replace."""
UNNAMED = "path/or/repo"
"""Source in a usage snippet while the repository is not known."""
_DATASET = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@runtime_checkable
class Report(Protocol):
    """Anything with results, such as a :class:`~xbt.evaluation.RetrievalReport`."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form with the key ``"cells"``."""


class ResultCell(NamedTuple):
    """R@k, by direction and ``"R@1"``, of a pair of query model and gallery model such as ``"new/old"``."""

    name: str
    n_images: int
    n_texts: int
    recall: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class CardData:
    """Card content that the owner of a saved artifact adds.

    Raises:
        ConfigError: If a data set name is not one of the Hub.
    """

    report: Report | Mapping[str, Any] | str | Path | None = None
    """Retrieval results: a :class:`~xbt.evaluation.RetrievalReport`, its dictionary, or the path of its
    ``retrieval.json``."""
    evaluated_on: str | None = None
    """Data that the results were measured on, such as ``"nlphuji/flickr30k"`` or ``"our catalogue, May"``."""
    license: str | None = None
    """Licence, such as ``"apache-2.0"``; left out of the card if not given."""
    datasets: Sequence[str] = ()
    """Hub names of the data sets that it was fitted on."""
    base: str | None = None
    """Public specification of the new model, if it was loaded from a local directory."""
    tags: Sequence[str] = ()
    """Further tags."""

    def __post_init__(self) -> None:
        """Check the names of the data sets."""
        for name in self.datasets:
            if not _DATASET.fullmatch(name):
                raise ConfigError(f"{name!r} is not a data set of the Hub; write 'org/name', or leave it out")


@dataclass(frozen=True)
class CardFacts:
    """Card content that a saved artifact provides itself."""

    title: str
    summary: str
    """A paragraph on what it is."""
    snippet: str
    """Python code that uses it, with ``{source}`` as a placeholder for the repository."""
    method: str
    """A paragraph on how it was made, with the paper."""
    limits: Sequence[str]
    spaces: Mapping[str, EmbeddingSpace | None] = field(default_factory=dict)
    base: str | None = None
    """Hub repository of the model that it adapts, if it has one."""
    tags: Sequence[str] = ()
    pipeline_tag: str | None = None
    packages: Sequence[str] = ()
    """Python packages whose versions matter, besides xbt and torch."""


def make_card(facts: CardFacts, data: CardData | None = None, source: str | None = None) -> ModelCard:
    """Write a card: front matter for the Hub, then a page for people, without paths of this machine.

    Args:
        facts: The artifact's own content.
        data: The owner's content.
        source: The repository that the usage snippet loads.
    """
    data = data or CardData()
    cells = [] if data.report is None else read_cells(data.report)
    front = ModelCardData(
        library_name="xbt",
        license=data.license,
        tags=["xbt", "backward-compatible", *facts.tags, *data.tags],
        pipeline_tag=facts.pipeline_tag,
        base_model=facts.base,
        base_model_relation="adapter" if facts.base else None,
        datasets=list(data.datasets) or None,
        model_name=(source or facts.title).rpartition("/")[2] if cells else None,
        eval_results=eval_results(cells, data.evaluated_on) if cells else None,
    )
    sections = [
        f"# {facts.title}\n\n{facts.summary}",
        f"## Use\n\n```python\n{facts.snippet.format(source=json.dumps(source or UNNAMED))}\n```",
        f"## Results\n\n{_results(cells, data.evaluated_on)}",
        f"## Method\n\n{facts.method}",
        *([f"## Spaces\n\n{_spaces(facts.spaces)}"] if any(facts.spaces.values()) else []),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in facts.limits),
        f"## Versions\n\n{_versions(facts.packages)}",
    ]
    body = "\n\n".join([MARK, *sections])
    return ModelCard(f"---\n{front.to_yaml()}\n---\n\n{body}\n")


def quoted(text: str) -> str:
    """A name as code in Markdown, on one line."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def read_cells(report: Report | Mapping[str, Any] | str | Path) -> list[ResultCell]:
    """Read the cells of a report, of its dictionary, or of the ``retrieval.json`` it was written to."""
    source = str(report) if isinstance(report, str | Path) else "the report"
    if isinstance(report, str | Path):
        report = read_json(Path(report))
    values = report.to_dict() if isinstance(report, Report) else report
    try:
        cells = [
            ResultCell(
                str(cell["name"]),
                int(cell["n_images"]),
                int(cell["n_texts"]),
                {way: {str(k): _fraction(value) for k, value in cell[way].items()} for way in DIRECTIONS},
            )
            for cell in values["cells"]
        ]
        if not cells:
            raise ValueError("it has no cells")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{source} is not a retrieval report ({type(error).__name__}: {error}); give the retrieval.json "
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
    """The cells as a Markdown table in percent."""
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
    """Escape a label for Markdown: one line that opens no column, code, link or tag."""
    return re.sub(r"([\\|`\[\]<*])", r"\\\1", " ".join(text.split()))


def _fraction(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a fraction between 0 and 1")
    return float(value)


def _results(cells: list[ResultCell], evaluated_on: str | None) -> str:
    if not cells:
        return (
            "Nothing was measured when this card was written. `recipes/evaluate_retrieval.py` measures "
            "old/old, new/old and new/new on your own image–text pairs."
        )
    first = cells[0]
    on = f" of {one_line(evaluated_on)}" if evaluated_on else ""
    return (
        f"R@k in percent over {first.n_images:,} images and {first.n_texts:,} texts{on}: the share of "
        "queries with a correct result among their first k. T2I is a text query in the image gallery, I2T an "
        "image query in the text gallery; new/old means queries of this model in a gallery of the old "
        f"model.\n\n{cells_table(cells)}"
    )


def _spaces(spaces: Mapping[str, EmbeddingSpace | None]) -> str:
    lines = ["| space | model | revision | dimension |", "|---|---|---|---:|"]
    for name, space in spaces.items():
        if space is not None:
            revision = quoted(space.revision) if space.revision else "not known"
            cells = (name, quoted(public_name(space.model)), revision)
            # A bar ends a table cell even inside code.
            row = " | ".join(cell.replace("|", r"\|") for cell in cells)
            lines.append(f"| {row} | {space.dim} |")
    return "\n".join(lines)


def _versions(packages: Sequence[str]) -> str:
    listed = [f"xbt {__version__}"]
    for package in ("torch", "safetensors", *packages):
        try:
            listed.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(listed)
