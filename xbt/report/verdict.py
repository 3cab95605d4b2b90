"""Verdict on an upgrade in one sentence, and thresholds for automatic checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from xbt.errors import ConfigError
from xbt.evaluation import Interval, differences, recovered_gain
from xbt.projections.auto.selection import MIN_IMAGES, GainTest, run_gain_test
from xbt.report.config import FailUnder
from xbt.report.measure import ALONE, NEW, OLD, UPGRADED, Measured

Answer = Literal["yes", "ensemble", "no", "unknown"]
Outcome = Literal["gain", "no gain", "loss", "open"]

HEADLINES: dict[Answer, str] = {
    "yes": "Upgrade: yes",
    "ensemble": "Upgrade: only with the ensemble",
    "no": "Upgrade: no",
    "unknown": "Upgrade: too few queries to decide",
}
QUERIES = {"T2I": "text queries", "I2T": "image queries"}


@dataclass(frozen=True)
class DirectionVerdict:
    """Effect of new queries in one direction, with the reason in one sentence.

    The outcomes ``"gain"`` and ``"loss"`` are shown with confidence; ``"no gain"`` excludes a gain that is
    worth it; ``"open"`` is everything else. If new queries are not ``deployed``, the old query stays.
    ``mean_gain`` over the ks has the interval that decided, if there is one.
    """

    outcome: Outcome
    deployed: bool
    why: str
    mean_gain: Interval | None


@dataclass(frozen=True)
class Verdict:
    """The answer in a sentence with its reason, by the verdicts of the directions.

    ``"ensemble"`` is yes, but only if the old model runs beside the new one. ``without_old_model`` has the
    verdicts without it; empty if that was not measured.
    """

    answer: Answer
    sentence: str
    directions: dict[str, DirectionVerdict]
    without_old_model: dict[str, DirectionVerdict]

    @property
    def headline(self) -> str:
        """The answer in a few words."""
        return HEADLINES[self.answer]

    @property
    def reason(self) -> str:
        """The sentence without the headline."""
        return self.sentence.removeprefix(f"{self.headline}: ")


def give_verdict(measured: Measured, confidence: float, worthwhile: float, seed: int = 0) -> Verdict:
    """Give a verdict on the measured cells.

    A direction gains if the interval of its mean gain over the ks is above 0 and no single k loses, on
    queries that were not used for the choice (:func:`xbt.projections.auto.selection.run_gain_test`).
    Otherwise it has no gain if the interval is below ``worthwhile`` points of R@k. Where the old query stayed
    because no gain was shown, the interval is that of the choice. ``confidence`` is one-sided.
    """
    judged, alone = (
        {d: _judge(measured, cell, d, confidence, worthwhile, seed) for d in measured.directions}
        if cell in measured.cells
        else {}
        for cell in (UPGRADED, ALONE)
    )
    needs_old = [
        direction
        for direction, verdict in judged.items()
        if verdict.deployed and measured.decision.ensemble.needs_old(direction)
    ]
    too_few = min(measured.n_chosen, len(measured.pairs)) < MIN_IMAGES
    answer = _answer(judged, alone, needs_old, too_few)
    sentence = f"{HEADLINES[answer]}: {_reason(answer, judged, alone, needs_old, too_few, measured)}."
    return Verdict(answer, sentence, judged, alone)


def outcome_of(gain_test: GainTest, worthwhile: float) -> Outcome:
    """Outcome of a direction by a gain test on queries that were not used for the choice."""
    if gain_test.pooled is None:
        return "open"
    if gain_test.met:
        return "gain"
    if gain_test.pooled.high < 0:
        return "loss"
    if 100 * gain_test.pooled.high < worthwhile:
        return "no gain"
    return "open"


def _judge(
    measured: Measured, cell: str, direction: str, confidence: float, worthwhile: float, seed: int
) -> DirectionVerdict:
    decision = measured.alone if cell == ALONE else measured.decision
    assert decision is not None
    deployed = decision.deployed(direction)
    if not deployed:
        # The old query stays, so this cell equals old/old; only the choice has evidence on the candidate.
        gain_test = decision.gain_tests[direction]
        outcome = outcome_of(gain_test, worthwhile)
        if outcome == "loss":  # a losing candidate is not deployed, so nothing is lost
            outcome = "no gain"
        return DirectionVerdict(outcome, False, gain_test.why, gain_test.pooled)
    new, old = measured.cells[cell].ranks[direction], measured.cells[OLD].ranks[direction]
    gain_test = run_gain_test(direction, new, old, measured.ks, measured.groups[direction], confidence, seed)
    return DirectionVerdict(outcome_of(gain_test, worthwhile), True, gain_test.why, gain_test.pooled)


def _answer(
    judged: Mapping[str, DirectionVerdict],
    alone: Mapping[str, DirectionVerdict],
    needs_old: list[str],
    too_few: bool,
) -> Answer:
    if too_few:
        return "unknown"
    outcomes = [verdict.outcome for verdict in judged.values()]
    if "loss" in outcomes:
        return "no"
    gains = [direction for direction, verdict in judged.items() if verdict.outcome == "gain"]
    if gains:
        lost = [d for d in gains if d in needs_old and (d not in alone or alone[d].outcome != "gain")]
        return "ensemble" if lost else "yes"
    return "no" if all(outcome == "no gain" for outcome in outcomes) else "unknown"


def _reason(
    answer: Answer,
    judged: Mapping[str, DirectionVerdict],
    alone: Mapping[str, DirectionVerdict],
    needs_old: list[str],
    too_few: bool,
    measured: Measured,
) -> str:
    if too_few:
        return (
            f"the method was chosen by {measured.n_chosen} images and measured on {len(measured.pairs)}, and "
            f"fewer than {MIN_IMAGES} cannot show a gain"
        )
    parts = [f"{QUERIES[direction]} {_clause(verdict)}" for direction, verdict in judged.items()]
    gaining = [d for d in needs_old if judged[d].outcome == "gain"]
    if answer == "yes" and gaining:
        parts.append("without the old model running beside the new one a gain is still shown")
    elif answer == "ensemble":
        without = [QUERIES[d] for d in gaining if d not in alone or alone[d].outcome != "gain"]
        parts.append(
            f"without the old model running beside the new one no gain is shown for {' and '.join(without)}"
        )
    return "; ".join(parts)


def _clause(verdict: DirectionVerdict) -> str:
    """Effect of a direction with its interval, as part of a sentence."""
    if verdict.mean_gain is None:
        return "were not judged"
    low, high = (f"{100 * end:+.1f}" for end in verdict.mean_gain[1:])
    amount = f"{100 * verdict.mean_gain.estimate:+.1f} points of R@k [{low}, {high}]"
    effect = {
        "gain": f"gain {amount}",
        "loss": f"lose, {amount}",
        "no gain": f"gain nothing that is worth it, {amount}",
        "open": f"are open, {amount}",
    }[verdict.outcome]
    return effect if verdict.deployed else f"{effect}, so that the old query stays"


@dataclass(frozen=True)
class Threshold:
    """A threshold (its flag and minimum) and the measured value; ``None`` if there is no gain to recover."""

    name: str
    what: str
    needed: float
    found: float | None
    met: bool

    def __str__(self) -> str:
        found = "cannot be computed" if self.found is None else f"{self.found:.1f}"
        return f"{'met' if self.met else 'missed'}: {self.name} {self.needed:g}; {self.what} {found}"


def check_thresholds(limits: FailUnder, measured: Measured) -> list[Threshold]:
    """Compare the measured cells with the thresholds."""
    old, new_old, k = measured.cells[OLD], measured.cells[UPGRADED], limits.k
    changes = differences(new_old, old, measured.groups)
    thresholds = []
    for direction, needed in limits.directions.items():
        if direction not in measured.directions:
            raise ConfigError(f"--fail_under.{direction} was given, but {direction} was not measured")
        gain = changes[direction][k].gain
        value = 100 * (gain.low if limits.lower_end else gain.estimate)
        end = ", at least" if limits.lower_end else ""
        what = f"gain in points of R@{k}{end}"
        met = _reached(value, needed)
        thresholds.append(Threshold(f"fail_under.{direction}", what, needed, value, met))
    if limits.recovered_gain is not None:
        if NEW not in measured.cells:
            raise ConfigError("--fail_under.recovered_gain was given, but new/new was not measured")
        shares = recovered_gain(new_old, old, measured.cells[NEW])
        for direction in measured.directions:
            share = shares[direction][k]
            percent = None if share is None else 100 * share
            met = percent is not None and _reached(percent, limits.recovered_gain)
            what = f"{direction}: percent of re-embedding's gain recovered at R@{k}"
            thresholds.append(
                Threshold("fail_under.recovered_gain", what, limits.recovered_gain, percent, met)
            )
    return thresholds


def _reached(value: float, needed: float) -> bool:
    # 100 · (0.3 − 0.2) is slightly less than 10.
    return value >= needed - 1e-9
