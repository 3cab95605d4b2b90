"""Rules that combine one old and one projected new query into one query.

With u the unit old query, v the unit projected new one and a the projected new one before normalisation:

    nlerp     q ∝ (1−β) u + β v
    slerp     q ∝ sin((1−α)θ) u + sin(αθ) v,   θ = ∠(u, v)
    adaptive  q ∝ (1−βᵢ) u + βᵢ v,             βᵢ = σ(b + s ⟨u, v⟩ + c (conf(v) − conf(u)))
    linear    q ∝ (1−β) u + β v + A u + B v

The first three are from "SLERP for backward-compatible multimodal retrieval" (arXiv 2609.39836), where
c = 0; the confidence term and the linear rule are ours. ``conf`` measures the lead of a query's best
score against a sample of the gallery: (highest − mean) / standard deviation.

The paper's text normalises v before its slerp. Its released code pads the gallery with zeros to the new
dimension and rotates with a square matrix, so that a, shorter than one, is what the old space sees of a unit
vector (a, r): there θ = ∠(u, (a, r)), and a new query of which little is seen counts less. ``padded=True`` is
that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from xbt.errors import ConfigError
from xbt.vectors import unit_rows

MAX_REFERENCE = 4096
"""Maximum number of gallery rows that are kept to estimate the confidence of a query."""

_SCORE_BYTES = 64 * 2**20
_CANCELLED = 1e-5


@dataclass(frozen=True)
class Combination(ABC):
    """The rule and the numbers by which the two queries of one direction are combined.

    Attributes:
        mode: The rule's name in a saved config.
    """

    mode: ClassVar[str]

    @property
    def share(self) -> float:
        """Share of the new query, where one number says it; at 0 or 1 one of the two is not needed."""
        return 0.5

    @property
    def needs_old(self) -> bool:
        """True if the old query counts, so that the old query tower has to run."""
        return self.share < 1

    @property
    def needs_new(self) -> bool:
        """True if the new query counts."""
        return self.share > 0

    def tensors(self, old_dim: int) -> dict[str, tuple[int | None, int]]:
        """Name → shape of what the rule needs beyond its numbers; ``None`` is any number of rows."""
        return {}

    @abstractmethod
    def shares(self, old: Tensor, new: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Factors of u and of the new query before they are added, (n, 1) or scalar each.

        Args:
            old: (n, old_dim) unit rows u.
            new: (n, old_dim) rows a as projected; of unit length where :meth:`visible` made them so.
            tensors: What :meth:`tensors` names.
        """

    def visible(self, new: Tensor) -> Tensor:
        """The new query as it enters the sum: v, of unit length."""
        return unit_rows(new)

    def combine(self, old: Tensor | None, new: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        """(n, old_dim) rows from unit old queries and projected new ones; what is not needed may be ``None``.

        Where the two cancel out there is no direction between them, and the one with the larger share (the
        old one, if they are equal) is taken.
        """
        if new is None:
            assert old is not None
            return old
        new = self.visible(new)
        if old is None:
            return self._sum(new.new_zeros(()), new, tensors, new.new_zeros(()), new.new_ones(()))
        first, second = self.shares(old, new, tensors)
        mixed = self._sum(old, new, tensors, first, second)
        lengths = mixed.norm(dim=-1, keepdim=True)
        larger = torch.where(second > first, unit_rows(new), old)
        return torch.where(lengths > _CANCELLED, mixed / lengths.clamp_min(_CANCELLED), larger)

    def _sum(
        self, old: Tensor, new: Tensor, tensors: Mapping[str, Tensor], first: Tensor, second: Tensor
    ) -> Tensor:
        return first * old + second * new

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON-able values."""
        return {"mode": self.mode, **asdict(self)}


@dataclass(frozen=True)
class Nlerp(Combination):
    """The normalised weighted mean; it ranks a gallery like the same mean of the two scores.

    Attributes:
        beta: Share of the new query: 0 is the old query alone, 1 the new one alone.
    """

    mode: ClassVar[str] = "nlerp"
    beta: float = 0.5

    def __post_init__(self) -> None:
        _require_share(self.mode, "beta", self.beta)

    @property
    def share(self) -> float:
        """Share of the new query."""
        return self.beta

    def shares(self, old: Tensor, new: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Factors of both queries, (n, 1) or scalar each."""
        return old.new_tensor(1 - self.beta), old.new_tensor(self.beta)


@dataclass(frozen=True)
class Slerp(Combination):
    """A point on the arc from the old query to the new one.

    Attributes:
        alpha: How far along it: 0 is the old query, 1 the new one.
        padded: Whether the new query counts by the length it was projected to; more than one counts as one.
    """

    mode: ClassVar[str] = "slerp"
    alpha: float = 0.5
    padded: bool = False

    def __post_init__(self) -> None:
        _require_share(self.mode, "alpha", self.alpha)
        _require_flag(self.mode, "padded", self.padded)

    @property
    def share(self) -> float:
        """Share of the new query."""
        return self.alpha

    def visible(self, new: Tensor) -> Tensor:
        """The new query as it enters the sum; with padding the rows as projected, of length 1 at most."""
        if not self.padded:
            return unit_rows(new)
        lengths: Tensor = new.norm(dim=-1, keepdim=True)
        return new / lengths.clamp_min(1)

    def shares(self, old: Tensor, new: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Factors of both queries; both are divided by θ/sin θ, which the normalisation undoes."""
        unseen = (1 - new.square().sum(dim=-1, keepdim=True)).clamp_min(0)
        apart = ((old - new).square().sum(dim=-1, keepdim=True) + unseen).sqrt()
        together = ((old + new).square().sum(dim=-1, keepdim=True) + unseen).sqrt()
        # Exact near 0 and π, unlike the arc cosine; and sin(xθ)/θ has no hole at θ = 0, where this is a lerp.
        angle = 2 * torch.atan2(apart, together) / torch.pi
        x, y = 1 - self.alpha, self.alpha
        return x * torch.sinc(x * angle), y * torch.sinc(y * angle)


@dataclass(frozen=True)
class Adaptive(Combination):
    """A weighted mean whose weight depends on the query.

    Attributes:
        bias: b, the weight's logit before anything is known of the query.
        similarity: s, what the agreement of both queries adds to it.
        confidence: c, the weight of the confidence gap between new and old query; 0 needs no reference.
    """

    mode: ClassVar[str] = "adaptive"
    bias: float = 0.0
    similarity: float = 0.0
    confidence: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _require_number(self.mode, name, value)

    def tensors(self, old_dim: int) -> dict[str, tuple[int | None, int]]:
        """A sample of the gallery, if confidence counts."""
        return {"reference": (None, old_dim)} if self.confidence else {}

    def shares(self, old: Tensor, new: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Factors of both queries, (n, 1) or scalar each."""
        confidence_gap = None
        if self.confidence:
            reference = tensors["reference"].to(old.dtype)
            confidence_gap = confidence(new, reference) - confidence(old, reference)
        beta = self.weights((old * new).sum(dim=-1, keepdim=True), confidence_gap)
        return 1 - beta, beta

    def weights(self, cosines: Tensor, confidence_gap: Tensor | None) -> Tensor:
        """β of every query, from the cosine of its two vectors and the difference of their confidences."""
        logits = self.bias + self.similarity * cosines
        return torch.sigmoid(logits if confidence_gap is None else logits + self.confidence * confidence_gap)


@dataclass(frozen=True)
class Linear(Combination):
    """A weighted mean to which two matrices add what labelled pairs have taught them.

    Attributes:
        beta: Share of the new query in the mean.
        with_old: Whether there is a matrix A for the old query; without it, ``beta=1`` needs no old query.
    """

    mode: ClassVar[str] = "linear"
    beta: float = 0.5
    with_old: bool = True

    def __post_init__(self) -> None:
        _require_share(self.mode, "beta", self.beta)
        _require_flag(self.mode, "with_old", self.with_old)

    @property
    def needs_old(self) -> bool:
        """True if the old query counts."""
        return self.with_old or self.beta < 1

    def tensors(self, old_dim: int) -> dict[str, tuple[int | None, int]]:
        """The matrices A, if it is there, and B."""
        names = ("old_matrix", "new_matrix") if self.with_old else ("new_matrix",)
        return dict.fromkeys(names, (old_dim, old_dim))

    def shares(self, old: Tensor, new: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Factors of both queries; the matrices come on top."""
        return old.new_tensor(1 - self.beta), old.new_tensor(self.beta)

    def _sum(
        self, old: Tensor, new: Tensor, tensors: Mapping[str, Tensor], first: Tensor, second: Tensor
    ) -> Tensor:
        mixed = first * old + second * new + linear(new, tensors["new_matrix"].to(new.dtype))
        return mixed + linear(old, tensors["old_matrix"].to(new.dtype)) if self.with_old else mixed


_MODES: dict[str, type[Combination]] = {each.mode: each for each in (Nlerp, Slerp, Adaptive, Linear)}


def keys_of_mode(mode: object) -> tuple[str, ...]:
    """The numbers a mode has in a saved config; empty for a mode that is not known."""
    known = _MODES.get(mode) if isinstance(mode, str) else None
    return tuple(each.name for each in fields(known)) if known else ()


def combination_from_dict(values: Mapping[str, Any]) -> Combination:
    """The reverse of :meth:`Combination.to_dict`."""
    given = dict(values)
    mode = given.pop("mode", None)
    if mode not in _MODES:
        raise ConfigError(f"there is no ensemble mode {mode!r}; there is {', '.join(_MODES)}")
    try:
        return _MODES[mode](**given)
    except TypeError as error:
        raise ConfigError(f"the ensemble mode {mode!r} does not take {given}: {error}") from error


def confidence(queries: Tensor, reference: Tensor) -> Tensor:
    """(n, 1) distance of each query's best score from its mean, in standard deviations of its scores."""
    rows = max(1, _SCORE_BYTES // (reference.element_size() * len(reference)))
    parts = []
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ reference.T
        spread = scores.std(dim=1, correction=0, keepdim=True).clamp_min(1e-6)
        parts.append((scores.amax(dim=1, keepdim=True) - scores.mean(dim=1, keepdim=True)) / spread)
    return torch.cat(parts) if parts else queries.new_zeros(0, 1)


def _require_number(mode: str, name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(float(value)) < float("inf"):  # type: ignore[arg-type]
        raise ConfigError(f"{name} of the ensemble mode {mode!r} is {value!r}, but must be a finite number")


def _require_share(mode: str, name: str, value: object) -> None:
    _require_number(mode, name, value)
    if not 0 <= value <= 1:  # type: ignore[operator]
        raise ConfigError(f"{name} of the ensemble mode {mode!r} is {value!r}, but must lie in [0, 1]")


def _require_flag(mode: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} of the ensemble mode {mode!r} is {value!r}, but must be true or false")
