"""Settings shared by the training recipes, and their optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import nn

from xbt.errors import ConfigError
from xbt.projections.trainer import Schedule, parameter_groups


@dataclass
class TrainArgs(Schedule):
    """Length, optimiser, checkpoints and log of a training."""

    batch_size: int = 256
    """Global batch size: the batch is split over the processes, and negatives are gathered across them."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 writes none."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep."""
    log_every: int = 10
    """Steps between two entries of the training log."""
    log_with: str | None = None
    """Accelerate tracker: tensorboard, wandb, trackio, mlflow, all, ..."""
    num_workers: int = 0
    """Worker processes that load and preprocess data, per training process."""

    flag: ClassVar[str] = "--training."
    minimum: ClassVar[Mapping[str, int]] = {
        **Schedule.minimum,
        "checkpoint_every": 0,
        "keep_checkpoints": 1,
        "log_every": 1,
        "num_workers": 0,
    }


@dataclass
class BackboneTraining(TrainArgs):
    """Settings for backbones trained from scratch, with epochs and a choice of optimiser."""

    batch_size: int = 128
    """Global batch size: the batch is split over the processes."""
    lr: float = 1e-3
    """Peak learning rate; linear warm-up, then cosine decay to zero."""
    weight_decay: float = 0.0
    """Weight decay of matrices; biases, norms and orthogonal maps have none."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    grad_clip: float = 0.0
    """Largest gradient norm; 0 turns clipping off."""
    epochs: int | None = None
    """Passes over the data, in place of steps; the incomplete last batch of a pass is left out."""
    warmup_epochs: int | None = None
    """Passes of linear warm-up, in place of warmup_steps."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """adam (weight decay in the gradient, as in the papers), adamw (weight decay apart) or sgd."""
    momentum: float = 0.9
    """Momentum of sgd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "warmup_epochs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"--training.{name} must not be negative, got {value}")
        if self.optimizer not in ("adam", "adamw", "sgd"):
            raise ConfigError(f"--training.optimizer must be adam, adamw or sgd, got {self.optimizer!r}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"--training.momentum must lie in [0, 1), got {self.momentum}")

    def in_steps(self, n_items: int) -> Self:
        """Convert epochs to steps.

        Args:
            n_items: Number of training items; at least the batch size.
        """
        per_epoch = n_items // self.batch_size
        return replace(
            self,
            steps=self.steps if self.epochs is None else self.epochs * per_epoch,
            warmup_steps=(
                self.warmup_steps if self.warmup_epochs is None else self.warmup_epochs * per_epoch
            ),
            epochs=None,
            warmup_epochs=None,
        )


def make_optimizer(
    parameters: dict[str, nn.Parameter], args: TrainArgs, no_decay: Iterable[str] = ()
) -> torch.optim.Optimizer:
    """Create AdamW or the optimiser of :class:`~xbt.training.args.BackboneTraining`.

    Args:
        parameters: What to train, by name.
        args: Learning rate, weight decay and, for backbones, the optimiser.
        no_decay: Names (or parts of names) of matrices that get no weight decay, as vectors and scalars do.

    Returns:
        The optimiser. ``adam`` adds the weight decay to the gradient, as the papers of backbones do;
        ``adamw`` keeps the two apart.
    """
    groups = parameter_groups(parameters, args.weight_decay, no_decay)
    kind = args.optimizer if isinstance(args, BackboneTraining) else "adamw"
    if kind == "sgd":
        assert isinstance(args, BackboneTraining)
        return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=True)
    make = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
    return make(groups, lr=args.lr, fused=True)
