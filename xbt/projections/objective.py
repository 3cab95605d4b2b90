"""The loss that every trained map shares, and the noise that makes a map of texts bear images as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn.functional import normalize

from xbt.errors import ConfigError
from xbt.losses import Temperature, contrastive_loss, cosine_loss, relational_loss
from xbt.projections.base import Projection

NOISE_FAMILIES = ("gaussian", "uniform", "centred")


class LossSettings(Protocol):
    """What :class:`TextProjectionObjective` reads; any configuration that has these will do."""

    @property
    def cosine_weight(self) -> float:
        """Weight of the cosine loss."""

    @property
    def contrastive_weight(self) -> float:
        """Weight of the contrastive loss."""

    @property
    def relational_weight(self) -> float:
        """Weight of the relational loss."""

    @property
    def temperature(self) -> float:
        """Temperature of the contrastive loss at the start."""


@dataclass(frozen=True)
class TextLoss:
    """Weights of the three losses, and the temperature at the start; see :class:`TextProjectionObjective`.

    Raises:
        ConfigError: If a weight is negative, all are zero, or the temperature lies outside [0.01, 1].
    """

    cosine_weight: float = 1.0
    contrastive_weight: float = 1.0
    relational_weight: float = 0.0
    temperature: float = 0.05

    def __post_init__(self) -> None:
        names = ("cosine_weight", "contrastive_weight", "relational_weight")
        weights = {name: getattr(self, name) for name in names}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"{name} must be a number of at least 0, got {weight}")
        if not any(weights.values()):
            raise ConfigError(f"{', '.join(names)} are all 0, so there is nothing to train for; raise one")
        if not 0.01 <= self.temperature <= 1:
            raise ConfigError(f"temperature must lie in [0.01, 1], got {self.temperature}")


def check_noise(noise: float, family: str, prefix: str = "") -> None:
    """Checks a noise's expected norm and its family.

    Raises:
        ConfigError: If the norm is negative or infinite, or the family is not known.
    """
    if not 0 <= noise < float("inf"):
        raise ConfigError(f"{prefix}noise must not be negative or infinite, got {noise}")
    if family not in NOISE_FAMILIES:
        raise ConfigError(
            f"{prefix}noise_family {family!r} is not known; there is {', '.join(NOISE_FAMILIES)}"
        )


def add_noise(
    vectors: Tensor,
    gaussian: Tensor,
    noise: float,
    uniform: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    """Perturbs the direction of vectors, in one of three ways.

    With ε ~ N(0, I / dim), whose expected norm is 1, and σ the noise:

    ========  =======================================================  =====================================
    family    z̃                                                        after
    ========  =======================================================  =====================================
    gaussian  normalise(z + σ ε)                                       CapDec (Nukrai et al., EMNLP 2022)
    uniform   normalise(z + σ u ε),  u ~ U(0, 1) for every vector      LinCIR (Gu et al., CVPR 2024)
    centred   μ + ‖z − μ‖ · normalise((z − μ) / ‖z − μ‖ + σ ε)         C3 (Zhang et al., ICLR 2024)
    ========  =======================================================  =====================================

    LinCIR does not divide by √dim: its noise is σ = √dim here. C3 takes the mean text vector μ off, adds
    noise and normalises, and takes the mean image vector off images when in use, so that the gap between the
    modalities is not in the way. One map for both modalities must then take the means off by itself, as a
    centred :class:`~xbt.projections.residual.ResidualProjection` does; this is why μ is added back here. And
    because such a map adds the old mean afterwards, z − μ keeps its length, which C3 makes 1: only so is the
    map before training the centred Procrustes rotation.

    Args:
        vectors: (n, dim) vectors z.
        gaussian: (n, dim) draws of ε.
        noise: σ; 0 returns the vectors as they are.
        uniform: (n, 1) draws of u, for the family ``"uniform"``.
        mean: (dim,) μ, for the family ``"centred"``.

    Returns:
        (n, dim) noisy vectors.
    """
    if noise == 0:
        return vectors
    shift = noise * gaussian if uniform is None else noise * uniform * gaussian
    if mean is None:
        return normalize(vectors + shift, dim=1)
    centred = vectors - mean
    lengths = centred.norm(dim=1, keepdim=True)
    noisy: Tensor = mean + lengths * normalize(normalize(centred, dim=1) + shift, dim=1)
    return noisy


class TextProjectionObjective(nn.Module):
    """The loss of stage 1 over a batch of text vectors.

        L = λ_cos · mean(1 − cos(φ(z̃), y)) + λ_con · InfoNCE(φ(z̃), y; τ) + λ_rel · ‖ŶŶᵀ − YYᵀ‖²_F / B²

    with z̃ the noisy new and y the old vector of a caption, and Ŷ, Y the rows φ(z̃), y of the batch, in the
    last term at most 512 of them (:func:`~xbt.losses.relational_loss`). That
    XBT's projection is trained on text with Gaussian noise is known (arXiv 2405.14715, and its description in
    arXiv 2609.39836); loss, noise scale and schedule are our choice. The noise makes φ smooth around the text
    vectors, because at search time it also receives image vectors, which lie beside them. The last term keeps
    the similarities between texts as they are in the old space; without it the contrastive term is free to
    push texts apart that the old model had close together.

    Args:
        projection: φ.
        settings: The weights and the temperature at the start, which is learned.
    """

    def __init__(self, projection: Projection, settings: LossSettings) -> None:
        super().__init__()
        self.projection = projection
        self.temperature = Temperature(settings.temperature)
        self.cosine_weight, self.contrastive_weight = settings.cosine_weight, settings.contrastive_weight
        self.relational_weight = settings.relational_weight
        # Distributed training wants a gradient for whatever can be trained.
        self.temperature.requires_grad_(bool(settings.contrastive_weight))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts for a batch of ``{"new": (n, new_dim), "old": (n, old_dim)}``."""
        predicted, target = self.projection(batch["new"], "text"), batch["old"]
        cosine = cosine_loss(predicted, target)
        loss, parts = self.cosine_weight * cosine, {"cosine": cosine.detach()}
        if self.contrastive_weight:
            contrastive = contrastive_loss(predicted, target, self.temperature())
            loss = loss + self.contrastive_weight * contrastive
            parts["contrastive"] = contrastive.detach()
        if self.relational_weight:
            relational = relational_loss(predicted, target)
            loss = loss + self.relational_weight * relational
            parts["relational"] = relational.detach()
        return loss, parts
