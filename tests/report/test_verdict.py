"""The verdict and the thresholds on cells whose answer is known by construction."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from xbt.errors import ConfigError
from xbt.evaluation import Cell, Interval
from xbt.projections.auto.selection import GainTest
from xbt.report import FailUnder
from xbt.report.measure import ALONE, NEW, OLD, UPGRADED
from xbt.report.verdict import check_thresholds, give_verdict, outcome_of

KS = (1, 5, 10)
COUNT = 200


def cell(name, **ranks):
    recall = {d: {k: float((each < k).double().mean()) for k in KS} for d, each in ranks.items()}
    return Cell(name, recall["T2I"], recall.get("I2T", {}), COUNT, COUNT, ranks)


def hits(share):
    """Ranks of which so large a share hits at every k, spread evenly."""
    return torch.where(torch.arange(COUNT) % 100 < round(100 * share), 0, 50)


def world(old, new, alone=None, full=None, deployed=True, needs_old=False, n_chosen=COUNT, gain_tests=None):
    """What :class:`Measured` shows, of shares of hits by direction."""
    cells = {OLD: old, UPGRADED: new, **({ALONE: alone} if alone else {}), **({NEW: full} if full else {})}
    cells = {name: cell(name, **{d: hits(share) for d, share in of.items()}) for name, of in cells.items()}

    def decision(needs):
        return SimpleNamespace(
            deployed=lambda direction: deployed,
            ensemble=SimpleNamespace(needs_old=lambda direction: needs),
            gain_tests=gain_tests or {},
        )

    return SimpleNamespace(
        cells=cells,
        directions=tuple(old),
        ks=KS,
        groups={direction: torch.arange(COUNT) for direction in old},
        n_chosen=n_chosen,
        pairs=range(COUNT),
        decision=decision(needs_old),
        alone=decision(False) if alone else None,
    )


def verdict(measured, worthwhile=1.0):
    return give_verdict(measured, 0.95, worthwhile)


BOTH = {"T2I": 0.3, "I2T": 0.3}


def test_a_clear_gain():
    found = verdict(world(BOTH, {"T2I": 0.5, "I2T": 0.45}))
    assert found.answer == "yes"
    assert found.sentence.startswith("Upgrade: yes: text queries gain +20.0 points of R@k [+")
    assert "image queries gain +15.0" in found.sentence
    assert found.sentence.count(". ") == 0
    assert found.headline == "Upgrade: yes"


def test_a_gain_that_needs_the_old_model():
    found = verdict(world(BOTH, {"T2I": 0.5, "I2T": 0.5}, alone={"T2I": 0.5, "I2T": 0.3}, needs_old=True))
    assert found.answer == "ensemble"
    assert found.headline == "Upgrade: only with the ensemble"
    assert "no gain is shown for image queries" in found.sentence
    assert {name: each.outcome for name, each in found.without_old_model.items()} == {
        "T2I": "gain",
        "I2T": "no gain",
    }


def test_a_gain_that_remains_without_the_old_model():
    found = verdict(world(BOTH, {"T2I": 0.5, "I2T": 0.5}, alone={"T2I": 0.4, "I2T": 0.4}, needs_old=True))
    assert found.answer == "yes"
    assert "a gain is still shown" in found.sentence


def test_a_loss_says_no():
    assert verdict(world(BOTH, {"T2I": 0.5, "I2T": 0.1})).answer == "no"


def test_no_gain_says_no():
    # Equal hits of 200 queries: the interval is [0, 0], which excludes a point.
    found = verdict(world(BOTH, BOTH))
    assert found.answer == "no"
    assert "gain nothing that is worth it" in found.sentence


def gain_test(direction, estimate, low, high):
    return GainTest(direction, False, "why", Interval(estimate, low, high))


@pytest.mark.parametrize(
    ("ends", "answer"),
    [((-0.01, 0.005), "no"), ((-0.05, -0.01), "no"), ((-0.01, 0.03), "unknown")],
)
def test_where_the_old_query_stays_the_choice_tells_why(ends, answer):
    judged = {d: gain_test(d, sum(ends) / 2, *ends) for d in BOTH}
    found = verdict(world(BOTH, BOTH, deployed=False, gain_tests=judged))
    assert found.answer == answer
    assert "so that the old query stays" in found.sentence
    # What counts as worth it decides between the two.
    assert verdict(world(BOTH, BOTH, deployed=False, gain_tests=judged), worthwhile=4.0).answer == "no"


@pytest.mark.parametrize("n_chosen", [3, 19])
def test_too_few_say_nothing_whatever_was_measured(n_chosen):
    found = verdict(world(BOTH, {"T2I": 0.9, "I2T": 0.9}, n_chosen=n_chosen))
    assert found.answer == "unknown"
    assert found.sentence.startswith("Upgrade: too few queries to decide: ")
    assert str(n_chosen) in found.sentence


def test_a_gain_in_one_direction_and_an_open_one():
    old, new = hits(0.3), hits(0.3).clone()
    new[:6], new[50:56] = 50, 0  # as many fixed as broken
    measured = world(BOTH, {"T2I": 0.5, "I2T": 0.3})
    measured.cells[UPGRADED] = cell(UPGRADED, T2I=hits(0.5), I2T=new)
    measured.cells[OLD] = cell(OLD, T2I=old, I2T=old)
    found = verdict(measured, worthwhile=0.5)
    assert found.directions["I2T"].outcome == "open"
    assert found.answer == "yes"


def test_outcomes_of_judgements():
    assert outcome_of(GainTest.unknown("T2I", "nothing"), 1.0) == "open"
    assert outcome_of(gain_test("T2I", -0.02, -0.03, -0.01), 1.0) == "loss"
    assert outcome_of(GainTest("T2I", True, "", Interval(0.02, 0.01, 0.03)), 1.0) == "gain"


def test_thresholds_on_gains_and_on_what_is_recovered():
    measured = world(BOTH, {"T2I": 0.4, "I2T": 0.5}, full={"T2I": 0.5, "I2T": 0.3})
    found = check_thresholds(FailUnder(T2I=10, I2T=20.5, recovered_gain=50, k=5), measured)
    assert [(each.name, each.met) for each in found] == [
        ("fail_under.T2I", True),  # exactly reached
        ("fail_under.I2T", False),
        ("fail_under.recovered_gain", True),
        ("fail_under.recovered_gain", False),  # re-embedding gains nothing: there is nothing to recover
    ]
    assert found[2].found == pytest.approx(50)
    assert found[3].found is None
    assert str(found[0]) == "met: fail_under.T2I 10; gain in points of R@5 10.0"
    assert "cannot be computed" in str(found[3])


def test_the_lower_end_may_be_held_against_a_threshold():
    measured = world(BOTH, {"T2I": 0.4, "I2T": 0.4})
    estimate, low = (
        check_thresholds(FailUnder(T2I=9.9, lower_end=end), measured)[0] for end in (False, True)
    )
    assert estimate.met
    assert not low.met
    assert low.found < estimate.found


@pytest.mark.parametrize("limits", [FailUnder(I2T=1), FailUnder(recovered_gain=10)])
def test_a_threshold_on_what_was_not_measured(limits):
    with pytest.raises(ConfigError, match="not measured"):
        check_thresholds(limits, world({"T2I": 0.3}, {"T2I": 0.4}))
