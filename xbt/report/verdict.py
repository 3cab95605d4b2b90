"""Whether to upgrade, in one sentence.

Thresholds that an upgrade must reach, for automatic checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from xbt.errors import ConfigError
from xbt.evaluation import Interval, differences, recovered_gain
from xbt.projections.auto.choose import MIN_IMAGES
from xbt.projections.auto.selection import GainTest, run_gain_test
from xbt.report.config import FailUnder
from xbt.report.measure import ALONE, NEW, OLD, UPGRADED, Measured

Answer = Literal["yes", "ensemble", "no", "unknown"]
Outcome = Literal["gain", "no gain", "loss", "open"]

HEADLINES: dict[Answer, str] = {
    "yes": "Upgrade: yes",
    "ensemble": "Upgrade: only with the ensemble",
    "no": "Upgrade: no",
    "unknown": "Upgrade: cannot be told from so few queries",
}
QUERIES = {"T2I": "text queries", "I2T": "image queries"}


@dataclass(frozen=True)
class DirectionVerdict:
    """What new queries do in one direction.

    Attributes:
        outcome: ``"gain"`` and ``"loss"`` are shown with confidence; ``"no gain"`` excludes what would be
            worth it; ``"open"`` is all else.
        deployed: Whether new queries are used at all; if not, the old query stays.
        why: One sentence.
        pooled: The mean gain over the ks with its interval, by which it was decided, if there was any.
    """

    outcome: Outcome
    deployed: bool
    why: str
    pooled: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "outcome": self.outcome,
            "deployed": self.deployed,
            "why": self.why,
            "mean_gain": None if self.pooled is None else list(self.pooled),
        }


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        answer: ``"yes"``, ``"ensemble"`` (yes, but only if the old model runs beside the new one), ``"no"``,
            or ``"unknown"``.
        sentence: The answer and what it rests on.
        directions: What each direction says.
        without_old: The same where the old model does not run at search time; empty where that was not asked.
    """

    answer: Answer
    sentence: str
    directions: dict[str, DirectionVerdict]
    without_old: dict[str, DirectionVerdict]

    @property
    def headline(self) -> str:
        """The answer in a few words."""
        return HEADLINES[self.answer]

    @property
    def reason(self) -> str:
        """What the answer rests on: the sentence without the headline."""
        return self.sentence.removeprefix(f"{self.headline}: ")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "answer": self.answer,
            "sentence": self.sentence,
            "directions": {name: each.to_dict() for name, each in self.directions.items()},
            "without_old_model": {name: each.to_dict() for name, each in self.without_old.items()},
        }


def give_verdict(measured: Measured, confidence: float, worthwhile: float, seed: int = 0) -> Verdict:
    """Judges what was measured.

    A direction gains if the interval of its mean gain over the ks lies above 0 and no single k loses, on
    queries that took no part in the choice (:func:`xbt.projections.auto.selection.run_gain_test`). If not,
    there is no gain where the interval lies below ``worthwhile``: what would be worth it is excluded. Where
    the old query stayed because no gain was shown, the interval is that of the choice itself.

    Args:
        measured: The cells.
        confidence: One-sided.
        worthwhile: Points of R@k.
        seed: Fixes the bootstrap.
    """
    judged = {
        direction: _judge(measured, UPGRADED, direction, confidence, worthwhile, seed)
        for direction in measured.directions
    }
    alone = {}
    if ALONE in measured.cells:
        alone = {
            direction: _judge(measured, ALONE, direction, confidence, worthwhile, seed)
            for direction in measured.directions
        }
    needs_old = [
        direction
        for direction, each in judged.items()
        if each.deployed and measured.decision.ensemble.needs_old(direction)
    ]
    too_few = min(measured.n_chosen, len(measured.pairs)) < MIN_IMAGES
    answer = _answer(judged, alone, needs_old, too_few)
    sentence = f"{HEADLINES[answer]}: {_reason(answer, judged, alone, needs_old, too_few, measured)}."
    return Verdict(answer, sentence, judged, alone)


