"""Choice of the gallery-side steps that a decision deploys, and what they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xbt.evaluation import best_positive_ranks
from xbt.projections.auto.cross_validation import CrossValidation, Deployed
from xbt.projections.auto.decision import StepTests
from xbt.projections.auto.selection import CandidateRanks, GainTest, Selection, run_gain_test
from xbt.projections.auto.steps import (
    BEST,
    HUB_K,
    MAX_BANK,
    MIN_ITEMS,
    OLD,
    Items,
    Judged,
    StepSetting,
    StepTrial,
    some_images,
)
from xbt.projections.base import Modality
from xbt.projections.caption_map import MIN_ANCHORS, Neighbours, fit_caption_map
from xbt.projections.combinations import Combination, Nlerp
from xbt.projections.gallery_steps import GallerySteps
from xbt.projections.hubness import HubnessBias
from xbt.projections.pairs import PairVectors
from xbt.vectors import unit_rows

UNVERIFIED = {
    "T2I": StepSetting("0.5", 0.2, Neighbours(50, 0.05), 0.5),
    "I2T": StepSetting("0.5", 0.5, Neighbours(50, 0.05), 0.5),
}
"""What is deployed without evidence; chosen on Flickr8k's validation photos."""


class StepChoice(NamedTuple):
    """Steps per direction to be deployed, and the evidence."""

    settings: dict[str, StepSetting]
    tests: dict[str, StepTests]


def choose_steps(
    trial: CrossValidation,
    ranked: Sequence[CandidateRanks],
    gain_tests: Mapping[str, GainTest],
) -> StepChoice:
    """Choose steps by pairs, per direction.

    The new query with steps is deployed where it beats the old query with the best steps of its own, by the
    test of :func:`~xbt.projections.auto.selection.run_gain_test`. Where it does not, and a bias alone is
    shown to help the old query by more than the new query gains without steps, the old query is deployed with
    it.

    Args:
        trial: The cross-validation of the candidates.
        ranked: Their ranks.
        gain_tests: The tests of the queries without steps.
    """
    choices = trial.fold_choices(ranked)
    pairs, clusters, fold_of = some_images(trial.pairs, trial.clusters, trial.fold_of, trial.options.seed)
    settings: dict[str, StepSetting] = {}
    tests: dict[str, StepTests] = {}
    for direction in pairs.directions:
        judged = Judged(pairs, direction, clusters, fold_of, trial.options.ks)
        anchors, bank = materials(trial, judged.pairs, direction, judged.clusters)

        def mix(fold: int, query: str, new: Tensor, old: Tensor, direction: str = direction) -> Tensor:
            return trial.mixed(choices[fold], fold, query, direction, new, old)

        queries = (BEST, "0.5", "0.25", OLD) if trial.options.use_old else (BEST,)
        made = StepTrial(judged, anchors, bank, mix, queries)
        control = made.of_old()
        plain = best_positive_ranks(
            pairs.queries(direction)[1], pairs.gallery(direction), pairs.positives(direction)
        )
        ours = made.nested()
        over_old, over_control, of_bias = (
            _test(judged, trial, new, old)
            for new, old in ((ours, plain), (ours, control.nested()), (control.nested((0.0,)), plain))
        )
        # What is weaker of both counts: the old query with its best steps may lie below the old query alone.
        tests[direction] = StepTests(over_control if over_old.met else over_old, of_bias, control.climb())
        chosen = made.climb()
        if over_old.met and over_control.met and chosen.uses_new:
            settings[direction] = chosen
        elif of_bias.met and _mean(of_bias) > _mean(gain_tests[direction]) * gain_tests[direction].met:
            settings[direction] = control.climb(None, (0.0,))
    kept = {way: each for way, each in settings.items() if each.share or each.weight}
    return StepChoice(kept, tests)


def _test(judged: Judged, trial: CrossValidation, ours: Tensor, theirs: Tensor) -> GainTest:
    rules = trial.options
    return run_gain_test(
        judged.direction,
        ours,
        theirs,
        rules.ks,
        judged.groups,
        rules.confidence,
        rules.seed,
        rules.every_k,
    )


