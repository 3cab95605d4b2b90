"""Settings that every training recipe shares."""

from __future__ import annotations

from dataclasses import dataclass

from xbt.errors import ConfigError


@dataclass
class TrainArgs:
    """How long, how fast and how safely to train."""

    steps: int = 1000
    """Number of optimiser steps."""
    batch_size: int = 256
    """Global batch size: the batch is split over the processes, and negatives are gathered across them."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; linear warm-up, then cosine decay to zero."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms, gates, rotations and temperatures have none."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    seed: int = 0
    """Fixes initialisation, order of the data, noise and choice of captions."""
    eval_every: int = 100
    """Steps between evaluations on held-out data; step 0 and the last step are always evaluated."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 writes none."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    log_every: int = 10
    """Steps between two entries of the training log."""
    log_with: str | None = None
    """Accelerate tracker: tensorboard, wandb, trackio, mlflow, all, ..."""
    num_workers: int = 0
    """Worker processes that load and preprocess data, per training process."""

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 0),
            ("batch_size", 1),
            ("warmup_steps", 0),
            ("eval_every", 1),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 1),
            ("log_every", 1),
            ("num_workers", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"--training.{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--training.{name} must not be negative, got {getattr(self, name)}")
