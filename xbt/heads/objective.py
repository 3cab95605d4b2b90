"""What the losses of all heads share: what they are given, and the two cross entropies they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from xbt.errors import ConfigError, DataError
from xbt.heads.base import HeadOutput
from xbt.heads.prototypes import Prototypes


@dataclass(frozen=True)
class Targets:
    """What the rows of a batch should become.

    Attributes:
        labels: (n,) int64 classes.
        old: (n, old_dim) vectors of the old model φ_old, for BT².
        new: (n, new_dim) vectors of the independent new model φ'_new, for BT².
    """

    labels: Tensor
    old: Tensor | None = None
    new: Tensor | None = None


class HeadLoss(nn.Module, ABC):
    """A loss over a head's output; ``loss(output, targets)`` returns (loss, its parts before weights)."""

    @abstractmethod
    def forward(self, output: HeadOutput, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss, a scalar, and its parts, detached scalars.

        Raises:
            ConfigError: If the head lacks what the loss needs.
            DataError: If the targets do.
        """


def check_weights(**weights: float) -> None:
    """Checks the weights of a loss by their names.

    Raises:
        ConfigError: If one is negative or not finite, or all are 0.
    """
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"{name} must be a number of at least 0, got {weight}")
    if not any(weights.values()):
        raise ConfigError(f"{', '.join(weights)} are all 0, so there is nothing to train for; raise one")


def check_smoothing(label_smoothing: float) -> None:
    """Checks a label smoothing.

    Raises:
        ConfigError: If it does not lie in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")


def classification(output: HeadOutput, labels: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross entropy of the classifier's logits, a scalar.

    Raises:
        ConfigError: If the head has no classifier.
    """
    if output.logits is None:
        raise ConfigError("the head has no classifier to train; give it n_classes")
    return cross_entropy(output.logits, labels, label_smoothing=label_smoothing)


def compatible_direction(output: HeadOutput) -> Tensor:
    """The compatible part as (n, old_dim) unit rows.

    Raises:
        ConfigError: If the head is compatible with nothing.
    """
    if output.compatible is None:
        raise ConfigError("the head is compatible with nothing, so this loss cannot train it; give old_dim")
    return normalize(output.compatible, dim=1)


def influence(
    directions: Tensor, prototypes: Prototypes, labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of the inner products with the old model's class prototypes, a scalar.

        CE(u · pᵀ, y)    over the classes that have a prototype

    the influence loss of BCT (Shen et al., CVPR 2020, arXiv 2003.11942) with class means in place of the old
    classifier. There is no temperature, on purpose: the prototypes of classes that the old model never saw
    lie close together, and a sharp softmax pushes new vectors apart where the old ones are not. Logits
    multiplied by 16 brought cross tests of all three methods below the old model's own.

    Args:
        directions: (n, old_dim) unit rows u.
        prototypes: p.
        labels: (n,) int64 classes y.
        label_smoothing: Share of the target that is spread over the classes that have a prototype.

    Raises:
        ConfigError: If the dimensions differ.
        DataError: If a label has no prototype.
    """
    if directions.shape[1] != prototypes.dim:
        raise ConfigError(
            f"the head's compatible part has {directions.shape[1]} dimensions, but the prototypes have "
            f"{prototypes.dim}; build both for the same old model"
        )
    columns = prototypes.columns(labels)
    return cross_entropy(directions @ prototypes.present.T, columns, label_smoothing=label_smoothing)


def matching(predicted: Tensor, target: Tensor | None, name: str) -> Tensor:
    """1 − mean cos between unit rows and what they should be, a scalar; no gradient flows into the latter.

    Raises:
        ConfigError: If the dimensions differ.
        DataError: If there is no target.
    """
    if target is None:
        raise DataError(f"the loss needs the {name} vectors of every row; give them as the targets' {name}")
    if target.shape != predicted.shape:
        raise ConfigError(
            f"the {name} vectors have the shape {tuple(target.shape)}, but the head's have "
            f"{tuple(predicted.shape)}; build the head for the models that made them"
        )
    wanted = normalize(target.detach().to(predicted.dtype), dim=1)
    return 1 - (predicted * wanted).sum(dim=1).mean()
