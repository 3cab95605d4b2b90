"""Common parts of the heads' losses: targets, cross entropies, and class prototypes of the old model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from xbt.errors import ConfigError, DataError
from xbt.heads.base import HeadOutput
from xbt.store.store import EmbeddingStore
from xbt.vectors import Vectors, as_vectors

_BLOCK_ROWS = 8_192
_NAMED = 5


class Prototypes(nn.Module):
    """Mean vector of each class under the old model.

    They replace the old model's classifier, also for classes that it never saw. Prototypes are data, not
    weights: they move with their module, but are not in its state dict.

    Args:
        vectors: (n_classes, dim) means; rows of classes without samples are ignored.
        counts: (n_classes,) number of samples of each class.

    Attributes:
        vectors: (n_classes, dim) float32.
        counts: (n_classes,) int64.
        present: (m, dim) float32, the rows of classes that have samples.

    Raises:
        DataError: If the shapes do not fit, a value is not finite, or no class has samples.
    """

    vectors: Tensor
    counts: Tensor
    present: Tensor
    _column: Tensor

    def __init__(self, vectors: Tensor, counts: Tensor) -> None:
        super().__init__()
        vectors = as_vectors(vectors, "prototypes").float()
        counts = counts.detach().cpu().long()
        if counts.shape != vectors.shape[:1]:
            raise DataError(
                f"there are {len(vectors)} prototypes but counts of the shape {tuple(counts.shape)}; "
                "give one count per class"
            )
        has_samples = counts > 0
        if not bool(has_samples.any()):
            raise DataError(f"none of the {len(counts)} classes has samples, so there is no prototype")
        column = torch.where(has_samples, has_samples.cumsum(0) - 1, -1)
        for name, tensor in (
            ("vectors", vectors),
            ("counts", counts),
            ("present", vectors[has_samples]),
            ("_column", column),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Dimension of the old model's vectors."""
        return int(self.vectors.shape[1])

    def columns(self, labels: Tensor) -> Tensor:
        """(n,) int64 rows of ``present`` for (n,) labels.

        Raises:
            DataError: If a label is not a class, or its class has no prototype.
        """
        in_range = (labels >= 0) & (labels < len(self))
        columns = torch.where(in_range, self._column[labels.clamp(0, len(self) - 1)], -1)
        if bool((columns < 0).any()):
            bad = sorted(set(labels[columns < 0].tolist()))
            raise DataError(
                f"label {bad[0]} has no prototype among {len(self)} classes: the old model's vectors have no "
                "sample of it; compute the prototypes on the training data"
            )
        return columns


def class_prototypes(
    features: Vectors | EmbeddingStore, labels: Tensor | NDArray[np.integer], n_classes: int
) -> Prototypes:
    """Average the old model's vectors of each class.

        p_c = mean of φ_old(x) over the training images of class c

    The mean of unit rows is shorter than 1, and shorter for scattered classes. It is not normalised, so the
    logits of scattered classes are smaller. Sums are in float64, in blocks of rows.

    Args:
        features: (n, dim) unit rows of the old model: tensor, array or store.
        labels: (n,) classes.
        n_classes: Number of classes of the new model, with those that the old one never saw.

    Returns:
        The prototypes; the influence loss ignores classes without samples, and a warning names them.

    Raises:
        ConfigError: If ``n_classes`` is below 1.
        DataError: If there are no rows, a label is out of range, the counts differ, or a value is not finite.
    """
    if n_classes < 1:
        raise ConfigError(f"n_classes must be at least 1, got {n_classes}")
    classes = _checked_labels(labels, len(features), n_classes)
    counts = torch.bincount(classes, minlength=n_classes)
    sums: Tensor | None = None
    start = 0
    for block in _blocks(features):
        if sums is None:
            sums = torch.zeros(n_classes, block.shape[1], dtype=torch.float64)
        sums.index_add_(0, classes[start : start + len(block)], block.double())
        start += len(block)
    assert sums is not None  # there is at least one row
    empty = torch.nonzero(counts == 0).flatten().tolist()
    if empty:
        named = ", ".join(map(str, empty[:_NAMED])) + (", …" if len(empty) > _NAMED else "")
        warnings.warn(
            f"{len(empty)} of {n_classes} classes have no sample and so no prototype: {named}; they take no "
            "part in the influence loss",
            stacklevel=2,
        )
    return Prototypes((sums / counts.clamp(min=1)[:, None]).float(), counts)


def _checked_labels(labels: Tensor | NDArray[np.integer], rows: int, n_classes: int) -> Tensor:
    classes = torch.as_tensor(labels).detach().cpu()
    if classes.ndim != 1 or len(classes) != rows:
        raise DataError(
            f"there are {rows} vectors but labels of the shape {tuple(classes.shape)}; "
            "give one label per vector"
        )
    if not rows:
        raise DataError("there are no vectors to average; give at least one")
    if classes.is_floating_point() or classes.is_complex():
        raise DataError(f"labels must be whole numbers, got {classes.dtype}")
    bad = torch.nonzero((classes < 0) | (classes >= n_classes)).flatten()
    if len(bad):
        raise DataError(
            f"label {int(classes[bad[0]])} in row {int(bad[0])} is not a class: they count from 0 to "
            f"{n_classes - 1}; raise n_classes or fix the labels"
        )
    return classes.long()


