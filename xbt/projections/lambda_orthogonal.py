"""λ-orthogonality: an affine map that may leave the orthogonal ones as far as λ allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xbt.errors import ConfigError
from xbt.projections.base import LinearProjection
from xbt.projections.objective import TextLoss, TextProjectionObjective
from xbt.projections.sources import Source, random_access
from xbt.projections.start import procrustes_start
from xbt.projections.trainer import Schedule, TextBatches, split, text_hits, train


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


def fit_lambda_orthogonal(
    new: Source,
    old: Source,
    *,
    lam: float = 1.0,
    orthogonality_weight: float = 10.0,
    cosine_weight: float = 1.0,
    contrastive_weight: float = 0.0,
    relational_weight: float = 0.0,
    temperature: float = 0.05,
    steps: int = 500,
    batch_size: int = 1024,
    lr: float = 1e-3,
    warmup_steps: int = 50,
    grad_clip: float = 1.0,
    eval_every: int = 100,
    held_out: int = 2000,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> LinearProjection:
    """Trains an affine map φ(z) = normalise(W z + b) under a λ-orthogonality constraint.

    After Ricci, Biondi, Pernici et al., "λ-orthogonality regularization for compatible representation
    learning", NeurIPS 2025, arXiv 2509.16664. Its exact regulariser was not verified: the hinge of
    :class:`LambdaOrthogonalObjective` is ours. λ = 0 keeps W orthogonal but for what the penalty's weight
    cannot hold, λ = ∞ lets it go. W starts at the Procrustes rotation and b at 0; a later step is kept only
    if it is certainly better on held-out rows (:func:`~xbt.projections.trainer.train`), and else the
    Procrustes rotation of all rows is returned.

    Args:
        new: Vectors of the new model: (n, new_dim) tensor, array or store. Rows are used as they are.
        old: Vectors of the old model for the same items; unit rows.
        lam: λ ≥ 0, the Frobenius norm of G − I that costs nothing; ``inf`` for none that does.
        orthogonality_weight: w, how much what is beyond costs.
        cosine_weight: Weight of the cosine loss.
        contrastive_weight: Weight of the contrastive loss.
        relational_weight: Weight of the relational loss.
        temperature: Temperature of the contrastive loss at the start.
        steps: Steps, see :class:`~xbt.projections.trainer.Schedule` for these and what follows.
        batch_size: Rows per step.
        lr: Peak learning rate.
        warmup_steps: Steps of warm-up.
        grad_clip: Largest gradient norm.
        eval_every: Steps between evaluations.
        held_out: Rows held out.
        seed: Fixes the result on a given machine.
        device: Where to train.

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
    settings = TextLoss(cosine_weight, contrastive_weight, relational_weight, temperature)
    schedule = Schedule(
        steps, batch_size, lr, warmup_steps, 0.0, grad_clip, eval_every, held_out, seed, device
    )
    rows = random_access(new, old)
    if steps:
        chosen, kept_out = split(len(rows), held_out, seed)
        start = procrustes_start(rows, chosen).rotation
        projection = LinearProjection.from_weight(start, torch.zeros(len(start)))
        objective = LambdaOrthogonalObjective(projection, settings, lam, orthogonality_weight)
        new_rows, old_rows = rows.take(kept_out)
        batches = TextBatches(rows, chosen, schedule)
        outcome = train(objective, batches, schedule, lambda: text_hits(projection, new_rows, old_rows))
        if outcome.best_step:
            return projection.cpu().eval()
    return LinearProjection.from_weight(procrustes_start(rows).rotation)
