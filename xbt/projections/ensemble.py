"""Combining the old model's query with the projected new one, per direction of search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from xbt.errors import ConfigError, DataError, SpaceMismatchError
from xbt.evaluation.cells import DIRECTIONS
from xbt.hub import (
    CardData,
    CardFacts,
    HubArtifact,
    Naming,
    SavedConfig,
    described_space,
    public_name,
    quoted,
)
from xbt.projections.base import Modality
from xbt.projections.combinations import (
    MAX_REFERENCE,
    Adaptive,
    Combination,
    Linear,
    Nlerp,
    Slerp,
    combination_from_dict,
    keys_of_mode,
)
from xbt.space import EmbeddingSpace
from xbt.vectors import unit_rows

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Direction → name → what a combination needs beyond its numbers."""


class QueryEnsemble(nn.Module, HubArtifact):
    """Old and projected new query vectors in, one query vector for the old gallery out.

    The gallery stays as it is; the price is the old query tower, unless the old query's vector is at hand.
    The formulas of the modes are in :mod:`xbt.projections.combinations`.

    Args:
        old_dim: Dimension of the old space.
        directions: The combination for ``"T2I"`` (text queries), for ``"I2T"`` (image queries), or for both.
        tensors: Per direction, ``"reference"`` (2 to 4,096 rows of the gallery, (m, old_dim)) for
            :class:`Adaptive` with a confidence term; ``"old_matrix"`` and ``"new_matrix"`` (old_dim, old_dim)
            for :class:`Linear`.
        old_space: The space the vectors live in.

    Attributes:
        directions: The combinations, by direction.

    Raises:
        ConfigError: If there is no direction or an unknown one.
        DataError: If a tensor is missing, not asked for, of another shape, or not finite.
        SpaceMismatchError: If the space's dimension is not ``old_dim``.
    """

    format_name = "query_ensemble"
    config_keys = ("old_dim", "directions", "old_space")

    def __init__(
        self,
        old_dim: int,
        directions: Mapping[str, Combination],
        tensors: Tensors | None = None,
        old_space: EmbeddingSpace | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(directions) - set(DIRECTIONS))
        if unknown or not directions:
            raise ConfigError(
                f"an ensemble has the directions 'T2I' and 'I2T' or one of them, not {sorted(directions)}"
            )
        if old_space is not None and old_space.dim != old_dim:
            raise SpaceMismatchError(
                f"the ensemble combines {old_dim}-d vectors, but its space is {old_space}"
            )
        self.old_dim = old_dim
        self.old_space = old_space
        self.directions = {name: directions[name] for name in DIRECTIONS if name in directions}
        given = tensors or {}
        for direction in sorted(set(given) - set(self.directions)):
            raise DataError(f"there are tensors for {direction!r}, but no combination; leave them out")
        for direction, combination in self.directions.items():
            self._keep(direction, combination.tensors(old_dim), given.get(direction, {}))

    def _keep(
        self, direction: str, needed: dict[str, tuple[int | None, int]], given: Mapping[str, Tensor]
    ) -> None:
        mode = self.directions[direction].mode
        if set(needed) != set(given):
            raise DataError(
                f"the {mode} ensemble of {direction} needs the tensors {sorted(needed)}, but was given "
                f"{sorted(given)}"
            )
        for name, (rows, dim) in needed.items():
            tensor = given[name].detach().float()
            fits = tensor.ndim == 2 and tensor.shape[1] == dim
            if not fits or not (len(tensor) == rows if rows else 2 <= len(tensor) <= MAX_REFERENCE):
                shape = (rows or f"2 to {MAX_REFERENCE}", dim)
                raise DataError(f"{name} of {direction} has the shape {tuple(tensor.shape)}, not {shape}")
            if not bool(torch.isfinite(tensor).all()):
                raise DataError(f"{name} of {direction} holds NaN or infinite values; make it again")
            # A copy: two directions may be given one tensor, and safetensors refuses shared memory.
            self.register_buffer(_buffer(direction, name), tensor.clone().contiguous())

    @classmethod
    def midpoint(cls, old_dim: int, old_space: EmbeddingSpace | None = None) -> Self:
        """The mean of both queries in both directions, which needs no labelled pairs."""
        return cls(old_dim, dict.fromkeys(DIRECTIONS, Nlerp(0.5)), old_space=old_space)

    def needs_old(self, direction: str) -> bool:
        """True if queries of a direction need the old model's vector.

        Raises:
            DataError: If there is no such direction.
            ConfigError: If the ensemble was not made for it.
        """
        return self.combination(direction).needs_old

    def needs_new(self, direction: str) -> bool:
        """True if queries of a direction need the new model's vector; raises as :meth:`needs_old`."""
        return self.combination(direction).needs_new

    def combination(self, direction: str) -> Combination:
        """The combination of a direction; raises as :meth:`needs_old`."""
        if direction not in DIRECTIONS:
            raise DataError(f"there is no direction {direction!r}; use 'T2I' or 'I2T'")
        if direction not in self.directions:
            raise ConfigError(
                f"the ensemble was made for {' and '.join(self.directions)} alone, not for {direction}; "
                f"fit it on pairs that have {direction} queries"
            )
        return self.directions[direction]

    def tensors(self, direction: str) -> dict[str, Tensor]:
        """Tensors that the direction's combination needs beyond its numbers, by name."""
        names = self.combination(direction).tensors(self.old_dim)
        return {name: self.get_buffer(_buffer(direction, name)) for name in names}

    def forward(self, old: Tensor | None, new: Tensor | None, direction: str) -> Tensor:
        """Combines the two vectors of every query.

        Args:
            old: (n, old_dim) vectors of the old model; ``None`` where :meth:`needs_old` is false.
            new: (n, old_dim) projected vectors of the new model, as :meth:`Projection.project` returns them.
                Their length matters only to ``Slerp(padded=True)``; for all else a projection's unit rows do
                as well. ``None`` where :meth:`needs_new` is false.
            direction: ``"T2I"`` for text queries, ``"I2T"`` for image queries.

        Returns:
            (n, old_dim) unit rows; float32, or float64 if the vectors are.

        Raises:
            DataError: If a vector that is needed is not given, or not as many of both.
            SpaceMismatchError: If a dimension is not ``old_dim``.
            ConfigError: If the ensemble was not made for the direction.
        """
        combination = self.combination(direction)
        sides = {
            "old": self._rows(old, "old", direction) if combination.needs_old else None,
            "new": self._rows(new, "projected new", direction) if combination.needs_new else None,
        }
        first, second = sides["old"], sides["new"]
        if first is not None and second is not None:
            if len(first) != len(second):
                raise DataError(
                    f"there are {len(first)} old and {len(second)} new vectors; give both for each query"
                )
            dtype = torch.promote_types(first.dtype, second.dtype)
            first, second = first.to(dtype), second.to(dtype)
        unit = None if first is None else unit_rows(first)
        return unit_rows(combination.combine(unit, second, self.tensors(direction)))

    def _rows(self, vectors: Tensor | None, name: str, direction: str) -> Tensor:
        if vectors is None:
            raise DataError(
                f"the ensemble's {direction} queries need the {name} query vectors "
                f"({self.directions[direction]}); give them"
            )
        if vectors.ndim != 2 or vectors.shape[1] != self.old_dim:
            raise SpaceMismatchError(
                f"the ensemble takes (n, {self.old_dim}) vectors"
                + (f" of {self.old_space}" if self.old_space else "")
                + f", but the {name} queries have the shape {tuple(vectors.shape)}"
            )
        return vectors if vectors.dtype == torch.float64 else vectors.float()

    def _config(self, naming: Naming, card: CardData) -> dict[str, Any]:
        directions = {
            direction: {
                **combination.to_dict(),
                "tensors": {name: list(rows.shape) for name, rows in self.tensors(direction).items()},
            }
            for direction, combination in self.directions.items()
        }
        return {
            "old_dim": self.old_dim,
            "directions": directions,
            "old_space": described_space(self.old_space, naming),
        }

    @classmethod
    def _build(cls, config: SavedConfig) -> QueryEnsemble:
        directions = _saved_directions(config)
        return cls(int(config.values["old_dim"]), *directions, config.space("old_space"))

    def _facts(self, card: CardData) -> CardFacts:
        space = self.old_space
        old = quoted(public_name(space.model)) if space else "an older model"
        rules = "; ".join(f"{direction}: {rule.mode}" for direction, rule in self.directions.items())
        return CardFacts(
            title="Old and new queries combined",
            summary=(
                f"A query ensemble made with xbt: it combines what {old} makes of a query with what a newer "
                "model, projected into the same space, makes of it, and the gallery stays as it is."
            ),
            snippet=_SNIPPET.format(dim=self.old_dim, direction=next(iter(self.directions))),
            method=(
                f"The rule per direction is {rules}. Spherical and linear interpolation of old and new "
                'queries follow "SLERP for backward-compatible multimodal retrieval" '
                "([arXiv 2609.39836](https://arxiv.org/abs/2609.39836))."
            ),
            limits=_LIMITS,
            spaces={"old": space},
            tags=("clip", "query-ensemble"),
        )


