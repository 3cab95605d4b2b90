"""Losses of the trained maps, and their settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from xbt.errors import ConfigError
from xbt.losses import Temperature, contrastive_loss, cosine_loss, relational_loss
from xbt.projections.base import LinearProjection, Projection
from xbt.projections.pairs import PairVectors

NOISE_FAMILIES = ("gaussian", "uniform", "centred")


@dataclass(kw_only=True)
class TextLoss:
    """Weights of the three losses on texts; see :class:`TextProjectionObjective`.

    Raises:
        ConfigError: If a weight is negative, all are zero, or the temperature lies outside [0.01, 1].
    """

    cosine_weight: float = 1.0
    """Weight of the cosine loss."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss."""
    relational_weight: float = 0.0
    """Weight of the relational loss, which keeps the similarities between captions; around 100 it counts
    as much as the others."""
    temperature: float = 0.05
    """Temperature of the contrastive loss at the start; it is learned."""

    flag: ClassVar[str] = ""
    """What the command line puts before a field's name; for messages."""

    def __post_init__(self) -> None:
        names = ("cosine_weight", "contrastive_weight", "relational_weight")
        weights = {name: getattr(self, name) for name in names}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ConfigError(f"{self.flag}{name} must be a number of at least 0, got {weight}")
        if not any(weights.values()):
            raise ConfigError(
                f"{', '.join(self.flag + name for name in names)} are all 0, so there is nothing to train "
                "for; raise one"
            )
        if not 0.01 <= self.temperature <= 1:
            raise ConfigError(f"{self.flag}temperature must lie in [0.01, 1], got {self.temperature}")


