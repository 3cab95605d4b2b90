"""The method that a report judges: chosen by a part of the sample, or taken where that is too small."""

from __future__ import annotations

from typing import Any

from xbt.evaluation.cells import DIRECTIONS
from xbt.projections import Decision, QueryEnsemble, choose_projection, fit_projection
from xbt.projections.auto.candidates import NEW_ALONE
from xbt.projections.auto.choose import MIN_IMAGES
from xbt.projections.auto.selection import GainTest
from xbt.report.upgrade.config import UpgradeReportConfig
from xbt.report.upgrade.sample import Sample

_TAKEN = "procrustes"


class Untried(Decision):
    """A method that was compared with nothing, because the sample is too small to choose by.

    Its ``n_texts`` are those that it was fitted to.
    """

    def to_dict(self) -> dict[str, Any]:
        """As a decision's, with ``"none"`` for the evidence."""
        return {**super().to_dict(), "evidence": "none"}

    def __str__(self) -> str:
        combinations = (f"{each}: {self.ensemble.combination(each)}" for each in DIRECTIONS)
        return "\n".join(
            [
                f"{self.name} was taken without a choice: {self.n_images} images are too small a sample to "
                f"choose by, for fewer than {MIN_IMAGES} cannot show a gain",
                f"fitted to {self.n_texts:,} texts",
                *combinations,
            ]
        )


def choose_method(chosen: Sample, config: UpgradeReportConfig, use_old: bool) -> Decision:
    """Choose by a part of the sample.

    Args:
        chosen: That part. With fewer images than :data:`~xbt.projections.auto.choose.MIN_IMAGES` Procrustes
            is fitted to the corpus, or without one to the part's own texts, and its query is mixed in equal
            parts with the old one.
        config: Cut-offs, confidence and what may be tried.
        use_old: Whether the old model may run at search time; without it the new query stands alone.

    Raises:
        DataError: If the vectors cannot be used.
    """
    new, old = chosen.corpus or (None, None)
    if len(chosen) >= MIN_IMAGES:
        return choose_projection(
            new,
            old,
            pairs=chosen.pairs,
            thorough=config.thorough,
            use_old=use_old,
            ks=config.ks,
            confidence=config.confidence,
            seed=config.seed,
            new_space=chosen.new.space,
            old_space=chosen.old.space,
        )
    if new is None or old is None:
        new, old = chosen.pairs.new_texts, chosen.pairs.old_texts
    spaces = chosen.new.space, chosen.old.space
    projection = fit_projection(new, old, _TAKEN, new_space=spaces[0], old_space=spaces[1])
    ensemble = QueryEnsemble.midpoint(projection.old_dim, projection.old_space)
    if not use_old:
        ensemble = QueryEnsemble(
            projection.old_dim, dict.fromkeys(DIRECTIONS, NEW_ALONE), old_space=projection.old_space
        )
    return Untried(
        projection,
        ensemble,
        _TAKEN,
        "own captions",
        {each: GainTest.unknown(each, "the sample is too small to choose by") for each in DIRECTIONS},
        (),
        len(chosen),
        len(new),  # type: ignore[arg-type]  # a sample's corpus is never a stream
        config.confidence,
        0,
    )
