"""Stage 1 of XBT: a projection from the new space to the old one, trained on text alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from xbt.data import CaptionSource, read_captions
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError
from xbt.evaluation import recall_at_k
from xbt.projections import Projection, ResidualProjection
from xbt.projections.objective import TextProjectionObjective, add_noise, check_noise
from xbt.projections.start import procrustes_start
from xbt.run_dir import RunDirectory
from xbt.store import EmbeddingStore
from xbt.training.args import TrainArgs
from xbt.training.batches import Draw, gaussian_noise
from xbt.training.embedding import embed_texts_once
from xbt.training.loop import LoopState, TrainingLoop, make_accelerator
from xbt.training.text_vectors import TextVectors, open_text_stores

_ENCODED, _STORED = ("old", "new", "captions"), ("old_store", "new_store")


@dataclass
class TextProjectionConfig:
    """Stage 1: pretrain the projection from the new model's space to the old model's on text alone.

    Writes ``projection/`` (load it with ``xbt.Projection.from_pretrained``), ``result.json`` and the training
    log to the output directory.
    """

    old: str | None = None
    """The encoder that embedded the gallery, such as open_clip:ViT-B-32-quickgelu/openai."""
    new: str | None = None
    """The encoder that shall query it, such as transformers:openai/clip-vit-large-patch14."""
    captions: CaptionSource | None = None
    """The text corpus, which both encoders embed first, or ..."""
    output_dir: str = ""
    """Where everything goes."""
    training: TrainArgs = field(
        default_factory=lambda: TrainArgs(steps=1000, batch_size=512, lr=1e-3, eval_every=100)
    )
    """How to train."""
    hidden_dim: int = 0
    """Width of the projection's MLP; 0 means twice the new model's dimension."""
    train_rotation: bool = False
    """Also train the rotation W; it then need not stay orthogonal."""
    noise: float = 0.3
    """Expected norm of the Gaussian noise added to the unit-length inputs."""
    noise_family: str = "gaussian"
    """gaussian, uniform (LinCIR: each caption's noise is scaled by U(0, 1)) or centred (C3: noise about the
    mean caption, which the projection then takes off by itself)."""
    cosine_weight: float = 1.0
    """Weight of the cosine loss."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss."""
    relational_weight: float = 0.0
    """Weight of the relational loss, which keeps the similarities between captions; around 100 it counts
    as much as the others."""
    temperature: float = 0.05
    """Temperature of the contrastive loss at the start; it is learned."""
    held_out: int = 2000
    """Captions held out to choose the best step; at most a fifth of the corpus is taken."""
    encode_batch_size: int = 256
    """Captions per forward pass of the text towers."""
    old_store: str | None = None
    """... a directory where recipes/embed.py has put a corpus under the old encoder, and ..."""
    new_store: str | None = None
    """... one with the same corpus under the new encoder: in place of old, new and captions."""
    overwrite: bool = False
    """Start afresh in an output directory that holds another run."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: If one cannot be used, or the texts are given in neither way or in both.
        """
        self._check_texts()
        check_noise(self.noise, self.noise_family, "--")
        for name in ("cosine_weight", "contrastive_weight", "relational_weight", "hidden_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} must not be negative, got {getattr(self, name)}")
        if not 0.01 <= self.temperature <= 1:
            raise ConfigError(f"--temperature must lie in [0.01, 1], got {self.temperature}")
        if self.held_out < 1:
            raise ConfigError(f"--held_out must be at least 1, got {self.held_out}")
        if self.encode_batch_size < 1:
            raise ConfigError(f"--encode_batch_size must be at least 1, got {self.encode_batch_size}")

    def _check_texts(self) -> None:
        if not self.output_dir.strip():
            raise ConfigError("--output_dir is missing; say where everything goes")
        ways = [{name: getattr(self, name) for name in way} for way in (_ENCODED, _STORED)]
        given = [[f"--{name}" for name, value in way.items() if value is not None] for way in ways]
        lacking = [[f"--{name}" for name, value in way.items() if value is None] for way in ways]
        if all(given):
            raise ConfigError(
                f"{' and '.join(given[1])} stand in place of --old, --new and --captions, but "
                f"{' and '.join(given[0])} was given as well; leave out one or the other"
            )
        if all(lacking):
            missing = next((less for some, less in zip(given, lacking, strict=True) if some), None)
            also = f"; {' and '.join(missing)} is missing" if missing else ""
            raise ConfigError(
                "stage 1 needs --old, --new and --captions, or --old_store and --new_store in their place"
                + also
            )


class NoisyVectors(Dataset[Any]):
    """Pairs of text vectors, the new side with noise that depends on (seed, step, position) alone.

    Args:
        vectors: The texts' vectors.
        positions: (n,) int64, which of them to train on.
        noise: Expected norm of the noise.
        seed: The run's seed.
        noise_family: Which noise; see :func:`~xbt.projections.objective.add_noise`.
        mean: The mean new vector, for the family ``"centred"``.
    """

    def __init__(
        self,
        vectors: TextVectors,
        positions: NDArray[np.int64],
        noise: float,
        seed: int,
        noise_family: str = "gaussian",
        mean: Tensor | None = None,
    ) -> None:
        self.vectors, self.positions, self.noise, self.seed = vectors, positions, noise, seed
        self.uniform, self.mean = noise_family == "uniform", mean

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Tensor]:
        new, old = self.vectors.take(self.positions[[draw.item for draw in draws]])
        if self.noise:
            new = self._noisy(new, draws)
        return {"new": new, "old": old}

    def _noisy(self, new: Tensor, draws: list[Draw]) -> Tensor:
        dim = new.shape[1]
        if not self.uniform:
            return add_noise(new, gaussian_noise(draws, dim, self.seed), self.noise, mean=self.mean)
        # One more normal value per caption, through its distribution function, is uniform and as well seeded.
        normal = gaussian_noise(draws, dim + 1, self.seed) * (dim + 1) ** 0.5
        uniform = torch.special.ndtr(normal[:, dim:])
        return add_noise(new, normal[:, :dim] * dim**-0.5, self.noise, uniform)


