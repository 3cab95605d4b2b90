"""Heads of backward-compatible models as projections into the old space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xbt.errors import ConfigError
from xbt.heads import CompatibleHead, make_head
from xbt.heads.base import known_options
from xbt.hub import SavedConfig
from xbt.projections.base import Modality, Projection
from xbt.space import EmbeddingSpace

Output = Literal["old", "full"]


class HeadProjection(Projection):
    """φ(z) = normalise(compatible part of head(E z)), or of its whole vector.

    A projection serves the old gallery alone. A head's whole vector serves both: its leading dimensions are
    the compatible ones, and all of them are the new model's own. ``output="old"`` gives the first, for a
    gallery of the old model; :meth:`full` the second, for items that are embedded again.

    Args:
        new_dim: Dimension of the vectors that come in.
        old_dim: Dimension of the vectors that go out: the head's ``old_dim``, for ``"full"`` its ``out_dim``.
        head: Kind of the head; see :func:`~xbt.heads.make_head`.
        head_options: Its options.
        output: ``"old"`` or ``"full"``.
        new_space: The space the projection maps from.
        old_space: The space the projection maps to.

    Raises:
        ConfigError: If the head or the output is not known, or ``old_dim`` is not what it gives.

    Attributes:
        embedding: E, (head.in_dim, new_dim) without bias.
        head: The head.
    """

    kind = "head"

    def __init__(
        self,
        new_dim: int,
        old_dim: int,
        head: str,
        head_options: Mapping[str, Any],
        output: Output = "old",
        new_space: EmbeddingSpace | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        super().__init__(new_dim, old_dim, new_space, old_space)
        self.head: CompatibleHead = make_head(head, head_options)
        self.embedding = nn.Linear(new_dim, self.head.in_dim, bias=False)
        self.output: Output = output
        dims = {"old": self.head.old_dim, "full": self.head.out_dim}
        if output not in dims:
            raise ConfigError(f"output {output!r} is not known; there is {', '.join(dims)}")
        if old_dim != dims[output] or not old_dim:
            raise ConfigError(
                f"old_dim is {old_dim}, but the {head} head's output {output!r} has {dims[output]} dimensions"
            )

    @classmethod
    def starting_at(
        cls,
        weight: Tensor,
        head: CompatibleHead,
        order: Tensor | None = None,
        new_space: EmbeddingSpace | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> HeadProjection:
        """Begins near a map that is already known, as far as the head's architecture allows.

        Args:
            weight: (old_dim, new_dim) map to the old space of orthonormal rows, such as a Procrustes
                rotation.
            head: The head; its weights are set, and shared with the projection.
            order: Directions of the old space, the least important first; see
                :meth:`~xbt.heads.CompatibleHead.init_from`.
            new_space: The space the projection maps from.
            old_space: The space the projection maps to.

        Raises:
            ConfigError: If a shape does not fit, or the head is compatible with nothing.
        """
        start = head.init_from(weight, order)
        projection = cls(
            weight.shape[1], head.old_dim, head.kind, head.options(), "old", new_space, old_space
        )
        projection.head = head
        with torch.no_grad():
            projection.embedding.weight.copy_(start)
        return projection

    def full(self) -> HeadProjection:
        """The same projection with ``output="full"``: it shares the weights, and knows no old space."""
        twin = HeadProjection(
            self.new_dim, self.head.out_dim, self.head.kind, self.head.options(), "full", self.new_space
        )
        twin.embedding, twin.head = self.embedding, self.head
        return twin.train(self.training)

    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """(n, new_dim) → (n, old_dim), before normalisation."""
        output = self.head(self.embedding(vectors))
        chosen: Tensor = output.full if self.output == "full" else output.compatible
        return chosen

    def options(self) -> dict[str, Any]:
        """Kind and options of the head, and which part of it goes out."""
        return {"head": self.head.kind, "head_options": self.head.options(), "output": self.output}

    @classmethod
    def _options(cls, config: SavedConfig) -> dict[str, Any]:
        options = super()._options(config)
        options["head_options"] = known_options(
            config, options["head"], options["head_options"], "options.head_options"
        )
        return options
