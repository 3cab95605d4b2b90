"""What a gallery answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xbt.space import EmbeddingSpace


@dataclass(frozen=True)
class SearchResult:
    """The first k gallery items of every query, best first.

    Attributes:
        ids: For every query the ids of its k items.
        scores: (n_queries, k) float32, descending: inner products, or what a merge made of them. Equal scores
            stand in the gallery's order.
    """

    ids: list[list[str]]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class PartSummary:
    """What a user sees of a part.

    Attributes:
        name: ``"old"``, ``"new"``, or what the user called it.
        space: The space of its vectors; ``None`` where nobody has said it.
        dim: Their dimension.
        count: Items that are searched in this part.
    """

    name: str
    space: EmbeddingSpace | None
    dim: int
    count: int