def _mean(test: GainTest) -> float:
    return sum(test.recall.values()) / max(1, len(test.recall))


def materials(
    trial: CrossValidation, pairs: PairVectors, direction: str, owners: Tensor | None
) -> tuple[Items | None, Items | None]:
    """Anchors and bank of a direction; ``None`` where there are too few.

    Args:
        trial: Its corpus, if there is one, gives the anchors and the bank of text queries.
        pairs: Their texts take the place of a missing corpus; their images are the bank of image queries.
        direction: ``"T2I"`` or ``"I2T"``.
        owners: (n_images,) what every image belongs to.
    """
    sample = trial.fitter.sample()
    belongs = torch.arange(len(pairs)) if owners is None else owners
    texts = (
        Items.of(pairs.old_texts, pairs.new_texts, belongs[pairs.image_of_text])
        if sample is None
        else Items.of(*sample)
    )
    bank = texts
    if direction == "I2T":
        assert pairs.new_images is not None
        bank = Items.of(pairs.old_images, pairs.new_images, belongs)
    few = [len(items.old) < MIN_ITEMS for items in (texts, bank)]
    return None if few[0] else texts, None if few[1] else bank


def deployed_steps(
    trial: CrossValidation, deployed: Deployed, selection: Selection, settings: Mapping[str, StepSetting]
) -> GallerySteps | None:
    """Make the steps that were chosen by pairs, of all there is."""
    if not settings:
        return None
    parts = {direction: materials(trial, trial.pairs, direction, None) for direction in settings}
    combinations = {
        direction: trial.combination(selection, setting.query, direction)
        for direction, setting in settings.items()
    }
    return _made(deployed, settings, combinations, parts)


def unverified_steps(
    trial: CrossValidation, deployed: Deployed, images: Items | None, use_old: bool
) -> GallerySteps | None:
    """The steps of :data:`UNVERIFIED`, as far as there is enough to make them of."""
    sample = trial.fitter.sample()
    texts = None if sample is None else Items.of(*sample)
    settings, parts = {}, {}
    for direction, setting in UNVERIFIED.items():
        anchors = texts if texts is not None and len(texts.old) >= MIN_ANCHORS else None
        bank = texts if direction == "T2I" else images
        if bank is None or len(bank.old) < MIN_ITEMS:
            bank, setting = None, setting._replace(weight=0.0)
        if anchors is None:
            setting = setting._replace(share=0.0, rule=None)
        if setting.share or setting.weight:
            settings[direction], parts[direction] = setting, (anchors, bank)
    if not settings:
        return None
    combination = Nlerp(0.5 if use_old else 1.0)
    return _made(deployed, settings, dict.fromkeys(settings, combination), parts)


def _made(
    deployed: Deployed,
    settings: Mapping[str, StepSetting],
    combinations: Mapping[str, Combination],
    parts: Mapping[str, tuple[Items | None, Items | None]],
) -> GallerySteps:
    ensemble = deployed.ensemble(combinations)
    forward, rules = None, {}
    for direction, setting in settings.items():
        if setting.rule is not None:
            forward = parts[direction][0]
            rules["image" if direction == "T2I" else "text"] = setting.rule
    forward_map = None
    if forward is not None:
        forward_map = fit_caption_map(forward.old, forward.new, rules=rules, owners=forward.owners)
        forward_map.set_spaces(deployed.projection.old_space, deployed.projection.new_space)
    biases = {}
    for direction, setting in settings.items():
        items = parts[direction][1]
        if setting.weight and items is not None:
            few = items.spread(MAX_BANK)
            modality: Modality = "text" if direction == "T2I" else "image"
            with torch.no_grad():
                queries = ensemble(few.old, deployed.projection.project(few.new, modality), direction)
            if setting.share:
                queries = torch.cat([queries, unit_rows(few.new)], dim=1)
            biases[direction] = HubnessBias.from_bank(queries, setting.weight, HUB_K, few.owners)
    shares = {direction: setting.share for direction, setting in settings.items()}
    return GallerySteps(ensemble, shares, forward_map, biases).eval()
