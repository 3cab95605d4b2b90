"""Model cards: what a saved part knows of itself, what its owner adds, and the two as one page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from xbt.errors import ConfigError
from xbt.hub.names import public_name
from xbt.hub.results import Report, ResultCell, cells_table, eval_results, one_line, read_cells
from xbt.space import EmbeddingSpace
from xbt.version import __version__

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
