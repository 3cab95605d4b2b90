"""A map from old vectors, and what else was stored beside them, to the new space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xbt.errors import ConfigError, SpaceMismatchError
from xbt.projections.base import Modality, Projection
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors, unit_rows


class ForwardMap(Projection):
    """h(o, ψ) = normalise(W [o ‖ ψ] + M(P₁ o ‖ P₂ ψ)): old vectors and side information to the new space.

    The architecture of forward-compatible training (FCT; Ramanujan et al., "Forward Compatible Training for
    Large-Scale Embedding Retrieval Systems", CVPR 2022): a branch each for the old vector and for the side
    information, d → 2d → 2·new_dim, and a mixer 4·new_dim → hidden → hidden → new_dim. Three things are
    ours. It is a residual beside a linear map, so that step 0 is a closed form. Layers are normalised by
    item and not by batch, so that an item's vector does not depend on what else is in its batch. And without
    side information there is one branch, where FCT puts the old vector into both.

    It is a :class:`Projection` that runs the other way: what comes in are vectors of the *old* model, so that
    ``new_dim`` is the old model's dimension and ``old_dim`` the new one's.

    Args:
        new_dim: Dimension of the vectors that come in.
        old_dim: Dimension of the vectors that go out.
        side_dim: Dimension of the side information; 0 if there is none.
        hidden_dim: Width of the mixer; 0 leaves the linear map alone.
        new_space: The space of the vectors that come in.
        old_space: The space of those that go out.

    Raises:
        ConfigError: If a width is negative.

    Attributes:
        linear: W, (old_dim, new_dim + side_dim) without offset.
    """

    kind = "forward"

    def __init__(
        self,
        new_dim: int,
        old_dim: int,
        side_dim: int = 0,
        hidden_dim: int = 0,
        new_space: EmbeddingSpace | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        super().__init__(new_dim, old_dim, new_space, old_space)
        for name, width in (("side_dim", side_dim), ("hidden_dim", hidden_dim)):
            if width < 0:
                raise ConfigError(f"{name} must not be negative, got {width}; 0 leaves that part out")
        self.side_dim, self.hidden_dim = side_dim, hidden_dim
        self.linear = nn.Linear(new_dim + side_dim, old_dim, bias=False)
        widths = [width for width in (new_dim, side_dim) if width] if hidden_dim else []
        self.branches = nn.ModuleList(
            nn.Sequential(*_layer(width, 2 * width), *_layer(2 * width, 2 * old_dim)) for width in widths
        )
        self.mixer: nn.Sequential | None = None
        if hidden_dim:
            inside = [*_layer(2 * old_dim * len(widths), hidden_dim), *_layer(hidden_dim, hidden_dim)]
            self.mixer = nn.Sequential(*inside, nn.Linear(hidden_dim, old_dim))

    @classmethod
    def starting_at(cls, weight: Tensor, side_dim: int, hidden_dim: int, seed: int) -> ForwardMap:
        """Begins at a linear map; the mixer's last layer is zero.

        Args:
            weight: (old_dim, new_dim + side_dim) matrix.
            side_dim: How many of its columns belong to the side information, the last ones.
            hidden_dim: Width of the mixer.
            seed: Fixes the rest; torch's global generator stays as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(weight.shape[1] - side_dim, weight.shape[0], side_dim, hidden_dim)
        with torch.no_grad():
            made.linear.weight.copy_(weight)
            if made.mixer is not None:
                for parameter in made.mixer[-1].parameters():
                    parameter.zero_()
        return made

    def forward(
        self, vectors: Vectors, modality: Modality | None = None, side: Tensor | None = None
    ) -> Tensor:
        """Maps (n, new_dim) old vectors to (n, old_dim) unit rows of the new model's space.

        Args:
            vectors: (n, new_dim) vectors of the old model.
            modality: Taken for the sake of the contract; there is one map for both.
            side: (n, side_dim) side information of the same items, where the map was fitted with it.

        Raises:
            SpaceMismatchError: If a dimension is not the map's, or side information is missing.
        """
        there = 0 if side is None else side.shape[-1]
        if there != self.side_dim:
            raise SpaceMismatchError(
                f"the map takes side information of dimension {self.side_dim}, got {there}; give what was "
                "stored beside the old vectors, of the kind that the map was fitted with"
            )
        if side is None:
            return super().forward(vectors, modality)
        vectors = self._taken(vectors)
        if vectors.shape != (*side.shape[:-1], self.new_dim):
            raise SpaceMismatchError(
                f"the map takes vectors of dimension {self.new_dim} and as many rows of side information, "
                f"got the shapes {tuple(vectors.shape)} and {tuple(side.shape)}"
            )
        return unit_rows(self.mapped(torch.cat([vectors, side], dim=-1)))

    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """(n, new_dim) → (n, old_dim), before normalisation; only without side information."""
        return self.mapped(vectors)

    def mapped(self, joined: Tensor) -> Tensor:
        """(n, new_dim + side_dim), old vector then side information → (n, old_dim), not normalised."""
        output: Tensor = self.linear(joined)
        if self.mixer is None:
            return output
        parts = (joined[..., : self.new_dim], joined[..., self.new_dim :])
        branches = [branch(part) for branch, part in zip(self.branches, parts, strict=False)]
        correction: Tensor = self.mixer(torch.cat(branches, dim=-1))
        return output + correction

    def options(self) -> dict[str, Any]:
        """See :meth:`Projection.options`."""
        return {"side_dim": self.side_dim, "hidden_dim": self.hidden_dim}


def _layer(width: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Linear(width, out), nn.LayerNorm(out), nn.ReLU()
