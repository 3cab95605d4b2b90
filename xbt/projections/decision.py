"""What ``method="auto"`` decided, for people, for files, and for use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xbt.evaluation import Interval
from xbt.evaluation.cells import DIRECTIONS
from xbt.projections.base import Modality, Projection
from xbt.projections.combinations import Combination
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.selection import Judgement
from xbt.version import __version__

Evidence = Literal["pairs", "text groups", "own captions"]
"""What the candidates were judged on."""

_MEANING = {
    "pairs": "image–text pairs",
    "text groups": "texts that say the same; images were not seen, so nothing is known of the gain with them",
    "own captions": "texts found by their own old vector, which says nothing about the old query",
}


@dataclass(frozen=True)
class CandidateScore:
    """What one candidate reached with its best setting, on queries its fit had not seen.

    The setting was chosen on the same queries, so the best candidate's figures flatter it;
    :attr:`Decision.judgements` do not. Without pairs all candidates are shown with one setting, and the
    figures are of finding texts by texts.

    Attributes:
        name: The candidate.
        direction: ``"T2I"`` or ``"I2T"``.
        combination: The setting; ``None`` for the old query.
        recall: R@k with its 95 % interval.
        chosen: Whether it is what was chosen, deployed or not.
    """

    name: str
    direction: str
    combination: Combination | None
    recall: Mapping[int, Interval]
    chosen: bool = False


@dataclass(frozen=True)
class Decision:
    """The choice of ``method="auto"``, with the evidence.

    Attributes:
        projection: The chosen candidate's map.
        ensemble: How to combine its queries with the old ones; the old query alone where the choice was not
            shown to be better.
        name: The chosen candidate.
        evidence: What it was judged on.
        judgements: Per direction whether the choice is deployed, and why, by queries whose own ranks had no
            say in it.
        scores: What every candidate reached.
        n_images: Images (or groups of texts) it was judged on.
        n_texts: Texts it was judged on.
        confidence: One-sided confidence that was asked for.
        folds: Folds of fitting and of judging.
        n_joined: Images that were kept together with others, as near-duplicates or by equal texts.
        n_left_out: Rows of the corpus that no fit was given, because they are texts it is judged on.
    """

    projection: Projection
    ensemble: QueryEnsemble
    name: str
    evidence: Evidence
    judgements: Mapping[str, Judgement]
    scores: tuple[CandidateScore, ...]
    n_images: int
    n_texts: int
    confidence: float
    folds: int
    n_joined: int = 0
    n_left_out: int = 0

    def deployed(self, direction: str) -> bool:
        """Whether queries of a direction use the new model at all; if not, the old query is used alone.

        Raises:
            DataError: If there is no such direction.
        """
        return self.ensemble.needs_new(direction)

    @torch.no_grad()
    def queries(self, new: Tensor | None, old: Tensor | None, direction: str) -> Tensor:
        """The query vectors to search the old gallery with.

        Args:
            new: (n, new_dim) vectors of the new model; may be ``None`` where :meth:`deployed` is false.
            old: (n, old_dim) vectors of the old model; may be ``None`` where the ensemble does not need them.
            direction: ``"T2I"`` for texts, ``"I2T"`` for images.

        Returns:
            (n, old_dim) unit rows.

        Raises:
            DataError, SpaceMismatchError: As :meth:`QueryEnsemble.forward`.
        """
        modality: Modality = "text" if direction == "T2I" else "image"
        projected = None if new is None else self.projection(new, modality)
        queries: Tensor = self.ensemble(old, projected, direction)
        return queries

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, without the weights."""
        return {
            "xbt_version": __version__,
            "chosen": self.name,
            "evidence": self.evidence,
            "n_images": self.n_images,
            "n_texts": self.n_texts,
            "n_images_joined": self.n_joined,
            "n_corpus_texts_left_out": self.n_left_out,
            "confidence": self.confidence,
            "folds": self.folds,
            "directions": {
                direction: {
                    "deployed": self.deployed(direction),
                    "combination": self.ensemble.combination(direction).to_dict(),
                    "gain_shown": judgement.met,
                    "why": judgement.why,
                    "mean_gain": list(judgement.pooled) if judgement.pooled else None,
                    "gain": {f"R@{k}": each.to_dict() for k, each in judgement.differences.items()},
                    "old_recall": {f"R@{k}": value for k, value in judgement.old_recall.items()},
                    "recall": {f"R@{k}": value for k, value in judgement.recall.items()},
                }
                for direction, judgement in self.judgements.items()
            },
            "candidates": [
                {
                    "name": score.name,
                    "direction": score.direction,
                    "combination": score.combination.to_dict() if score.combination else None,
                    "recall": {f"R@{k}": list(value) for k, value in score.recall.items()},
                    "chosen": score.chosen,
                }
                for score in self.scores
            ],
        }

    def save(self, directory: str | Path) -> Path:
        """Writes ``projection/``, ``ensemble/`` and ``decision.json``; returns the directory."""
        path = Path(directory)
        self.projection.save_pretrained(path / "projection")
        self.ensemble.save_pretrained(path / "ensemble")
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (path / "decision.json").write_text(text + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        lines = [
            f"auto chose {self.name}",
            f"judged on {self.n_images:,} images and {self.n_texts:,} texts ({_MEANING[self.evidence]})"
            if self.evidence == "pairs"
            else f"judged on {self.n_texts:,} texts ({_MEANING[self.evidence]})",
        ]
        if self.n_joined:
            lines.append(
                f"{self.n_joined:,} of these images are near-duplicates of others or share a text, and were "
                "kept together"
            )
        if self.n_left_out:
            lines.append(
                f"{self.n_left_out:,} texts of the corpus are among these, and were left out of the fits"
            )
        for direction in DIRECTIONS:
            judgement = self.judgements[direction]
            what = (
                str(self.ensemble.combination(direction))
                if self.deployed(direction)
                else "the old query alone"
            )
            lines.append(f"{direction}: {what}; {judgement.why}")
        for direction in DIRECTIONS:
            rows = [score for score in self.scores if score.direction == direction]
            if rows:
                lines += ["", *_table(direction, rows)]
        return "\n".join(lines)


def _table(direction: str, rows: list[CandidateScore]) -> list[str]:
    """R@k in percent with 95 % intervals, a row per candidate, the chosen one with a star."""
    heads = [direction, *(f"R@{k}" for k in rows[0].recall), "with"]
    cells = [heads] + [
        [
            f"{'* ' if row.chosen else '  '}{row.name}",
            *(str(value) for value in row.recall.values()),
            str(row.combination or ""),
        ]
        for row in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
