"""XBT's φ: a rotation plus a gated residual MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from xbt.errors import ConfigError
from xbt.projections.base import Modality, Projection
from xbt.space import EmbeddingSpace


class ResidualProjection(Projection):
    """φ(z) = normalise(W z + s · MLP(z)), with W the Procrustes rotation and s = 0 at the start.

    XBT (Jang & Lim, "Towards Cross-modal Backward-compatible Representation Learning for Vision-Language
    Models", ICCV 2025, arXiv 2405.14715) pretrains one projection on text alone and uses it for images as
    well. The architecture of its φ is not public; this one is ours. The residual form makes step 0 of
    training equal to the best closed-form map, which is known to carry over from text to images; the scalar
    gate s lets training leave it only as far as the held-out data rewards. With s fixed at 1 it is
    Drift-Adapter's residual MLP; see :func:`~xbt.projections.mlp.fit_mlp`.

    A centred one knows the mean text vector of both models, μ and ν, and maps

        φ(z) = normalise(W (z − μ) + s · MLP(z − μ) + ν)

    Images are mapped with means of their own where there are any, and else with those of the texts.

    The MLP is Linear(new_dim, hidden_dim) → GELU → Linear(hidden_dim, old_dim).

    Args:
        new_dim: Dimension of the vectors that come in.
        old_dim: Dimension of the vectors that go out.
        hidden_dim: Width of the MLP; 0 means 2 · new_dim.
        centred: Whether there are means, zero until :meth:`begin_at`.
        image_means: Whether images have means of their own; only where ``centred``.
        new_space: The space the projection maps from.
        old_space: The space the projection maps to.

    Raises:
        ConfigError: If ``hidden_dim`` is negative.

    Attributes:
        weight: (old_dim, new_dim) matrix W.
        mlp: The MLP.
        scale: The gate s, a scalar.
        new_mean: (new_dim,) mean μ, or ``None``; ``new_image_mean`` likewise.
        old_mean: (old_dim,) mean ν, or ``None``; ``old_image_mean`` likewise.
    """

    kind = "residual"
    new_mean: Tensor | None
    old_mean: Tensor | None
    new_image_mean: Tensor | None
    old_image_mean: Tensor | None

    def __init__(
        self,
        new_dim: int,
        old_dim: int,
        hidden_dim: int = 0,
        centred: bool = False,
        image_means: bool = False,
        new_space: EmbeddingSpace | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        super().__init__(new_dim, old_dim, new_space, old_space)
        if hidden_dim < 0:
            raise ConfigError(f"hidden_dim must not be negative, got {hidden_dim}; 0 means twice new_dim")
        self.hidden_dim = hidden_dim or 2 * new_dim
        self.weight = nn.Parameter(torch.eye(old_dim, new_dim))
        self.mlp = nn.Sequential(
            nn.Linear(new_dim, self.hidden_dim), nn.GELU(), nn.Linear(self.hidden_dim, old_dim)
        )
        self.scale = nn.Parameter(torch.zeros(()))
        for name, dim, wanted in (
            ("new_mean", new_dim, centred),
            ("old_mean", old_dim, centred),
            ("new_image_mean", new_dim, centred and image_means),
            ("old_image_mean", old_dim, centred and image_means),
        ):
            self.register_buffer(name, torch.zeros(dim) if wanted else None)

    @classmethod
    def seeded(cls, new_dim: int, old_dim: int, seed: int, hidden_dim: int = 0, **options: Any) -> Self:
        """A projection whose MLP is drawn with a seed; torch's global generator stays as it was.

        Args:
            new_dim: Dimension of the vectors that come in.
            old_dim: Dimension of the vectors that go out.
            seed: Fixes the MLP, which is drawn as torch draws linear layers.
            hidden_dim: Width of the MLP.
            **options: Further arguments of the class.

        Raises:
            ConfigError: If ``hidden_dim`` is negative.
        """
        with torch.random.fork_rng(devices=[]):
            projection = cls(new_dim, old_dim, hidden_dim, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in projection.mlp:
                if isinstance(layer, nn.Linear):
                    bound = layer.in_features**-0.5
                    layer.weight.uniform_(-bound, bound, generator=generator)
                    layer.bias.uniform_(-bound, bound, generator=generator)
        return projection

    def begin_at(self, rotation: Tensor, means: Mapping[str, Tensor]) -> Self:
        """Takes over a closed form; see :class:`~xbt.projections.start.ProcrustesStart`.

        Args:
            rotation: (old_dim, new_dim) matrix W.
            means: The means by their names, those that the projection was made for.

        Returns:
            This projection.
        """
        with torch.no_grad():
            self.weight.copy_(rotation)
            for name, mean in means.items():
                self.get_buffer(name).copy_(mean)
        return self

    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """(n, new_dim) → (n, old_dim), before normalisation."""
        new_mean, old_mean = self.new_mean, self.old_mean
        if modality == "image" and self.new_image_mean is not None:
            new_mean, old_mean = self.new_image_mean, self.old_image_mean
        if new_mean is not None:
            vectors = vectors - new_mean
        correction: Tensor = self.mlp(vectors)
        return nn.functional.linear(vectors, self.weight, old_mean) + self.scale * correction

    def options(self) -> dict[str, Any]:
        """See :meth:`Projection.options`."""
        return {
            "hidden_dim": self.hidden_dim,
            "centred": self.new_mean is not None,
            "image_means": self.new_image_mean is not None,
        }
