"""Fitting a projection by the name of its method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from xbt.errors import ConfigError
from xbt.projections.base import LinearProjection, Projection
from xbt.projections.closed_form import fit_identity, fit_mean_shift, fit_procrustes
from xbt.projections.pairs import PairVectors
from xbt.projections.ridge import fit_low_rank, fit_ridge, fit_whitened_procrustes
from xbt.projections.sources import Source
from xbt.projections.trained import fit_lambda_orthogonal, fit_mlp, fit_xbt
from xbt.space import EmbeddingSpace
from xbt.store.store import EmbeddingStore

_APART = ("new", "old", "pairs")

CLOSED_FORMS: dict[str, Callable[..., LinearProjection]] = {
    "identity": fit_identity,
    "mean_shift": fit_mean_shift,
    "procrustes": fit_procrustes,
    "ridge": fit_ridge,
    "low_rank": fit_low_rank,
    "whitened_procrustes": fit_whitened_procrustes,
}
"""Those that need the vectors' statistics alone, which may be given: of texts, and of images or ``None``."""

METHODS: dict[str, Callable[..., Projection]] = {
    **CLOSED_FORMS,
    "lambda_orthogonal": fit_lambda_orthogonal,
    "mlp": fit_mlp,
    "xbt": fit_xbt,
}
"""Every method: a function from new and old vectors, ``pairs`` where it can use them, and its options."""


def fit_projection(
    new: Source,
    old: Source,
    method: str = "procrustes",
    *,
    pairs: PairVectors | None = None,
    new_space: EmbeddingSpace | None = None,
    old_space: EmbeddingSpace | None = None,
    **options: Any,
) -> Projection:
    """Fit a projection to vectors of the same items under both models.

    To have the method chosen by held-out retrieval, see :func:`~xbt.projections.choose_projection`.

    Args:
        new: Vectors of the new model: (n, new_dim) rows, a store, or an iterable of (k, new_dim) chunks.
        old: Vectors of the old model, row by row for the same items; its chunks need not have the same sizes.
        method: The name of a method; :data:`METHODS` has their functions, with formula and options.
        pairs: Image–text pairs under both models, for methods that can use them.
        new_space: The space of ``new``, attached to the result; that of the store, if ``new`` is one.
        old_space: The space of ``old``, likewise.
        **options: The method's own options. Those of its schedule, loss or stage 1 may be given by their own
            names: ``steps=300`` is ``schedule=FitSchedule(steps=300)`` with the method's other defaults.

    Returns:
        A projection whose forward takes (n, new_dim) vectors and returns (n, old_dim) unit rows.

    Raises:
        ConfigError: If the method or an option is not known or cannot be used.
        DataError: If the vectors are empty, not paired, or hold NaN.
        SpaceMismatchError: If a space is not that of the store, or its dimension not that of the vectors.
    """
    options = grouped_options(method, options)
    if pairs is not None:
        if "pairs" not in _parameters(method):
            raise ConfigError(f"projection method {method!r} cannot use pairs; leave them out")
        options["pairs"] = pairs
    spaces = space_of(new, new_space, "new"), space_of(old, old_space, "old")
    projection = METHODS[method](new, old, **options)
    projection.set_spaces(*spaces)
    projection.method = method
    return projection


def grouped_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method as its function takes them: fields of a schedule or a loss within their object.

    Args:
        method: The method.
        options: By name.

    Raises:
        ConfigError: If the method or an option is not known, or a value cannot be used; the message lists
            the options there are.
    """
    if method not in METHODS:
        raise ConfigError(f"projection method {method!r} is not known; there is {', '.join(sorted(METHODS))}")
    own = {name: each for name, each in _parameters(method).items() if name not in _APART}
    groups = {name: each.default for name, each in own.items() if is_dataclass(each.default)}
    holder = {each.name: name for name, group in groups.items() for each in fields(group)}
    taken: dict[str, Any] = {}
    for name, value in options.items():
        if name in own:
            taken[name] = value
        elif name not in holder:
            known = [*(each for each in own if each not in groups), *holder]
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"projection method {method!r} has no option {name!r}; {there}")
    for name, group in groups.items():
        changes = {key: value for key, value in options.items() if holder.get(key) == name and key not in own}
        if changes:
            taken[name] = replace(taken.get(name, group), **changes)
    return taken


def option_names(method: str) -> list[str]:
    """Names of a method's own options, ``"pairs"`` among them where it can use pairs."""
    found = []
    for name, each in _parameters(method).items():
        if is_dataclass(each.default):
            found += [part.name for part in fields(each.default)]
        elif name not in ("new", "old"):
            found.append(name)
    return found


def space_of(source: Source, given: EmbeddingSpace | None, side: str) -> EmbeddingSpace | None:
    """The space of a source: as given, or that of a store; the two must not contradict each other."""
    stored = source.space if isinstance(source, EmbeddingStore) else None
    if given is not None and stored is not None:
        given.require(stored, f"the {side} vectors")
    return given or stored


def _parameters(method: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(METHODS[method]).parameters
