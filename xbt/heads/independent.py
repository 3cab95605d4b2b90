"""The head of an independent model: what every compatible one is measured against."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from xbt.errors import ConfigError
from xbt.heads.base import CompatibleHead, HeadOutput, require_at_least
from xbt.heads.folded import FoldedHead
from xbt.heads.objective import HeadLoss, Targets, check_smoothing, classification


class PlainHead(CompatibleHead):
    """f = h / ‖h‖, logits = W f: the old model φ_old, and the independent new one φ'_new.

    It is compatible with nothing: ``old_dim`` is 0 and ``compatible`` is ``None``.

    Args:
        dim: Dimension of the features and of the vectors.
        n_classes: Classes of the classifier; ``None`` for no classifier.

    Raises:
        ConfigError: If a number is too small.
    """

    kind = "independent"

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

    def start_at(self, weight: Tensor, order: Tensor | None = None) -> Tensor:
        """Always refused.

        Raises:
            ConfigError: Because there is no old model.
        """
        raise ConfigError(
            "an independent head is compatible with nothing, so there is no map to start at; "
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
