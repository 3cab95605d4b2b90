"""Projection and ensemble as one module that can be traced: vectors in, a query vector out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

from xbt.projections import HeadProjection, Projection
from xbt.projections.base import Modality
from xbt.projections.combinations import Adaptive, Combination
from xbt.projections.ensemble import QueryEnsemble, direction_of


class WholeAdaptive(Adaptive):
    """As :class:`Adaptive`; confidence is computed for all queries at once, since a graph has no loop."""

    def shares(self, old: Tensor, new: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See :meth:`Combination.shares`."""
        confidence_gap = None
        if self.confidence:
            reference = tensors["reference"]
            confidence_gap = _confidence(new, reference) - _confidence(old, reference)
        beta = self.weights((old * new).sum(dim=-1, keepdim=True), confidence_gap)
        return 1 - beta, beta


class _HeadMap(nn.Module):
    """The map of a :class:`HeadProjection` without its training parts."""

    def __init__(self, projection: HeadProjection) -> None:
        super().__init__()
        self.embedding, self.head = projection.embedding, projection.head
        for name, child in list(self.head.named_children()):
            if parametrize.is_parametrized(child, "weight"):
                setattr(self.head, name, _plain(child))
        self.whole = projection.output == "full"

    def project(self, vectors: Tensor, modality: Modality | None = None) -> Tensor:
        """As :meth:`Projection.project`."""
        full: Tensor = self.head.embedded(self.embedding(vectors))[1]
        return full if self.whole else full[:, : self.head.old_dim]


def _plain(layer: nn.Module) -> nn.Linear:
    """A layer with the matrix that a parametrised one has; that one's copies share its class, so it stays."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made.requires_grad_(False)


class QueryGraph(nn.Module):
    """What :class:`~xbt.compatible.CompatibleEncoder` makes of its encoders' vectors, for one modality.

    The parts are copied, in float32 on the CPU, so that nothing that is exported changes.

    Args:
        projection: The map.
        ensemble: How its queries are combined with the old ones, or ``None``.
        modality: ``"text"`` or ``"image"``.

    Raises:
        ConfigError: If the ensemble was not made for queries of this modality.

    Attributes:
        takes_new: Whether new vectors are an input.
        takes_old: Whether old vectors are an input; it comes last.
    """

    def __init__(self, projection: Projection, ensemble: QueryEnsemble | None, modality: Modality) -> None:
        super().__init__()
        copied = copy.deepcopy(projection).float().cpu().eval().requires_grad_(False)
        self.map = _HeadMap(copied) if isinstance(copied, HeadProjection) else copied
        self.modality = modality
        self.combination: Combination | None = None
        self.takes_new, self.takes_old = True, False
        self.names: list[str] = []
        if ensemble is not None:
            direction = direction_of(modality)
            self.combination = _traceable(ensemble.combination(direction))
            self.takes_new = self.combination.needs_new
            self.takes_old = self.combination.needs_old
            for name, tensor in ensemble.tensors(direction).items():
                self.register_buffer(name, tensor.detach().float().cpu().clone())
                self.names.append(name)

    def forward(self, *vectors: Tensor) -> Tensor:
        """(n, new_dim) new vectors, then (n, old_dim) old ones, each where it is needed → unit rows."""
        new = self.map.project(vectors[0], self.modality) if self.takes_new else None
        if self.combination is None:
            assert new is not None
            return normalize(new, dim=-1)
        old = normalize(vectors[-1], dim=-1) if self.takes_old else None
        tensors = {name: self.get_buffer(name) for name in self.names}
        return normalize(self.combination.combine(old, new, tensors), dim=-1)


def _traceable(combination: Combination) -> Combination:
    if not isinstance(combination, Adaptive):
        return combination
    return WholeAdaptive(**{field.name: getattr(combination, field.name) for field in fields(combination)})


def _confidence(queries: Tensor, reference: Tensor) -> Tensor:
    scores = queries @ reference.T
    mean = scores.mean(dim=1, keepdim=True)
    spread = (scores - mean).square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6)
    result: Tensor = (scores.amax(dim=1, keepdim=True) - mean) / spread
    return result


def example_inputs(graph: QueryGraph, new_dim: int, old_dim: int, rows: int) -> tuple[Tensor, ...]:
    """Unit rows for a graph's inputs, the same every time."""
    generator = torch.Generator().manual_seed(0)
    dims = [dim for dim, taken in ((new_dim, graph.takes_new), (old_dim, graph.takes_old)) if taken]
    return tuple(normalize(torch.randn(rows, dim, generator=generator), dim=1) for dim in dims)