def pretrain_text_projection(config: TextProjectionConfig) -> Projection:
    """Runs stage 1 and saves its projection.

    Args:
        config: What to do.

    Returns:
        The projection of the best step on held-out captions; step 0 is the Procrustes rotation.

    Raises:
        XbtError: If an encoder, the captions or a setting cannot be used.
    """
    run = RunDirectory(config.output_dir, config, config.overwrite)
    if config.new_store is not None and config.old_store is not None:
        vectors = open_text_stores(config.new_store, config.old_store)
        accelerator = make_accelerator(config.training, run, config, "pretrain_text_projection")
        accelerator.print(f"reading {len(vectors)} distinct captions from two stores of {len(vectors.new)}")
    else:
        assert config.captions is not None
        texts = read_captions(config.captions)
        accelerator = make_accelerator(config.training, run, config, "pretrain_text_projection")
        vectors = embed_both(accelerator, config, texts)
    projection, _ = train_text_projection(vectors, config, accelerator, run)
    if accelerator.is_main_process:
        projection.save_pretrained(run.path / "projection")
    accelerator.wait_for_everyone()
    return projection


def embed_both(accelerator: Accelerator, config: TextProjectionConfig, texts: list[str]) -> TextVectors:
    """Embeds every distinct caption once with each frozen text tower, one model in memory at a time."""
    distinct = list(dict.fromkeys(texts))
    accelerator.print(f"embedding {len(distinct)} distinct captions of {len(texts)} with both text towers")
    folder = Path(config.output_dir) / "vectors"

    def embed(spec: str | None, side: str) -> EmbeddingStore:
        assert spec is not None
        encoder = load_encoder(spec, accelerator.device)
        return embed_texts_once(accelerator, encoder, distinct, folder / side, config.encode_batch_size)

    new, old = embed(config.new, "new"), embed(config.old, "old")
    return TextVectors(new, old, new.space, old.space)


def train_text_projection(
    vectors: TextVectors, config: TextProjectionConfig, accelerator: Accelerator, run: RunDirectory
) -> tuple[ResidualProjection, LoopState]:
    """Trains φ on paired text vectors and keeps the best step.

    Memory is bounded by the batch and the held-out captions: vectors in stores are read a batch at a time,
    and all that grows with the corpus are a few arrays of row numbers, 8 bytes a caption each.

    Args:
        vectors: The same captions under both models.
        config: What to do; its encoders and captions are not looked at.
        accelerator: From :func:`~xbt.training.loop.make_accelerator`.
        run: The run's directory.

    Returns:
        The projection on the CPU in evaluation mode, and the state that says which step it is.

    Raises:
        DataError: If vectors hold NaN, are not paired, or are too few to train on.
    """
    vectors = vectors.checked()
    train, held_out = _split_rows(len(vectors), config)
    args = config.training
    if args.steps and len(train) < args.batch_size:
        raise DataError(
            f"there are {len(train)} distinct training captions, fewer than --training.batch_size "
            f"{args.batch_size}; lower it or bring more captions"
        )
    centred = config.noise_family == "centred"
    projection = ResidualProjection(*vectors.dims, config.hidden_dim, centred)
    projection.set_spaces(vectors.new_space, vectors.old_space)
    start = procrustes_start(vectors, train, centred=centred)
    projection.begin_at(start.rotation, start.means)
    projection.weight.requires_grad_(config.train_rotation)
    held_out_new, held_out_old = vectors.take(held_out)

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            queries = projection(held_out_new.to(projection.weight.device)).cpu()
        return held_out_recall(queries, held_out_old)

    loop = TrainingLoop(
        accelerator,
        run,
        args,
        TextProjectionObjective(projection, config),
        NoisyVectors(
            vectors, train, config.noise, args.seed, config.noise_family, start.means.get("new_mean")
        ),
        evaluate=evaluate,
        no_decay=("projection.weight",),
    )
    state = loop.fit()
    return projection.cpu().eval(), state


def held_out_recall(projected: Tensor, old: Tensor) -> dict[str, float]:
    """R@1 between projected new and old vectors of the same captions, both ways; their mean decides."""
    own = [[row] for row in range(len(old))]
    forward = recall_at_k(projected, old, own, (1,))[1]
    backward = recall_at_k(old, projected, own, (1,))[1]
    return {"score": (forward + backward) / 2, "new_to_old_r1": forward, "old_to_new_r1": backward}


def _split_rows(count: int, config: TextProjectionConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if count < 5:
        raise DataError(f"stage 1 needs at least 5 distinct captions, got {count}; bring more text")
    order = np.random.default_rng(config.training.seed).permutation(count)
    held_out = min(config.held_out, count // 5)
    return order[held_out:], order[:held_out]