def outcome_of(gain_test: GainTest, worthwhile: float) -> Outcome:
    """What a gain_test says of a direction.

    Args:
        gain_test: On queries that had no say in the choice.
        worthwhile: Points of R@k that would be worth it.
    """
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
        # The old query stays, so that the cell is that of the old query: only the choice tells why.
        gain_test = decision.gain_tests[direction]
        found = outcome_of(gain_test, worthwhile)
        # A candidate that loses is never deployed: nothing is lost.
        outcome: Outcome = "no gain" if found == "loss" else found
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
    outcomes = [each.outcome for each in judged.values()]
    if "loss" in outcomes:
        return "no"
    gains = [direction for direction, each in judged.items() if each.outcome == "gain"]
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
    parts = [f"{QUERIES[direction]} {_said(each)}" for direction, each in judged.items()]
    gaining = [d for d in needs_old if judged[d].outcome == "gain"]
    if answer == "yes" and gaining:
        parts.append("without the old model running beside the new one a gain is still shown")
    elif answer == "ensemble":
        without = [QUERIES[d] for d in gaining if d not in alone or alone[d].outcome != "gain"]
        parts.append(
            f"without the old model running beside the new one no gain is shown for {' and '.join(without)}"
        )
    return "; ".join(parts)


def _said(verdict: DirectionVerdict) -> str:
    """What a direction does, with the interval that says so."""
    if verdict.pooled is None:
        return "were not judged"
    low, high = (f"{100 * end:+.1f}" for end in verdict.pooled[1:])
    amount = f"{100 * verdict.pooled.estimate:+.1f} points of R@k [{low}, {high}]"
    said = {
        "gain": f"gain {amount}",
        "loss": f"lose, {amount}",
        "no gain": f"gain nothing that is worth it, {amount}",
        "open": f"are open, {amount}",
    }[verdict.outcome]
    return said if verdict.deployed else f"{said}, so that the old query stays"


@dataclass(frozen=True)
class Threshold:
    """One threshold and what was found.

    Attributes:
        name: Its flag.
        what: What is held against it.
        needed: The least that passes.
        found: What was measured; ``None`` where there is nothing to recover.
        met: Whether it passes.
    """

    name: str
    what: str
    needed: float
    found: float | None
    met: bool

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    def __str__(self) -> str:
        found = "cannot be computed" if self.found is None else f"{self.found:.1f}"
        return f"{'met' if self.met else 'missed'}: {self.name} {self.needed:g}; {self.what} {found}"


def check_thresholds(limits: FailUnder, measured: Measured) -> list[Threshold]:
    """Holds what was measured against the thresholds.

    Args:
        limits: The thresholds.
        measured: The cells.

    Raises:
        ConfigError: If a direction or new/new was not measured.
    """
    old, new_old, k = measured.cells[OLD], measured.cells[UPGRADED], limits.k
    changes = differences(new_old, old, measured.groups)
    found = []
    for direction, needed in limits.directions.items():
        if direction not in measured.directions:
            raise ConfigError(f"--fail_under.{direction} was given, but {direction} was not measured")
        gain = changes[direction][k].gain
        value = 100 * (gain.low if limits.lower_end else gain.estimate)
        end = ", at least" if limits.lower_end else ""
        what = f"gain in points of R@{k}{end}"
        found.append(Threshold(f"fail_under.{direction}", what, needed, value, _reached(value, needed)))
    if limits.recovered_gain is not None:
        if NEW not in measured.cells:
            raise ConfigError("--fail_under.recovered_gain was given, but new/new was not measured")
        shares = recovered_gain(new_old, old, measured.cells[NEW])
        for direction in measured.directions:
            share = shares[direction][k]
            percent = None if share is None else 100 * share
            met = percent is not None and _reached(percent, limits.recovered_gain)
            what = f"{direction}: percent of re-embedding's gain recovered at R@{k}"
            found.append(Threshold("fail_under.recovered_gain", what, limits.recovered_gain, percent, met))
    return found


def _reached(value: float, needed: float) -> bool:
    # 100 · (0.3 − 0.2) is a hair less than 10.
    return value >= needed - 1e-9
