"""What a training loop keeps: its progress, and the tensors that training changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from xbt.errors import DataError


@dataclass
class LoopState:
    """What a checkpoint keeps besides weights, optimiser and schedule.

    Attributes:
        step: Steps done.
        best_step: Step with the best held-out score so far; where nothing is held out, the last step.
        best_score: That score; higher is better.
        best_weights: What training changes (:class:`TrainedTensors`), as it was at that step.
        history: One entry per evaluation.
    """

    step: int = 0
    best_step: int = 0
    best_score: float = -math.inf
    best_weights: dict[str, Tensor] | None = None
    history: list[dict[str, float]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """For Accelerate's checkpoints."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For Accelerate's checkpoints."""
        vars(self).update(state)


class TrainedTensors:
    """The tensors of a module that training changes.

    They are its parameters that require gradients and the persistent buffers of what is trained: batch norm's
    running statistics above all, without which the weights alone are another model. A buffer counts as
    trained where the module that owns it has a trained parameter of its own or, if it has no parameters at
    all, where the module that holds it has one. Frozen layers, and constants such as class prototypes, are
    left out: they are read again from their source.

    Attributes:
        parameters: The trained parameters by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._owners = dict(_owners_of_trained_buffers(module))

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name, looked up each time: a module that moves to a device gets others."""
        return {name: owner.get_buffer(name.rpartition(".")[2]) for name, owner in self._owners.items()}

    def copy(self) -> dict[str, Tensor]:
        """All of them, copied to the CPU."""
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self._all.items()}

    def set(self, values: dict[str, Tensor], source: str = "the kept weights") -> None:
        """Puts values of :meth:`copy` back.

        Args:
            values: By name.
            source: Where they come from, for the error.

        Raises:
            DataError: If one is missing or has another shape.
        """
        with torch.no_grad():
            for name, tensor in self._all.items():
                if name not in values or values[name].shape != tensor.shape:
                    raise DataError(
                        f"{source} does not fit the model at {name!r}; it was written by another version of "
                        "xbt, so start afresh with --overwrite true"
                    )
                tensor.copy_(values[name])

    def agree(self) -> None:
        """Gives every process the main one's buffers: statistics of its own share of the data differ."""
        for buffer in self.buffers.values():
            broadcast(buffer, from_process=0)

    @property
    def _all(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}


def _owners_of_trained_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    holders = {id(child): parent for parent in module.modules() for child in parent.children()}
    for prefix, owner in module.named_modules():
        own = list(owner.parameters(recurse=False))
        holder = holders.get(id(owner))
        if holder is not None and next(owner.parameters(), None) is None:
            own = list(holder.parameters())
        if not any(parameter.requires_grad for parameter in own):
            continue
        for name, _ in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, owner
