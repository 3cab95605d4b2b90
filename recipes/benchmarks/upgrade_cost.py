"""Cost of a text-only upgrade compared with embedding the gallery again, from rates measured here.

    python recipes/benchmarks/upgrade_cost.py --captions captions.json.gz

Models have the architectures' size and random weights, which cost exactly what trained ones do; nothing is
downloaded. Decoding images, reading and moving them and building the index again are left out: all of them
would be the gallery's cost, none of them the upgrade's.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from bench import Spread, side_by_side, write_report
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from xbt.batches import SeededBatches
from xbt.config import config_to_dict, run_recipe
from xbt.data import CaptionSource, read_captions
from xbt.encoders import DualEncoder
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.errors import ConfigError, TruncationWarning
from xbt.projections import ResidualProjection, Stage1Options
from xbt.projections.objective import TextProjectionObjective
from xbt.projections.trainer import NoisyVectors
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore
from xbt.training import TrainArgs
from xbt.training.cached_vectors import TextVectors
from xbt.training.clip import read_model_config

OLD_TEXT, NEW_TEXT, NEW_IMAGE, FIT, STEP = "old text", "new text", "new image", "fit", "step"
FORMULA = (
    "upgrade = N · (old text + new text + fit) + steps · step;  re-embedding = M · new image, for N "
    "captions and M images"
)
_FIT_ROWS = 8_192
_POOL_ROWS = 20_000
_DAY = 86_400


@dataclass
class UpgradeCostBenchmark:
    """Measure what a caption, an image and a training step cost here, and work out upgrades from that."""

    captions: str = "scenes"
    """Captions of which a sample is measured: a file, or scenes for the built-in ones."""
    old: str = "ViT-B-32"
    """The old model: an architecture of open_clip, or a JSON file with an open_clip model config."""
    new: str = "ViT-L-14"
    """The new model, likewise."""
    n_captions: int = 1_000_000
    """Distinct captions of the upgrade that is worked out."""
    steps: int = 5_000
    """Its steps of stage 1."""
    batch_size: int = 1_024
    """Captions per step."""
    galleries: list[int] = field(default_factory=lambda: [1_000_000, 100_000_000, 1_000_000_000])
    """Images of the galleries it is compared with."""
    sample_texts: int = 256
    """Captions per timing."""
    text_batch: int = 32
    """Captions per forward pass: an eighth of the sample, so that sorting by length shows as in a corpus."""
    sample_images: int = 4
    """Images per timing."""
    rounds: int = 5
    """Rounds; everything is timed once in each."""
    device: str = "cpu"
    """Device of the models."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoders."""
    threads: int = 2
    """Threads of torch on the CPU."""
    seed: int = 0
    """Seed of captions, weights and batches."""
    results: str = "recipes/benchmarks/results/upgrade_cost"
    """Path of the results, without suffix."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If there is no gallery, or a number is below 1.
        """
        if min(self.galleries, default=0) < 1:
            raise ConfigError(f"--galleries must be numbers of images, got {self.galleries}")
        for name in (
            "n_captions",
            "steps",
            "batch_size",
            "sample_texts",
            "text_batch",
            "sample_images",
            "rounds",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")


class Cost(NamedTuple):
    """Seconds here, in every round, and operations (a multiplication and an addition are two)."""

    seconds: Spread
    flops: float


def main(config: UpgradeCostBenchmark) -> None:
    """Measures, works out and writes the results."""
    torch.set_num_threads(config.threads)
    texts = sample_captions(config)
    old, new = make_encoder(config, config.old), make_encoder(config, config.new)
    with tempfile.TemporaryDirectory() as folder:
        units = measure(config, texts, old, new, Path(folder))
    lengths = {name: text_lengths(each, texts) for name, each in ((config.old, old), (config.new, new))}
    written = write_report(
        config.results,
        f"Upgrading {config.old} to {config.new} on text alone, or embedding the gallery again",
        compare(config, units),
        describe(config, lengths, units),
        config={**config_to_dict(config), "captions": Path(config.captions).name},
        text_lengths=lengths,
        units={name: {"seconds": unit.seconds, "flops": unit.flops} for name, unit in units.items()},
    )
    print(written.with_suffix(".md").read_text(encoding="utf-8"), end="")


def sample_captions(config: UpgradeCostBenchmark) -> list[str]:
    """Distinct captions, drawn with the seed."""
    distinct = list(dict.fromkeys(read_captions(CaptionSource(config.captions))))
    if len(distinct) < config.sample_texts:
        raise ConfigError(
            f"--captions {config.captions} has {len(distinct)} distinct captions, fewer than --sample_texts "
            f"{config.sample_texts}; lower it or give more"
        )
    chosen = np.random.default_rng(config.seed).choice(len(distinct), config.sample_texts, replace=False)
    return [distinct[row] for row in chosen]


def make_encoder(config: UpgradeCostBenchmark, model: str) -> OpenClipEncoder:
    """An encoder with random weights, frozen and in eval mode."""
    torch.manual_seed(config.seed)
    encoder = OpenClipEncoder.create(read_model_config(model)).to(config.device)
    encoder.module.requires_grad_(False).eval()
    encoder.precision = config.precision
    return encoder


def measure(
    config: UpgradeCostBenchmark, texts: list[str], old: OpenClipEncoder, new: OpenClipEncoder, folder: Path
) -> dict[str, Cost]:
    """Cost of one caption in each text tower, one image, one caption of the Procrustes fit, and one step."""
    pixels = torch.randn(config.sample_images, 3, *new.preprocessing["size"], device=config.device)
    rows = [normalize(torch.randn(_FIT_ROWS, encoder.dim), dim=1) for encoder in (new, old)]
    step = make_step(config, new.dim, old.dim, folder)
    work: dict[str, tuple[int, Callable[[], object]]] = {
        OLD_TEXT: (len(texts), lambda: old.encode_texts(texts, config.text_batch)),
        NEW_TEXT: (len(texts), lambda: new.encode_texts(texts, config.text_batch)),
        NEW_IMAGE: (len(pixels), lambda: embed_images(new, pixels)),
        FIT: (_FIT_ROWS, lambda: rows[0].double().T @ rows[1].double()),
        STEP: (1, step),
    }
    timings = side_by_side({name: run for name, (_, run) in work.items()}, config.rounds)
    return {
        name: Cost(Spread(tuple(s / count for s in timings[name].values)), count_flops(run) / count)
        for name, (count, run) in work.items()
    }


def embed_images(encoder: DualEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """The image tower, in the encoder's precision."""
    with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, encoder.precision == "bf16"):
        return encoder.embed_pixels(pixels)


def make_step(config: UpgradeCostBenchmark, new_dim: int, old_dim: int, folder: Path) -> Callable[[], object]:
    """A step of stage 1: rows of two stores, noise, loss, gradients and AdamW."""
    stores = []
    for name, dim in (("new", new_dim), ("old", old_dim)):
        rows = normalize(torch.randn(max(_POOL_ROWS, config.batch_size), dim), dim=1)
        stores.append(EmbeddingStore.create(folder / name, modality="text", space=EmbeddingSpace(name, dim)))
        stores[-1].append(rows, [str(row) for row in range(len(rows))])
    new, old = stores
    settings = Stage1Options()
    objective = TextProjectionObjective(ResidualProjection(new_dim, old_dim), settings).to(config.device)
    objective.projection.get_parameter("weight").requires_grad_(False)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TrainArgs().lr, fused=True)
    batches = NoisyVectors(TextVectors(new, old), np.arange(len(new)), config.seed, settings.noise)
    draws = iter(SeededBatches(len(new), config.batch_size, config.seed, 0, 10**9))

    def step() -> None:
        batch = batches.__getitems__(next(draws))
        loss, _ = objective({name: rows.to(config.device) for name, rows in batch.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, TrainArgs().grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_flops(run: Callable[[], object]) -> float:
    """Operations of the matrix products, convolutions and attention in a call."""
    fast = torch.backends.mha.get_fastpath_enabled()
    # The counter knows no fused kernel of whole layers, and older torch's none of attention on a CPU.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return float(counter.get_total_flops())


def full_context_flops(encoder: DualEncoder) -> float:
    """Operations for one text that fills the context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # it is meant to be too long
        tokens = encoder.tokenize(["word " * encoder.context_length] * 2)
    with torch.no_grad():
        return count_flops(lambda: encoder.embed_tokens(tokens)) / len(tokens)


def text_lengths(encoder: DualEncoder, texts: list[str]) -> dict[str, float]:
    """Tokens that a text needs on average, those of the context, and the operations the whole would take."""
    context, short = encoder.context_length, encoder.short_context
    needed = context if short is None else short.lengths(encoder.tokenize(texts)).float().mean()
    return {"needed": float(needed), "context": context, "full_context_flops": full_context_flops(encoder)}


def total(units: Mapping[str, Cost], counts: Mapping[str, int]) -> Cost:
    """The sum of so many of each unit, round by round."""
    rounds = zip(*(units[name].seconds.values for name in counts), strict=True)
    seconds = tuple(sum(s * n for s, n in zip(each, counts.values(), strict=True)) for each in rounds)
    return Cost(Spread(seconds), sum(units[name].flops * count for name, count in counts.items()))


def compare(config: UpgradeCostBenchmark, units: Mapping[str, Cost]) -> list[dict[str, Any]]:
    """The table: the upgrade, and embedding each gallery again."""
    n = config.n_captions
    upgrade = total(units, {OLD_TEXT: n, NEW_TEXT: n, FIT: n, STEP: config.steps})
    costs = {f"upgrade on {n:,} captions": upgrade}
    for images in config.galleries:
        costs[f"re-embedding {images:,} images"] = total(units, {NEW_IMAGE: images})
    return [
        {
            "what": what,
            "PFLOP": f"{cost.flops / 1e15:,.4g}",
            "of the upgrade's": f"× {cost.flops / upgrade.flops:,.3g}",
            "days on this machine": Spread(tuple(second / _DAY for second in cost.seconds.values)),
            "of the upgrade's time": cost.seconds.over(upgrade.seconds),
        }
        for what, cost in costs.items()
    ]


def describe(
    config: UpgradeCostBenchmark, lengths: Mapping[str, Mapping[str, float]], units: Mapping[str, Cost]
) -> str:
    """Measured values behind the table."""
    lines = ["| one | GFLOP | milliseconds here |", "|---|---|---|"]
    for name, unit in units.items():
        milliseconds = Spread(tuple(1000 * second for second in unit.seconds.values))
        lines.append(f"| {name} | {unit.flops / 1e9:.4g} | {milliseconds} |")
    models = ", ".join(
        f"{model} {text['full_context_flops'] / 1e9:.4g} GFLOP (of its {text['context']} tokens a caption "
        f"needs {text['needed']:.1f} on average)"
        for model, text in lengths.items()
    )
    epochs = config.steps * config.batch_size / config.n_captions
    return "\n".join(
        [
            f"{FORMULA}; N = {config.n_captions:,}, {config.steps:,} steps of {config.batch_size:,} captions "
            f"({epochs:.1f} epochs), with the cost of",
            "",
            *lines,
            "",
            f"Measured on {config.device} in {config.precision} with random weights, {config.rounds} rounds "
            f"in turns, shown as median [least, greatest]: {config.sample_texts} captions through "
            f"`encode_texts`, tokenising included; {config.sample_images} images through the image tower "
            "alone (no decoding, which favours re-embedding); *fit*, a caption's part in the Procrustes "
            f"solution; *step*, a step of stage 1 with its reading. A text at the full context would take: "
            f"{models}. Operations are those of matrix products, convolutions and attention.",
        ]
    )


if __name__ == "__main__":
    run_recipe(main, UpgradeCostBenchmark)
