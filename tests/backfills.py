"""What the tests of backfills share: the scenes of the gallery, and how to read what a job has left."""

from __future__ import annotations

import json
from pathlib import Path

from xbt.data import PairSource, make_scenes

COUNT = 60
SCENES = make_scenes(COUNT, 5, "test")


def scenes(limit=COUNT, seed=5, split="test"):
    """Pairs: those of the gallery unless said otherwise."""
    return PairSource("scenes", limit=limit, seed=seed, split=split)


def others():
    """Pairs that are not in the gallery."""
    return scenes(40, 9, "val")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def order_of(out):
    return json.loads((Path(out) / "order.json").read_text())["ids"]
