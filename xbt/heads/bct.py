"""BCT head and loss, and the head of independent models, which are the baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from xbt.errors import ConfigError
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
from xbt.heads.orthogonal import checked_map, stacked


class BCTHead(CompatibleHead):
    """h of unit length, whose leading coordinates are compatible; logits = W h.

    Shen et al., "Towards backward-compatible representation learning", CVPR 2020, arXiv 2003.11942. With
    ``extra_dims`` it is the naive way to add dimensions for the new model, a baseline of BT².

    Args:
        new_dim: Dimension of the new vectors.
        old_dim: Dimension of the old model's vectors.
        extra_dims: Dimensions added to ``new_dim``.
        n_classes: Classes of the classifier; ``None`` for no classifier.

    Raises:
        ConfigError: If a number is too small, or there are fewer dimensions than the old vectors have.
    """

    kind = "bct"
    paper = (
        'BCT (Shen et al., "Towards backward-compatible representation learning", CVPR 2020, '
        "[arXiv 2003.11942](https://arxiv.org/abs/2003.11942))."
    )

    def __init__(self, new_dim: int, old_dim: int, extra_dims: int = 0, n_classes: int | None = None) -> None:
        for name, value, minimum in (
            ("new_dim", new_dim, 1),
            ("old_dim", old_dim, 1),
            ("extra_dims", extra_dims, 0),
        ):
            require_at_least(name, value, minimum)
        dim = new_dim + extra_dims
        if dim < old_dim:
            raise ConfigError(
                f"new_dim {new_dim} and extra_dims {extra_dims} make {dim} dimensions, but the old vectors "
                f"have {old_dim}; raise extra_dims to at least {old_dim - new_dim}"
            )
        super().__init__(in_dim=dim, old_dim=old_dim, out_dim=dim, feature_dim=dim, n_classes=n_classes)
        self.new_dim, self.extra_dims = new_dim, extra_dims

    def embedded(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`CompatibleHead.embedded`."""
        unit = normalize(features, dim=1)
        return unit, unit

    def options(self) -> dict[str, Any]:
        """See :meth:`CompatibleHead.options`."""
        return {
            "new_dim": self.new_dim,
            "old_dim": self.old_dim,
            "extra_dims": self.extra_dims,
            "n_classes": self.n_classes,
        }

    def fold(self) -> FoldedHead:
        """See :meth:`CompatibleHead.fold`."""
        return FoldedHead(self.in_dim, self.old_dim, self.in_dim)

    def init_from(self, weight: Tensor, order: Tensor | None = None) -> Tensor:
        """See :meth:`CompatibleHead.init_from`; the head itself has nothing to initialise."""
        return stacked(checked_map(weight, self.old_dim), self.in_dim)


class BCTLoss(HeadLoss):
    """L = w_cls · CE(W h, y) + w_infl · CE(u · pᵀ, y), where u is the compatible part as a unit vector.

    p are the old model's class means for all classes of the new data ("pseudo classifier"); see
    :func:`~xbt.heads.losses.influence` for why there is no temperature. Both terms are label-smoothed. The
    weights 1 and 10 are those of BT²'s code for its baseline.

    Args:
        prototypes: p.
        influence_weight: w_infl.
        classification_weight: w_cls.
        label_smoothing: Share of the target that is spread over all classes.

    Raises:
        ConfigError: If a weight or the smoothing cannot be used.
    """

    def __init__(
        self,
        prototypes: Prototypes,
        influence_weight: float = 10.0,
        classification_weight: float = 1.0,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        check_weights(influence_weight=influence_weight, classification_weight=classification_weight)
        check_smoothing(label_smoothing)
        self.prototypes = prototypes
        self.influence_weight, self.classification_weight = influence_weight, classification_weight
        self.label_smoothing = label_smoothing

    def forward(self, output: HeadOutput, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`HeadLoss.forward`; parts ``classification``, ``influence``."""
        class_loss = classification(output, targets.labels, self.label_smoothing)
        direction = compatible_direction(output)
        influence_loss = influence(direction, self.prototypes, targets.labels, self.label_smoothing)
        loss = self.classification_weight * class_loss + self.influence_weight * influence_loss
        return loss, {"classification": class_loss.detach(), "influence": influence_loss.detach()}


class PlainHead(CompatibleHead):
    """f = h / ‖h‖, logits = W f: the old model φ_old, and the independent new one φ'_new.

    It is compatible with no old model: ``old_dim`` is 0 and ``compatible`` is ``None``.

    Args:
        dim: Dimension of the features and of the vectors.
        n_classes: Classes of the classifier; ``None`` for no classifier.

    Raises:
        ConfigError: If a number is too small.
    """

    kind = "independent"
    paper = "A plain classifier's head, compatible with no other model."

    def __init__(self, dim: int, n_classes: int | None = None) -> None:
        require_at_least("dim", dim, 1)
        super().__init__(in_dim=dim, old_dim=0, out_dim=dim, feature_dim=dim, n_classes=n_classes)

    def embedded(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`CompatibleHead.embedded`."""
        unit = normalize(features, dim=1)
        return unit, unit

    def options(self) -> dict[str, Any]:
        """See :meth:`CompatibleHead.options`."""
        return {"dim": self.in_dim, "n_classes": self.n_classes}

    def fold(self) -> FoldedHead:
        """See :meth:`CompatibleHead.fold`."""
        return FoldedHead(self.in_dim, 0, self.in_dim)

    def init_from(self, weight: Tensor, order: Tensor | None = None) -> Tensor:
        """Refuse: there is no old model.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "an independent head has no old model, so it cannot be initialised from a map; "
            "take a bct, bt2 or oca head"
        )


class ClassificationLoss(HeadLoss):
    """L = CE(W f, y), with label smoothing.

    Args:
        label_smoothing: Share of the target that is spread over all classes.

    Raises:
        ConfigError: If it does not lie in [0, 1).
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        super().__init__()
        check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(self, output: HeadOutput, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`HeadLoss.forward`; part ``classification``."""
        loss = classification(output, targets.labels, self.label_smoothing)
        return loss, {"classification": loss.detach()}
