"""Candidates of a choice: projections, and ways to combine their queries with the old ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xbt.errors import DataError
from xbt.projections.base import Projection
from xbt.projections.combinations import Combination, Linear, Nlerp
from xbt.projections.fitting import CLOSED_FORMS, fit_projection, grouped_options
from xbt.projections.near_duplicates import TextFinder
from xbt.projections.pair_tuning import tune_matrices
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import TERMS, PairStatistics, Source, paired_chunks, random_access

MAX_ANCHORS = 32_768
"""Most texts of the corpus that a caption forward map keeps."""

_BETAS = (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8, 1.0)
_TUNED_BETAS = (0.5, 0.4, 0.6, 0.3, 0.7)
_TUNING_STEPS = 7

OLD_ALONE = Nlerp(0.0)
NEW_ALONE = Nlerp(1.0)


@dataclass(frozen=True)
class Candidate:
    """A projection that may be chosen, and whether pairs tune the query on top of it.

    Attributes:
        method: A method of :func:`~xbt.projections.fit_projection`.
        options: Its options.
        tune_penalty: λ of :func:`~xbt.projections.pair_tuning.tune_on_pairs`; ``None`` leaves the pairs'
            contrastive objective out.
        name: What to call it; made from the rest if it is empty.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tune_penalty: float | None = None
    name: str = ""

    def __str__(self) -> str:
        if self.name:
            return self.name
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        tuned = "" if self.tune_penalty is None else f" + tuned on pairs (penalty={self.tune_penalty:g})"
        return f"{self.method}({options}){tuned}" if options else f"{self.method}{tuned}"

    @property
    def uses_pairs(self) -> bool:
        """True if its fit learns from the pairs, so that it must be judged on pairs it has not seen."""
        return self.tune_penalty is not None or self.needs_image_vectors

    @property
    def needs_image_vectors(self) -> bool:
        """True if its fit needs the pairs' images under the new model."""
        return self.options.get("pairs_weight", 0) > 0 or self.options.get("centring") == "modality"


def default_candidates(pairs: PairVectors | None, thorough: bool = False) -> list[Candidate]:
    """Candidates by default, from simple to elaborate: ties go to the first.

    Args:
        pairs: The pairs there are; without any, only text-fitted candidates are tried.
        thorough: Also the trained projections, which take minutes.
    """
    found = [
        Candidate("procrustes"),
        Candidate("procrustes", {"centring": "joint"}),
        Candidate("whitened_procrustes"),
        Candidate("ridge"),
    ]
    if thorough:
        found += [Candidate("lambda_orthogonal"), Candidate("xbt"), Candidate("xbt", {"noise": 0.3})]
    if pairs is None:
        return found
    images = pairs.new_images is not None
    if images:
        found.append(Candidate("procrustes", {"pairs_weight": 0.33}))
        found.append(Candidate("procrustes", {"centring": "modality", "pairs_weight": 0.33}))
    base = {"pairs_weight": 0.33} if images else {}
    found.append(Candidate("procrustes", base, 30.0))
    if thorough and images:
        found.append(Candidate("xbt", {"pairs_weight": 0.33}))
    return found


def settings_of(candidate: Candidate, use_old: bool) -> list[Combination]:
    """The combinations tried with a candidate, those that win a tie first."""
    if candidate.tune_penalty is not None:
        return [Linear(beta) for beta in _TUNED_BETAS] if use_old else [Linear(1.0, with_old=False)]
    if not use_old:
        return [NEW_ALONE]
    return [Nlerp(beta) for beta in _BETAS]


