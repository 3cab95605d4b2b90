"""The compatible backbones on worlds of vectors: one upgrade, BT²'s sweep, and a chain of versions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xbt.data.synthetic import ClassWorld, make_class_world
from xbt.evaluation import compatibility_matrix, evaluate_labels, prefix_vectors
from xbt.heads import (
    BCTHead,
    BCTLoss,
    BT2Head,
    BT2Loss,
    ClassificationLoss,
    CompatibleHead,
    EpochSchedule,
    OCAHead,
    OCALoss,
    PlainHead,
    Prototypes,
    Targets,
    class_prototypes,
    fit_on_vectors,
)
from xbt.projections import fit_projection

OLD_CLASSES, CLASSES = 20, 40
CHAIN = (10, 20, 40)
SWEEP = (0, 4, 16, 32, 64)

Values = dict[str, float]
"""Measured values: "top-1 new/old", "mAP new/old", ..., as fractions."""


@dataclass
class WorldsConfig:
    """The worlds of vectors: 40 classes, of which the old model knows 20."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """One world per seed; an empty list leaves them out."""
    dim: int = 64
    """Dimension of the vectors."""
    extra_dims: int = 16
    """Extra dimensions of BT², OCA and the naive BCT."""
    new_weight: float = 5.0
    """BT²'s λ1; the paper's 1 underfits on small data."""
    epochs: int = 30
    """Epochs of every model."""


class Model(NamedTuple):
    """A trained model: inputs to vectors of its own and, if it has one, of the old space."""

    full: Callable[[Tensor], Tensor]
    compatible: Callable[[Tensor], Tensor]
    out_dim: int


def one_step(config: WorldsConfig, seed: int) -> dict[str, Values]:
    """Every method on one upgrade from 20 to 40 classes, by name."""
    world = make_class_world(CLASSES, seed=seed)
    trainer = Trainer(config, world, seed)
    old = trainer.plain(OLD_CLASSES, seed_offset=1)
    independent = trainer.plain(CLASSES, seed_offset=2)
    teachers = trainer.teachers(old, independent)
    found = {"independent": trainer.measure(independent, old)}
    for name, (head, loss) in trainer.methods(teachers, config.dim).items():
        found[name] = trainer.measure(trainer.fit(head, loss, teachers), old)
    new, seen = (model.full(world.train_inputs) for model in (independent, old))
    for method in ("procrustes", "lambda_orthogonal"):
        projection = fit_projection(new, seen, method=method)
        found[method] = trainer.measure(
            independent._replace(compatible=lambda rows, p=projection: p(independent.full(rows)).detach()),
            old,
        )
    return found


def sweep(config: WorldsConfig, seed: int) -> dict[str, Values]:
    """BT² with more and more extra dimensions, by name."""
    trainer = Trainer(config, make_class_world(CLASSES, seed=seed), seed)
    old = trainer.plain(OLD_CLASSES, seed_offset=1)
    independent = trainer.plain(CLASSES, seed_offset=2)
    teachers = trainer.teachers(old, independent)
    prototypes = trainer.prototypes(teachers)
    found = {}
    for extra in (each for each in SWEEP if each <= config.dim):
        head = BT2Head(config.dim, config.dim, extra, n_classes=CLASSES)
        loss = BT2Loss(prototypes, new_weight=config.new_weight)
        found[f"BT², {extra} extra"] = trainer.measure(trainer.fit(head, loss, teachers), old)
    return found


def chain(config: WorldsConfig, seed: int) -> dict[str, dict[str, list[list[float]]]]:
    """Three versions, each compatible with the whole of the one before: per method and metric, the matrix."""
    world = make_class_world(CLASSES, seed=seed)
    trainer = Trainer(config, world, seed)
    versions = {method: [trainer.plain(CHAIN[0], 1)] for method in ("independent", "BCT", "BT²", "OCA")}
    for step, classes in enumerate(CHAIN[1:], start=2):
        independent = trainer.plain(classes, step)
        for method, models in versions.items():
            if method == "independent":
                models.append(independent)
                continue
            old = models[-1]
            teachers = trainer.teachers(old, independent, classes)
            prototypes = trainer.prototypes(teachers)
            extra = config.extra_dims
            head: CompatibleHead
            if method == "BCT":
                head, loss = BCTHead(config.dim, old.out_dim, 0, n_classes=classes), BCTLoss(prototypes)
            elif method == "OCA":
                head, loss = OCAHead(old.out_dim, extra, n_classes=classes), OCALoss(prototypes)
            else:
                beyond = extra + old.out_dim - config.dim
                head = BT2Head(config.dim, old.out_dim, beyond, n_classes=classes)
                loss = BT2Loss(prototypes, new_weight=config.new_weight)
            models.append(trainer.fit(head, loss, teachers, classes))
    return {
        method: {
            metric: matrix.values.tolist()
            for metric, matrix in compatibility_matrix(
                {f"v{number}": model.full(world.test_inputs) for number, model in enumerate(models)},
                world.test_labels,
            ).items()
        }
        for method, models in versions.items()
    }


class Trainer:
    """Train MLPs on one world and measure them."""

    def __init__(self, config: WorldsConfig, world: ClassWorld, seed: int) -> None:
        self.config, self.world, self.seed = config, world, seed

    def plain(self, classes: int, seed_offset: int) -> Model:
        """A model of its own, on the first classes."""
        head = PlainHead(self.config.dim, n_classes=classes)
        return self.fit(head, ClassificationLoss(), None, classes, seed_offset)

    def fit(
        self,
        head: CompatibleHead,
        loss: nn.Module,
        teachers: Targets | None,
        classes: int = CLASSES,
        seed_offset: int = 7,
    ) -> Model:
        """An MLP behind a head, trained on the first classes."""
        seed = 1000 * self.seed + seed_offset
        torch.manual_seed(seed)
        inputs, targets = self._rows(classes)
        module = nn.Sequential(
            nn.Linear(inputs.shape[1], 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, head.in_dim),
        )
        for layer in head.modules():  # drawn by this seed, whenever the head was made
            if isinstance(layer, nn.Linear) and not hasattr(layer, "parametrizations"):
                layer.reset_parameters()
        schedule = EpochSchedule(epochs=self.config.epochs, seed=seed)
        fit_on_vectors(module, head, loss, inputs, teachers or targets, schedule=schedule)

        def vectors(rows: Tensor, space: str) -> Tensor:
            with torch.no_grad():
                return head.embed(module(rows), space)  # type: ignore[arg-type]

        compatible = "old" if head.old_dim else "new"  # an independent model is compared as it is
        return Model(lambda rows: vectors(rows, "new"), lambda rows: vectors(rows, compatible), head.out_dim)

    def teachers(self, old: Model, independent: Model, classes: int = CLASSES) -> Targets:
        """Outputs of the frozen models for the training inputs."""
        inputs, targets = self._rows(classes)
        return Targets(targets.labels, old.full(inputs), independent.full(inputs))

    def prototypes(self, teachers: Targets) -> Prototypes:
        """The classes' means under the old model."""
        assert teachers.old is not None
        return class_prototypes(teachers.old, teachers.labels, int(teachers.labels.max()) + 1)

    def methods(self, teachers: Targets, dim: int) -> dict[str, tuple[CompatibleHead, nn.Module]]:
        """Every trained method with its paper's weights, but for BT²'s λ1."""
        prototypes, extra = self.prototypes(teachers), self.config.extra_dims
        return {
            "BCT": (BCTHead(dim, dim, n_classes=CLASSES), BCTLoss(prototypes)),
            "BCT + extra dimensions": (BCTHead(dim, dim, extra, n_classes=CLASSES), BCTLoss(prototypes)),
            "BT²": (BT2Head(dim, dim, extra, n_classes=CLASSES), BT2Loss(prototypes)),
            f"BT², λ1 = {self.config.new_weight:g}": (
                BT2Head(dim, dim, extra, n_classes=CLASSES),
                BT2Loss(prototypes, new_weight=self.config.new_weight),
            ),
            "OCA": (OCAHead(dim, extra, n_classes=CLASSES), OCALoss(prototypes)),
            "OCA without T": (OCAHead(dim, extra, orthogonal=False, n_classes=CLASSES), OCALoss(prototypes)),
        }

    def measure(self, model: Model, old: Model) -> Values:
        """The three cells on the test inputs of all classes."""
        return cells(
            old.full(self.world.test_inputs),
            model.compatible(self.world.test_inputs),
            model.full(self.world.test_inputs),
            self.world.test_labels,
        )

    def _rows(self, classes: int) -> tuple[Tensor, Targets]:
        known = self.world.train_labels < classes
        return self.world.train_inputs[known], Targets(self.world.train_labels[known])


def cells(old: Tensor, compatible: Tensor, full: Tensor, labels: Tensor) -> Values:
    """old/old, new/old and new/new: top-1 and mAP, every query's own item left out.

    Args:
        old: (n, old_dim) old vectors.
        compatible: (n, ≥ old_dim or less) new vectors to be compared with them on the leading coordinates.
        full: (n, new_dim) new vectors for a gallery of their own.
        labels: (n,) classes.
    """
    ids = [str(row) for row in range(len(labels))]
    query, gallery = prefix_vectors(normalize(compatible, dim=1), old)
    measured = {
        "old/old": evaluate_labels(old, labels),
        "new/old": evaluate_labels(query, labels, gallery, labels, query_ids=ids, gallery_ids=ids),
        "new/new": evaluate_labels(full, labels),
    }
    return {
        f"{metric} {name}": value
        for name, found in measured.items()
        for metric, value in (("top-1", found.cmc[1]), ("mAP", found.mean_average_precision))
    }