def direction_of(modality: Modality) -> str:
    """The direction in which queries of a modality search: texts T2I, images I2T."""
    return "T2I" if modality == "text" else "I2T"


def _buffer(direction: str, name: str) -> str:
    return f"{direction.lower()}_{name}"


__all__ = [
    "MAX_REFERENCE",
    "Adaptive",
    "Combination",
    "Linear",
    "Nlerp",
    "QueryEnsemble",
    "Slerp",
    "direction_of",
]

_SNIPPET = """import torch
from xbt import QueryEnsemble

ensemble = QueryEnsemble.from_pretrained({{source}})
old, new = torch.randn(2, {dim}), torch.randn(2, {dim})  # here: the same two queries, old and projected new
queries = ensemble(old, new, "{direction}")  # (2, {dim}) unit rows: search the old gallery with them"""

_LIMITS = (
    "Its vectors are queries and not for storing.",
    "It combines vectors of the old model with new ones that a projection has mapped into its space, and no "
    "others.",
    "Where it needs the old model's vector, that model runs on every query as well, unless its vectors are "
    "kept.",
)


def _saved_directions(
    config: SavedConfig,
) -> tuple[dict[str, Combination], dict[str, dict[str, Tensor]]]:
    """The combinations a config describes, and zeros where their tensors will be."""
    directions: dict[str, Combination] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for direction, entry in config.values["directions"].items():
        numbers = keys_of_mode(entry.get("mode"))
        # A mode that is not known is left for what follows to refuse.
        keys = {*numbers, "mode", "tensors"} if numbers else set(entry)
        values = config.only(entry, keys, f"directions.{direction}")
        shapes = {name: tuple(map(int, shape)) for name, shape in values.pop("tensors").items()}
        directions[direction] = combination_from_dict(values)
        # Expanded zeros take no memory before the shape has been checked.
        tensors[direction] = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    return directions, tensors
