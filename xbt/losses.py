"""The losses of stage 1, stage 2 and CLIP training, with negatives from all processes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

RELATIONAL_ROWS = 512
"""Rows of the global batch that :func:`relational_loss` takes; they have 130,000 pairs, enough for a mean."""


class _GatherRows(torch.autograd.Function):
    """All-gather along rows whose backward sums the gradients that every process has for this one's rows.

    The gradient of a mean of per-process losses then comes out right after DDP's averaging. all_reduce is
    used in backward because the gloo backend, which CPU runs need, has no reduce_scatter.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes in rank order, differentiable; in one process the rows themselves.

    Args:
        rows: (n, dim), with the same n in every process.

    Returns:
        (world_size · n, dim).
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _BothWays(torch.autograd.Function):
    """InfoNCE along the rows and along the columns of a square matrix of similarities S, with logits S / τ.

    Its gradient (softmax over rows + softmax over columns − 2 I) / (2 B τ) is made of what the loss needs
    anyway, in place of two passes backwards.
    """

    @staticmethod
    def forward(ctx: Any, similarities: Tensor, logit_scale: Tensor) -> Tensor:
        logits = logit_scale * similarities
        along_rows, along_columns = logits.log_softmax(dim=1), logits.log_softmax(dim=0)
        loss = -(along_rows.diagonal() + along_columns.diagonal()).mean() / 2
        gradient = along_rows.exp_().add_(along_columns.exp_())
        gradient.diagonal().sub_(2)
        gradient *= 0.5 / len(logits)
        ctx.save_for_backward(gradient, similarities, logit_scale)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        gradient, similarities, logit_scale = ctx.saved_tensors
        for_scale = torch.vdot(gradient.flatten(), similarities.flatten()) * grad_outputs[0]
        return gradient * (logit_scale * grad_outputs[0]), for_scale


def contrastive_loss(first: Tensor, second: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE between paired unit rows, with negatives from every process.

    For pairs (aᵢ, bᵢ) of the global batch of size B and the logit scale 1/τ:

        L = −1/(2B) Σᵢ [ log softmaxⱼ(⟨aᵢ, bⱼ⟩/τ)ᵢ + log softmaxⱼ(⟨bᵢ, aⱼ⟩/τ)ᵢ ]

    (van den Oord et al. 2018; symmetric as in CLIP, Radford et al. 2021). Each process computes the terms of
    its own rows; the mean over processes, which DDP's gradient averaging takes, is L.

    Args:
        first: (n, dim) unit rows of this process.
        second: (n, dim) unit rows of this process, paired with ``first``.
        logit_scale: Scalar 1/τ.

    Returns:
        This process's part of the loss, a scalar.
    """
    # Logits reach 100: in half precision their differences would be lost.
    with torch.autocast(first.device.type, enabled=False):
        first, second, logit_scale = first.float(), second.float(), logit_scale.float()
        all_first, all_second = gather_rows(first), gather_rows(second)
        if len(all_first) == len(first) and not second.requires_grad:
            # Both directions can share one product, and with fixed targets its gradient costs one more.
            loss: Tensor = _BothWays.apply(first @ second.T, logit_scale)
            return loss
        rank = dist.get_rank() if len(all_first) > len(first) else 0
        target = torch.arange(len(first), device=first.device) + rank * len(first)
        forward = F.cross_entropy(logit_scale * first @ all_second.T, target)
        backward = F.cross_entropy(logit_scale * second @ all_first.T, target)
    return (forward + backward) / 2


def cosine_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 − cos over paired unit rows, (n, dim) each; a scalar in [0, 2]."""
    return (1 - (predicted * target).sum(dim=1)).mean()


class _Relational(torch.autograd.Function):
    """The formula of :func:`relational_loss`, whose gradient 4 (E G + Y (P + Q)) / B² costs two products.

    Differentiated term by term it would cost three, and pass over the matrices many times.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, wanted: Tensor) -> Tensor:
        error = rows - wanted
        wanted_gram, cross, own = wanted.T @ wanted, error.T @ wanted, error.T @ error
        gram = own + cross + cross.T + wanted_gram
        mixed = own + cross
        ctx.save_for_backward(error, wanted, gram, mixed)
        total = torch.vdot(own.flatten(), (gram + wanted_gram).flatten())
        return (total + 2 * torch.vdot(mixed.flatten(), cross.T.flatten())) / len(rows) ** 2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        error, wanted, gram, mixed = ctx.saved_tensors
        gradient = torch.addmm(error @ gram, wanted, mixed)
        return gradient.mul_(4 * grad_outputs[0] / len(error) ** 2), None


def relational_loss(predicted: Tensor, target: Tensor, most_rows: int = RELATIONAL_ROWS) -> Tensor:
    """How far the similarities within a batch are from those they should be, over all processes.

    For B rows Ŷ and Y of the global batch:

        L = ‖Ŷ Ŷᵀ − Y Yᵀ‖²_F / B²

    the mean square of the difference between two matrices of similarities (similarity-preserving
    distillation, Tung & Mori, ICCV 2019, without its row normalisation). With E = Ŷ − Y, P = EᵀE, Q = EᵀY and
    C = YᵀY the same number is

        L = (⟨P, G + C⟩ + 2 ⟨P + Q, Qᵀ⟩) / B²   with   G = ŶᵀŶ = P + Q + Qᵀ + C

    whose matrices have the size of the dimension, not of the batch, and which does not cancel where Ŷ ≈ Y.
    Every process computes L from the same rows; with DDP's averaging the gradients are those of L.

    Args:
        predicted: (n, dim) unit rows of this process.
        target: (n, dim) unit rows of this process, paired with ``predicted``; no gradient flows into them.
        most_rows: B at most. Of larger global batches the first rows are taken.

    Returns:
        The loss of the global batch, a scalar, the same in every process.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        rows = gather_rows(predicted.float())[:most_rows]
        wanted = gather_rows(target.detach().float())[:most_rows]
        loss: Tensor = _Relational.apply(rows, wanted)
    return loss


class Temperature(nn.Module):
    """A learnable softmax temperature τ, kept in [0.01, 1] as CLIP keeps it above 0.01.

    Args:
        initial: τ at the start.
    """

    def __init__(self, initial: float = 0.07) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / initial)))

    def forward(self) -> Tensor:
        """The logit scale 1/τ, a scalar in [1, 100]."""
        return self.log_scale.clamp(0.0, math.log(100.0)).exp()
