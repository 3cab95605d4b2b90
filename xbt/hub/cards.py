"""Model cards: what a saved part knows of itself, what its owner adds, and the two as one page.

Retrieval results as a model card tells them: a table for people, an index for the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from xbt.errors import ConfigError
from xbt.hub.files import read_json
from xbt.hub.names import public_name
from xbt.hub.transfer import is_repository
from xbt.space import EmbeddingSpace
from xbt.version import __version__

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


MARK = "<!-- Written by xbt. Remove this line, and xbt keeps the card as it is. -->"
"""Stands in every card that xbt wrote, and so may replace."""
UNNAMED = "path/or/repo"
"""What a usage snippet loads where nobody knows yet where the part will be."""
_DATASET = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class CardData:
    """What the owner of a saved part adds to its card.

    Raises:
        ConfigError: If a data set is not named as on the Hub.
    """

    report: Report | Mapping[str, Any] | str | Path | None = None
    """Retrieval results: a :class:`~xbt.evaluation.RetrievalReport`, its dictionary, or the path of its
    ``retrieval.json``."""
    evaluated_on: str | None = None
    """What the results were measured on, such as ``"nlphuji/flickr30k"`` or ``"our catalogue, May"``."""
    license: str | None = None
    """Such as ``"apache-2.0"``; nothing is claimed if left out."""
    datasets: Sequence[str] = ()
    """What the part was fitted on, as the Hub names it."""
    base: str | None = None
    """Specification of the new model that holds everywhere, for one that was loaded from a directory here."""
    tags: Sequence[str] = ()
    """Further tags."""

    def __post_init__(self) -> None:
        """Checks the names."""
        for name in self.datasets:
            if not _DATASET.fullmatch(name):
                raise ConfigError(f"{name!r} is not a data set of the Hub; write 'org/name', or leave it out")


@dataclass(frozen=True)
class CardFacts:
    """What a saved part knows of itself.

    Attributes:
        title: The heading.
        summary: A paragraph on what it is.
        snippet: Python code that uses it; ``{source}`` stands for where it is loaded from.
        method: A paragraph on how it was made, with the paper.
        limits: Sentences on what it cannot do.
        spaces: What to call a space → the space.
        base: Hub repository of the model that it adapts, if it has one.
        tags: For the Hub.
        pipeline_tag: For the Hub.
        packages: Python packages whose versions matter, besides xbt and torch.
    """

    title: str
    summary: str
    snippet: str
    method: str
    limits: Sequence[str]
    spaces: Mapping[str, EmbeddingSpace | None] = field(default_factory=dict)
    base: str | None = None
    tags: Sequence[str] = ()
    pipeline_tag: str | None = None
    packages: Sequence[str] = ()


def make_card(facts: CardFacts, data: CardData | None = None, source: str | None = None) -> ModelCard:
    """Writes a card: front matter for the Hub, then a page for people. It holds no path of this machine.

    Args:
        facts: What the part knows.
        data: What its owner adds.
        source: The repository that the usage snippet loads.

    Raises:
        ConfigError, SavedPartError: If the report cannot be read.
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
        "queries that find something right among their first k. T2I is a text query in the image gallery, "
        "I2T an image query in the text gallery; new/old means queries of this part in a gallery of the old "
        f"model.\n\n{cells_table(cells)}"
    )


def _spaces(spaces: Mapping[str, EmbeddingSpace | None]) -> str:
    lines = ["| space | model | revision | dimension |", "|---|---|---|---:|"]
    for name, space in spaces.items():
        if space is not None:
            revision = quoted(space.revision) if space.revision else "not known"
            cells = (name, quoted(public_name(space.model)), revision)
            # Within code a table still ends a cell at a bar.
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
