"""Base of every projection: one map for texts and images, two spaces, one way to be saved."""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from xbt.encoders.configs import hub_repository
from xbt.errors import DataError, SavedPartError, SpaceMismatchError
from xbt.hub import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CardData,
    CardFacts,
    HubArtifact,
    Naming,
    SavedConfig,
    described_space,
    public_name,
    quoted,
)
from xbt.space import EmbeddingSpace
from xbt.vectors import Vectors, as_floating, require_finite, unit_rows

Modality = Literal["text", "image"]

_GIVEN = "vectors to project"

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "LinearProjection", "Modality", "Projection"]


class Projection(nn.Module, HubArtifact):
    """A map from the new space into the old one, the same for texts and images.

    ``projection(new_vectors)`` takes (n, new_dim) vectors, as models, stores and files give them, and returns
    (n, old_dim) unit rows. Some maps add another offset to images than to texts;
    ``projection(new_vectors, "image")`` asks for it.

    Attributes:
        new_space: The space the projection maps from, if known.
        old_space: The space the projection maps to, if known.
        method: The name of the method that fitted it, if known; a model card names it.
    """

    format_name = "projection"
    config_keys = ("kind", "method", "new_dim", "old_dim", "options", "new_space", "old_space")
    kind: ClassVar[str]
    method: str | None = None
    _kinds: ClassVar[dict[str, type[Projection]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Projection._kinds[cls.kind] = cls

    def __init__(
        self,
        new_dim: int,
        old_dim: int,
        new_space: EmbeddingSpace | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        super().__init__()
        self.new_dim, self.old_dim = new_dim, old_dim
        self.new_space: EmbeddingSpace | None = None
        self.old_space: EmbeddingSpace | None = None
        self.set_spaces(new_space, old_space)

    def set_spaces(self, new_space: EmbeddingSpace | None, old_space: EmbeddingSpace | None) -> None:
        """Attaches the spaces the projection maps between.

        Raises:
            SpaceMismatchError: If a space's dimension is not the projection's.
        """
        for space, dim, side in ((new_space, self.new_dim, "new"), (old_space, self.old_dim, "old")):
            if space is not None and space.dim != dim:
                raise SpaceMismatchError(
                    f"the projection maps {self.new_dim} → {self.old_dim} dimensions, "
                    f"but its {side} space is {space}"
                )
        self.new_space, self.old_space = new_space, old_space

    @abstractmethod
    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """(n, new_dim) → (n, old_dim), before normalisation."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Keyword arguments beyond the dimensions and spaces that rebuild this projection."""

    def forward(self, vectors: Vectors, modality: Modality | None = None) -> Tensor:
        """Maps (n, new_dim) vectors of the new space to (n, old_dim) unit rows of the old space.

        A row that is mapped to zero has no direction and comes out as zeros, not as a unit row: under a map
        without offset every zero row does so, under one with an offset a zero row comes out as the offset's
        direction, which says nothing of the item. Values are looked at in evaluation mode on the CPU only;
        elsewhere, where it would make a training step or a GPU wait, a row with NaN comes out as NaN.

        Args:
            vectors: (n, new_dim) tensor or numpy array of any float dtype, or one vector of (new_dim,);
                gradients flow into a tensor.
            modality: ``"text"`` or ``"image"``, for maps that tell them apart; ``None`` is taken as text.

        Returns:
            (n, old_dim) tensor, or (old_dim,) for one vector, of the dtype of the projection's weights:
            float32 unless it was converted.

        Raises:
            DataError: If the vectors are not floating point or not dense, or where it is looked for, a value
                is NaN or infinite; the message names the first such row.
            SpaceMismatchError: If the dimension is not ``new_dim``.
        """
        rows = self._taken(vectors)
        if not self._watched(rows) and _is_extreme(rows):
            # In fp32, products of very short rows vanish and those of very long ones overflow.
            exact = copy.deepcopy(self).double()
            return unit_rows(exact.project(rows.double(), modality)).to(rows.dtype)
        return unit_rows(self.project(rows, modality))

    def _watched(self, rows: Tensor) -> bool:
        """Tells where a branch on values would break a graph, or make a training step or a GPU wait."""
        graph = rows.requires_grad or torch.compiler.is_compiling()
        return self.training or graph or rows.device.type != "cpu"

    def _taken(self, vectors: Vectors) -> Tensor:
        """Vectors in the dtype of the weights, after the checks of :meth:`forward`.

        Raises:
            SpaceMismatchError: If the dimension is not ``new_dim``.
        """
        rows = as_floating(vectors, _GIVEN)
        if rows.ndim == 0:
            raise DataError(f"{_GIVEN} must have the shape (n, dim) or (dim,), got a single number")
        if rows.shape[-1] != self.new_dim:
            raise SpaceMismatchError(
                f"the projection takes vectors of dimension {self.new_dim}"
                + (f" from {self.new_space}" if self.new_space else "")
                + f", got {rows.shape[-1]}"
            )
        weights = next(self.parameters())
        if isinstance(vectors, np.ndarray):
            rows = rows.to(weights.device)
        rows = rows.to(weights.dtype)
        if not self._watched(rows):
            require_finite(rows.reshape(-1, self.new_dim), _GIVEN)
        return rows

    def _config(self, naming: Naming, card: CardData) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "method": self.method,
            "new_dim": self.new_dim,
            "old_dim": self.old_dim,
            "options": self.options(),
            "new_space": described_space(self.new_space, naming),
            "old_space": described_space(self.old_space, naming),
        }

    @classmethod
    def _build(cls, config: SavedConfig) -> Projection:
        values = config.values
        kind = cls._kinds.get(values["kind"]) if isinstance(values["kind"], str) else None
        if kind is None:
            raise SavedPartError(
                f"{config.file} is of kind {values['kind']!r}, not a projection; the known kinds are "
                f"{', '.join(sorted(cls._kinds))}"
            )
        options = kind._options(config)
        spaces = (config.space("new_space"), config.space("old_space"))
        projection = kind(values["new_dim"], values["old_dim"], **options)
        projection.set_spaces(*spaces)
        projection.method = values["method"] if isinstance(values["method"], str) else None
        return projection

    @classmethod
    def _options(cls, config: SavedConfig) -> dict[str, Any]:
        """Options in a config, without those that only a newer xbt knows."""
        names = [name for name in inspect.signature(cls.__init__).parameters if name not in _APART]
        return config.only(config.values["options"], names, "options")

    def _facts(self, card: CardData) -> CardFacts:
        spaces = {"new": self.new_space, "old": self.old_space}
        names = {
            side: quoted(public_name(space.model)) if space else f"the {side} model"
            for side, space in spaces.items()
        }
        base = card.base or (self.new_space.model if self.new_space else "")
        return CardFacts(
            title="A projection into the space of an older model",
            summary=(
                f"A {type(self).__name__} made with xbt: it maps vectors of {names['new']} "
                f"({self.new_dim}-d) into the space of {names['old']} ({self.old_dim}-d), so that a gallery "
                "which the old model embedded can be searched with the new one. Nothing in that gallery "
                "needs to be embedded again. One map serves texts and images."
            ),
            snippet=_SNIPPET.format(new_dim=self.new_dim, old_dim=self.old_dim),
            method=described_method(self.method, self.kind),
            limits=_LIMITS,
            spaces=spaces,
            base=hub_repository(base),
            tags=("clip", "projection"),
            pipeline_tag="feature-extraction",
        )


def _is_extreme(rows: Tensor) -> bool:
    if not rows.numel():
        return False
    largest = rows.detach().abs().amax(dim=-1)
    return bool(((largest > 2.0**40) | ((largest < 2.0**-40) & (largest > 0))).any())


class LinearProjection(Projection):
    """φ(z) = normalise(W z + b), with images maybe at an offset of their own.

    Args:
        new_dim: Dimension of the vectors that come in.
        old_dim: Dimension of the vectors that go out.
        bias: Whether there is an offset b; without one W can be folded into the encoder's last layer.
        image_bias: Whether images have an offset of their own in place of b.
        new_space: The space the projection maps from.
        old_space: The space the projection maps to.

    Attributes:
        weight: (old_dim, new_dim) matrix W.
        bias: (old_dim,) offset b, or ``None``.
        image_bias: (old_dim,) offset of images, or ``None`` where b serves both.
        filled: How many directions of a rotation the vectors it was fitted to do not determine; they were
            filled up. Not saved: 0 once it is loaded.
    """

    kind = "linear"

    def __init__(
        self,
        new_dim: int,
        old_dim: int,
        bias: bool = False,
        image_bias: bool = False,
        new_space: EmbeddingSpace | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        super().__init__(new_dim, old_dim, new_space, old_space)
        self.filled = 0
        self.weight = nn.Parameter(torch.eye(old_dim, new_dim))
        self.bias = nn.Parameter(torch.zeros(old_dim)) if bias else None
        self.image_bias = nn.Parameter(torch.zeros(old_dim)) if image_bias else None

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None = None, image_bias: Tensor | None = None
    ) -> LinearProjection:
        """Wraps an (old_dim, new_dim) matrix and maybe (old_dim,) offsets; kept as float32."""
        projection = LinearProjection(
            weight.shape[1], weight.shape[0], bias is not None, image_bias is not None
        )
        with torch.no_grad():
            projection.weight.copy_(weight)
            if projection.bias is not None and bias is not None:
                projection.bias.copy_(bias)
            if projection.image_bias is not None and image_bias is not None:
                projection.image_bias.copy_(image_bias)
        return projection.eval()

    def extra_repr(self) -> str:
        """Dimensions of the map, for ``print``."""
        return f"{self.new_dim} → {self.old_dim}" + (f", filled={self.filled}" if self.filled else "")

    @property
    def foldable(self) -> bool:
        """True if the map is a matrix alone, so that it can be folded into the encoder's last layer.

        The input is normalised; a matrix whose output is normalised does not notice, an offset would.
        """
        return self.bias is None and self.image_bias is None

    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """(n, new_dim) → (n, old_dim), before normalisation."""
        offset = self.bias if modality != "image" or self.image_bias is None else self.image_bias
        return nn.functional.linear(vectors, self.weight, offset)

    def options(self) -> dict[str, Any]:
        """Offsets: one for all, and one for images."""
        return {"bias": self.bias is not None, "image_bias": self.image_bias is not None}


_APART = ("self", "new_dim", "old_dim", "new_space", "old_space")

_SNIPPET = """import torch
from xbt import Projection

projection = Projection.from_pretrained({{source}})
new_vectors = torch.randn(2, {new_dim})  # here: what the new model made of two queries
queries = projection(new_vectors)  # (2, {old_dim}) unit rows: search the old gallery with them"""

_LIMITS = (
    "It maps vectors of the one model named above, at that revision and with that preprocessing; vectors of "
    "any other model come out as noise.",
    "Queries are not better than the old gallery's vectors allow; what the old model never saw cannot be "
    "found.",
    "It was judged, if at all, on the data named under Results; measure it on your own before you rely on "
    "it.",
)


_METHODS = {
    "identity": "The new vectors as they are, cut or filled up with zeros; nothing was fitted.",
    "mean_shift": (
        "The new vectors moved by the difference of both models' means: query drift compensation (Goswami et "
        "al., 2025, [arXiv 2506.00037](https://arxiv.org/abs/2506.00037))."
    ),
    "procrustes": (
        'The rotation that brings the new vectors nearest to the old ones, in closed form (Schönemann, "A '
        'generalized solution of the orthogonal Procrustes problem", Psychometrika, 1966).'
    ),
    "ridge": (
        'Regularised least squares, in closed form (Hoerl & Kennard, "Ridge Regression: Biased Estimation '
        'for Nonorthogonal Problems", 1970).'
    ),
    "low_rank": (
        "Reduced-rank regression, in closed form (Izenman, 1975), of the form of Drift-Adapter's low-rank "
        "map (Vejendla, 2025, [arXiv 2509.23471](https://arxiv.org/abs/2509.23471))."
    ),
    "whitened_procrustes": (
        'A rotation between whitened vectors, in closed form (Artetxe, Labaka & Agirre, "Generalizing and '
        'Improving Bilingual Word Embedding Mappings with a Multi-Step Framework of Linear Transformations", '
        "2018)."
    ),
    "lambda_orthogonal": (
        "An affine map trained from the Procrustes rotation on under a λ-orthogonality constraint (Ricci, "
        "Biondi, Pernici et al., NeurIPS 2025, [arXiv 2509.16664](https://arxiv.org/abs/2509.16664))."
    ),
    "mlp": (
        "A residual MLP trained from the Procrustes rotation on: Drift-Adapter (Vejendla, EMNLP 2025, "
        "[arXiv 2509.23471](https://arxiv.org/abs/2509.23471))."
    ),
    "xbt": (
        "XBT's projection, pretrained on text (Jang & Lim, \"Towards Cross-modal Backward-compatible "
        'Representation Learning for Vision-Language Models", ICCV 2025, '
        "[arXiv 2405.14715](https://arxiv.org/abs/2405.14715)); its architecture here is xbt's own."
    ),
}
_KINDS = {
    "linear": "One matrix, with an offset if there is one; how it was fitted was not recorded.",
    "residual": f"{_METHODS['xbt']} A rotation plus a gated residual MLP.",
    "head": (
        "The head of a model trained to be backward compatible: BT² (Zhou et al., ICCV 2023, "
        "[arXiv 2211.03989](https://arxiv.org/abs/2211.03989)), OCA (Ricci et al., 2024, "
        "[arXiv 2408.08793](https://arxiv.org/abs/2408.08793)) or BCT (Shen et al., CVPR 2020, "
        "[arXiv 2003.11942](https://arxiv.org/abs/2003.11942)); its config says which."
    ),
    "forward": (
        'A forward map, from old vectors to the new space (Ramanujan et al., "Forward Compatible Training '
        'for Large-Scale Embedding Retrieval Systems", CVPR 2022).'
    ),
}


def described_method(method: str | None, kind: str) -> str:
    """Sentence on how a projection was made, with its paper, as far as it is known."""
    return _METHODS.get(method or "", _KINDS.get(kind, "How it was made was not recorded."))
