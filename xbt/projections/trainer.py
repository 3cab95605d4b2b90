"""A small training loop for maps on vectors that are already there: one process, one device.

``recipes/pretrain_text_projection.py`` is the distributed form, with checkpoints and a log, that continues
after a kill. This one is for :func:`~xbt.projections.fit_projection`: it returns a map and leaves nothing
behind, torch's global random generators included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xbt.errors import ConfigError, DataError
from xbt.evaluation import best_positive_ranks, recall_at_k
from xbt.projections.base import Projection
from xbt.projections.objective import add_noise, check_noise
from xbt.projections.pairs import PairVectors
from xbt.projections.start import PairedVectors

Batch = dict[str, Tensor]
Positions = NDArray[np.int64]
Score = Callable[[], float | Tensor]
_FEWEST = 5

CERTAIN = 2.0
"""By so many standard errors of its gain a step must be better than step 0 on held-out texts."""


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and on what to train.

    Attributes:
        steps: Optimiser steps of AdamW; 0 leaves the closed form.
        batch_size: Rows per step, all of them if there are fewer.
        lr: Peak learning rate; linear warm-up, then cosine decay to zero.
        warmup_steps: Steps of warm-up.
        weight_decay: Of the MLP's matrices; biases, gates, temperatures and the linear part have none.
        grad_clip: Largest gradient norm; 0 turns clipping off.
        eval_every: Steps between evaluations on held-out rows; step 0 and the last step always are.
        held_out: Rows held out to choose the step; at most a fifth of them is taken.
        seed: Fixes initialisation, order, noise and what is held out.
        device: Where to train, such as ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: If a value cannot be used.
    """

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int = 50
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    eval_every: int = 100
    held_out: int = 2000
    seed: int = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps", "seed", "batch_size", "eval_every", "held_out"):
            least = int(name in ("batch_size", "eval_every", "held_out"))
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {str(self.device)!r} cannot be used: {error}") from error

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        part = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class Outcome:
    """Which step was kept.

    Attributes:
        best_step: The first step with the best held-out score, or 0 if no later one is certainly better.
        history: The held-out score of every step that was evaluated.
    """

    best_step: int
    history: dict[int, float]


class TextBatches:
    """Draws batches of rows and their noise, from generators of its own.

    Every epoch is a permutation, and its incomplete last batch is left out.

    Args:
        rows: The vectors.
        positions: (n,) int64, which of them to train on.
        schedule: Batch size, seed and device.
        noise: Expected norm of the noise on the new vectors; see :func:`add_noise`.
        noise_family: Which noise.
        mean: The mean new vector, for the family ``"centred"``.
    """

    def __init__(
        self,
        rows: PairedVectors,
        positions: Positions,
        schedule: Schedule,
        noise: float = 0.0,
        noise_family: str = "gaussian",
        mean: Tensor | None = None,
    ) -> None:
        check_noise(noise, noise_family)
        self.rows, self.positions, self.device = rows, positions, torch.device(schedule.device)
        self.size = min(schedule.batch_size, len(positions))
        self.noise, self.family = noise, noise_family
        self.mean = mean.to(self.device) if mean is not None and noise_family == "centred" else None
        self._order = torch.empty(0, dtype=torch.int64)
        self._shuffle = torch.Generator().manual_seed(schedule.seed)
        self._draw = torch.Generator(self.device).manual_seed(schedule.seed + 1)

    def __call__(self) -> Batch:
        """The next batch: ``{"new": (k, new_dim), "old": (k, old_dim)}``."""
        if len(self._order) < self.size:
            self._order = torch.randperm(len(self.positions), generator=self._shuffle)
        chosen, self._order = self._order[: self.size], self._order[self.size :]
        new, old = (side.to(self.device) for side in self.rows.take(self.positions[chosen.numpy()]))
        if self.noise:
            gaussian = torch.randn(new.shape, generator=self._draw, device=self.device)
            gaussian.mul_(new.shape[1] ** -0.5)
            uniform = None
            if self.family == "uniform":
                uniform = torch.rand((len(new), 1), generator=self._draw, device=self.device)
            new = add_noise(new, gaussian, self.noise, uniform, self.mean)
        return {"new": new, "old": old}


