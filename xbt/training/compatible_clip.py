"""Fine-tuning of a new CLIP for the old gallery and its own: BCT, BT² and OCA across modalities.

The losses are those of BCT, BT² and OCA with image–text pairs as classes. Heads start at a Procrustes fit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from xbt.compatible.encoder import CompatibleEncoder
from xbt.encoders import DualEncoder, add_lora, check_lora, load_encoder
from xbt.errors import ConfigError, TruncationWarning
from xbt.heads import BT2Head, HeadOutput, make_head
from xbt.losses import contrastive_loss, cosine_loss
from xbt.projections.base import LinearProjection
from xbt.projections.fitting import fit_projection
from xbt.projections.head_projection import HeadProjection
from xbt.space import PROBE_TEXTS, EmbeddingSpace, draw_probe_images
from xbt.training.batches import PairBatches
from xbt.training.cached_vectors import EncodedPairs, begin_on_pairs, cross_recall, embed_pairs
from xbt.training.loop import TrainingLoop
from xbt.training.lora_finetuning import LoraObjective, LoraTraining

_DEFAULTS: dict[str, dict[str, float]] = {
    "bct": {"contrastive": 1.0, "influence": 1.0, "old": 0.0, "own": 0.0},
    "bt2": {"contrastive": 1.0, "influence": 1.0, "old": 1.0, "own": 1.0},
    "oca": {"contrastive": 1.0, "influence": 1.0, "old": 1.0, "own": 0.0},
}


@dataclass
class CrossModalWeights:
    """Weights of the parts of the cross-modal loss; ``None`` takes the default of the method."""

    contrastive: float | None = None
    """Contrastive loss between the new model's texts and images; default 1."""
    influence: float | None = None
    """Contrastive loss between compatible vectors and old vectors of the other modality; default 1."""
    old: float | None = None
    """Cosine to the old vectors of the same items; default 0 for BCT, else 1."""
    own: float | None = None
    """Cosine to the new model's vectors before training; default 1 for BT², else 0."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and value < 0:
                raise ConfigError(f"--weights.{each.name} must not be negative, got {value}")

    def of(self, method: str) -> dict[str, float]:
        """Weights of all parts for a method."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return _DEFAULTS[method] | {name: value for name, value in given.items() if value is not None}


