"""The losses of BCT, BT² and OCA where classes are image–text pairs, and the start of their heads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xbt.encoders import DualEncoder
from xbt.errors import ConfigError
from xbt.heads import BT2Head, HeadOutput, make_head
from xbt.losses import Temperature, contrastive_loss, cosine_loss
from xbt.projections import HeadProjection, LinearProjection, fit_projection
from xbt.training.pairs import PairVectors

_DEFAULTS: dict[str, dict[str, float]] = {
    "bct": {"contrastive": 1.0, "influence": 1.0, "old": 0.0, "own": 0.0},
    "bt2": {"contrastive": 1.0, "influence": 1.0, "old": 1.0, "own": 1.0},
    "oca": {"contrastive": 1.0, "influence": 1.0, "old": 1.0, "own": 0.0},
}


@dataclass
class CrossModalWeights:
    """Weights of the parts of the cross-modal loss; a part without one has its method's default."""

    contrastive: float | None = None
    """Between the new model's own texts and images; 1."""
    influence: float | None = None
    """Between compatible vectors and the old vectors of the other modality; 1."""
    old: float | None = None
    """Of the cosine to the old vectors of the same items; 0 for BCT, else 1."""
    own: float | None = None
    """Of the cosine to the new model's vectors before training; 1 for BT², else 0."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and value < 0:
                raise ConfigError(f"--weights.{each.name} must not be negative, got {value}")

    def of(self, method: str) -> dict[str, float]:
        """Every part's weight for a method."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return _DEFAULTS[method] | {name: value for name, value in given.items() if value is not None}


class CrossModalObjective(nn.Module):
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

    def __init__(
        self, encoder: DualEncoder, projection: HeadProjection, weights: dict[str, float], temperature: float
    ) -> None:
        super().__init__()
        self._encoder = encoder
        self.towers = encoder.module
        self.projection = projection
        self.temperature = Temperature(temperature)
        self.weights = weights

    def train(self, mode: bool = True) -> CrossModalObjective:
        """Training mode, except for batch norm: its running statistics belong to the frozen base."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts.

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
    method: str, new: PairVectors, old: PairVectors, extra_dims: int | None = None, scale: float = 2.0
) -> HeadProjection:
    """A head whose compatible part starts at the Procrustes fit to texts and images alike.

    Args:
        method: ``"bct"``, ``"bt2"`` or ``"oca"``.
        new: The new model's vectors of some pairs.
        old: The old model's vectors of the same pairs.
        extra_dims: See :class:`~xbt.training.compatible_clip.CompatibleClipConfig`.
        scale: BT²'s C.

    Raises:
        ConfigError: If the dimensions do not fit together.
    """
    new_dim, old_dim = new.texts.shape[1], old.texts.shape[1]
    targets = torch.cat([old.texts, old.images])
    rotation = fit_projection(torch.cat([new.texts, new.images]), targets)
    assert isinstance(rotation, LinearProjection)
    head = make_head(method, _options(method, new_dim, old_dim, extra_dims, scale))
    order = _code_first(targets, head) if isinstance(head, BT2Head) else None
    return HeadProjection.starting_at(rotation.weight.detach(), head, order)


def _code_first(targets: Tensor, head: BT2Head) -> Tensor:
    """Directions of the old space, first those k that BT²'s code o is to stand for.

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
