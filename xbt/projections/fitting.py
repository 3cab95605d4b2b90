"""Fitting a projection by the name of its method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

from xbt.errors import ConfigError
from xbt.projections.base import LinearProjection, Projection
from xbt.projections.identity import fit_identity, identity_from
from xbt.projections.lambda_orthogonal import fit_lambda_orthogonal
from xbt.projections.low_rank import fit_low_rank, low_rank_from
from xbt.projections.mean_shift import fit_mean_shift, mean_shift_from
from xbt.projections.mlp import fit_mlp
from xbt.projections.pairs import PairVectors
from xbt.projections.procrustes import fit_procrustes, procrustes_from
from xbt.projections.ridge import fit_ridge, ridge_from
from xbt.projections.sources import Source
from xbt.projections.whitened_procrustes import fit_whitened_procrustes, whitened_procrustes_from
from xbt.projections.xbt_projection import fit_xbt
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore

if TYPE_CHECKING:
    from xbt.projections.decision import Decision

AUTO = "auto"

METHODS: dict[str, Callable[..., Projection]] = {
    "identity": fit_identity,
    "mean_shift": fit_mean_shift,
    "procrustes": fit_procrustes,
    "ridge": fit_ridge,
    "low_rank": fit_low_rank,
    "whitened_procrustes": fit_whitened_procrustes,
    "lambda_orthogonal": fit_lambda_orthogonal,
    "mlp": fit_mlp,
    "xbt": fit_xbt,
}
"""Every method: a function from new and old vectors, ``pairs`` where it can use them, and its options."""

CLOSED_FORMS: dict[str, Callable[..., LinearProjection]] = {
    "identity": identity_from,
    "mean_shift": mean_shift_from,
    "procrustes": procrustes_from,
    "ridge": ridge_from,
    "low_rank": low_rank_from,
    "whitened_procrustes": whitened_procrustes_from,
}
"""Those that need the vectors' statistics alone: functions from :class:`PairStatistics` and the options."""


@overload
def fit_projection(
    new: Source,
    old: Source,
    method: Literal["auto"],
    *,
    pairs: PairVectors | None = None,
    new_space: EmbeddingSpace | None = None,
    old_space: EmbeddingSpace | None = None,
    **options: Any,
) -> Decision: ...
@overload
def fit_projection(
    new: Source,
    old: Source,
    method: str = "procrustes",
    *,
    pairs: PairVectors | None = None,
    new_space: EmbeddingSpace | None = None,
    old_space: EmbeddingSpace | None = None,
    **options: Any,
) -> Projection: ...
def fit_projection(
    new: Source,
    old: Source,
    method: str = "procrustes",
    *,
    pairs: PairVectors | None = None,
    new_space: EmbeddingSpace | None = None,
    old_space: EmbeddingSpace | None = None,
    **options: Any,
) -> Projection | Decision:
    """Fits a projection to vectors of the same items under both models.

    Args:
        new: Vectors of the new model: (n, new_dim) rows, a store, or an iterable of (k, new_dim) chunks.
        old: Vectors of the old model, row by row for the same items; its chunks need not have the same sizes.
        method: The name of a method; each has a file in ``xbt/projections/`` with its formula and options.
            ``"auto"`` tries several and decides (:func:`~xbt.projections.auto.choose_projection`).
        pairs: Image–text pairs under both models, for methods that can use them.
        new_space: The space ``new`` lives in, attached to the result; that of the store, if ``new`` is one.
        old_space: The space ``old`` lives in, likewise.
        **options: The method's own options.

    Returns:
        A projection whose forward takes (n, new_dim) vectors and returns (n, old_dim) unit rows; of
        ``"auto"`` the :class:`~xbt.projections.decision.Decision`, which holds projection and ensemble.

    Raises:
        ConfigError: If the method or an option is not known or cannot be used.
        DataError: If the vectors are empty, not paired, or hold NaN.
        SpaceMismatchError: If a space is not that of the store, or its dimension not that of the vectors.
    """
    if method == AUTO:
        from xbt.projections.auto import choose_projection  # which fits its candidates by this module

        check_keywords("projection method 'auto'", options, choose_projection)
        return choose_projection(new, old, pairs=pairs, new_space=new_space, old_space=old_space, **options)
    check_options(method, options)
    if pairs is not None:
        if "pairs" not in options_of(method):
            raise ConfigError(f"projection method {method!r} cannot use pairs; leave them out")
        options["pairs"] = pairs
    spaces = _space_of(new, new_space, "new"), _space_of(old, old_space, "old")
    projection = METHODS[method](new, old, **options)
    projection.set_spaces(*spaces)
    projection.method = method
    return projection


def check_options(method: str, options: Iterable[str]) -> None:
    """Refuses options that a method does not have.

    Raises:
        ConfigError: If the method or an option is not known; the message lists those there are.
    """
    if method not in METHODS:
        known = ", ".join(sorted([*METHODS, AUTO]))
        raise ConfigError(f"projection method {method!r} is not known; there is {known}")
    check_keywords(f"projection method {method!r}", options, METHODS[method])


def check_keywords(what: str, options: Iterable[str], fit: Callable[..., object]) -> None:
    """Refuses keywords that a function does not take, or that have a place of their own.

    Raises:
        ConfigError: If there is one; the message lists those there are.
    """
    apart = ("new", "old", "pairs", "new_space", "old_space")
    known = [name for name in inspect.signature(fit).parameters if name not in apart]
    for name in options:
        if name not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{what} has no option {name!r}; {there}")


def options_of(method: str) -> list[str]:
    """Names of a method's own options, ``"pairs"`` among them where it can use pairs."""
    return [name for name in inspect.signature(METHODS[method]).parameters if name not in ("new", "old")]


def _space_of(source: Source, given: EmbeddingSpace | None, side: str) -> EmbeddingSpace | None:
    stored = source.space if isinstance(source, EmbeddingStore) else None
    if given is not None and stored is not None:
        given.require(stored, f"the {side} vectors")
    return given or stored