@dataclass(kw_only=True)
class Stage1Options(TextLoss):
    """Architecture, noise and loss of stage 1, with the defaults of ``fit_xbt`` and of the recipe alike.

    Raises:
        ConfigError: If a value cannot be used.
    """

    relational_weight: float = 100.0
    """Weight of the relational loss, which keeps the similarities between captions; around 100 it counts
    as much as the others."""
    noise: float = 1.0
    """Expected norm of the noise added to the unit-length inputs."""
    noise_family: str = "gaussian"
    """gaussian, uniform (LinCIR: each caption's noise is scaled by U(0, 1)) or centred (C3: noise about the
    mean caption, which the projection then subtracts by itself)."""
    hidden_dim: int = 0
    """Width of the projection's MLP; 0 means twice the new model's dimension."""
    train_rotation: bool = False
    """Also train the rotation W; it then need not stay orthogonal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"{self.flag}noise must not be negative or infinite, got {self.noise}")
        if self.noise_family not in NOISE_FAMILIES:
            raise ConfigError(
                f"{self.flag}noise_family {self.noise_family!r} is not known; there is "
                f"{', '.join(NOISE_FAMILIES)}"
            )
        if self.hidden_dim < 0:
            raise ConfigError(
                f"{self.flag}hidden_dim must not be negative, got {self.hidden_dim}; 0 means twice new_dim"
            )

    @property
    def centred(self) -> bool:
        """True if the projection subtracts means."""
        return self.noise_family == "centred"


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

    def __init__(self, projection: Projection, settings: TextLoss) -> None:
        super().__init__()
        self.projection = projection
        self.temperature = Temperature(settings.temperature)
        self.cosine_weight, self.contrastive_weight = settings.cosine_weight, settings.contrastive_weight
        self.relational_weight = settings.relational_weight
        # Distributed training needs a gradient for every trained parameter.
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


_LOGITS = 2**24
"""Upper bound on the scores of one direction in a step, 64 MiB of them."""


class JointObjective(nn.Module):
    """The loss on texts and the loss on image–text pairs, weighted.

        L       = (1 − ω) · L_text + ω · (L_T2I + L_I2T + L_image)
        L_T2I   = mean over texts t of   −log softmaxⱼ(⟨φ(t), gⱼ⟩ / τ) at t's image
        L_I2T   = mean over images i of  −log Σ_{j of i} softmaxⱼ(⟨φ(i), hⱼ⟩ / τ)
        L_image = mean over images i of  1 − cos(φ(i), gᵢ)

    with gⱼ the old image and hⱼ the old text vectors of *all* pairs: the queries are new, the galleries old
    and fixed. An image's texts are all right answers, so their probabilities are summed (MIL-NCE, Miech et
    al., CVPR 2020). Without new image vectors only L_T2I remains. The queries of a step are drawn at random.

    Args:
        text: The loss on texts, and with it φ.
        pairs: The pairs.
        weight: ω.
        temperature: τ.
        batch_size: Queries per direction and step, fewer where the gallery is large.
        seed: Fixes which.
    """

    old_images: Tensor
    old_texts: Tensor
    new_texts: Tensor
    owner: Tensor
    new_images: Tensor | None

    def __init__(
        self,
        text: TextProjectionObjective,
        pairs: PairVectors,
        weight: float,
        temperature: float,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.text, self.weight, self.logit_scale = text, weight, 1 / temperature
        for name, rows in (
            ("old_images", pairs.old_images),
            ("old_texts", pairs.old_texts),
            ("new_texts", pairs.new_texts),
            ("owner", pairs.image_of_text),
            ("new_images", pairs.new_images),
        ):
            self.register_buffer(name, rows, persistent=False)
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts for a batch of paired text vectors."""
        loss, parts = self.text(batch)
        if self.weight == 0:
            return loss, parts
        found = {"t2i": self._text_to_image()}
        if self.new_images is not None:
            found["i2t"], found["image"] = self._image_to_text(self.new_images)
        total = (1 - self.weight) * loss + self.weight * torch.stack(list(found.values())).sum()
        return total, {**parts, **{name: part.detach() for name, part in found.items()}}

    def _text_to_image(self) -> Tensor:
        chosen = self._draw(len(self.new_texts), len(self.old_images))
        queries = self.text.projection(self.new_texts[chosen], "text")
        return cross_entropy(self.logit_scale * queries @ self.old_images.T, self.owner[chosen])

    def _image_to_text(self, new_images: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self._draw(len(new_images), len(self.old_texts))
        queries = self.text.projection(new_images[chosen], "image")
        scores = self.logit_scale * queries @ self.old_texts.T
        right = scores.masked_fill(self.owner != chosen[:, None], -torch.inf)
        loss = (scores.logsumexp(dim=1) - right.logsumexp(dim=1)).mean()
        return loss, cosine_loss(queries, self.old_images[chosen])

    def _draw(self, count: int, gallery: int) -> Tensor:
        size = max(1, min(self.batch_size, count, _LOGITS // gallery))
        return torch.randperm(count, generator=self._generator)[:size].to(self.owner.device)


class LambdaOrthogonalObjective(nn.Module):
    """The loss of a map W z + b with a hinge on how far W is from orthogonal.

        L = λ_cos · mean(1 − cos) + λ_con · InfoNCE + λ_rel · relational + w · max(0, ‖G − I‖_F − λ)²

    with G the Gram matrix W Wᵀ or Wᵀ W of W's smaller side. The first three terms are those of
    :class:`~xbt.projections.objective.TextProjectionObjective`.

    Args:
        projection: The map.
        settings: Weights of the losses.
        lam: λ.
        orthogonality_weight: w.
    """

    def __init__(
        self, projection: LinearProjection, settings: TextLoss, lam: float, orthogonality_weight: float
    ) -> None:
        super().__init__()
        self.text = TextProjectionObjective(projection, settings)
        self.lam, self.orthogonality_weight = lam, orthogonality_weight

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts for a batch of paired vectors."""
        loss, parts = self.text(batch)
        weight = self.text.projection.get_parameter("weight")
        excess = (distance_from_orthogonal(weight) - self.lam).clamp(min=0)
        return loss + self.orthogonality_weight * excess.square(), {**parts, "excess": excess.detach()}


def distance_from_orthogonal(weight: Tensor) -> Tensor:
    """‖G − I‖_F of a matrix, G the Gram matrix of its smaller side; a scalar, 0 for orthonormal ones."""
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    distance: Tensor = torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype))
    return distance
