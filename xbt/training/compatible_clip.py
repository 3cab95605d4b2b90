"""A new CLIP that is fine-tuned to serve the old gallery and its own: BCT, BT² and OCA across modalities."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator

from xbt.compatible import CompatibleEncoder
from xbt.data import ImageTextPairs, PairSource, load_readable_pairs
from xbt.encoders import DualEncoder, LoraSettings, add_lora, load_encoder
from xbt.errors import ConfigError, TruncationWarning
from xbt.probe import PROBE_TEXTS, draw_probe_images
from xbt.projections import HeadProjection
from xbt.run_dir import RunDirectory
from xbt.space import EmbeddingSpace
from xbt.training.args import TrainArgs
from xbt.training.cross_modal import CrossModalObjective, CrossModalWeights, head_at_procrustes
from xbt.training.loop import TrainingLoop, make_accelerator
from xbt.training.pair_batches import PairBatches
from xbt.training.pairs import PairVectors, cross_recall, embed_pairs, require_enough


@dataclass
class CompatibleClipConfig:
    """Fine-tune a new CLIP behind a BCT, BT² or OCA head that both towers share, on image–text pairs.

    Writes ``compatible/``, a compatible encoder whose vectors lie in the old space (load it with
    ``xbt.CompatibleEncoder.from_pretrained``), ``full/``, the same model with its whole vectors for a gallery
    of its own, and ``result.json`` to the output directory. Unlike stage 2 of XBT it needs the old model.
    """

    old: str
    """The encoder that embedded the gallery."""
    new: str
    """The new encoder."""
    pairs: PairSource
    """The image–text pairs."""
    output_dir: str
    """Where everything goes."""
    method: Literal["bct", "bt2", "oca"] = "oca"
    """Which head."""
    extra_dims: int | None = None
    """Dimensions beyond the old ones (OCA) or the new model's (BCT, BT²). By default OCA gets what the new
    model has more than the old one, BCT none, and BT² a quarter of the old dimension."""
    scale: float = 2.0
    """BT²'s scale C of the new model's share of a vector."""
    weights: CrossModalWeights = field(default_factory=CrossModalWeights)
    """Weights of the parts of the loss."""
    training: TrainArgs = field(
        default_factory=lambda: TrainArgs(
            steps=200, batch_size=64, lr=5e-4, warmup_steps=20, eval_every=50, checkpoint_every=50
        )
    )
    """How to train."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The LoRA of the new model; the head is trained whole."""
    temperature: float = 0.05
    """Temperature of the contrastive losses at the start; it is learned."""
    held_out: float = 0.2
    """Fraction of the pairs held out to choose the best step."""
    overwrite: bool = False
    """Start afresh in an output directory that holds another run."""

    def __post_init__(self) -> None:
        if not 0.01 <= self.temperature <= 1:
            raise ConfigError(f"--temperature must lie in [0.01, 1], got {self.temperature}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"--held_out must lie between 0 and 1, got {self.held_out}")
        if self.extra_dims is not None and self.extra_dims < 0:
            raise ConfigError(f"--extra_dims must not be negative, got {self.extra_dims}")


def train_compatible_clip(config: CompatibleClipConfig) -> CompatibleEncoder:
    """Trains the new CLIP and its head, and saves both of its faces.

    Step 0 is the Procrustes fit to the pairs' texts and images. The step is kept whose mean of R@1 against
    the old gallery and against its own, over both directions on held-out pairs, is best.

    Args:
        config: What to do.

    Returns:
        The compatible encoder; ``encoder.projection.full()`` maps to its whole vectors.

    Raises:
        XbtError: If an encoder, the pairs or a setting cannot be used.
    """
    run = RunDirectory(config.output_dir, config, config.overwrite)
    accelerator = make_accelerator(config.training, run, config, "train_compatible_clip")
    pairs, _ = load_readable_pairs(config.pairs, progress=accelerator.is_main_process)
    train, held_out = pairs.split(config.held_out, config.training.seed)
    require_enough(train, config.training.batch_size)
    old = load_encoder(config.old, accelerator.device)
    targets, gallery = (embed_pairs(accelerator, old, part) for part in (train, held_out))
    new = load_encoder(config.new, accelerator.device)
    compatible = _start(accelerator, config, new, old.space, train, targets)
    del old
    _train(accelerator, run, config, compatible, train, targets, held_out, gallery)
    if accelerator.is_main_process:
        compatible.save_pretrained(run.path / "compatible")
        whole_encoder(compatible, f"xbt:{run.path.name}").save_pretrained(run.path / "full")
    accelerator.wait_for_everyone()
    return compatible


def whole_encoder(compatible: CompatibleEncoder, name: str) -> CompatibleEncoder:
    """The encoder with all dimensions of its head, for galleries that it embeds itself.

    Args:
        compatible: An encoder behind a :class:`~xbt.projections.HeadProjection`.
        name: What to call the space of the whole vectors.

    Raises:
        ConfigError: If its projection has no head.
    """
    projection = compatible.projection
    if not isinstance(projection, HeadProjection):
        raise ConfigError(
            f"the projection is a {type(projection).__name__}, which has no dimensions beyond the old ones; "
            "train the encoder with train_compatible_clip"
        )
    full = projection.full()
    preprocessing = dict(compatible.preprocessing)
    # The probe is made by the encoder, which needs a space first: one without a probe stands in.
    full.set_spaces(projection.new_space, EmbeddingSpace(name, full.old_dim, preprocessing))
    encoder = CompatibleEncoder(compatible.new, full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # cut texts tell models apart as well
        probe = torch.cat([encoder.encode_texts(PROBE_TEXTS), encoder.encode_images(draw_probe_images())])
    full.set_spaces(projection.new_space, EmbeddingSpace(name, full.old_dim, preprocessing, probe))
    return encoder


def _start(
    accelerator: Accelerator,
    config: CompatibleClipConfig,
    new: DualEncoder,
    old_space: EmbeddingSpace,
    train: ImageTextPairs,
    targets: PairVectors,
) -> CompatibleEncoder:
    """The new encoder, not yet with LoRA, behind a head at the Procrustes fit."""
    vectors = embed_pairs(accelerator, new, train)
    torch.manual_seed(config.training.seed)
    projection = head_at_procrustes(config.method, vectors, targets, config.extra_dims, config.scale)
    projection.set_spaces(new.space, old_space)
    return CompatibleEncoder(new, projection)


def _train(
    accelerator: Accelerator,
    run: RunDirectory,
    config: CompatibleClipConfig,
    compatible: CompatibleEncoder,
    train: ImageTextPairs,
    targets: PairVectors,
    held_out: ImageTextPairs,
    gallery: PairVectors,
) -> None:
    own = embed_pairs(accelerator, compatible.new, train)
    add_lora(compatible.new, config.lora)
    projection = compatible.projection
    assert isinstance(projection, HeadProjection)
    projection.requires_grad_(True)

    def evaluate() -> dict[str, float]:
        new = embed_pairs(accelerator, compatible.new, held_out)
        with torch.no_grad():
            faces = {
                name: PairVectors(*(face(side.to(accelerator.device)).cpu() for side in new))
                for name, face in (("old", projection), ("full", projection.full()))
            }
        across = cross_recall(faces["old"], gallery, held_out)
        itself = cross_recall(faces["full"], faces["full"], held_out)
        parts = {f"{name}_{key}": value for name, cell in (("new_old", across), ("new_new", itself))
                 for key, value in cell.items()}  # fmt: skip
        return {"score": (across["score"] + itself["score"]) / 2, **parts}

    objective = CrossModalObjective(
        compatible.new, projection, config.weights.of(config.method), config.temperature
    )
    dataset = PairBatches(
        train,
        compatible,
        config.training.seed,
        per_text={"old_texts": targets.texts, "own_texts": own.texts},
        per_image={"old_images": targets.images, "own_images": own.images},
    )
    loop = TrainingLoop(
        accelerator,
        run,
        config.training,
        objective,
        dataset,
        evaluate=evaluate,
        no_decay=("projection.",),
    )
    loop.fit()
