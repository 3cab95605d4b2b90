"""The identity of an embedding space: which model made the vectors, and how.

Same dimension, other model is the silent failure: scores come out, and they mean nothing. A space therefore
carries, besides names, a *probe*: the vectors its encoder gives for fixed texts and drawn images. Two spaces
are the same when their probes agree, whatever they are called.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from xbt.errors import SpaceMismatchError

PROBE_TEXTS = (
    "a photo of a dog",
    "a red circle",
    "two children playing football in a park",
    "the Eiffel Tower at night",
    "a bowl of noodle soup with an egg",
    "a diagram of a neural network",
    "rain",
    "a close-up of a bee on a yellow flower, out of focus background",
    "an old man reading a newspaper on a bench",
    "small blue square to the left of a large green triangle",
    "a street sign that says STOP",
    "satellite image of farmland",
    "people waiting for a train",
    "a black and white drawing of a sailing ship in a storm",
    "nothing but sky",
    "3 apples, 2 pears & a knife",
)
"""The sixteen fixed texts of a probe."""

SAME_COSINE = 0.999
"""Two probes agree when every pair of their vectors has at least this cosine."""


@dataclass(frozen=True, eq=False)
class EmbeddingSpace:
    """Where a model's vectors live.

    Attributes:
        model: The encoder's specification, such as ``"open_clip:ViT-B-32-quickgelu/openai"``.
        dim: Dimension of the vectors.
        preprocessing: Image backend, size, interpolation, mean and standard deviation, for people to read.
        probe: (20, dim) float32 CPU tensor, the vectors of :data:`PROBE_TEXTS` followed by the drawn probe
            images; ``None`` when the encoder itself was not at hand, and then only names can be compared.
    """

    model: str
    dim: int
    preprocessing: dict[str, Any] = field(default_factory=dict)
    probe: Tensor | None = None

    def agreement(self, other: EmbeddingSpace) -> float | None:
        """Smallest cosine between the two probes' vectors, or ``None`` where a probe is missing."""
        if self.probe is None or other.probe is None or self.dim != other.dim:
            return None
        return float(torch.nn.functional.cosine_similarity(self.probe, other.probe, dim=1).min())

    def same_as(self, other: EmbeddingSpace) -> bool:
        """Whether vectors of the two spaces may be compared with each other."""
        if self.dim != other.dim:
            return False
        agreement = self.agreement(other)
        return self.model == other.model if agreement is None else agreement >= SAME_COSINE

    def require(self, other: EmbeddingSpace, what: str) -> None:
        """Refuses a foreign space.

        Args:
            other: The space that was offered.
            what: What was offered, such as ``"the query vectors"``.

        Raises:
            SpaceMismatchError: If the spaces differ; the message names both and why they are told apart.
        """
        if self.same_as(other):
            return
        agreement = self.agreement(other)
        reason = (
            "their names differ and one has no probe to compare"
            if agreement is None
            else f"their probes agree only to a cosine of {agreement:.3f}"
        )
        if self.dim != other.dim:
            reason = "their dimensions differ"
        raise SpaceMismatchError(
            f"the space of {what} is {other}, but {self} is needed ({reason}); "
            "use the model that made it or project into that space"
        )

    def __str__(self) -> str:
        return f"'{self.model}' ({self.dim}-d)"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; the probe is stored as base64 of little-endian fp16."""
        probe = None
        if self.probe is not None:
            probe = base64.b64encode(self.probe.numpy().astype("<f2").tobytes()).decode("ascii")
        return {"model": self.model, "dim": self.dim, "preprocessing": self.preprocessing, "probe": probe}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Reads what :meth:`to_dict` wrote."""
        dim, encoded = int(data["dim"]), data.get("probe")
        probe = None
        if encoded is not None:
            values = np.frombuffer(base64.b64decode(encoded), dtype="<f2").astype(np.float32)
            probe = torch.from_numpy(values.reshape(-1, dim))
        return cls(str(data["model"]), dim, dict(data.get("preprocessing") or {}), probe)
