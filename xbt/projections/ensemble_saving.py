"""The files of a query ensemble: its config, its tensors, and what its card says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from xbt.errors import XbtError
from xbt.hub import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CardFacts,
    Naming,
    SavedConfig,
    SavedPartError,
    build_and_load,
    check_digests,
    digests,
    public_name,
    quoted,
    save_weights,
    write_config,
)
from xbt.projections.combinations import Combination, combination_from_dict, keys_of_mode
from xbt.version import __version__

if TYPE_CHECKING:
    from xbt.projections.ensemble import QueryEnsemble

EnsembleT = TypeVar("EnsembleT", bound="QueryEnsemble")

_KIND = "query_ensemble"
_KEYS = ("xbt_version", "kind", "old_dim", "directions", "old_space")

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


def save(ensemble: QueryEnsemble, directory: Path, naming: Naming) -> None:
    """Writes config and tensors."""
    save_weights(ensemble, directory / WEIGHTS_NAME)
    directions = {
        direction: {
            **combination.to_dict(),
            "tensors": {name: list(each.shape) for name, each in ensemble.tensors(direction).items()},
        }
        for direction, combination in ensemble.directions.items()
    }
    space = ensemble.old_space
    config = {
        "xbt_version": __version__,
        "kind": _KIND,
        "old_dim": ensemble.old_dim,
        "directions": directions,
        "old_space": space.to_dict() | {"model": naming(space.model)} if space else None,
        "sha256": digests(directory, [WEIGHTS_NAME]),
    }
    write_config(directory / CONFIG_NAME, config)


def load(directory: Path, kind: type[EnsembleT]) -> EnsembleT:
    """Builds the ensemble that :func:`save` wrote and loads its tensors, strictly.

    Raises:
        SavedPartError: If a file is missing, damaged, changed, of another kind, or does not fit the other.
    """
    file = directory / CONFIG_NAME
    config = SavedConfig(file)
    if config.values.get("kind") != _KIND:
        raise SavedPartError(f"{file} is of kind {config.values.get('kind')!r}, not a query ensemble")
    values = config.known(_KEYS, ["sha256"])
    space = config.space("old_space")
    try:
        ensemble = build_and_load(
            directory / WEIGHTS_NAME,
            lambda: kind(int(values["old_dim"]), *_directions(config, values["directions"]), space),
            file,
        )
    except SavedPartError:
        raise
    except (XbtError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise SavedPartError(f"{file} does not describe a query ensemble: {error}") from error
    check_digests(directory, values.get("sha256"))
    return ensemble


def _directions(
    config: SavedConfig, described: dict[str, Any]
) -> tuple[dict[str, Combination], dict[str, dict[str, Tensor]]]:
    """The combinations a config describes, and zeros where their tensors will be."""
    directions: dict[str, Combination] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for direction, entry in described.items():
        numbers = keys_of_mode(entry.get("mode"))
        # A mode that is not known is left for what follows to refuse.
        known = {*numbers, "mode", "tensors"} if numbers else set(entry)
        values = config.only(entry, known, f"directions.{direction}")
        shapes = {name: tuple(map(int, shape)) for name, shape in values.pop("tensors").items()}
        directions[direction] = combination_from_dict(values)
        # Expanded zeros take no memory before the shape has been checked.
        tensors[direction] = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    return directions, tensors


def facts(ensemble: QueryEnsemble) -> CardFacts:
    """What the card of an ensemble says."""
    space = ensemble.old_space
    old = quoted(public_name(space.model)) if space else "an older model"
    rules = "; ".join(f"{direction}: {each.mode}" for direction, each in ensemble.directions.items())
    return CardFacts(
        title="Old and new queries combined",
        summary=(
            f"A query ensemble made with xbt: it combines what {old} makes of a query with what a newer "
            "model, projected into the same space, makes of it, and the gallery stays as it is."
        ),
        snippet=_SNIPPET.format(dim=ensemble.old_dim, direction=next(iter(ensemble.directions))),
        method=(
            f"The rule per direction is {rules}. Spherical and linear interpolation of old and new queries "
            "follow "
            '"SLERP for backward-compatible multimodal retrieval" '
            "([arXiv 2609.39836](https://arxiv.org/abs/2609.39836))."
        ),
        limits=_LIMITS,
        spaces={"old": space},
        tags=("clip", "query-ensemble"),
    )
