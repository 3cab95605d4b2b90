"""Training loop for heads on precomputed features, in one process on one device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xbt.errors import ConfigError, DataError
from xbt.heads.base import CompatibleHead, require_at_least
from xbt.heads.losses import HeadLoss, Targets
from xbt.vectors import as_vectors

_WARM_UP = 0.05


@dataclass(frozen=True)
class EpochSchedule:
    """Schedule of :func:`fit_on_vectors`, in passes over the rows.

    Attributes:
        epochs: Passes over the rows.
        batch_size: Rows per step, all of them if there are fewer.
        lr: Peak learning rate; it warms up over 5 % of the steps, then falls to zero along a cosine.
        weight_decay: Weight decay of all parameters but ``head.no_decay``.
        seed: Seed of the order of the rows; the caller sets the initial weights.
        device: Device of the training; module and head stay there.

    Raises:
        ConfigError: If a value cannot be used.
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.0
    seed: int = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        require_at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        require_at_least(0, seed=self.seed)
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number of at least 0, got {getattr(self, name)}")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm_up = math.ceil(_WARM_UP * steps)
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


SCHEDULE = EpochSchedule()


def fit_on_vectors(
    module: nn.Module | None,
    head: CompatibleHead,
    loss: HeadLoss,
    inputs: Tensor,
    targets: Targets,
    *,
    schedule: EpochSchedule = SCHEDULE,
    progress: bool = False,
) -> CompatibleHead:
    """Train a head, and the module before it, in place.

    It is made for precomputed features, where an epoch is short;
    :func:`xbt.training.train_compatible_backbone` trains on images, with checkpoints and many processes. The
    optimiser is Adam. Every epoch is a permutation of the rows without its incomplete last batch.

    Args:
        module: Any backbone (n, d) → (n, head.in_dim), or ``None`` if the head takes the inputs.
        head: The head.
        loss: Its loss.
        inputs: (n, d) features.
        targets: Targets of all n rows.
        schedule: The schedule.
        progress: Show a progress bar.

    Returns:
        The head; head and module are in evaluation mode.

    Raises:
        ConfigError: If there is nothing to train.
        DataError: If the numbers of rows differ, or rows or loss are not finite.
    """
    device = schedule.device
    inputs = as_vectors(inputs, "inputs").to(device)
    targets = _moved(targets, len(inputs), device)
    whole = nn.ModuleList([head, loss] if module is None else [head, loss, module]).to(device).train()
    optimizer = torch.optim.Adam(_groups(whole, head.no_decay, schedule.weight_decay), lr=schedule.lr)
    size = min(schedule.batch_size, len(inputs))
    per_epoch = len(inputs) // size
    shuffle = torch.Generator().manual_seed(schedule.seed)
    for epoch in tqdm(range(schedule.epochs), desc="epochs", disable=not progress):
        order = torch.randperm(len(inputs), generator=shuffle).to(device)
        total = torch.zeros((), device=device)
        for number in range(per_epoch):
            rows = order[number * size : (number + 1) * size]
            features = inputs[rows] if module is None else module(inputs[rows])
            old, new = (None if side is None else side[rows] for side in (targets.old, targets.new))
            value, _ = loss(head(features), Targets(targets.labels[rows], old, new))
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_at(epoch * per_epoch + number, schedule.epochs * per_epoch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total += value.detach()
        if not bool(torch.isfinite(total)):
            raise DataError(
                f"the loss is NaN or infinite in epoch {epoch + 1}; lower lr (now {schedule.lr}) or check "
                "the rows"
            )
    whole.eval()
    return head


def _groups(whole: nn.Module, no_decay: tuple[str, ...], weight_decay: float) -> list[dict[str, object]]:
    trained = [(name, weight) for name, weight in whole.named_parameters() if weight.requires_grad]
    if not trained:
        raise ConfigError("there is nothing to train: neither the head nor the module has trainable weights")
    sides: dict[float, list[nn.Parameter]] = {}
    for name, weight in trained:
        decay = 0.0 if any(part in name for part in no_decay) else weight_decay
        sides.setdefault(decay, []).append(weight)
    return [{"params": weights, "weight_decay": decay} for decay, weights in sides.items()]


def _moved(targets: Targets, rows: int, device: str | torch.device) -> Targets:
    if targets.labels.shape != (rows,):
        raise DataError(
            f"there are {rows} inputs but labels of the shape {tuple(targets.labels.shape)}; "
            "give one label per row"
        )
    vectors = {}
    for name in ("old", "new"):
        side = getattr(targets, name)
        if side is None:
            continue
        if len(side) != rows:
            raise DataError(f"there are {rows} inputs but {len(side)} {name} vectors; give one per row")
        vectors[name] = as_vectors(side, f"the {name} vectors").to(device)
    return replace(targets, labels=targets.labels.long().to(device), **vectors)
