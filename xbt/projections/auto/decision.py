"""Decision of a choice: what is deployed, the evidence, and the scores it gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xbt.errors import ConfigError
from xbt.evaluation import Interval
from xbt.evaluation.cells import DIRECTIONS
from xbt.projections.auto.selection import GainTest
from xbt.projections.auto.steps import StepSetting
from xbt.projections.base import Modality, Projection
from xbt.projections.caption_map import CaptionForwardMap
from xbt.projections.combinations import Combination
from xbt.projections.ensemble import QueryEnsemble
from xbt.projections.gallery_steps import GallerySteps
from xbt.projections.hubness import HubnessBias
from xbt.vectors import Vectors, as_vectors, unit_rows
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
    """Recall of one candidate with its best setting, on queries its fit had not seen.

    The setting was chosen on the same queries, so the best candidate's figures flatter it;
    :attr:`Decision.gain_tests` do not. Without pairs all candidates are shown with one setting, and the
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
class StepTests:
    """Evidence on the steps of one direction.

    Attributes:
        new: The new query with steps over the old query with the best steps of its own.
        old: The old query with a hubness bias over the old query alone.
        control: The best steps of the old query.
    """

    new: GainTest
    old: GainTest
    control: StepSetting


@dataclass(frozen=True)
class Decision:
    """The choice of :func:`~xbt.projections.choose_projection`, with the evidence.

    It holds two things that can be deployed. ``projection`` and ``ensemble`` make queries for the gallery as
    it is (:meth:`queries`, :meth:`deployed`, :attr:`gain_tests`). ``steps`` adds what is computed for the
    gallery's rows, with a query of its own that was chosen together with them (:meth:`step_queries`,
    :attr:`step_tests`). :meth:`scores` are those of the steps in the directions that have them.

    Attributes:
        projection: The chosen candidate's map.
        ensemble: How to combine its queries with the old ones; the old query alone where the choice was not
            shown to be better.
        name: The chosen candidate.
        evidence: What it was judged on.
        gain_tests: Per direction whether the choice is deployed, and why, by queries whose own ranks took no
            part in it.
        candidates: What every candidate reached, and the old query, on held-out queries.
        n_images: Images (or groups of texts) it was judged on.
        n_texts: Texts it was judged on.
        confidence: One-sided confidence that was asked for.
        folds: Folds of fitting and of judging.
        n_joined: Images that were kept together with others, as near-duplicates or by equal texts.
        n_left_out: Rows of the corpus that no fit was given, because they are texts it is judged on.
        steps: Gallery-side steps of the directions that deploy any; ``None`` where none does.
        step_tests: Per direction with pairs, the evidence on the steps.
    """

    projection: Projection
    ensemble: QueryEnsemble
    name: str
    evidence: Evidence
    gain_tests: Mapping[str, GainTest]
    candidates: tuple[CandidateScore, ...]
    n_images: int
    n_texts: int
    confidence: float
    folds: int
    n_joined: int = 0
    n_left_out: int = 0
    steps: GallerySteps | None = None
    step_tests: Mapping[str, StepTests] = field(default_factory=dict)

    def deployed(self, direction: str) -> bool:
        """True if queries for the gallery as it is use the new model; if not, the old query is used alone.

        It does not speak of steps: :meth:`GallerySteps.needs_new` does.

        Raises:
            DataError: If there is no such direction.
        """
        return self.ensemble.needs_new(direction)

    @property
    def forward(self) -> CaptionForwardMap | None:
        """The caption forward map of the gallery's rows, if it is deployed."""
        return None if self.steps is None else self.steps.forward_map

    @property
    def bias(self) -> dict[str, HubnessBias]:
        """The hubness biases that are deployed, by direction."""
        found = {each: self.steps.bias_of(each) for each in self.steps.shares} if self.steps else {}
        return {direction: bias for direction, bias in found.items() if bias is not None}

    def has_steps(self, direction: str) -> bool:
        """True if gallery-side steps are deployed in a direction."""
        return self.steps is not None and direction in self.steps.shares

    @property
    def needs_old(self) -> bool:
        """True if the old encoder runs on queries of any direction."""
        return any(self.ensemble.needs_old(direction) for direction in self.gain_tests)

    @torch.no_grad()
    def scores(
        self,
        direction: str,
        new_queries: Vectors | None,
        old_queries: Vectors | None,
        gallery: Vectors,
        own: Tensor | None = None,
    ) -> Tensor:
        """Score queries against the old gallery exactly as what would be deployed does, steps included.

        Where the old query is kept these are the scores of old/old; there ``new_queries`` may be ``None``.
        With steps, estimates and biases of the gallery's rows are computed at every call; store
        :meth:`GallerySteps.rows` to search with them.

        Args:
            direction: ``"T2I"`` for text queries, ``"I2T"`` for image queries.
            new_queries: (n, new_dim) vectors of the queries under the new model.
            old_queries: (n, old_dim) vectors of the same queries under the old model; may be ``None`` where
                the ensemble does not need them.
            gallery: (m, old_dim) vectors of the old gallery.
            own: (m,) or (m, e) int64 images of the pairs that every row is, or is a text of; -1 for none.
                What the steps know of them is left out for that row. It is for judging on rows of the pairs
                that the decision was made from.

        Returns:
            (n, m) scores of the wider float type of both: cosines of the combined queries and the rows, or
            with steps those of :mod:`xbt.projections.gallery_steps`.

        Raises:
            DataError: If there is no such direction, a vector that is needed is not given, or one holds NaN.
            SpaceMismatchError: If a dimension is not that of its space.
        """
        if self.steps is not None and direction in self.steps.shares:
            queries = self.step_queries(new_queries, old_queries, direction)
            rows = self.steps.rows(direction, gallery, own)
        else:
            queries = self.queries(new_queries, old_queries, direction)
            rows = unit_rows(as_vectors(gallery, "gallery vectors", self.projection.old_dim))
        dtype = torch.promote_types(queries.dtype, rows.dtype)
        return queries.to(dtype) @ rows.to(queries.device, dtype).T

    @torch.no_grad()
    def step_queries(self, new: Vectors | None, old: Vectors | None, direction: str) -> Tensor:
        """The queries [q; q_new; 1] for rows with steps; see :meth:`GallerySteps.queries`.

        Args:
            new: (n, new_dim) vectors of the new model; may be ``None`` where the steps need none.
            old: (n, old_dim) vectors of the old model; may be ``None`` where the mixture needs none.
            direction: ``"T2I"`` for texts, ``"I2T"`` for images.

        Raises:
            ConfigError: If the direction has no steps.
            DataError, SpaceMismatchError: As :meth:`QueryEnsemble.forward`.
        """
        if self.steps is None or direction not in self.steps.shares:
            raise ConfigError(f"no steps are deployed in {direction}; use queries()")
        sides = self._sides(self.steps.ensemble, new, old, direction)
        return self.steps.queries(direction, *sides, new)

    @torch.no_grad()
    def queries(self, new: Vectors | None, old: Vectors | None, direction: str) -> Tensor:
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
        queries: Tensor = self.ensemble(*self._sides(self.ensemble, new, old, direction), direction)
        return queries

    def _sides(
        self, ensemble: QueryEnsemble, new: Vectors | None, old: Vectors | None, direction: str
    ) -> tuple[Tensor | None, Tensor | None]:
        """Old and projected new queries, as far as they are given and needed."""
        modality: Modality = "text" if direction == "T2I" else "image"
        projected = None
        if new is not None and ensemble.needs_new(direction):
            projected = self.projection(new, modality)
        own = None if old is None else as_vectors(old, "old queries", self.projection.old_dim)
        if projected is not None and own is not None:
            own = own.to(projected.device)
        return own, projected

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
                    **_evidence(gain_test),
                }
                for direction, gain_test in self.gain_tests.items()
            },
            "steps": {} if self.steps is None else self.steps.to_dict(),
            "step_tests": {
                direction: {
                    "gain_over_old_with_steps": _evidence(tests.new),
                    "gain_of_bias_for_old": _evidence(tests.old),
                    "old_with_steps": str(tests.control),
                }
                for direction, tests in self.step_tests.items()
            },
            "candidates": [
                {
                    "name": score.name,
                    "direction": score.direction,
                    "combination": score.combination.to_dict() if score.combination else None,
                    "recall": {f"R@{k}": list(value) for k, value in score.recall.items()},
                    "chosen": score.chosen,
                }
                for score in self.candidates
            ],
        }

    def save(self, directory: str | Path) -> Path:
        """Writes ``projection/``, ``ensemble/``, maybe ``steps/``, and ``decision.json`` to a directory.

        :meth:`Projection.from_pretrained`, :meth:`QueryEnsemble.from_pretrained` and
        :meth:`GallerySteps.load` read them.
        """
        path = Path(directory)
        self.projection.save_pretrained(path / "projection")
        self.ensemble.save_pretrained(path / "ensemble")
        if self.steps is not None:
            self.steps.save(path / "steps")
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (path / "decision.json").write_text(text + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        count = len({score.name for score in self.candidates if score.combination is not None})
        judged = f"{self.n_texts:,} texts"
        if self.evidence == "pairs":
            judged = f"{self.n_images:,} images and {judged}"
        lines = [
            f"chose {self.name} of {count} candidates",
            f"judged on {judged} ({_MEANING[self.evidence]})",
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
            lines += [self._of_direction(direction), *self._of_steps(direction)]
        for direction in DIRECTIONS:
            rows = [score for score in self.candidates if score.direction == direction]
            if rows:
                lines += ["", *_table(direction, rows)]
        return "\n".join(lines)

    def _of_direction(self, direction: str) -> str:
        """One line on a direction: the query that is deployed, the change in recall, and the reason."""
        test = self.gain_tests[direction]
        query = f"deploy {self.ensemble.combination(direction)}"
        if not self.deployed(direction):
            query = "keep the old query alone"
        return f"{direction}: {query}; {_changes(test)}{test.why}"

    def _of_steps(self, direction: str) -> list[str]:
        """Lines on the steps of a direction: what is deployed for the rows, and the evidence."""
        tests, lines = self.step_tests.get(direction), []
        if self.steps is not None and direction in self.steps.shares:
            query = self.steps.ensemble.combination(direction)
            named = query if self.steps.ensemble.needs_new(direction) else "the old query"
            reason = "accepted unverified" if tests is None else ""
            if tests is not None and self.steps.needs_new(direction):
                reason = (
                    f"over the old query with the best steps of its own: {_changes(tests.new)}{tests.new.why}"
                )
            elif tests is not None:
                reason = (
                    f"over the old query alone: {_changes(tests.old)}{tests.old.why}. The new query with "
                    f"steps is not shown to be better than that: {tests.new.why}"
                )
            lines.append(f"{direction} with steps: {named} + {self.steps.describe(direction)}; {reason}")
        elif tests is not None:
            lines.append(
                f"{direction}: no gallery-side steps; over the old query with the best steps of its own: "
                f"{_changes(tests.new)}{tests.new.why}"
            )
        return lines


def _changes(test: GainTest) -> str:
    changes = [f"R@{k} {100 * old:.1f} → {100 * test.recall[k]:.1f}" for k, old in test.old_recall.items()]
    return ", ".join(changes) + "; " if changes else ""


def _evidence(test: GainTest) -> dict[str, Any]:
    """A test as JSON-able values."""
    return {
        "gain_shown": test.met,
        "why": test.why,
        "mean_gain": list(test.pooled) if test.pooled else None,
        "gain": {f"R@{k}": each.to_dict() for k, each in test.differences.items()},
        "old_recall": {f"R@{k}": value for k, value in test.old_recall.items()},
        "recall": {f"R@{k}": value for k, value in test.recall.items()},
    }


def _table(direction: str, rows: list[CandidateScore]) -> list[str]:
    """R@k in percent with 95 % intervals, a row per candidate, the chosen one with a star."""
    heads = [direction, *(f"R@{k}" for k in rows[0].recall), "query"]
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
