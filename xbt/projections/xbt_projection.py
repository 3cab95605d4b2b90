"""XBT's φ on vectors that are already there: from texts with noise, and from image–text pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from xbt.errors import ConfigError, SpaceMismatchError
from xbt.projections.closed_form import PAIRS_WEIGHT
from xbt.projections.objective import TextLoss, TextProjectionObjective, check_noise
from xbt.projections.pair_objective import JointObjective
from xbt.projections.pairs import PairVectors
from xbt.projections.residual import ResidualProjection
from xbt.projections.sources import Source, random_access
from xbt.projections.start import PairedVectors, procrustes_start
from xbt.projections.trainer import (
    Positions,
    Schedule,
    TextBatches,
    pairs_score,
    split,
    text_hits,
    train,
)


def fit_xbt(
    new: Source,
    old: Source,
    *,
    pairs: PairVectors | None = None,
    pairs_weight: float | None = None,
    hidden_dim: int = 0,
    train_rotation: bool = False,
    noise: float = 1.0,
    noise_family: str = "gaussian",
    cosine_weight: float = 1.0,
    contrastive_weight: float = 1.0,
    relational_weight: float = 100.0,
    temperature: float = 0.05,
    steps: int = 1000,
    batch_size: int = 1024,
    lr: float = 1e-3,
    warmup_steps: int = 50,
    weight_decay: float = 0.01,
    grad_clip: float = 1.0,
    eval_every: int = 100,
    held_out: int = 2000,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> ResidualProjection:
    """Trains φ(z) = normalise(W z + s · MLP(z)) from the closed form on, and keeps it unless that is better.

    See :class:`~xbt.projections.residual.ResidualProjection` for φ and its paper, and
    :class:`~xbt.projections.objective.TextProjectionObjective` for the loss on texts, L_text. With pairs,

        L = (1 − ω) · L_text + ω · L_pairs

    whose second part is in :class:`~xbt.projections.pair_objective.JointObjective`: retrieval itself, of old
    vectors by projected new ones. Step 0 (s = 0) is the Procrustes rotation, over the pairs' images too where
    there are some, with ω (:func:`~xbt.projections.start.procrustes_start`). A later step is kept if it is
    better on what was held out: captions, found by their own vector, by more than the error of that gain
    (:func:`~xbt.projections.trainer.train`), or with pairs their images, found across modalities. If
    none is, the closed form of all vectors is returned, and ``scale`` is 0.

    The defaults for noise and relational loss are not those of the recipe (0.3 and none); they were chosen on
    one pair of dual encoders. Whether the result beats the closed form depends on the two models: see
    ``recipes/benchmarks/projections.py``, or let ``method="auto"`` with ``thorough=True`` find out.

    Args:
        new: Vectors of the new model for texts: (n, new_dim) tensor, array or store, used as they are.
        old: Vectors of the old model for the same texts; unit rows.
        pairs: Image–text pairs under both models. Without new image vectors only text queries are trained.
        pairs_weight: ω in [0, 1); ``None`` means 0.33 with pairs. At 0 they only choose the step.
        hidden_dim: Width of the MLP; 0 means 2 · new_dim.
        train_rotation: Also train W, which then need not stay orthogonal.
        noise: Expected norm of the noise; see :func:`~xbt.projections.objective.add_noise`.
        noise_family: ``"gaussian"``, ``"uniform"`` or ``"centred"``; the last makes φ centred.
        cosine_weight: Weight of the cosine loss.
        contrastive_weight: Weight of the contrastive loss.
        relational_weight: Weight of the relational loss.
        temperature: Temperature at the start; it is learned on texts, and stays on pairs.
        steps: Steps, see :class:`~xbt.projections.trainer.Schedule` for these and what follows.
        batch_size: Rows per step. A smaller one spends more of its time on the optimiser.
        lr: Peak learning rate.
        warmup_steps: Steps of warm-up.
        weight_decay: Of the MLP's matrices.
        grad_clip: Largest gradient norm.
        eval_every: Steps between evaluations.
        held_out: Captions held out, or with pairs images; at most a fifth.
        seed: Fixes the result on a given machine.
        device: Where to train.

    Returns:
        The map new_dim → old_dim, on the CPU.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If vectors cannot be used or are too few, or the loss is not finite.
        SpaceMismatchError: If the pairs' dimensions are not those of the texts.
    """
    check_noise(noise, noise_family)
    settings = TextLoss(cosine_weight, contrastive_weight, relational_weight, temperature)
    schedule = Schedule(
        steps, batch_size, lr, warmup_steps, weight_decay, grad_clip, eval_every, held_out, seed, device
    )
    rows = random_access(new, old)
    weight = _checked_weight(pairs, pairs_weight, rows.dims)
    start = partial(
        _start, rows, pairs_weight=weight, hidden_dim=hidden_dim, centred=noise_family == "centred", seed=seed
    )
    if steps:
        data = _split(rows, pairs, schedule)
        projection = start(data.texts, data.pairs)
        projection.weight.requires_grad_(train_rotation)
        text = TextProjectionObjective(projection, settings)
        objective: TextProjectionObjective | JointObjective = text
        if data.pairs is not None:
            objective = JointObjective(text, data.pairs, weight, temperature, batch_size, seed)
        batches = TextBatches(rows, data.texts, schedule, noise, noise_family, projection.new_mean)
        outcome = train(objective, batches, schedule, lambda: data.score(projection))
        if outcome.best_step:
            projection.weight.requires_grad_(True)
            return projection.cpu().eval()
    return start(None, pairs).eval()


def _checked_weight(pairs: PairVectors | None, weight: float | None, dims: tuple[int, int]) -> float:
    if pairs is None:
        if weight:
            raise ConfigError(f"pairs_weight is {weight}, but there are no pairs to weigh; give pairs")
        return 0.0
    if pairs.dims != dims:
        raise SpaceMismatchError(
            f"the pairs map {pairs.dims[0]} → {pairs.dims[1]} dimensions, the texts {dims[0]} → {dims[1]}; "
            "embed both with the same two models"
        )
    weight = PAIRS_WEIGHT if weight is None else weight
    if not 0 <= weight < 1:
        raise ConfigError(f"pairs_weight must lie in [0, 1), got {weight}")
    return weight


def _start(
    rows: PairedVectors,
    positions: Positions | None,
    pairs: PairVectors | None,
    *,
    pairs_weight: float,
    hidden_dim: int,
    centred: bool,
    seed: int,
) -> ResidualProjection:
    closed = procrustes_start(rows, positions, centred=centred, pairs=pairs, pairs_weight=pairs_weight)
    options = {"centred": centred, "image_means": "new_image_mean" in closed.means}
    projection = ResidualProjection.seeded(*rows.dims, seed, hidden_dim, **options)
    return projection.begin_at(closed.rotation, closed.means)


@dataclass(frozen=True)
class _Split:
    """What is trained on, and how what was held out judges a map."""

    texts: Positions
    pairs: PairVectors | None
    score: Callable[[ResidualProjection], float | Tensor]


def _split(rows: PairedVectors, pairs: PairVectors | None, schedule: Schedule) -> _Split:
    if pairs is None:
        texts, held_out = split(len(rows), schedule.held_out, schedule.seed)
        new, old = rows.take(held_out)
        return _Split(texts, None, lambda projection: text_hits(projection, new, old))
    images, others = split(len(pairs), schedule.held_out, schedule.seed, "images in the pairs")
    kept_out = pairs.subset(torch.from_numpy(np.sort(others)))
    chosen = pairs.subset(torch.from_numpy(np.sort(images)))
    return _Split(np.arange(len(rows)), chosen, lambda projection: pairs_score(projection, kept_out))
