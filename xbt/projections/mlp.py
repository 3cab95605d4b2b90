"""Drift-Adapter's residual MLP, started at the Procrustes rotation."""

from __future__ import annotations

import torch

from xbt.projections.objective import TextLoss, TextProjectionObjective
from xbt.projections.residual import ResidualProjection
from xbt.projections.sources import Source, random_access
from xbt.projections.start import ProcrustesStart, procrustes_start
from xbt.projections.trainer import Schedule, TextBatches, split, text_hits, train


def fit_mlp(
    new: Source,
    old: Source,
    *,
    hidden_dim: int = 256,
    steps: int = 500,
    batch_size: int = 1024,
    lr: float = 1e-3,
    warmup_steps: int = 50,
    weight_decay: float = 0.01,
    grad_clip: float = 1.0,
    eval_every: int = 100,
    held_out: int = 2000,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> ResidualProjection:
    """Trains φ(z) = normalise(W z + W₂ · GELU(W₁ z + b₁) + b₂) to the old vectors by their cosine.

    The residual MLP of Drift-Adapter (Vejendla, EMNLP 2025, arXiv 2509.23471), which trains it on the squared
    error; between unit rows that is twice the cosine loss. Everything is trained, W too. W starts at the
    Procrustes rotation and W₂, b₂ at 0, so that step 0 is that rotation; it is kept unless a later step is
    certainly better on held-out rows (:func:`~xbt.projections.trainer.train`), and is then fitted to all
    rows. Neither noise nor pairs: it is a baseline that knows one modality.
    :func:`~xbt.projections.xbt_projection.fit_xbt` is what knows of two.

    Args:
        new: Vectors of the new model: (n, new_dim) tensor, array or store. Rows are used as they are.
        old: Vectors of the old model for the same items; unit rows.
        hidden_dim: Width of the MLP.
        steps: Steps, see :class:`~xbt.projections.trainer.Schedule` for these and what follows.
        batch_size: Rows per step.
        lr: Peak learning rate.
        warmup_steps: Steps of warm-up.
        weight_decay: Of the MLP's matrices.
        grad_clip: Largest gradient norm.
        eval_every: Steps between evaluations.
        held_out: Rows held out.
        seed: Fixes the result on a given machine.
        device: Where to train.

    Returns:
        The map new_dim → old_dim, on the CPU.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If vectors cannot be used or are too few, or the loss is not finite.
    """
    schedule = Schedule(
        steps, batch_size, lr, warmup_steps, weight_decay, grad_clip, eval_every, held_out, seed, device
    )
    settings = TextLoss(cosine_weight=1.0, contrastive_weight=0.0)
    rows = random_access(new, old)
    if steps:
        chosen, kept_out = split(len(rows), held_out, seed)
        projection = _start(procrustes_start(rows, chosen), hidden_dim, seed)
        new_rows, old_rows = rows.take(kept_out)
        batches = TextBatches(rows, chosen, schedule)
        objective = TextProjectionObjective(projection, settings)
        outcome = train(objective, batches, schedule, lambda: text_hits(projection, new_rows, old_rows))
        if outcome.best_step:
            return projection.cpu().eval()
    return _start(procrustes_start(rows), hidden_dim, seed).eval()


def _start(start: ProcrustesStart, hidden_dim: int, seed: int) -> ResidualProjection:
    old_dim, new_dim = start.rotation.shape
    projection = ResidualProjection.seeded(new_dim, old_dim, seed, hidden_dim)
    projection.begin_at(start.rotation, start.means)
    with torch.no_grad():
        projection.scale.fill_(1.0)
        for parameter in projection.mlp[2].parameters():
            parameter.zero_()
    projection.scale.requires_grad_(False)
    return projection
