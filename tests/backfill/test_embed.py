"""The rate limit of a job, with a clock of its own."""

from __future__ import annotations

import pytest
from backfills import COUNT

from xbt.backfill import job, run_backfill
from xbt.backfill.embed import RateLimiter


class Clock:
    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_it_waits_as_long_as_is_missing():
    clock = Clock()
    limiter = RateLimiter(10, clock, clock.sleep)
    limiter.wait(5)
    clock.now += 0.2
    limiter.wait(5)
    assert clock.slept == pytest.approx([0.5, 0.3])
    assert clock.now == pytest.approx(101)


def test_time_spent_otherwise_is_no_credit():
    clock = Clock()
    limiter = RateLimiter(10, clock, clock.sleep)
    clock.now += 3600
    limiter.wait(5)
    assert clock.slept == []
    limiter.wait(5)
    assert clock.slept == pytest.approx([0.5])


def test_without_a_rate_it_never_waits():
    clock = Clock()
    RateLimiter(None, clock, clock.sleep).wait(10**9)
    assert clock.slept == []


def test_a_job_keeps_to_its_rate(config, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(job, "RateLimiter", lambda rate: RateLimiter(rate, clock, clock.sleep))
    assert run_backfill(config(items_per_second=4.0)).items == COUNT
    assert clock.now - 100 == pytest.approx(COUNT / 4)