def _blocks(features: Vectors | EmbeddingStore) -> Iterator[Tensor]:
    if isinstance(features, EmbeddingStore):
        for read in features.batches(_BLOCK_ROWS):
            yield as_vectors(read, f"the old vectors ({features.path})")
    else:
        for start in range(0, len(features), _BLOCK_ROWS):
            yield as_vectors(features[start : start + _BLOCK_ROWS], "the old vectors")


@dataclass(frozen=True)
class Targets:
    """Targets of the rows of a batch.

    Attributes:
        labels: (n,) int64 classes.
        old: (n, old_dim) vectors of the old model φ_old, for BT².
        new: (n, new_dim) vectors of the independent new model φ'_new, for BT².
    """

    labels: Tensor
    old: Tensor | None = None
    new: Tensor | None = None


class HeadLoss(nn.Module):
    """A loss over a head's output; ``loss(output, targets)`` returns (loss, its parts before weights).

    Args:
        prototypes: The old model's class means, where the loss needs them.
        label_smoothing: Share of the target that is spread over all classes.
        **weights: Weights of the parts, each ``PART_weight`` and kept as an attribute.

    Raises:
        ConfigError: If a weight is negative or not finite, all are 0, or the smoothing is not in [0, 1).
    """

    def __init__(
        self, prototypes: Prototypes | None = None, label_smoothing: float = 0.0, **weights: float
    ) -> None:
        super().__init__()
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"{name} must be a number of at least 0, got {weight}")
            setattr(self, name, weight)
        if weights and not any(weights.values()):
            raise ConfigError(f"{', '.join(weights)} are all 0, so there is nothing to train for; raise one")
        check_smoothing(label_smoothing)
        self.prototypes, self.label_smoothing = prototypes, label_smoothing

    def parts(self, output: HeadOutput, targets: Targets) -> dict[str, Tensor]:
        """The parts of the loss by name, scalars before weights; a subclass gives them."""
        raise NotImplementedError

    def forward(self, output: HeadOutput, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar, and its parts, detached scalars.

        Raises:
            ConfigError: If the head lacks an output that the loss needs.
            DataError: If the targets lack a value that the loss needs.
        """
        parts = self.parts(output, targets)
        terms = [getattr(self, f"{name}_weight") * part for name, part in parts.items()]
        return sum(terms[1:], terms[0]), {name: part.detach() for name, part in parts.items()}

    def classification(self, output: HeadOutput, labels: Tensor) -> Tensor:
        """Mean cross entropy of the classifier's logits, a scalar; a ConfigError without a classifier."""
        if output.logits is None:
            raise ConfigError("the head has no classifier to train; give it n_classes")
        return cross_entropy(output.logits, labels, label_smoothing=self.label_smoothing)

    def old_parts(self, output: HeadOutput, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The compatible part as (n, old_dim) unit rows, and classification and influence loss."""
        assert self.prototypes is not None
        if output.compatible is None:
            raise ConfigError("the head has no compatible part, so this loss cannot train it; give old_dim")
        direction = normalize(output.compatible, dim=1)
        return direction, {
            "classification": self.classification(output, labels),
            "influence": influence(direction, self.prototypes, labels, self.label_smoothing),
        }


def check_smoothing(label_smoothing: float) -> None:
    """Check a label smoothing."""
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")


def influence(
    directions: Tensor, prototypes: Prototypes, labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of the inner products with the old model's class prototypes, a scalar.

        CE(u · pᵀ, y)    over the classes that have a prototype

    The influence loss of BCT (Shen et al., CVPR 2020, arXiv 2003.11942) with class means instead of the
    old classifier. There is no temperature on purpose: the prototypes of classes that the old model never saw
    are close together, and a sharp softmax pushes new vectors apart where the old ones are not. With logits
    multiplied by 16, the cross tests of all three methods were worse than the old model's self test.

    Args:
        directions: (n, old_dim) unit rows u.
        prototypes: p.
        labels: (n,) int64 classes y.
        label_smoothing: Share of the target that is spread over the classes that have a prototype.
    """
    if directions.shape[1] != prototypes.dim:
        raise ConfigError(
            f"the head's compatible part has {directions.shape[1]} dimensions, but the prototypes have "
            f"{prototypes.dim}; build both for the same old model"
        )
    columns = prototypes.columns(labels)
    return cross_entropy(directions @ prototypes.present.T, columns, label_smoothing=label_smoothing)


def matching(predicted: Tensor, target: Tensor | None, name: str) -> Tensor:
    """1 − mean cos between unit rows and their targets, a scalar; no gradient flows into the targets."""
    if target is None:
        raise DataError(f"the loss needs the {name} vectors of every row; give them as the targets' {name}")
    if target.shape != predicted.shape:
        raise ConfigError(
            f"the {name} vectors have the shape {tuple(target.shape)}, but the head's have "
            f"{tuple(predicted.shape)}; build the head for the models that made them"
        )
    unit_target = normalize(target.detach().to(predicted.dtype), dim=1)
    return 1 - (predicted * unit_target).sum(dim=1).mean()
