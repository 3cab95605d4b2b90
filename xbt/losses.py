"""The losses of stage 1, stage 2 and CLIP training, with negatives from all processes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


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
        rank = dist.get_rank() if len(all_first) > len(first) else 0
        target = torch.arange(len(first), device=first.device) + rank * len(first)
        forward = F.cross_entropy(logit_scale * first @ all_second.T, target)
        backward = F.cross_entropy(logit_scale * second @ all_first.T, target)
    return (forward + backward) / 2


def cosine_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 − cos over paired unit rows, (n, dim) each; a scalar in [0, 2]."""
    return (1 - (predicted * target).sum(dim=1)).mean()


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
