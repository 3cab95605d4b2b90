"""Training of maps on vectors: one schedule, one rule for the step that is kept, one skeleton for every fit.

A map of texts is prepared for images by noise on the texts (:func:`add_noise`).

:func:`train` is a small loop: one process, one device, nothing written to disk. The recipes' loop
(:mod:`xbt.training.loop`) adds several processes, checkpoints and a log. Both share the schedule, the groups
of weight decay and the choice of the step, and give the same map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import Dataset

from xbt.batches import Draw, SeededBatches, gaussian_noise
from xbt.errors import ConfigError, DataError
from xbt.evaluation import best_positive_ranks, recall_at_k
from xbt.projections.base import Projection
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import PairedRows

Positions = NDArray[np.int64]
Score = float | Tensor
"""A held-out score, higher is better: a number, or (n,) one per held-out item (or (n, ways))."""

MIN_ROWS = 5
"""Fewest rows to train on, of which a fifth is held out."""

MIN_STANDARD_ERRORS = 2.0
"""Minimum gain over step 0 on held-out items, in its standard errors, to keep a trained step."""

NO_DECAY = ("projection.weight",)
"""Matrices without weight decay: the linear part of a map starts at a rotation, and decay would shrink it."""


@dataclass
class Schedule:
    """Length and speed of a training.

    Raises:
        ConfigError: If a value cannot be used.
    """

    steps: int = 1000
    """Number of optimiser steps."""
    batch_size: int = 1024
    """Global batch size."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; linear warm-up, then cosine decay to zero."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms, gates, rotations and temperatures have none."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    seed: int = 0
    """Fixes initialisation, order of the data, noise and what is held out."""
    eval_every: int = 100
    """Steps between evaluations on held-out data; step 0 and the last step are always evaluated."""

    flag: ClassVar[str] = ""
    """What the command line puts before a field's name; for messages."""
    minimum: ClassVar[Mapping[str, int]] = {
        "steps": 0,
        "batch_size": 1,
        "warmup_steps": 0,
        "eval_every": 1,
        "seed": 0,
    }
    """Smallest value of every whole number."""

    def __post_init__(self) -> None:
        for name, least in self.minimum.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{self.flag}{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{self.flag}{name} must be a number of at least 0, got {getattr(self, name)}"
                )

    def common(self) -> dict[str, Any]:
        """Values of the fields that every schedule has, by name."""
        return {each.name: getattr(self, each.name) for each in fields(Schedule)}

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        span = max(self.steps - self.warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min((step - self.warmup_steps) / span, 1.0)))


