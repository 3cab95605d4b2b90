"""λ-orthogonality: an affine map that may leave the orthogonal maps as far as λ allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xbt.errors import ConfigError
from xbt.projections.base import LinearProjection
from xbt.projections.objective import TextLoss, TextProjectionObjective
from xbt.projections.pairs import PairVectors
from xbt.projections.procrustes import procrustes_start
from xbt.projections.sources import Source, random_access
from xbt.projections.trainer import FitSchedule, Positions, fit_trained


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


LOSS, SCHEDULE = TextLoss(contrastive_weight=0.0), FitSchedule(steps=500, weight_decay=0.0)


def fit_lambda_orthogonal(
    new: Source,
    old: Source,
    *,
    lam: float = 1.0,
    orthogonality_weight: float = 10.0,
    loss: TextLoss = LOSS,
    schedule: FitSchedule = SCHEDULE,
) -> LinearProjection:
    """Train an affine map φ(z) = normalise(W z + b) under a λ-orthogonality constraint.

    After Ricci, Biondi, Pernici et al., "λ-orthogonality regularization for compatible representation
    learning", NeurIPS 2025, arXiv 2509.16664. Its exact regulariser was not verified: the hinge of
    :class:`LambdaOrthogonalObjective` is ours. λ = 0 keeps W orthogonal as far as the penalty's weight can,
    λ = ∞ sets it free. W starts at the Procrustes rotation and b at 0. A later step is kept only for a clear
    gain on held-out rows (:class:`~xbt.projections.trainer.StepSelection`); else the Procrustes rotation of
    all rows is returned.

    Args:
        new: Vectors of the new model: (n, new_dim) tensor, array or store. Rows are used as they are.
        old: Vectors of the old model for the same items; unit rows.
        lam: λ ≥ 0, the Frobenius norm of G − I that costs nothing; ``inf`` turns the penalty off.
        orthogonality_weight: w, the cost of what is beyond λ.
        loss: Weights of the losses on the vectors.
        schedule: How to train.

    Returns:
        The map as matrix and bias, (old_dim, new_dim) and (old_dim,), on the CPU; without bias if step 0 was
        kept.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If vectors cannot be used or are too few, or the loss is not finite.
    """
    if not lam >= 0 or not 0 <= orthogonality_weight < float("inf"):
        raise ConfigError(
            f"lam and orthogonality_weight must be at least 0, got {lam} and {orthogonality_weight}"
        )
    rows = random_access(new, old)

    def start(positions: Positions | None, pairs: PairVectors | None) -> LinearProjection:
        rotation = procrustes_start(rows, positions).rotation
        # Only what is trained has an offset; the rotation alone can be folded into the encoder.
        return LinearProjection.from_weight(
            rotation, None if positions is None else torch.zeros(len(rotation))
        )

    def objective(projection: LinearProjection, pairs: PairVectors | None) -> nn.Module:
        return LambdaOrthogonalObjective(projection, loss, lam, orthogonality_weight)

    return fit_trained(rows, start, objective, schedule)
