"""OCA head and loss: added dimensions, and an orthogonal layer before the classifier during training."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from xbt.heads.base import CompatibleHead, FoldedHead, HeadOutput, require_at_least
from xbt.heads.losses import (
    HeadLoss,
    Prototypes,
    Targets,
    check_smoothing,
    check_weights,
    classification,
    compatible_direction,
    influence,
)
from xbt.heads.orthogonal import checked_map, orthogonal_linear, stacked


class OCAHead(CompatibleHead):
    """h of unit length with ``old_dim + extra_dims`` coordinates, the leading ones compatible.

        logits = W T h,    T orthogonal;    galleries store h

    Ricci, Biondi, Pernici, Del Bimbo, "Backward-compatible aligned representations via an orthogonal
    transformation layer", ECCV 2024 workshops, arXiv 2408.08793. T is square and orthogonal, so T h and h
    have the same angles, and W T is a matrix like W: T changes only the optimisation, not the functions that
    can be learned. ``orthogonal=False`` leaves it out; measure the effect. T has no bias here. The authors'
    code has one, which preserves distances but not angles.

    Args:
        old_dim: Dimension of the old model's vectors.
        extra_dims: Dimensions added to it.
        orthogonal: Use T.
        n_classes: Classes of the classifier; ``None`` for no classifier.
        orthogonal_map: Parametrisation of T; see :func:`~xbt.heads.orthogonal.orthogonal_linear`.

    Raises:
        ConfigError: If a number is too small or the map is not known.
    """

    kind = "oca"
    paper = (
        'OCA (Ricci et al., "Backward-compatible aligned representations via an orthogonal transformation '
        'layer", ECCV 2024 workshops, [arXiv 2408.08793](https://arxiv.org/abs/2408.08793)).'
    )

    def __init__(
        self,
        old_dim: int,
        extra_dims: int,
        orthogonal: bool = True,
        n_classes: int | None = None,
        orthogonal_map: str = "matrix_exp",
    ) -> None:
        require_at_least("old_dim", old_dim, 1)
        require_at_least("extra_dims", extra_dims, 0)
        dim = old_dim + extra_dims
        super().__init__(in_dim=dim, old_dim=old_dim, out_dim=dim, feature_dim=dim, n_classes=n_classes)
        self.extra_dims, self.orthogonal_map = extra_dims, orthogonal_map
        rotation = orthogonal_linear(dim, orthogonal_map)  # refuses unknown maps even if T is not used
        self.rotation = rotation if orthogonal else None

    def embedded(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`CompatibleHead.embedded`."""
        unit = normalize(features, dim=1)
        return (unit if self.rotation is None else self.rotation(unit)), unit

    def options(self) -> dict[str, Any]:
        """See :meth:`CompatibleHead.options`."""
        return {
            "old_dim": self.old_dim,
            "extra_dims": self.extra_dims,
            "orthogonal": self.rotation is not None,
            "n_classes": self.n_classes,
            "orthogonal_map": self.orthogonal_map,
        }

    def fold(self) -> FoldedHead:
        """See :meth:`CompatibleHead.fold`; T is dropped with the classifier."""
        return FoldedHead(self.in_dim, self.old_dim, self.in_dim)

    def init_from(self, weight: Tensor, order: Tensor | None = None) -> Tensor:
        """See :meth:`CompatibleHead.init_from`; T keeps its initial value."""
        return stacked(checked_map(weight, self.old_dim), self.in_dim)


class OCALoss(HeadLoss):
    """L = w_cls · CE(W T h, y) + w_infl · CE(u · pᵀ, y) + w_proto · (1 − mean cos(p_y, u)).

    u is the compatible part as a unit vector and p the old model's class means; the weights 5, 10 and 5 are
    those of the authors' code. Both cross entropies are label-smoothed and neither has a temperature; see
    :func:`~xbt.heads.losses.influence`. The old model is needed only for the prototypes.

    Args:
        prototypes: p.
        classification_weight: w_cls.
        influence_weight: w_infl.
        prototype_weight: w_proto.
        label_smoothing: Share of the target that is spread over all classes.

    Raises:
        ConfigError: If a weight or the smoothing cannot be used.
    """

    def __init__(
        self,
        prototypes: Prototypes,
        classification_weight: float = 5.0,
        influence_weight: float = 10.0,
        prototype_weight: float = 5.0,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        check_weights(
            classification_weight=classification_weight,
            influence_weight=influence_weight,
            prototype_weight=prototype_weight,
        )
        check_smoothing(label_smoothing)
        self.prototypes = prototypes
        self.classification_weight, self.influence_weight = classification_weight, influence_weight
        self.prototype_weight, self.label_smoothing = prototype_weight, label_smoothing

    def forward(self, output: HeadOutput, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`HeadLoss.forward`; parts ``classification``, ``influence``, ``prototype``."""
        labels, direction = targets.labels, compatible_direction(output)
        parts = {
            "classification": classification(output, labels, self.label_smoothing),
            "influence": influence(direction, self.prototypes, labels, self.label_smoothing),
        }
        own_prototypes = self.prototypes.present[self.prototypes.columns(labels)]
        parts["prototype"] = 1 - cosine_similarity(direction, own_prototypes, dim=1).mean()
        weights = (self.classification_weight, self.influence_weight, self.prototype_weight)
        first, second, third = (weight * part for weight, part in zip(weights, parts.values(), strict=True))
        return first + second + third, {name: part.detach() for name, part in parts.items()}
