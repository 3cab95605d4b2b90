"""XBT's φ: a rotation plus a gated residual MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xbt.projections.base import Modality, Projection
from xbt.space import EmbeddingSpace


class ResidualProjection(Projection):
    """φ(z) = normalise(W z + s · MLP(z)), with W the Procrustes rotation and s = 0 at the start.

    XBT (Jang & Lim, "Towards Cross-modal Backward-compatible Representation Learning for Vision-Language
    Models", ICCV 2025, arXiv 2405.14715) pretrains one projection on text alone and uses it for images as
    well. The architecture of its φ is not public; this one is ours. The residual form makes step 0 of
    training equal to the best closed-form map, which is known to carry over from text to images; the scalar
    gate s lets training leave it only as far as the held-out data rewards.

    The MLP is Linear(new_dim, hidden_dim) → GELU → Linear(hidden_dim, old_dim).

    Args:
        new_dim: Dimension of the vectors that come in.
        old_dim: Dimension of the vectors that go out.
        hidden_dim: Width of the MLP; 0 means 2 · new_dim.
        new_space: The space the projection maps from.
        old_space: The space the projection maps to.
    """

    kind = "residual"

    def __init__(
        self,
        new_dim: int,
        old_dim: int,
        hidden_dim: int = 0,
        new_space: EmbeddingSpace | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        super().__init__(new_dim, old_dim, new_space, old_space)
        self.hidden_dim = hidden_dim or 2 * new_dim
        self.weight = nn.Parameter(torch.eye(old_dim, new_dim))
        self.mlp = nn.Sequential(
            nn.Linear(new_dim, self.hidden_dim), nn.GELU(), nn.Linear(self.hidden_dim, old_dim)
        )
        self.scale = nn.Parameter(torch.zeros(()))

    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """(n, new_dim) → (n, old_dim), before normalisation."""
        linear = nn.functional.linear(vectors, self.weight)
        correction: Tensor = self.mlp(vectors)
        return linear + self.scale * correction

    def options(self) -> dict[str, Any]:
        """See :meth:`Projection.options`."""
        return {"hidden_dim": self.hidden_dim}
