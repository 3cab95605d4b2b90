"""Inference form of a head: plain matrices."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from xbt.errors import ConfigError, SpaceMismatchError


class FoldedHead(nn.Module):
    """A head without parametrisations, classifier or parameters, which embeds as the head did.

    With f = unit(h[:d]) the full vector is f, or M [unit(A relu(h) + a); f] with a matrix M. For BT², M
    combines both rotations and the scale.

    Args:
        in_dim: Dimension of the input features.
        old_dim: Number of compatible leading dimensions; 0 for none.
        feature_dim: d.
        matrix: (out_dim, k + d) M, or ``None`` if the vectors are f.
        code: (k, in_dim) A and (k,) a, or ``None`` for k = 0.
    """

    matrix: Tensor | None
    code_weight: Tensor | None
    code_bias: Tensor | None

    def __init__(
        self,
        in_dim: int,
        old_dim: int,
        feature_dim: int,
        matrix: Tensor | None = None,
        code: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.in_dim, self.old_dim, self.feature_dim = in_dim, old_dim, feature_dim
        self.out_dim = feature_dim if matrix is None else len(matrix)
        self.register_buffer("matrix", None if matrix is None else matrix.detach().clone())
        self.register_buffer("code_weight", None if code is None else code[0].detach().clone())
        self.register_buffer("code_bias", None if code is None else code[1].detach().clone())

    def embed(self, features: Tensor, space: Literal["old", "new"] = "new") -> Tensor:
        """Embed as :meth:`xbt.heads.CompatibleHead.embed` does; computes only the requested dimensions.

        Raises:
            ConfigError: If there is no such space.
            SpaceMismatchError: If the dimension is not ``in_dim``.
        """
        dims = {"new": self.out_dim, "old": self.old_dim}.get(space, 0)
        if not dims:
            raise ConfigError(
                f"this folded head does not embed into the space {space!r}; "
                f"choose {'new, old' if self.old_dim else 'new'}"
            )
        if features.ndim != 2 or features.shape[1] != self.in_dim:
            raise SpaceMismatchError(
                f"the folded head takes features of the shape (n, {self.in_dim}), got {tuple(features.shape)}"
            )
        vectors = normalize(features[:, : self.feature_dim], dim=1)
        if self.code_weight is not None:
            code = normalize(linear(features.relu(), self.code_weight, self.code_bias), dim=1)
            vectors = torch.cat([code, vectors], dim=1)
        vectors = vectors[:, :dims] if self.matrix is None else linear(vectors, self.matrix[:dims])
        return normalize(vectors, dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, in_dim) features to full vectors, (n, out_dim) unit rows."""
        return self.embed(features)
