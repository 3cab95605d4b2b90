"""Base class of heads: input and output, embedding into the old or the new space, saving."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from xbt.errors import ConfigError, SpaceMismatchError
from xbt.heads.orthogonal import checked_map, stacked
from xbt.hub import CardData, CardFacts, HubArtifact, Naming, SavedConfig

Space = Literal["old", "new"]
"""Space of a head's vectors: ``"old"`` is comparable with the old model, ``"new"`` is its own."""

_SNIPPET = """import torch
from xbt.heads import CompatibleHead

head = CompatibleHead.from_pretrained({{source}})
vectors = head.embed(torch.randn(2, {in_dim}))  # (2, {out_dim}) unit rows of a backbone's features"""


@dataclass(frozen=True)
class HeadOutput:
    """Output of a head for a batch.

    Attributes:
        features: (n, feature dim), unit rows, the input of the classifier.
        compatible: (n, old_dim), comparable with the old model's vectors, not normalised; bitwise
            ``full[:, :old_dim]``. ``None`` for an independent head.
        full: (n, out_dim), the vectors that a gallery stores for new items.
        logits: (n, n_classes), or ``None`` without a classifier.
    """

    features: Tensor
    compatible: Tensor | None
    full: Tensor
    logits: Tensor | None


class CompatibleHead(nn.Module, HubArtifact):
    """Last part of a model: maps a backbone's features to vectors with compatible leading coordinates.

    It computes in float32 (or float64), also under autocast: in half precision an orthogonal matrix is not
    orthogonal. A subclass keeps every argument of its constructor as an attribute of that name.

    Args:
        in_dim: Dimension of the input features.
        old_dim: Dimension of the old model's vectors; 0 for an independent head.
        out_dim: Dimension of the output vectors.
        feature_dim: Dimension of the classifier's input.
        n_classes: Number of classes; ``None`` for no classifier.

    Raises:
        ConfigError: If a number is too small.
    """

    format_name = "compatible_head"
    config_keys = ("kind", "options")
    kind: ClassVar[str]
    paper: ClassVar[str]
    """Name and source of the method, for a model card."""
    no_decay: ClassVar[tuple[str, ...]] = ("parametrizations",)
    """Parts of the names of parameters without weight decay: those of orthogonal matrices. Decay would pull
    the matrix back to its start, and destroy its Householder form."""
    _kinds: ClassVar[dict[str, type[CompatibleHead]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        CompatibleHead._kinds[cls.kind] = cls

    def __init__(
        self, *, in_dim: int, old_dim: int, out_dim: int, feature_dim: int, n_classes: int | None
    ) -> None:
        super().__init__()
        if n_classes is not None:
            require_at_least(1, n_classes=n_classes)
        self.in_dim, self.old_dim, self.out_dim, self.n_classes = in_dim, old_dim, out_dim, n_classes
        self.classifier = nn.Linear(feature_dim, n_classes, bias=False) if n_classes else None

    def embedded(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n, in_dim) to the classifier's input (n, feature dim) and to full vectors (n, out_dim)."""
        unit = normalize(features, dim=1)
        return unit, unit

    def options(self) -> dict[str, Any]:
        """JSON-able keyword arguments that rebuild this head."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def fold(self) -> FoldedHead:
        """Convert to an inference head: plain matrices, the same vectors (≤ 1e-5), no classifier."""
        return FoldedHead(self.in_dim, self.old_dim, self.in_dim)

    def init_from(self, weight: Tensor, order: Tensor | None = None) -> Tensor:
        """Initialise the head so that ``compatible`` starts near the direction of ``weight @ x``.

        Args:
            weight: (old_dim, d) map of vectors x to the old space, with orthonormal rows (or columns).
            order: (old_dim, old_dim) orthogonal matrix; its columns are directions of the old space, the
                least important first. Only BT² heads use it.

        Returns:
            (in_dim, d) float32 matrix E; the input of the head must be E x.

        Raises:
            ConfigError: If a shape does not fit, or the head is independent.
        """
        if not self.old_dim:
            raise ConfigError(
                "an independent head has no old model, so it cannot be initialised from a map; "
                "take a bct, bt2 or oca head"
            )
        return stacked(checked_map(weight, self.old_dim), self.in_dim)

    def forward(self, features: Tensor) -> HeadOutput:
        """Map (n, in_dim) features of a backbone to a :class:`HeadOutput`.

        Raises:
            SpaceMismatchError: If the dimension is not ``in_dim``.
        """
        if features.ndim != 2 or features.shape[1] != self.in_dim:
            raise SpaceMismatchError(
                f"the {self.kind} head takes features of the shape (n, {self.in_dim}), "
                f"got {tuple(features.shape)}"
            )
        with torch.autocast(features.device.type, enabled=False):
            class_features, full = self.embedded(
                features if features.dtype == torch.float64 else features.float()
            )
            logits = self.classifier(class_features) if self.classifier is not None else None
        return HeadOutput(class_features, full[:, : self.old_dim] if self.old_dim else None, full, logits)

    def embed(self, features: Tensor, space: Space = "new") -> Tensor:
        """Map (n, in_dim) features to unit rows.

        Args:
            features: Features of a backbone.
            space: ``"new"`` for full vectors (n, out_dim), ``"old"`` for compatible ones (n, old_dim).

        Raises:
            ConfigError: If there is no such space.
            SpaceMismatchError: If the dimension is not ``in_dim``.
        """
        dims = _dims_of(space, self)
        return normalize(self(features).full[:, :dims], dim=1)

    def _config(self, naming: Naming, card: CardData) -> dict[str, Any]:
        return described_head(self)

    @classmethod
    def _build(cls, config: SavedConfig) -> CompatibleHead:
        return build_head(config, config.values)

    def _facts(self, card: CardData) -> CardFacts:
        return CardFacts(
            title=f"A head of the kind {self.kind}",
            summary=(
                f"The last part of a model, made with xbt: from {self.in_dim}-d features of a backbone to "
                f"{self.out_dim}-d vectors, of which the leading {self.old_dim} are compatible with an older "
                "model's."
            ),
            snippet=_SNIPPET.format(in_dim=self.in_dim, out_dim=self.out_dim),
            method=self.paper,
            limits=("It is of use only behind the backbone that it was trained with.",),
            tags=("representation-learning",),
            pipeline_tag="feature-extraction",
        )


def make_head(kind: str, options: Mapping[str, Any]) -> CompatibleHead:
    """Build a head with random weights.

    Args:
        kind: ``"independent"``, ``"bct"``, ``"bt2"`` or ``"oca"``.
        options: Its keyword arguments; see :meth:`CompatibleHead.options`.

    Raises:
        ConfigError: If the kind or an option is unknown, or a value cannot be used.
    """
    if not isinstance(kind, str) or kind not in CompatibleHead._kinds:
        raise ConfigError(f"head {kind!r} is not known; there is {', '.join(sorted(CompatibleHead._kinds))}")
    if not isinstance(options, Mapping):
        raise ConfigError(f"the options of the {kind} head must be a mapping, got {options!r}")
    try:
        return CompatibleHead._kinds[kind](**options)
    except TypeError as error:
        raise ConfigError(f"the options of the {kind} head cannot be used: {error}") from error


def described_head(head: CompatibleHead) -> dict[str, Any]:
    """The section of a config from which :func:`build_head` builds the head."""
    return {"kind": head.kind, "options": head.options()}


def build_head(config: SavedConfig, section: Mapping[str, Any], where: str = "options") -> CompatibleHead:
    """Build the head that a section of a config describes; its weights are random.

    Args:
        config: The config.
        section: What :func:`described_head` returned.
        where: Name of the section's options.
    """
    kind, options = section["kind"], section["options"]
    return make_head(kind, known_options(config, kind, options, where))


def known_options(config: SavedConfig, kind: object, options: Any, where: str) -> Any:
    """A head's options without those of newer versions of xbt.

    What is no mapping is returned as it is; :func:`make_head` refuses it.
    """
    head = CompatibleHead._kinds.get(kind) if isinstance(kind, str) else None
    if head is None or not isinstance(options, dict):
        return options
    return config.only(options, inspect.signature(head).parameters, where)


def _dims_of(space: str, head: CompatibleHead | FoldedHead) -> int:
    dims = {"new": head.out_dim, "old": head.old_dim}.get(space, 0)
    if not dims:
        raise ConfigError(
            f"the head has no space {space!r} to embed into; choose {'new, old' if head.old_dim else 'new'}"
        )
    return dims


def require_at_least(minimum: int, **values: object) -> None:
    """Refuse what is not a whole number, or too small, with a ConfigError that names it."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(f"{name} must be a whole number of at least {minimum}, got {value!r}")


def require_dims(new_dim: int, old_dim: int, extra_dims: int) -> None:
    """Refuse dimensions that are too small, or too few for the old vectors, with a ConfigError."""
    require_at_least(1, new_dim=new_dim, old_dim=old_dim)
    require_at_least(0, extra_dims=extra_dims)
    if new_dim + extra_dims < old_dim:
        raise ConfigError(
            f"new_dim {new_dim} and extra_dims {extra_dims} make {new_dim + extra_dims} dimensions, but the "
            f"old vectors have {old_dim}; raise extra_dims to at least {old_dim - new_dim}"
        )


class FoldedHead(nn.Module):
    """A head without parametrisations, classifier or parameters, which embeds as the head did.

    With f = unit(h[:d]) the full vector is f, or M [unit(A relu(h) + a); f] with a matrix M. For BT², M
    combines both rotations and the scale.

    Args:
        in_dim: Dimension of the input features.
        old_dim: Number of compatible leading dimensions; 0 for none.
        feature_dim: d.
        matrix: (out_dim, k + d) M, or ``None`` if the vectors are f.
        code: (k, in_dim) A and (k,) a, or ``None`` for k = 0.
    """

    matrix: Tensor | None
    code_weight: Tensor | None
    code_bias: Tensor | None

    def __init__(
        self,
        in_dim: int,
        old_dim: int,
        feature_dim: int,
        matrix: Tensor | None = None,
        code: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.in_dim, self.old_dim, self.feature_dim = in_dim, old_dim, feature_dim
        self.out_dim = feature_dim if matrix is None else len(matrix)
        self.register_buffer("matrix", None if matrix is None else matrix.detach().clone())
        self.register_buffer("code_weight", None if code is None else code[0].detach().clone())
        self.register_buffer("code_bias", None if code is None else code[1].detach().clone())

    def embed(self, features: Tensor, space: Literal["old", "new"] = "new") -> Tensor:
        """Embed as :meth:`xbt.heads.CompatibleHead.embed` does; computes only the requested dimensions.

        Raises:
            ConfigError: If there is no such space.
            SpaceMismatchError: If the dimension is not ``in_dim``.
        """
        dims = _dims_of(space, self)
        if features.ndim != 2 or features.shape[1] != self.in_dim:
            raise SpaceMismatchError(
                f"the folded head takes features of the shape (n, {self.in_dim}), got {tuple(features.shape)}"
            )
        vectors = normalize(features[:, : self.feature_dim], dim=1)
        if self.code_weight is not None:
            code = normalize(linear(features.relu(), self.code_weight, self.code_bias), dim=1)
            vectors = torch.cat([code, vectors], dim=1)
        vectors = vectors[:, :dims] if self.matrix is None else linear(vectors, self.matrix[:dims])
        return normalize(vectors, dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, in_dim) features to full vectors, (n, out_dim) unit rows."""
        return self.embed(features)
