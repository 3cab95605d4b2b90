"""What every head shares: what goes in and what comes out, the two ways to embed, and one way to be saved."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xbt.errors import ConfigError, SpaceMismatchError
from xbt.heads import saving
from xbt.heads.folded import FoldedHead
from xbt.hub import CardData, CardFacts, HubArtifact, Naming

Space = Literal["old", "new"]
"""Which vectors a head is asked for: those that are compared with the old model's, or its own."""


@dataclass(frozen=True)
class HeadOutput:
    """What a head makes of a batch.

    Attributes:
        features: (n, feature dim), unit rows that the classifier sees.
        compatible: (n, old_dim), what is compared with the old model's vectors, not normalised; bitwise
            ``full[:, :old_dim]``. ``None`` for a head that is compatible with nothing.
        full: (n, out_dim), what is stored for a new item.
        logits: (n, n_classes), or ``None`` without a classifier.
    """

    features: Tensor
    compatible: Tensor | None
    full: Tensor
    logits: Tensor | None


class CompatibleHead(nn.Module, HubArtifact, ABC):
    """The last part of a model: from a backbone's features to vectors whose leading ones are compatible.

    Whatever it computes is computed in float32 (or float64), also under autocast: in half precision an
    orthogonal matrix is not orthogonal.

    Args:
        in_dim: Dimension of the features that come in.
        old_dim: Dimension of the old model's vectors; 0 for a head that is compatible with nothing.
        out_dim: Dimension of the vectors that go out.
        feature_dim: Dimension of what the classifier sees.
        n_classes: Classes of the classifier; ``None`` for no classifier.

    Raises:
        ConfigError: If a number is too small.
    """

    kind: ClassVar[str]
    no_decay: ClassVar[tuple[str, ...]] = ("parametrizations",)
    """Parts of the names of parameters that get no weight decay: those behind an orthogonal matrix, which
    decay would turn towards where it began, and whose Householder form it would destroy."""
    _kinds: ClassVar[dict[str, type[CompatibleHead]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        CompatibleHead._kinds[cls.kind] = cls

    def __init__(
        self, *, in_dim: int, old_dim: int, out_dim: int, feature_dim: int, n_classes: int | None
    ) -> None:
        super().__init__()
        if n_classes is not None:
            require_at_least("n_classes", n_classes, 1)
        self.in_dim, self.old_dim, self.out_dim, self.n_classes = in_dim, old_dim, out_dim, n_classes
        self.classifier = nn.Linear(feature_dim, n_classes, bias=False) if n_classes else None

    @abstractmethod
    def embedded(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(n, in_dim) → what the classifier sees (n, feature dim), and the whole vectors (n, out_dim)."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this head; JSON can hold them."""

    @abstractmethod
    def fold(self) -> FoldedHead:
        """The head as it is served: plain matrices, the same vectors (≤ 1e-5), no classifier."""

    @abstractmethod
    def start_at(self, weight: Tensor, order: Tensor | None = None) -> Tensor:
        """Sets the head so that ``compatible`` begins near the direction of ``weight @ x``.

        Args:
            weight: (old_dim, d) map of vectors x to the old space, of orthonormal rows (or columns).
            order: (old_dim, old_dim) orthogonal, its columns directions of the old space, the least
                important first; only BT² heads care.

        Returns:
            (in_dim, d) float32 matrix E: the head is to be given E x.

        Raises:
            ConfigError: If a shape does not fit, or the head is compatible with nothing.
        """

    def forward(self, features: Tensor) -> HeadOutput:
        """Maps (n, in_dim) features of a backbone to a :class:`HeadOutput`.

        Raises:
            SpaceMismatchError: If the dimension is not ``in_dim``.
        """
        if features.ndim != 2 or features.shape[1] != self.in_dim:
            raise SpaceMismatchError(
                f"the {self.kind} head takes features of the shape (n, {self.in_dim}), "
                f"got {tuple(features.shape)}"
            )
        with torch.autocast(features.device.type, enabled=False):
            seen, full = self.embedded(features if features.dtype == torch.float64 else features.float())
            logits = self.classifier(seen) if self.classifier is not None else None
        return HeadOutput(seen, full[:, : self.old_dim] if self.old_dim else None, full, logits)

    def embed(self, features: Tensor, space: Space = "new") -> Tensor:
        """Maps (n, in_dim) features to unit rows.

        Args:
            features: Features of a backbone.
            space: ``"new"`` for the whole vectors (n, out_dim), ``"old"`` for the compatible (n, old_dim).

        Raises:
            ConfigError: If there is no such space.
            SpaceMismatchError: If the dimension is not ``in_dim``.
        """
        dims = {"new": self.out_dim, "old": self.old_dim}.get(space, 0)
        if not dims:
            raise ConfigError(
                f"space {space!r} is not one that the {self.kind} head embeds into; "
                f"there is {'new, old' if self.old_dim else 'new'}"
            )
        return normalize(self(features).full[:, :dims], dim=1)

    def _write(self, directory: Path, naming: Naming, card: CardData) -> None:
        saving.save(self, directory)

    def _facts(self, card: CardData) -> CardFacts:
        return saving.facts(self)

    @classmethod
    def _read(cls, directory: Path, device: str | torch.device) -> Self:
        return saving.load(directory, cls).to(device)


def make_head(kind: str, options: Mapping[str, Any]) -> CompatibleHead:
    """Builds a head, its weights drawn anew.

    Args:
        kind: ``"independent"``, ``"bct"``, ``"bt2"`` or ``"oca"``.
        options: Its keyword arguments, as :meth:`CompatibleHead.options` returns them.

    Raises:
        ConfigError: If the kind or an option is not known, or a value cannot be used.
    """
    if not isinstance(kind, str) or kind not in CompatibleHead._kinds:
        raise ConfigError(f"head {kind!r} is not known; there is {', '.join(sorted(CompatibleHead._kinds))}")
    if not isinstance(options, Mapping):
        raise ConfigError(f"the options of the {kind} head must be a mapping, got {options!r}")
    try:
        return CompatibleHead._kinds[kind](**options)
    except TypeError as error:
        raise ConfigError(f"the options of the {kind} head cannot be used: {error}") from error


def option_names(kind: object) -> tuple[str, ...]:
    """The keyword arguments of a kind of head; none for a kind that is not known."""
    head = CompatibleHead._kinds.get(kind) if isinstance(kind, str) else None
    return () if head is None else tuple(inspect.signature(head).parameters)


def require_at_least(name: str, value: int, least: int) -> None:
    """Checks a whole number.

    Raises:
        ConfigError: If it is no whole number, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
