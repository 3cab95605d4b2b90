"""Stage 1 of XBT: a projection from the new space to the old one, trained on text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from accelerate import Accelerator
from torch import Tensor, nn

from xbt.data import CaptionSource, read_captions
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError
from xbt.projections.base import Projection
from xbt.projections.objective import Stage1Options
from xbt.projections.sources import random_access
from xbt.projections.trained import STAGE1_SCHEDULE, ResidualProjection, fit_stage1
from xbt.projections.trainer import MIN_ROWS, NO_DECAY, FitSchedule, NoisyVectors, Score
from xbt.run_dir import RunDirectory
from xbt.store.store import EmbeddingStore
from xbt.training.args import TrainArgs
from xbt.training.cached_vectors import TextVectors, embed_texts_once, open_text_stores
from xbt.training.loop import LoopState, TrainingLoop, make_accelerator
from xbt.vectors import as_vectors

_ENCODED, _STORED = ("old", "new", "captions"), ("old_store", "new_store")


@dataclass
class TextProjectionConfig(Stage1Options):
    """Stage 1: pretrain the projection from the new model's space to the old model's on text alone.

    Writes ``projection/`` (load it with ``xbt.Projection.from_pretrained``), ``result.json`` and the training
    log to the output directory. Architecture, noise, loss and their defaults are those of
    :class:`~xbt.projections.Stage1Options`.
    """

    old: str | None = None
    """The encoder of the gallery, such as open_clip:ViT-B-32-quickgelu/openai."""
    new: str | None = None
    """The new encoder for queries, such as transformers:openai/clip-vit-large-patch14."""
    captions: CaptionSource | None = None
    """The text corpus, embedded by both encoders. Alternatively, give old_store and new_store."""
    output_dir: str = ""
    """Output directory of the run."""
    training: TrainArgs = field(default_factory=lambda: TrainArgs(**STAGE1_SCHEDULE.common()))
    """Settings of the training."""
    held_out: int = STAGE1_SCHEDULE.held_out
    """Captions held out to choose the best step; at most a fifth of the corpus is taken."""
    encode_batch_size: int = 256
    """Captions per forward pass of the text towers."""
    old_store: str | None = None
    """A directory of recipes/embed.py with a corpus under the old encoder."""
    new_store: str | None = None
    """The same corpus under the new encoder; old_store and new_store replace old, new and captions."""
    overwrite: bool = False
    """Replace another run in the output directory."""

    flag: ClassVar[str] = "--"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If one cannot be used, or the texts are given in neither way or in both.
        """
        self._check_texts()
        super().__post_init__()
        if self.held_out < 1:
            raise ConfigError(f"--held_out must be at least 1, got {self.held_out}")
        if self.encode_batch_size < 1:
            raise ConfigError(f"--encode_batch_size must be at least 1, got {self.encode_batch_size}")

    def _check_texts(self) -> None:
        if not self.output_dir.strip():
            raise ConfigError("--output_dir is missing; name a directory")
        ways = [{name: getattr(self, name) for name in way} for way in (_ENCODED, _STORED)]
        given = [[f"--{name}" for name, value in way.items() if value is not None] for way in ways]
        lacking = [[f"--{name}" for name, value in way.items() if value is None] for way in ways]
        if all(given):
            raise ConfigError(
                f"{' and '.join(given[1])} take the place of --old, --new and --captions, but "
                f"{' and '.join(given[0])} was given as well; leave out one or the other"
            )
        if all(lacking):
            missing = next((less for some, less in zip(given, lacking, strict=True) if some), None)
            also = f"; {' and '.join(missing)} is missing" if missing else ""
            raise ConfigError(
                "stage 1 needs --old, --new and --captions, or --old_store and --new_store in their place"
                + also
            )


def pretrain_text_projection(config: TextProjectionConfig) -> Projection:
    """Run stage 1 and save its projection.

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
    """Embed every distinct caption once with each frozen text tower, one model in memory at a time."""
    distinct = list(dict.fromkeys(texts))
    accelerator.print(f"embedding {len(distinct)} distinct captions of {len(texts)} with both text towers")
    folder = Path(config.output_dir) / "vectors"

    def embed(spec: str | None, side: str) -> EmbeddingStore:
        assert spec is not None
        encoder = load_encoder(spec, accelerator.device)
        return embed_texts_once(accelerator, encoder, distinct, folder / side, config.encode_batch_size)

    new, old = embed(config.new, "new"), embed(config.old, "old")
    return TextVectors(new, old, None, new.space, old.space)


def train_text_projection(
    vectors: TextVectors, config: TextProjectionConfig, accelerator: Accelerator, run: RunDirectory
) -> tuple[ResidualProjection, LoopState]:
    """Train φ on paired text vectors and keep the best step, as :func:`~xbt.projections.fit_xbt` does.

    Memory is bounded by the batch and the held-out captions: vectors in stores are read a batch at a time,
    and all that grows with the corpus are a few arrays of row numbers, 8 bytes a caption each.

    Args:
        vectors: The same captions under both models.
        config: What to do; its encoders and captions are not used.
        accelerator: From :func:`~xbt.training.loop.make_accelerator`.
        run: The run's directory.

    Returns:
        The projection on the CPU in evaluation mode, and the state that says which step it is.

    Raises:
        DataError: If vectors hold NaN, are not paired, or are too few to train on.
    """
    if not (isinstance(vectors.new, EmbeddingStore) and isinstance(vectors.old, EmbeddingStore)):
        # Stores are checked as they are opened and read.
        for side, name in ((vectors.new, "new text vectors"), (vectors.old, "old text vectors")):
            if not isinstance(side, EmbeddingStore):
                as_vectors(side, name)
        random_access(vectors.new, vectors.old)
    if len(vectors.new) != len(vectors.old):
        raise DataError(
            f"new and old vectors must be of the same texts: there are {len(vectors.new)} new and "
            f"{len(vectors.old)} old rows"
        )
    if len(vectors) < MIN_ROWS:
        raise DataError(
            f"stage 1 needs at least {MIN_ROWS} distinct captions, got {len(vectors)}; bring more text"
        )
    states: list[LoopState] = []

    def train(objective: nn.Module, data: NoisyVectors, score: Callable[[], Score]) -> int:
        def evaluate() -> dict[str, Score]:
            hits = score()
            assert isinstance(hits, Tensor)
            return {"score": hits, "new_to_old_r1": hits[:, 0], "old_to_new_r1": hits[:, 1]}

        # All of the captions, if there are fewer than a batch; every process needs as many.
        processes = accelerator.num_processes
        size = min(config.training.batch_size, max(len(data) // processes, 1) * processes)
        args = replace(config.training, batch_size=size)
        loop = TrainingLoop(accelerator, run, args, objective, data, evaluate=evaluate, no_decay=NO_DECAY)
        states.append(loop.fit())
        return states[0].best_step

    schedule = FitSchedule(**config.training.common(), held_out=config.held_out)
    projection = fit_stage1(vectors, config, schedule, run=train)
    projection.set_spaces(vectors.new_space, vectors.old_space)
    return projection, states[0]
