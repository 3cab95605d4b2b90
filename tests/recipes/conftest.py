"""Benchmarks find the modules that they share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="package", autouse=True)
def shared_modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "recipes/benchmarks"))
        yield