class _Sample:
    """Rows drawn from a stream, each with the same chance; all of them while they are few."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._keys = np.empty(0)
        self._sides: list[Tensor] = []

    def add(self, new: Tensor, old: Tensor) -> None:
        """Draw from the next (k, new_dim) and (k, old_dim) rows."""
        keys = np.concatenate([self._keys, self._rng.random(len(new))])
        blocks = [side.float() for side in (old, new)]
        sides = [torch.cat(both) for both in zip(self._sides, blocks, strict=True)] if self._sides else blocks
        if len(keys) > MAX_ANCHORS:
            kept = np.sort(np.argpartition(keys, MAX_ANCHORS)[:MAX_ANCHORS])
            keys, sides = keys[kept], [side[torch.from_numpy(kept)] for side in sides]
        self._keys, self._sides = keys, sides

    def rows(self) -> tuple[Tensor, Tensor]:
        """The old and the new rows that were drawn, in the order they came."""
        return self._sides[0], self._sides[1]


class Fitter:
    """Fits candidates to one corpus, which all closed forms together read only once.

    Args:
        new: Vectors of the new model for texts: tensor, array, store, or, for closed forms alone, a stream.
            ``None`` where the texts of the pairs are all there is.
        old: Vectors of the old model for the same texts.
        pair_texts: Whether the texts of the pairs that a fit may look at join the corpus.
        judged: What the fits are judged on. Rows of the corpus that are its texts are left out of every fit;
            they are found on the one way through the corpus.

    Attributes:
        left_out: (m,) int64, the rows that were left out; known once something was fitted.
    """

    def __init__(
        self,
        new: Source | None,
        old: Source | None,
        pair_texts: bool = False,
        judged: PairVectors | None = None,
    ) -> None:
        self._new, self._old, self.pair_texts = new, old, pair_texts
        self._texts_judged = None if judged is None else TextFinder(judged.new_texts, judged.old_texts)
        self.left_out: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._corpus: PairStatistics | None = None
        self._of_pairs: tuple[PairVectors, dict[str, PairStatistics]] | None = None
        self._fitted: dict[tuple[str, int], tuple[Projection, PairVectors | None]] = {}
        self._tuned: dict[tuple[str, int, bool], tuple[dict[str, Tensor], PairVectors]] = {}
        self._sample = _Sample()

    def looks_at_pairs(self, candidate: Candidate) -> bool:
        """True if the candidate's fit depends on the pairs, its tuning included."""
        return self.pair_texts or candidate.uses_pairs

    def fit(self, candidate: Candidate, pairs: PairVectors | None) -> Projection:
        """The candidate's projection, before it is tuned.

        Args:
            candidate: What to fit.
            pairs: The pairs it may look at; a candidate that uses none does not.

        Raises:
            XbtError: As the method's own fit.
        """
        options = dict(candidate.options)
        grouped_options(candidate.method, options)
        images = pairs if candidate.needs_image_vectors else None
        depends = pairs is not None and (self.pair_texts or images is not None)
        key = f"{candidate.method} {sorted(options.items())}", id(pairs) if depends else 0
        if key in self._fitted:
            return self._fitted[key][0]
        if candidate.method in CLOSED_FORMS:
            # Not every closed form knows of images.
            of_images = [] if images is None else [self._statistics_of(images, "images")]
            fitted: Projection = CLOSED_FORMS[candidate.method](self._texts(pairs), *of_images, **options)
        else:
            fitted = fit_projection(*self._sources(pairs), candidate.method, pairs=images, **options)
        # The pairs are kept, so that their id is not that of others.
        self._fitted[key] = fitted, pairs if depends else None
        return fitted

    def tune(self, candidate: Candidate, pairs: PairVectors | None, use_old: bool) -> dict[str, Tensor]:
        """Matrices that the pairs teach the candidate on top of its projection; none if it is not tuned."""
        if candidate.tune_penalty is None or pairs is None:
            return {}
        key = str(candidate), id(pairs), use_old
        if key not in self._tuned:
            projection = self.fit(candidate, pairs)
            made = tune_matrices(
                projection, pairs, use_old=use_old, penalty=candidate.tune_penalty, steps=_TUNING_STEPS
            )
            self._tuned[key] = made, pairs
        return self._tuned[key][0]

    def sample(self) -> tuple[Tensor, Tensor] | None:
        """(m, old_dim) and (m, new_dim) rows of the corpus, at most :data:`MAX_ANCHORS`, in its order.

        ``None`` if there is no corpus. Texts that fits are judged on are not among them.
        """
        if self._new is None:
            return None
        self._texts(None)
        return self._sample.rows()

    def _texts(self, pairs: PairVectors | None) -> PairStatistics:
        """Statistics of the texts to fit to."""
        if self._corpus is None and self._new is not None and self._old is not None:
            self._corpus = PairStatistics.from_chunks(self._unjudged(self._new, self._old), TERMS)
        if not self.pair_texts or pairs is None:
            assert self._corpus is not None
            return self._corpus
        own = self._statistics_of(pairs, "texts")
        return own if self._corpus is None else self._corpus + own

    def _unjudged(self, new: Source, old: Source) -> Iterator[tuple[Tensor, Tensor]]:
        """The corpus block by block without the texts that fits are judged on, whose rows are noted."""
        count = 0
        found: list[NDArray[np.int64]] = []
        for left, right in paired_chunks(new, old):
            if self._texts_judged is not None and bool(
                (known := self._texts_judged.known(left, right)).any()
            ):
                found.append(count + torch.nonzero(known).flatten().numpy())
                left, right, seen = left[~known], right[~known], len(left)
            else:
                seen = len(left)
            self._sample.add(left, right)
            yield left, right
            count += seen
        self.left_out = np.concatenate([np.empty(0, dtype=np.int64), *found])
        if len(self.left_out) == count:
            raise DataError(
                f"all {count} texts of the corpus are texts that the fits are judged on, so that nothing is "
                "left to fit to; give other texts, or None for new and old, which fits to those of the pairs "
                "fold by fold"
            )

    def _sources(self, pairs: PairVectors | None) -> tuple[Source, Source]:
        """The texts to fit to, for methods that take rows in an order of their own."""
        joined = self.pair_texts and pairs is not None
        if self._new is None or self._old is None:
            assert pairs is not None
            return pairs.new_texts, pairs.old_texts
        rows = random_access(self._new, self._old)
        self._texts(None)  # finds what is to be left out
        if not joined and len(self.left_out) == 0:
            return self._new, self._old
        new, old = rows.take(np.setdiff1d(np.arange(len(rows)), self.left_out))
        if joined:
            assert pairs is not None
            new, old = torch.cat([new, pairs.new_texts]), torch.cat([old, pairs.old_texts])
        return new, old

    def _statistics_of(self, pairs: PairVectors, kind: str) -> PairStatistics:
        if self._of_pairs is None or self._of_pairs[0] is not pairs:
            self._of_pairs = pairs, {}
        known = self._of_pairs[1]
        if kind not in known:
            known[kind] = (
                PairStatistics.of_images(pairs, TERMS)
                if kind == "images"
                else PairStatistics.of(pairs.new_texts, pairs.old_texts, TERMS)
            )
        return known[kind]
