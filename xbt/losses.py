"""Losses of stage 1, stage 2 and CLIP training, with negatives from all processes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

RELATIONAL_ROWS = 512
"""Rows of the global batch that :func:`relational_loss` uses: 130,000 pairs are enough for a mean."""


class _GatherRows(torch.autograd.Function):
    """All-gather along rows; its backward sums the gradients of all processes for the rows of this one.

    With DDP's averaging this gives the gradient of the mean of the per-process losses. The backward pass uses
    all_reduce because the gloo backend, which CPU runs need, has no reduce_scatter.
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
    """Gather the rows of all processes in rank order, differentiably; one process returns its own rows.

    Args:
        rows: (n, dim), with the same n in every process.

    Returns:
        (world_size · n, dim).
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _SymmetricInfoNCE(torch.autograd.Function):
    """InfoNCE along the rows and along the columns of a square matrix of similarities S, with logits S / τ.

    The gradient (softmax over rows + softmax over columns − 2 I) / (2 B τ) reuses values of the forward pass
    and saves two backward passes.
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
        scale_gradient = torch.vdot(gradient.flatten(), similarities.flatten()) * grad_outputs[0]
        return gradient * (logit_scale * grad_outputs[0]), scale_gradient


def contrastive_loss(first: Tensor, second: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE between paired unit rows, with negatives from every process.

    For pairs (aᵢ, bᵢ) of the global batch of size B and the logit scale 1/τ:

        L = −1/(2B) Σᵢ [ log softmaxⱼ(⟨aᵢ, bⱼ⟩/τ)ᵢ + log softmaxⱼ(⟨bᵢ, aⱼ⟩/τ)ᵢ ]

    (van den Oord et al. 2018; symmetric as in CLIP, Radford et al. 2021). Each process computes the terms of
    its own rows. The mean over processes, which DDP's gradient averaging takes, is L.

    Args:
        first: (n, dim) unit rows of this process.
        second: (n, dim) unit rows of this process, paired with ``first``.
        logit_scale: Scalar 1/τ.

    Returns:
        The loss of this process's rows, a scalar.
    """
    # Logits reach 100: half precision would lose their differences.
    with torch.autocast(first.device.type, enabled=False):
        first, second, logit_scale = first.float(), second.float(), logit_scale.float()
        all_first, all_second = gather_rows(first), gather_rows(second)
        if len(all_first) == len(first) and not second.requires_grad:
            # Both directions share one matrix product; with fixed targets the gradient costs one more.
            loss: Tensor = _SymmetricInfoNCE.apply(first @ second.T, logit_scale)
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
    """The formula of :func:`relational_loss`; its gradient 4 (E G + Y (P + Q)) / B² costs two products.

    Autograd would need three products and many passes over the matrices.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor) -> Tensor:
        error = rows - targets
        target_gram, cross, error_gram = targets.T @ targets, error.T @ targets, error.T @ error
        gram = error_gram + cross + cross.T + target_gram
        mixed = error_gram + cross
        ctx.save_for_backward(error, targets, gram, mixed)
        total = torch.vdot(error_gram.flatten(), (gram + target_gram).flatten())
        return (total + 2 * torch.vdot(mixed.flatten(), cross.T.flatten())) / len(rows) ** 2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        error, targets, gram, mixed = ctx.saved_tensors
        gradient = torch.addmm(error @ gram, targets, mixed)
        return gradient.mul_(4 * grad_outputs[0] / len(error) ** 2), None


def relational_loss(predicted: Tensor, target: Tensor, max_rows: int = RELATIONAL_ROWS) -> Tensor:
    """Mean squared difference between the similarities within a batch and their targets.

    For B rows Ŷ and Y of the global batch:

        L = ‖Ŷ Ŷᵀ − Y Yᵀ‖²_F / B²

    the mean square of the difference between two matrices of similarities (similarity-preserving
    distillation, Tung & Mori, ICCV 2019, without its row normalisation). With E = Ŷ − Y, P = EᵀE, Q = EᵀY and
    C = YᵀY the same number is

        L = (⟨P, G + C⟩ + 2 ⟨P + Q, Qᵀ⟩) / B²   with   G = ŶᵀŶ = P + Q + Qᵀ + C

    These matrices have the size of the dimension, not of the batch, and nothing cancels where Ŷ ≈ Y. Every
    process computes L from the same rows of all processes; with DDP's averaging the gradients are those of L.

    Args:
        predicted: (n, dim) unit rows of this process.
        target: (n, dim) unit rows of this process, paired with ``predicted``; no gradient flows into them.
        max_rows: Maximum B; of larger global batches the first rows are used.

    Returns:
        The loss of the global batch, a scalar, the same in every process.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        rows = gather_rows(predicted.float())[:max_rows]
        targets = gather_rows(target.detach().float())[:max_rows]
        loss: Tensor = _Relational.apply(rows, targets)
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
