"""Trained maps: XBT's stage 1 and Drift-Adapter, a rotation plus an MLP, and the λ-orthogonal map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from xbt.errors import ConfigError
from xbt.projections.base import LinearProjection, Modality, Projection
from xbt.projections.closed_form import checked_share, procrustes_start, require_same_models
from xbt.projections.objective import (
    JointObjective,
    LambdaOrthogonalObjective,
    Stage1Options,
    TextLoss,
    TextProjectionObjective,
)
from xbt.projections.pairs import PairVectors
from xbt.projections.sources import PairedRows, Source, random_access
from xbt.projections.trainer import FitSchedule, NoisyVectors, Positions, Run, fit_trained
from xbt.space import EmbeddingSpace


class ResidualProjection(Projection):
    """φ(z) = normalise(W z + s · MLP(z)), with W the Procrustes rotation and s = 0 at the start.

    XBT (Jang & Lim, "Towards Cross-modal Backward-compatible Representation Learning for Vision-Language
    Models", ICCV 2025, arXiv 2405.14715) pretrains one projection on text alone and uses it for images as
    well. The architecture of its φ is not public; this one is ours. The residual form makes step 0 of
    training equal to the best closed-form map, which is known to carry over from text to images; the scalar
    gate s lets training leave it only as far as the held-out data rewards. With s fixed at 1 it is
    Drift-Adapter's residual MLP; see :func:`fit_mlp`.

    A centred one knows the mean text vector of both models, μ and ν, and maps

        φ(z) = normalise(W (z − μ) + s · MLP(z − μ) + ν)

    Images are mapped with means of their own where there are any, and else with those of the texts.

    The MLP is Linear(new_dim, hidden_dim) → GELU → Linear(hidden_dim, old_dim).

    Args:
        new_dim: Dimension of the vectors that come in.
        old_dim: Dimension of the vectors that go out.
        hidden_dim: Width of the MLP; 0 means 2 · new_dim.
        centred: Whether there are means, zero until :meth:`init_from`.
        image_means: Whether images have means of their own; only where ``centred``.
        new_space: The space the projection maps from.
        old_space: The space the projection maps to.

    Raises:
        ConfigError: If ``hidden_dim`` is negative.

    Attributes:
        weight: (old_dim, new_dim) matrix W.
        mlp: The MLP.
        scale: The gate s, a scalar.
        new_mean: (new_dim,) mean μ, or ``None``; ``new_image_mean`` likewise.
        old_mean: (old_dim,) mean ν, or ``None``; ``old_image_mean`` likewise.
    """

    kind = "residual"
    new_mean: Tensor | None
    old_mean: Tensor | None
    new_image_mean: Tensor | None
    old_image_mean: Tensor | None

    def __init__(
        self,
        new_dim: int,
        old_dim: int,
        hidden_dim: int = 0,
        centred: bool = False,
        image_means: bool = False,
        new_space: EmbeddingSpace | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        super().__init__(new_dim, old_dim, new_space, old_space)
        if hidden_dim < 0:
            raise ConfigError(f"hidden_dim must not be negative, got {hidden_dim}; 0 means twice new_dim")
        self.hidden_dim = hidden_dim or 2 * new_dim
        self.weight = nn.Parameter(torch.eye(old_dim, new_dim))
        self.mlp = nn.Sequential(
            nn.Linear(new_dim, self.hidden_dim), nn.GELU(), nn.Linear(self.hidden_dim, old_dim)
        )
        self.scale = nn.Parameter(torch.zeros(()))
        for name, dim, wanted in (
            ("new_mean", new_dim, centred),
            ("old_mean", old_dim, centred),
            ("new_image_mean", new_dim, centred and image_means),
            ("old_image_mean", old_dim, centred and image_means),
        ):
            self.register_buffer(name, torch.zeros(dim) if wanted else None)

    @classmethod
    def seeded(cls, new_dim: int, old_dim: int, seed: int, hidden_dim: int = 0, **options: Any) -> Self:
        """A projection whose MLP is drawn with a seed; torch's global generator stays as it was.

        Args:
            new_dim: Dimension of the vectors that come in.
            old_dim: Dimension of the vectors that go out.
            seed: Fixes the MLP, which is drawn as torch draws linear layers.
            hidden_dim: Width of the MLP.
            **options: Further arguments of the class.

        Raises:
            ConfigError: If ``hidden_dim`` is negative.
        """
        with torch.random.fork_rng(devices=[]):
            projection = cls(new_dim, old_dim, hidden_dim, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in projection.mlp:
                if isinstance(layer, nn.Linear):
                    bound = layer.in_features**-0.5
                    layer.weight.uniform_(-bound, bound, generator=generator)
                    layer.bias.uniform_(-bound, bound, generator=generator)
        return projection

    def init_from(self, rotation: Tensor, means: Mapping[str, Tensor]) -> Self:
        """Takes over a closed form; see :class:`~xbt.projections.closed_form.ProcrustesStart`.

        Args:
            rotation: (old_dim, new_dim) matrix W.
            means: The means by their names, those that the projection was made for.

        Returns:
            This projection.
        """
        with torch.no_grad():
            self.weight.copy_(rotation)
            for name, mean in means.items():
                self.get_buffer(name).copy_(mean)
        return self

    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """(n, new_dim) → (n, old_dim), before normalisation."""
        new_mean, old_mean = self.new_mean, self.old_mean
        if modality == "image" and self.new_image_mean is not None:
            new_mean, old_mean = self.new_image_mean, self.old_image_mean
        if new_mean is not None:
            vectors = vectors - new_mean
        correction: Tensor = self.mlp(vectors)
        return nn.functional.linear(vectors, self.weight, old_mean) + self.scale * correction

    def options(self) -> dict[str, Any]:
        """Width of the MLP, and the means there are."""
        return {
            "hidden_dim": self.hidden_dim,
            "centred": self.new_mean is not None,
            "image_means": self.new_image_mean is not None,
        }


MLP_SCHEDULE = FitSchedule(steps=500)
STAGE1, STAGE1_SCHEDULE = Stage1Options(), FitSchedule()


def fit_mlp(
    new: Source, old: Source, *, hidden_dim: int = 256, schedule: FitSchedule = MLP_SCHEDULE
) -> ResidualProjection:
    """Train φ(z) = normalise(W z + W₂ · GELU(W₁ z + b₁) + b₂) to the old vectors by their cosine.

    The residual MLP of Drift-Adapter (Vejendla, EMNLP 2025, arXiv 2509.23471), which trains it on the squared
    error; between unit rows that is twice the cosine loss. Everything is trained, W too. W starts at the
    Procrustes rotation and W₂, b₂ at 0, so that step 0 is that rotation. A later step is kept only for a
    clear gain on held-out rows (:class:`~xbt.projections.trainer.StepSelection`); else the rotation is fitted
    to all rows. Neither noise nor pairs: it is a baseline that knows one modality.

    Args:
        new: Vectors of the new model: (n, new_dim) tensor, array or store. Rows are used as they are.
        old: Vectors of the old model for the same items; unit rows.
        hidden_dim: Width of the MLP.
        schedule: How to train.

    Returns:
        The map new_dim → old_dim, on the CPU.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If vectors cannot be used or are too few, or the loss is not finite.
    """
    rows = random_access(new, old)
    loss = TextLoss(contrastive_weight=0.0)

    def start(positions: Positions | None, pairs: PairVectors | None) -> ResidualProjection:
        closed = procrustes_start(rows, positions)
        projection = ResidualProjection.seeded(*rows.dims, schedule.seed, hidden_dim)
        projection.init_from(closed.rotation, closed.means)
        with torch.no_grad():
            projection.scale.fill_(1.0)
            for parameter in projection.mlp[2].parameters():
                parameter.zero_()
        projection.scale.requires_grad_(False)
        return projection

    return fit_trained(rows, start, lambda projection, _: TextProjectionObjective(projection, loss), schedule)


def fit_xbt(
    new: Source,
    old: Source,
    *,
    pairs: PairVectors | None = None,
    pairs_weight: float | None = None,
    stage1: Stage1Options = STAGE1,
    schedule: FitSchedule = STAGE1_SCHEDULE,
) -> ResidualProjection:
    """Train φ(z) = normalise(W z + s · MLP(z)) from the closed form on, and keep it only if it is better.

    See :class:`ResidualProjection` for φ and its paper, and
    :class:`~xbt.projections.objective.TextProjectionObjective` for the loss on texts, L_text. With pairs,

        L = (1 − ω) · L_text + ω · L_pairs

    whose second part is in :class:`~xbt.projections.objective.JointObjective`: retrieval itself, of old
    vectors by projected new ones. Step 0 (s = 0) is the Procrustes rotation, with ω over the pairs' images
    too (:func:`~xbt.projections.closed_form.procrustes_start`). A later step is kept if it is better on what
    was held out: captions, found by their own vector, by a clear gain
    (:class:`~xbt.projections.trainer.StepSelection`), or with pairs their images, found across modalities. If
    none is, the closed form of all vectors is returned, and ``scale`` is 0.

    ``recipes/pretrain_text_projection.py`` is the same fit with several processes, checkpoints and a log.
    Whether the result beats the closed form depends on the two models: see
    ``recipes/benchmarks/projections.py``, or let :func:`~xbt.projections.choose_projection` find out.

    Args:
        new: Vectors of the new model for texts: (n, new_dim) tensor, array or store, used as they are.
        old: Vectors of the old model for the same texts; unit rows.
        pairs: Image–text pairs under both models. Without new image vectors only text queries are trained.
        pairs_weight: ω in [0, 1); ``None`` means 0.33 with pairs. At 0 they only choose the step.
        stage1: Architecture, noise and loss. The temperature is learned on texts, and fixed on pairs.
        schedule: How to train.

    Returns:
        The map new_dim → old_dim, on the CPU.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If vectors cannot be used or are too few, or the loss is not finite.
        SpaceMismatchError: If the pairs' dimensions are not those of the texts.
    """
    rows = random_access(new, old)
    if pairs is None and pairs_weight:
        raise ConfigError(f"pairs_weight is {pairs_weight}, but there are no pairs to weigh; give pairs")
    weight = checked_share(pairs, pairs_weight)
    require_same_models(pairs, rows.dims)
    return fit_stage1(rows, stage1, schedule, pairs=pairs, pairs_weight=weight)


def fit_stage1(
    rows: PairedRows,
    stage1: Stage1Options,
    schedule: FitSchedule,
    *,
    pairs: PairVectors | None = None,
    pairs_weight: float = 0.0,
    run: Run | None = None,
) -> ResidualProjection:
    """Stage 1 on any rows and by any loop; :func:`fit_xbt` and the recipe both call it.

    Args:
        rows: The texts' vectors under both models; unit rows.
        stage1: Architecture, noise and loss.
        schedule: How to train.
        pairs: Image–text pairs.
        pairs_weight: ω.
        run: The loop; by default the one in memory.

    Returns:
        The map, on the CPU in evaluation mode.
    """

    def start(positions: Positions | None, seen: PairVectors | None) -> ResidualProjection:
        closed = procrustes_start(
            rows, positions, centred=stage1.centred, pairs=seen, pairs_weight=pairs_weight
        )
        means = {"centred": stage1.centred, "image_means": "new_image_mean" in closed.means}
        projection = ResidualProjection.seeded(*rows.dims, schedule.seed, stage1.hidden_dim, **means)
        return projection.init_from(closed.rotation, closed.means)

    def objective(projection: ResidualProjection, seen: PairVectors | None) -> nn.Module:
        projection.weight.requires_grad_(stage1.train_rotation)
        text = TextProjectionObjective(projection, stage1)
        if seen is None:
            return text
        return JointObjective(
            text, seen, pairs_weight, stage1.temperature, schedule.batch_size, schedule.seed
        )

    def data(projection: ResidualProjection, positions: Positions) -> NoisyVectors:
        mean = projection.new_mean
        return NoisyVectors(rows, positions, schedule.seed, stage1.noise, stage1.noise_family, mean)

    projection = fit_trained(rows, start, objective, schedule, pairs=pairs, data=data, run=run)
    projection.weight.requires_grad_(True)
    return projection


LAMBDA_LOSS, LAMBDA_SCHEDULE = TextLoss(contrastive_weight=0.0), FitSchedule(steps=500, weight_decay=0.0)


def fit_lambda_orthogonal(
    new: Source,
    old: Source,
    *,
    lam: float = 1.0,
    orthogonality_weight: float = 10.0,
    loss: TextLoss = LAMBDA_LOSS,
    schedule: FitSchedule = LAMBDA_SCHEDULE,
) -> LinearProjection:
    """Train an affine map φ(z) = normalise(W z + b) under a λ-orthogonality constraint.

    After Ricci, Biondi, Pernici et al., "λ-orthogonality regularization for compatible representation
    learning", NeurIPS 2025, arXiv 2509.16664. Its exact regulariser was not verified: the hinge of
    :class:`~xbt.projections.objective.LambdaOrthogonalObjective` is ours. λ = 0 keeps W orthogonal as far as
    the penalty's weight can, λ = ∞ sets it free. W starts at the Procrustes rotation and b at 0. A later step
    is kept only for a clear gain on held-out rows (:class:`~xbt.projections.trainer.StepSelection`); else the
    Procrustes rotation of all rows is returned.

    Args:
        new: Vectors of the new model: (n, new_dim) tensor, array or store. Rows are used as they are.
        old: Vectors of the old model for the same items; unit rows.
        lam: λ ≥ 0, the Frobenius norm of G − I that costs nothing; ``inf`` turns the penalty off.
        orthogonality_weight: w, the cost of what is beyond λ.
        loss: Weights of the losses on the vectors.
        schedule: How to train.

    Returns:
        The map as matrix and bias, (old_dim, new_dim) and (old_dim,), on the CPU; without bias if step 0 was
        kept.

    Raises:
        ConfigError: If an option cannot be used.
        DataError: If vectors cannot be used or are too few, or the loss is not finite.
    """
    if not lam >= 0 or not 0 <= orthogonality_weight < float("inf"):
        raise ConfigError(
            f"lam and orthogonality_weight must be at least 0, got {lam} and {orthogonality_weight}"
        )
    rows = random_access(new, old)

    def start(positions: Positions | None, pairs: PairVectors | None) -> LinearProjection:
        rotation = procrustes_start(rows, positions).rotation
        # Only what is trained has an offset; the rotation alone can be folded into the encoder.
        return LinearProjection.from_weight(
            rotation, None if positions is None else torch.zeros(len(rotation))
        )

    def objective(projection: LinearProjection, pairs: PairVectors | None) -> nn.Module:
        return LambdaOrthogonalObjective(projection, loss, lam, orthogonality_weight)

    return fit_trained(rows, start, objective, schedule)
