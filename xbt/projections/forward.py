"""Forward maps: stored old vectors rewritten into the new space, for who has lost the originals.

Everything else here leaves the stored vectors alone and maps the queries. Where vectors may be rewritten and
their images or texts are gone, so that nothing can be embedded anew, the map runs the other way.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xbt.errors import ConfigError, DataError
from xbt.projections.base import Projection
from xbt.projections.forward_map import ForwardMap
from xbt.projections.procrustes import fit_procrustes
from xbt.projections.ridge import fit_ridge
from xbt.projections.sources import random_access
from xbt.projections.trainer import Batch, Schedule, TextBatches, split, train
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors, as_vectors

ForwardMethod = Literal["procrustes", "ridge", "fct"]


def fit_forward(
    old: Vectors,
    new: Vectors,
    side: Vectors | None = None,
    *,
    method: ForwardMethod = "procrustes",
    regularisation: float | None = None,
    hidden_dim: int = 512,
    steps: int = 500,
    batch_size: int = 1024,
    lr: float = 5e-4,
    weight_decay: float = 3e-5,
    eval_every: int = 50,
    held_out: int = 2000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    old_space: EmbeddingSpace | None = None,
    new_space: EmbeddingSpace | None = None,
) -> Projection:
    """Fits a map from old vectors, and maybe side information ψ stored beside them, to the new space.

    ``"procrustes"`` is the rotation and ``"ridge"`` the regularised least-squares map of the same names, with
    the roles of both models exchanged. ``"fct"`` starts at the ridge map and trains

        L = mean ‖ h(o, ψ) − z_new ‖²

    with the architecture of :class:`~xbt.projections.forward_map.ForwardMap` (FCT; Ramanujan et al., CVPR
    2022). It keeps step 0 unless a later step is better on held-out items.

    Args:
        old: (n, d_old) vectors of the old model.
        new: (n, d_new) vectors of the new model for the same items.
        side: (n, d_side) side information of the same items.
        method: One of the three; a rotation cannot use side information.
        regularisation: λ of the ridge map; see :func:`~xbt.projections.ridge.fit_ridge`.
        hidden_dim: Width of FCT's mixer; the paper's is 2,048, for 10⁶ items.
        steps: Steps; see :class:`~xbt.projections.trainer.Schedule` for these and what follows.
        batch_size: Items per step.
        lr: Peak learning rate.
        weight_decay: Of the matrices.
        eval_every: Steps between evaluations.
        held_out: Items held out; at most a fifth.
        seed: Fixes the result on a given machine.
        device: Where to train.
        old_space: The space of ``old``, attached to the result as the space that comes in.
        new_space: The space of ``new``, attached as the space that goes out.

    Returns:
        A projection whose input is the old model's: a matrix, or with side information or ``"fct"`` a
        :class:`~xbt.projections.forward_map.ForwardMap`, called as ``forward_map(old, side=side)``.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If vectors are empty, not of the same items, hold NaN, or are too few to train on.
    """
    if method not in get_args(ForwardMethod):
        raise ConfigError(f"forward method {method!r} is not known; there is procrustes, ridge, fct")
    if method == "procrustes" and side is not None:
        raise ConfigError("the method 'procrustes' cannot use side information; use 'ridge' or 'fct'")
    incoming, target = as_vectors(old, "old vectors").float(), as_vectors(new, "new vectors").float()
    extra = None if side is None else as_vectors(side, "side information").float()
    for name, rows in (("new vectors", target), ("side information", extra)):
        if rows is not None and len(rows) != len(incoming):
            raise DataError(
                f"there are {len(rows)} rows of {name} for {len(incoming)} old vectors; "
                "give both of the same items"
            )
    joined = incoming if extra is None else torch.cat([incoming, extra], dim=1)
    made: Projection
    if method == "procrustes":
        made = fit_procrustes(joined, target)
    elif method == "ridge":
        made = fit_ridge(joined, target, regularisation=regularisation)
        if extra is not None:
            made = ForwardMap.starting_at(made.weight.detach(), extra.shape[1], 0, seed)
    else:
        schedule = Schedule(steps, batch_size, lr, 50, weight_decay, 1.0, eval_every, held_out, seed, device)
        side_dim = 0 if extra is None else extra.shape[1]
        made = _trained(joined, target, side_dim, hidden_dim, regularisation, schedule)
    made.set_spaces(old_space, new_space)
    return made.eval()


def _trained(
    joined: Tensor,
    target: Tensor,
    side_dim: int,
    hidden_dim: int,
    regularisation: float | None,
    schedule: Schedule,
) -> ForwardMap:
    """FCT from the ridge map of the items it trains on; the ridge map of all of them if no step is better."""
    if hidden_dim < 1:
        raise ConfigError(f"hidden_dim is {hidden_dim}, but the mixer of 'fct' needs a width of at least 1")

    def start(rows: Tensor, targets: Tensor, width: int) -> ForwardMap:
        weight = fit_ridge(rows, targets, regularisation=regularisation).weight.detach()
        return ForwardMap.starting_at(weight, side_dim, width, schedule.seed)

    if schedule.steps:
        chosen, kept_out = split(len(joined), schedule.held_out, schedule.seed, "items")
        projection = start(joined[chosen], target[chosen], hidden_dim)
        batches = TextBatches(random_access(joined, target), chosen, schedule)
        held = joined[kept_out].to(schedule.device), target[kept_out].to(schedule.device)

        def score() -> float:
            with torch.no_grad():
                return -float(_error(projection, *held))

        with torch.enable_grad():
            outcome = train(_Objective(projection), batches, schedule, score)
        if outcome.best_step:
            return projection.cpu()
    return start(joined, target, 0)


class _Objective(nn.Module):
    """The mean squared error of a forward map, for the trainer."""

    def __init__(self, projection: ForwardMap) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        # The trainer's batches call what comes in new and what goes out old.
        loss = _error(self.projection, batch["new"], batch["old"])
        return loss, {"error": loss.detach()}


def _error(projection: ForwardMap, joined: Tensor, target: Tensor) -> Tensor:
    """Mean ‖h − z‖² over the items; both are unit rows."""
    return (normalize(projection.mapped(joined), dim=-1) - target).square().sum(dim=1).mean()