def train(objective: nn.Module, batches: Callable[[], Batch], schedule: Schedule, score: Score) -> Outcome:
    """Trains whatever requires gradients, and leaves the step that is best on held-out data in place.

    Texts found by texts are a stand-in for what a map is for, and among a few hundred of them nearly all are
    found from step 0 on: that one or two more are says nothing, and a map that finds them may be far worse
    for images. Where the score comes item by item, step 0 is left only for a gain of more than
    :data:`CERTAIN` of its paired standard errors.

    Args:
        objective: Takes a batch and returns (loss, parts); it is moved to the schedule's device.
        batches: Gives the next batch.
        schedule: How to train.
        score: The held-out score of the weights as they are: a number, or (n,) one for each held-out item,
            whose mean it is. Higher is better, and a tie keeps the earlier step.

    Returns:
        Which step was kept.

    Raises:
        DataError: If the loss or a weight becomes NaN or infinite; the message names the step.
    """
    objective.to(schedule.device)
    trained = {name: weight for name, weight in objective.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(_groups(trained, schedule), lr=schedule.lr, fused=True)
    first = score()
    history = {0: _mean(first)}
    best_step, best = 0, {name: weight.detach().clone() for name, weight in trained.items()}
    sound = torch.tensor(schedule.steps + 1, device=schedule.device)
    for step in range(1, schedule.steps + 1):
        loss, _ = objective(batches())
        loss.backward()
        # The first bad step is remembered on the device: asking for every loss would make it wait.
        bad = torch.where(torch.isfinite(loss.detach()), schedule.steps + 1, step)
        sound = torch.minimum(sound, bad)
        if schedule.grad_clip:
            nn.utils.clip_grad_norm_(trained.values(), schedule.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step - 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % schedule.eval_every == 0 or step == schedule.steps:
            _require_finite(int(sound), step, trained, schedule)
            scored = score()
            history[step] = _mean(scored)
            if history[step] > history[best_step] and (best_step or _certainly_better(scored, first)):
                best_step, best = step, {name: weight.detach().clone() for name, weight in trained.items()}
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(best[name])
    return Outcome(best_step, history)


def _mean(scored: float | Tensor) -> float:
    return float(scored.double().mean()) if isinstance(scored, Tensor) else scored


def _certainly_better(scored: float | Tensor, first: float | Tensor) -> bool:
    """Whether a step is better than step 0; a plain number tells nothing of its error."""
    if not isinstance(scored, Tensor) or not isinstance(first, Tensor):
        return _mean(scored) > _mean(first)
    gains = (scored - first).double()
    # Of a single item there is no standard error.
    return len(gains) > 1 and float(gains.mean()) > CERTAIN * float(gains.std()) / math.sqrt(len(gains))


def _groups(trained: dict[str, nn.Parameter], schedule: Schedule) -> list[dict[str, object]]:
    plain = {name for name, each in trained.items() if each.ndim < 2 or name.endswith("projection.weight")}
    decayed = [weight for name, weight in trained.items() if name not in plain]
    rest = [weight for name, weight in trained.items() if name in plain]
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": schedule.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _require_finite(bad: int, step: int, trained: dict[str, nn.Parameter], schedule: Schedule) -> None:
    finite = torch.stack([torch.isfinite(weight).all() for weight in trained.values()]).all()
    if bad <= step:
        raise DataError(
            f"the loss is NaN or infinite at step {bad}; lower lr (now {schedule.lr}) or look for broken "
            "vectors"
        )
    if not bool(finite):
        raise DataError(f"weights are NaN or infinite at step {step}; lower lr (now {schedule.lr})")


def split(count: int, held_out: int, seed: int, what: str = "rows") -> tuple[Positions, Positions]:
    """Draws what to train on and what to hold out.

    Returns:
        Positions to train on and positions held out, int64.

    Raises:
        DataError: If there are fewer than five to draw from.
    """
    if count < _FEWEST:
        raise DataError(
            f"training needs at least {_FEWEST} {what}, of which it holds some out, and got {count}; "
            "bring more, or set steps to 0 for the closed form"
        )
    order = np.random.default_rng(seed).permutation(count)
    size = min(held_out, count // _FEWEST)
    return order[size:], order[:size]


def text_hits(projection: Projection, new: Tensor, old: Tensor) -> Tensor:
    """(n,) per text the share of both ways, new finds old and old finds new, in which it is found first."""
    with torch.no_grad():
        queries = projection(new.to(_device(projection)), "text").cpu()
    own = [[row] for row in range(len(old))]
    ways = (best_positive_ranks(queries, old, own), best_positive_ranks(old, queries, own))
    return torch.stack([(ranks == 0).double() for ranks in ways]).mean(dim=0)


def text_score(projection: Projection, new: Tensor, old: Tensor) -> float:
    """R@1 between projected new and old vectors of the same items, the mean of both ways."""
    return float(text_hits(projection, new, old).mean())


def pairs_score(projection: Projection, pairs: PairVectors) -> float:
    """Mean of R@1, R@5 and R@10 of projected new queries against the old gallery, over the directions."""
    scores: list[float] = []
    for direction in pairs.directions:
        with torch.no_grad():
            new = pairs.queries(direction)[0].to(_device(projection))
            queries = projection(new, "text" if direction == "T2I" else "image").cpu()
        found = recall_at_k(queries, pairs.gallery(direction), pairs.positives(direction))
        scores.append(sum(found.values()) / len(found))
    return sum(scores) / len(scores)


def _device(projection: nn.Module) -> torch.device:
    return next(projection.parameters()).device