class CrossModalObjective(LoraObjective):
    """BCT, BT² and OCA over a batch of image–text pairs.

    With F the whole vectors of both towers behind one head, c their compatible parts, z the vectors that the
    head classifies by (BT²'s f, OCA's T h), o the old model's vectors and z₀ the new model's before training,
    all unit rows, subscripts t and i for texts and images:

        L = w_c · InfoNCE(z_t, z_i; τ)
          + w_i · ½ [InfoNCE(c_t, o_i; τ) + InfoNCE(c_i, o_t; τ)]
          + w_o · ½ [mean(1 − cos(c_t, o_t)) + mean(1 − cos(c_i, o_i))]
          + w_n · ½ [mean(1 − cos(z_t, z₀_t)) + mean(1 − cos(z_i, z₀_i))]

    These are the losses of the papers (see :mod:`xbt.heads`) with every pair a class of its own: the
    classification becomes the contrastive loss, and the class's prototype, against which the influence loss
    holds the compatible vectors, the old vector of the pair's other half. A softmax over pairs, of which none
    overlap, needs a temperature, which the papers' influence loss has not. BT²'s paper (Zhou et al., ICCV
    2023) shows a change of modality; this form of it, for two towers, is ours. OCA's T changes no inner
    product and therefore nothing here: OCA without ``old`` and BCT with as many dimensions are one method.

    Args:
        encoder: The new encoder, with LoRA.
        projection: The head behind it.
        weights: By part: contrastive, influence, old, own.
        temperature: τ at the start, learned.
    """

    projection: HeadProjection

    def __init__(
        self, encoder: DualEncoder, projection: HeadProjection, weights: dict[str, float], temperature: float
    ) -> None:
        super().__init__(encoder, projection, temperature)
        self.weights = weights

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts.

        Args:
            batch: ``pixels``, ``tokens`` and, (n, dim) each, ``old_texts``, ``old_images``, ``own_texts``
                and ``own_images``.
        """
        texts = self._outputs(self._encoder.embed_tokens(batch["tokens"]))
        images = self._outputs(self._encoder.embed_pixels(batch["pixels"]))
        parts = self._parts(texts, images, batch)
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _outputs(self, vectors: Tensor) -> HeadOutput:
        output: HeadOutput = self.projection.head(self.projection.embedding(vectors))
        return output

    def _parts(self, texts: HeadOutput, images: HeadOutput, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert texts.compatible is not None
        assert images.compatible is not None
        seen = [normalize(side.features, dim=1) for side in (texts, images)]
        speaking = [normalize(side, dim=1) for side in (texts.compatible, images.compatible)]
        scale = self.temperature()
        across = zip(speaking, (batch["old_images"], batch["old_texts"]), strict=True)
        same = zip(speaking, (batch["old_texts"], batch["old_images"]), strict=True)
        parts = {
            "contrastive": contrastive_loss(seen[0], seen[1], scale),
            "influence": sum((contrastive_loss(a, b, scale) for a, b in across), scale.new_zeros(())) / 2,
            "old": sum((cosine_loss(*pair) for pair in same), scale.new_zeros(())) / 2,
        }
        if self.weights["own"]:
            kept = zip(seen, (batch["own_texts"], batch["own_images"]), strict=True)
            parts["own"] = sum((cosine_loss(*pair) for pair in kept), scale.new_zeros(())) / 2
        return parts


def head_at_procrustes(
    method: str, new: EncodedPairs, old: EncodedPairs, extra_dims: int | None = None, scale: float = 2.0
) -> HeadProjection:
    """Create a head with its compatible part at the Procrustes fit to texts and images.

    Args:
        method: ``"bct"``, ``"bt2"`` or ``"oca"``.
        new: The new model's vectors of some pairs.
        old: The old model's vectors of the same pairs.
        extra_dims: See :class:`~xbt.training.compatible_clip.CompatibleClipConfig`.
        scale: BT²'s C.
    """
    new_dim, old_dim = new.texts.shape[1], old.texts.shape[1]
    targets = torch.cat([old.texts, old.images])
    rotation = fit_projection(torch.cat([new.texts, new.images]), targets)
    assert isinstance(rotation, LinearProjection)
    head = make_head(method, _options(method, new_dim, old_dim, extra_dims, scale))
    order = _code_first(targets, head) if isinstance(head, BT2Head) else None
    return HeadProjection.starting_at(rotation.weight.detach(), head, order)


def _code_first(targets: Tensor, head: BT2Head) -> Tensor:
    """Directions of the old space, first the k that BT²'s code o replaces.

    Whatever the input, o has the share 1 / (1 + C²) of a compatible vector's square. Of the principal
    directions those neighbouring k are taken that hold this share of the old vectors' own.
    """
    energy: Tensor
    directions: Tensor
    energy, directions = torch.linalg.eigh((targets.T @ targets).double())
    directions = directions.float()
    if not head.extra_dims:
        return directions
    held = (energy / energy.sum()).unfold(0, head.extra_dims, 1).sum(dim=1)
    first = int((held - 1 / (1 + head.scale**2)).abs().argmin())
    code = torch.arange(first, first + head.extra_dims)
    rest = torch.cat([torch.arange(first), torch.arange(first + head.extra_dims, len(energy))])
    return directions[:, torch.cat([code, rest])]


def _options(method: str, new_dim: int, old_dim: int, extra_dims: int | None, scale: float) -> dict[str, Any]:
    if method == "oca":
        return {
            "old_dim": old_dim,
            "extra_dims": max(new_dim - old_dim, 0) if extra_dims is None else extra_dims,
        }
    if method == "bct":
        return {"new_dim": new_dim, "old_dim": old_dim, "extra_dims": extra_dims or 0}
    extra = old_dim // 4 if extra_dims is None else extra_dims
    return {"new_dim": new_dim, "old_dim": old_dim, "extra_dims": extra, "scale": scale}


@dataclass(kw_only=True)
class CompatibleClipConfig(LoraTraining):
    """Fine-tune a new CLIP behind a BCT, BT² or OCA head that both towers share, on image–text pairs.

    Writes ``compatible/``, a compatible encoder whose vectors lie in the old space (load it with
    ``xbt.CompatibleEncoder.from_pretrained``), ``full/``, the same model with its whole vectors for a gallery
    of its own, and ``result.json`` to the output directory. The head is trained whole. Unlike stage 2 of
    XBT it needs the old model.
    """

    old: str
    """The encoder of the gallery."""
    method: Literal["bct", "bt2", "oca"] = "oca"
    """Method of the head."""
    extra_dims: int | None = None
    """Dimensions beyond the old ones (OCA) or the new model's (BCT, BT²). By default OCA gets the
    surplus of the new model over the old one, BCT none, and BT² a quarter of the old dimension."""
    scale: float = 2.0
    """Scale C of BT²: weight of the new model's features in a vector."""
    weights: CrossModalWeights = field(default_factory=CrossModalWeights)
    """Weights of the parts of the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extra_dims is not None and self.extra_dims < 0:
            raise ConfigError(f"--extra_dims must not be negative, got {self.extra_dims}")


def train_compatible_clip(config: CompatibleClipConfig) -> CompatibleEncoder:
    """Train the new CLIP and its head, and save the compatible encoder and the full one.

    Step 0 is the Procrustes fit to the pairs' texts and images. The step is kept whose mean of R@1 against
    the old gallery and against its own, over both directions on held-out pairs, is best.

    Args:
        config: What to do.

    Returns:
        The compatible encoder; ``encoder.projection.full()`` maps to its whole vectors.

    Raises:
        XbtError: If an encoder, the pairs or a setting cannot be used.
    """
    run, accelerator, train, held_out = begin_on_pairs(config, "train_compatible_clip")
    new = load_encoder(config.new, accelerator.device)
    check_lora(new, config.lora)
    old = load_encoder(config.old, accelerator.device)
    targets, gallery = (embed_pairs(accelerator, old, part) for part in (train, held_out))
    own, old_space = embed_pairs(accelerator, new, train), old.space
    del old
    torch.manual_seed(config.training.seed)
    projection = head_at_procrustes(config.method, own, targets, config.extra_dims, config.scale)
    projection.set_spaces(new.space, old_space)
    compatible = CompatibleEncoder(new, projection)
    add_lora(new, config.lora)
    projection.requires_grad_(True)

    def evaluate() -> dict[str, float]:
        vectors = embed_pairs(accelerator, new, held_out)
        with torch.no_grad():
            old_face, full = (
                EncodedPairs(*(face(side.to(accelerator.device)).cpu() for side in vectors))
                for face in (projection, projection.full())
            )
        across, itself = cross_recall(old_face, gallery, held_out), cross_recall(full, full, held_out)
        parts = {f"{name}_{key}": value for name, cell in (("new_old", across), ("new_new", itself))
                 for key, value in cell.items()}  # fmt: skip
        return {"score": (across["score"] + itself["score"]) / 2, **parts}

    dataset = PairBatches(
        train,
        compatible,
        config.training.seed,
        per_text={"old_texts": targets.texts, "own_texts": own.texts},
        per_image={"old_images": targets.images, "own_images": own.images},
    )
    weights = config.weights.of(config.method)
    objective = CrossModalObjective(new, projection, weights, config.temperature)
    TrainingLoop(
        accelerator, run, config.training, objective, dataset, evaluate=evaluate, no_decay=("projection.",)
    ).fit()
    if accelerator.is_main_process:
        compatible.save_pretrained(run.path / "compatible")
        whole_encoder(compatible, f"xbt:{run.path.name}").save_pretrained(run.path / "full")
    accelerator.wait_for_everyone()
    return compatible


def whole_encoder(compatible: CompatibleEncoder, name: str) -> CompatibleEncoder:
    """Encoder with all dimensions of its head, for its own galleries.

    Args:
        compatible: An encoder behind a :class:`~xbt.projections.HeadProjection`.
        name: What to call the space of the whole vectors.
    """
    projection = compatible.projection
    if not isinstance(projection, HeadProjection):
        raise ConfigError(
            f"the projection is a {type(projection).__name__}, which has no dimensions beyond the old ones; "
            "train the encoder with train_compatible_clip"
        )
    full = projection.full()
    preprocessing = dict(compatible.preprocessing)
    # The encoder makes the probe, but needs a space first: start with one without a probe.
    full.set_spaces(projection.new_space, EmbeddingSpace(name, full.old_dim, preprocessing))
    encoder = CompatibleEncoder(compatible.new, full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # cut texts distinguish models as well
        probe = torch.cat([encoder.encode_texts(PROBE_TEXTS), encoder.encode_images(draw_probe_images())])
    full.set_spaces(projection.new_space, EmbeddingSpace(name, full.old_dim, preprocessing, probe))
    return encoder
