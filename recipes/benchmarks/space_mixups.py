"""Mix-ups of two models of one dimension: those that the probe of a space detects, and those only declared.

    python recipes/benchmarks/space_mixups.py

Tiny CLIPs of open_clip with random weights are changed in one thing each. A harmless change (another number
of threads, weights rounded to half precision) must stay the same space; a mix-up must be refused, or at least
be called unverified. Nothing is downloaded; it takes about a minute on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from xbt.config import run_recipe
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.run_dir import versions, write_json
from xbt.space import EmbeddingSpace

TOWER = {"width": 32, "layers": 2}
MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "head_width": 16, **TOWER},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "heads": 2, **TOWER},
}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@dataclass
class SpaceMixups:
    """Compare the spaces of models that differ in one thing."""

    seeds: int = 4
    """Models with other random weights, each compared with its own variants."""
    results: str = "recipes/benchmarks/results/space_mixups"
    """Path of the results, without suffix."""


def make(seed: int, preprocess: dict[str, Any] | None = None, **config: Any) -> OpenClipEncoder:
    """A model with random weights, the same ones for a seed whatever else is given."""
    torch.manual_seed(seed)
    encoder = OpenClipEncoder.create({**deepcopy(MODEL), **config}, preprocess, name="open_clip:tiny")
    encoder.module.eval()
    return encoder


def changed(seed: int, change: Callable[[nn.Module], object]) -> EmbeddingSpace:
    """The space of a model whose weights were changed."""
    encoder = make(seed)
    change(encoder.module)
    return encoder.space


def noisy(scale: float) -> Callable[[nn.Module], object]:
    """Add noise of a fraction of each weight's own spread."""

    @torch.no_grad()
    def change(module: nn.Module) -> None:
        for weight in module.parameters():
            if weight.numel() > 1:
                weight.add_(scale * weight.std() * torch.randn_like(weight))

    return change


def read_back(space: EmbeddingSpace) -> EmbeddingSpace:
    """A space after it was written and read."""
    return EmbeddingSpace.from_dict(json.loads(json.dumps(space.to_dict())))


def threaded(seed: int) -> EmbeddingSpace:
    """The space as another number of threads computes it."""
    before = torch.get_num_threads()
    torch.set_num_threads(before % 2 + 1)
    space = make(seed).space
    torch.set_num_threads(before)
    return space


HARMLESS: dict[str, Callable[[int], EmbeddingSpace]] = {
    "made again": lambda seed: make(seed).space,
    "another number of threads": threaded,
    "saved as JSON": lambda seed: EmbeddingSpace.from_dict(
        json.loads(json.dumps(make(seed).space.to_dict()))
    ),
    "weights rounded to fp16": lambda seed: changed(seed, lambda module: module.half().float()),
    "weights rounded to bf16": lambda seed: changed(seed, lambda module: module.bfloat16().float()),
}
MIX_UPS: dict[str, Callable[[int], EmbeddingSpace]] = {
    "QuickGELU for GELU": lambda seed: make(seed, quick_gelu=True).space,
    "bilinear for bicubic": lambda seed: make(seed, {"interpolation": "bilinear"}).space,
    "squashed, not cropped": lambda seed: make(seed, {"resize_mode": "squash"}).space,
    "std larger by a tenth": lambda seed: make(seed, {"std": (0.295, 0.287, 0.303)}).space,
    "mean and std of 0.5": lambda seed: make(seed, HALF).space,
    "1 % noise on the weights": lambda seed: changed(seed, noisy(0.01)),
    "5 % noise on the weights": lambda seed: changed(seed, noisy(0.05)),
    "other weights": lambda seed: make(seed + 1000).space,
}


def centred(ours: Tensor, theirs: Tensor) -> float:
    """The lowest cosine of two probes whose means, of texts and of images, are taken out."""
    parts = zip(ours.split((16, 4)), theirs.split((16, 4)), strict=True)
    return min(float(cosine_similarity(a - a.mean(0), b - a.mean(0)).min()) for a, b in parts)


def compare(
    name: str, kind: str, make_space: Callable[[int], EmbeddingSpace], originals: list[EmbeddingSpace]
) -> dict[str, Any]:
    """One row: how far a variant's probe is from the original's, and what is said of it."""
    agreements, without_mean, states = [], [], []
    for seed, original in enumerate(originals):
        variant = make_space(seed)
        assert original.probe is not None
        assert variant.probe is not None
        agreements.append(original.agreement(variant) or 0.0)
        without_mean.append(centred(original.probe, variant.probe))
        states.append(original.compare(variant).state)
    said = {state: states.count(state) for state in ("same", "unverified", "other")}
    lowest, highest = min(agreements), max(agreements)
    return {
        "variant": name,
        "kind": kind,
        "lowest cosine": f"{lowest:.5f}",
        "highest cosine": f"{highest:.5f}",
        "lowest cosine without the mean": f"{min(without_mean):.4f}",
        "highest cosine without the mean": f"{max(without_mean):.4f}",
        **said,
    }


def main(config: SpaceMixups) -> None:
    """Measure and write the results."""
    originals = [make(seed).space for seed in range(config.seeds)]
    rows = [compare(name, "harmless", make_space, originals) for name, make_space in HARMLESS.items()]
    rows += [compare(name, "mix-up", make_space, originals) for name, make_space in MIX_UPS.items()]
    about = (
        f"{config.seeds} random CLIPs of open_clip (16-d, two layers a tower), each against a variant that "
        "differs in one thing: the lowest cosine of two probe vectors, and in how many cases the variant is "
        "called the same space, unverified (its probe agrees, its declared settings do not), or another."
    )
    result = {"title": "Mix-ups of spaces", "rows": rows, "notes": about, "versions": versions()}
    write_json(Path(f"{config.results}.json"), {**result, "config": {"seeds": config.seeds}})
    for row in rows:
        print(" | ".join(map(str, row.values())))


if __name__ == "__main__":
    run_recipe(main, SpaceMixups)