@dataclass
class FitSchedule(Schedule):
    """The schedule of a fit in one process: also what is held out, and the device.

    Raises:
        ConfigError: If a value cannot be used, or the device is not there.
    """

    held_out: int = 2000
    """Items held out to choose the step; at most a fifth of them is taken."""
    device: str | torch.device = "cpu"
    """Where to train, such as "cpu" or "cuda"."""

    minimum: ClassVar[Mapping[str, int]] = {**Schedule.minimum, "held_out": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {str(self.device)!r} cannot be used: {error}") from error


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, no_decay: Iterable[str] = NO_DECAY
) -> list[dict[str, object]]:
    """Parameters with and without weight decay, for an optimiser.

    Args:
        parameters: What is trained, by name.
        weight_decay: Of matrices.
        no_decay: Names (or parts of names) of matrices that get none, as vectors and scalars do.
    """
    names = tuple(no_decay)
    plain = {name for name, each in parameters.items() if each.ndim < 2 or any(n in name for n in names)}
    groups: list[dict[str, object]] = [
        {
            "params": [each for name, each in parameters.items() if name not in plain],
            "weight_decay": weight_decay,
        },
        {"params": [each for name, each in parameters.items() if name in plain], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass
class StepSelection:
    """Rule for the step whose weights are kept.

    Finding texts by texts is a proxy for what a map is for, and among a few hundred texts nearly all are
    found from step 0 on. One or two more say nothing, and a map that finds them may be far worse for images.
    Where scores come item by item, step 0 is left only for a gain of more than
    :data:`MIN_STANDARD_ERRORS` of its paired standard errors. Where the score is one number, its error is not
    known, and any gain counts. Ties keep the earlier step.

    Attributes:
        best_step: The step that is kept.
        best_score: Its mean held-out score.
        first: The scores of step 0.
    """

    best_step: int = 0
    best_score: float = -math.inf
    first: Score = -math.inf

    def improves(self, step: int, scored: Score) -> bool:
        """Take an evaluation into account; true if the weights of this step are now the best."""
        mean = mean_score(scored)
        if step == 0:
            self.first = scored
        elif not mean > self.best_score or (self.best_step == 0 and not _gains(scored, self.first)):
            return False
        self.best_step, self.best_score = step, mean
        return True


def mean_score(scored: Score) -> float:
    """Mean of a held-out score over its items."""
    return float(scored.double().mean()) if isinstance(scored, Tensor) else scored


def _gains(scored: Score, first: Score) -> bool:
    if not isinstance(scored, Tensor) or not isinstance(first, Tensor):
        return True
    gains = (scored - first).double()
    gains = gains.mean(dim=1) if gains.ndim > 1 else gains
    # A single item has no standard error.
    error = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    return float(gains.mean()) > MIN_STANDARD_ERRORS * error


@dataclass(frozen=True)
class TrainResult:
    """Result of :func:`train`.

    Attributes:
        best_step: The step that :class:`StepSelection` kept.
        history: The mean held-out score of every step that was evaluated.
    """

    best_step: int
    history: dict[int, float] = field(default_factory=dict)


def train(
    objective: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    schedule: FitSchedule,
    score: Callable[[], Score],
) -> TrainResult:
    """Train the parameters that require gradients, and leave the kept step's weights in place.

    Args:
        objective: Takes a batch and returns (loss, parts); it is moved to the schedule's device.
        batches: At least as many batches as the schedule has steps; they are moved to the device too.
        schedule: How to train.
        score: The held-out score of the weights as they are.

    Returns:
        Which step was kept.

    Raises:
        DataError: If the loss or a weight becomes NaN or infinite; the message names the step.
    """
    objective.to(schedule.device)
    trained = {name: weight for name, weight in objective.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(
        parameter_groups(trained, schedule.weight_decay), lr=schedule.lr, fused=True
    )
    selection, history = StepSelection(), {}
    best: dict[str, Tensor] = {}

    def evaluate(step: int) -> None:
        scored = score()
        history[step] = mean_score(scored)
        if selection.improves(step, scored):
            best.update({name: weight.detach().clone() for name, weight in trained.items()})

    evaluate(0)
    first_bad = torch.tensor(schedule.steps + 1, device=schedule.device)
    # Whoever calls may have turned gradients off.
    with torch.enable_grad():
        for step, batch in zip(range(1, schedule.steps + 1), batches, strict=False):
            loss, _ = objective({name: rows.to(schedule.device) for name, rows in batch.items()})
            loss.backward()
            # The first bad step is kept on the device: reading every loss would make it wait.
            bad = torch.where(torch.isfinite(loss.detach()), schedule.steps + 1, step)
            first_bad = torch.minimum(first_bad, bad)
            if schedule.grad_clip:
                nn.utils.clip_grad_norm_(trained.values(), schedule.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * schedule.lr_factor(step - 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % schedule.eval_every == 0 or step == schedule.steps:
                _require_finite(int(first_bad), step, trained, schedule)
                evaluate(step)
    with torch.no_grad():
        for name, weight in trained.items():
            weight.copy_(best[name])
    return TrainResult(selection.best_step, history)


def _require_finite(
    first_bad: int, step: int, trained: Mapping[str, nn.Parameter], schedule: Schedule
) -> None:
    if first_bad <= step:
        raise DataError(
            f"the loss is NaN or infinite at step {first_bad}; lower lr (now {schedule.lr}) or look for "
            "broken vectors"
        )
    if not bool(torch.stack([torch.isfinite(weight).all() for weight in trained.values()]).all()):
        raise DataError(f"weights are NaN or infinite at step {step}; lower lr (now {schedule.lr})")


def add_noise(
    vectors: Tensor,
    gaussian: Tensor,
    noise: float,
    uniform: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    """Perturbs the direction of vectors, in one of three ways.

    With ε ~ N(0, I / dim), whose expected norm is 1, and σ the noise:

    ========  =======================================================  =====================================
    family    z̃                                                        after
    ========  =======================================================  =====================================
    gaussian  normalise(z + σ ε)                                       CapDec (Nukrai et al., EMNLP 2022)
    uniform   normalise(z + σ u ε),  u ~ U(0, 1) for every vector      LinCIR (Gu et al., CVPR 2024)
    centred   μ + ‖z − μ‖ · normalise((z − μ) / ‖z − μ‖ + σ ε)         C3 (Zhang et al., ICLR 2024)
    ========  =======================================================  =====================================

    LinCIR does not divide by √dim: its noise is σ = √dim here. C3 takes the mean text vector μ off, adds
    noise and normalises, and takes the mean image vector off images when in use, so that the gap between the
    modalities is not in the way. One map for both modalities must then take the means off by itself, as a
    centred :class:`~xbt.projections.trained.ResidualProjection` does; this is why μ is added back here. And
    because such a map adds the old mean afterwards, z − μ keeps its length, which C3 makes 1: only so is the
    map before training the centred Procrustes rotation.

    Args:
        vectors: (n, dim) vectors z.
        gaussian: (n, dim) draws of ε.
        noise: σ; 0 returns the vectors as they are.
        uniform: (n, 1) draws of u, for the family ``"uniform"``.
        mean: (dim,) μ, for the family ``"centred"``.

    Returns:
        (n, dim) noisy vectors.
    """
    if noise == 0:
        return vectors
    shift = noise * gaussian if uniform is None else noise * uniform * gaussian
    if mean is None:
        return normalize(vectors + shift, dim=1)
    centred = vectors - mean
    lengths = centred.norm(dim=1, keepdim=True)
    noisy: Tensor = mean + lengths * normalize(normalize(centred, dim=1) + shift, dim=1)
    return noisy


class NoisyVectors(Dataset[dict[str, Tensor]]):
    """Pairs of text vectors, the new side with noise that depends on (seed, step, position) alone.

    Any number of processes that take slices of a batch therefore see what one process sees alone.

    Args:
        rows: The texts' vectors.
        positions: (n,) int64, which of them to train on.
        seed: Fixes the noise.
        noise: Expected norm of the noise.
        noise_family: Which noise; see :func:`add_noise`.
        mean: (new_dim,) the mean new vector, for the family ``"centred"``.
    """

    def __init__(
        self,
        rows: PairedRows,
        positions: NDArray[np.int64],
        seed: int,
        noise: float = 0.0,
        noise_family: str = "gaussian",
        mean: Tensor | None = None,
    ) -> None:
        self.rows, self.positions, self.noise, self.seed = rows, positions, noise, seed
        self.uniform = noise_family == "uniform"
        self.mean = mean.detach().cpu().clone() if mean is not None and noise_family == "centred" else None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, draws: list[Draw]) -> dict[str, Tensor]:
        """``{"new": (k, new_dim), "old": (k, old_dim)}`` float32 of a slice of a batch."""
        new, old = self.rows.take(self.positions[[draw.item for draw in draws]])
        return {"new": self._noisy(new, draws) if self.noise else new, "old": old}

    def _noisy(self, new: Tensor, draws: list[Draw]) -> Tensor:
        dim = new.shape[1]
        if not self.uniform:
            return add_noise(new, gaussian_noise(draws, dim, self.seed), self.noise, mean=self.mean)
        # One more normal value per caption, through its distribution function, is uniform and seeded too.
        normal = gaussian_noise(draws, dim + 1, self.seed) * (dim + 1) ** 0.5
        uniform = torch.special.ndtr(normal[:, dim:])
        return add_noise(new, normal[:, :dim] * dim**-0.5, self.noise, uniform)


ProjectionT = TypeVar("ProjectionT", bound=Projection)
Run = Callable[[nn.Module, NoisyVectors, Callable[[], Score]], int]
"""Trains an objective on data, scored by a function, keeps the best step's weights, and returns that step."""


def fit_trained(
    rows: PairedRows,
    start: Callable[[Positions | None, PairVectors | None], ProjectionT],
    objective: Callable[[ProjectionT, PairVectors | None], nn.Module],
    schedule: FitSchedule,
    *,
    pairs: PairVectors | None = None,
    data: Callable[[ProjectionT, Positions], NoisyVectors] | None = None,
    score: Callable[[ProjectionT, Tensor, Tensor], Score] | None = None,
    run: Run | None = None,
) -> ProjectionT:
    """Train a map from its closed form on; return the closed form of all rows unless a step is better.

    Rows are held out to choose the step. With pairs their images are held out instead, and all rows are
    trained on.

    Args:
        rows: Vectors of the same items under both models.
        start: The closed form of some of the rows (``None``: of all) and of pairs, which is step 0.
        objective: The module to train, around a projection.
        schedule: How to train; with 0 steps the closed form of all rows is returned.
        pairs: Image–text pairs, for a map that learns from them.
        data: What is trained on, given the projection at step 0; by default the rows without noise.
        score: The score of held-out rows, new and old; by default :func:`text_hits`.
        run: The loop; by default :func:`train`.

    Returns:
        The map, on the CPU in evaluation mode.

    Raises:
        DataError: If there are too few rows to hold some out, or the loss is not finite.
    """
    if schedule.steps or run is not None:
        chosen, seen, evaluate = _hold_out(rows, pairs, schedule, score or text_hits)
        projection = start(chosen, seen)
        batches = NoisyVectors(rows, chosen, schedule.seed) if data is None else data(projection, chosen)
        best_step = (run or _in_memory(schedule))(
            objective(projection, seen), batches, lambda: evaluate(projection)
        )
        if best_step:
            return projection.cpu().eval()
    return start(None, pairs).eval()


def _in_memory(schedule: FitSchedule) -> Run:
    def run(objective: nn.Module, data: NoisyVectors, score: Callable[[], Score]) -> int:
        size = min(schedule.batch_size, len(data))
        draws = SeededBatches(len(data), size, schedule.seed, 0, schedule.steps)
        return train(objective, map(data.__getitems__, draws), schedule, score).best_step

    return run


def _hold_out(
    rows: PairedRows,
    pairs: PairVectors | None,
    schedule: FitSchedule,
    score: Callable[[ProjectionT, Tensor, Tensor], Score],
) -> tuple[Positions, PairVectors | None, Callable[[ProjectionT], Score]]:
    """Rows and pairs to train on, and the score of a map on what is held out."""
    if pairs is None:
        chosen, held_out = split(len(rows), schedule.held_out, schedule.seed)
        new, old = rows.take(held_out)
        return chosen, None, lambda projection: score(projection, new, old)
    images, others = split(len(pairs), schedule.held_out, schedule.seed, "images in the pairs")
    kept_out = pairs.subset(torch.from_numpy(np.sort(others)))
    seen = pairs.subset(torch.from_numpy(np.sort(images)))
    return np.arange(len(rows)), seen, lambda projection: pairs_score(projection, kept_out)


def split(count: int, held_out: int, seed: int, what: str = "rows") -> tuple[Positions, Positions]:
    """Draw what to train on and what to hold out.

    Returns:
        Positions to train on and positions held out, int64.
    """
    if count < MIN_ROWS:
        raise DataError(
            f"training needs at least {MIN_ROWS} {what}, of which it holds some out, and got {count}; "
            "bring more, or set steps to 0 for the closed form"
        )
    order = np.random.default_rng(seed).permutation(count)
    size = min(held_out, count // MIN_ROWS)
    return order[size:], order[:size]


@torch.no_grad()
def text_hits(projection: Projection, new: Tensor, old: Tensor) -> Tensor:
    """(n, 2) float64: 1 where a projected new text finds its old vector first, and where old finds new."""
    device = next(projection.parameters()).device
    queries = projection(new.to(device), "text").cpu()
    own = [[row] for row in range(len(old))]
    ways = (best_positive_ranks(queries, old, own), best_positive_ranks(old, queries, own))
    return torch.stack([(ranks == 0).double() for ranks in ways], dim=1)


@torch.no_grad()
def pairs_score(projection: Projection, pairs: PairVectors) -> float:
    """Mean of R@1, R@5 and R@10 of projected new queries against the old gallery, over the directions."""
    device = next(projection.parameters()).device
    scores: list[float] = []
    for direction in pairs.directions:
        new = pairs.queries(direction)[0].to(device)
        queries = projection(new, "text" if direction == "T2I" else "image").cpu()
        recall = recall_at_k(queries, pairs.gallery(direction), pairs.positives(direction))
        scores.append(sum(recall.values()) / len(recall))
    return sum(scores) / len(scores)
