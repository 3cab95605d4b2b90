"""The optimiser of a run, its parameter groups and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from xbt.training.args import BackboneTraining, TrainArgs


def make_optimizer(
    parameters: dict[str, nn.Parameter], args: TrainArgs, no_decay: Iterable[str] = ()
) -> torch.optim.Optimizer:
    """AdamW, or what :class:`~xbt.training.args.BackboneTraining` names.

    Args:
        parameters: What to train, by name.
        args: Learning rate, weight decay and, for backbones, the optimiser.
        no_decay: Names (or parts of names) of matrices that get no weight decay, as vectors and scalars do.

    Returns:
        The optimiser. ``adam`` adds the weight decay to the gradient, as the papers of backbones do;
        ``adamw`` keeps the two apart.
    """
    groups = _parameter_groups(parameters, args.weight_decay, tuple(no_decay))
    kind = args.optimizer if isinstance(args, BackboneTraining) else "adamw"
    if kind == "sgd":
        assert isinstance(args, BackboneTraining)
        return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=True)
    make = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
    return make(groups, lr=args.lr, fused=True)


def _parameter_groups(
    parameters: dict[str, nn.Parameter], weight_decay: float, no_decay: tuple[str, ...]
) -> list[dict[str, Any]]:
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        plain = parameter.ndim < 2 or any(part in name for part in no_decay)
        (rest if plain else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def lr_factor(step: int, args: TrainArgs) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine decay to zero."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    span = max(args.steps - args.warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min((step - args.warmup_steps) / span, 1.0)))
