"""The files of a projection: its config, its weights, and what its card says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from xbt.encoders.repositories import hub_repository
from xbt.errors import XbtError
from xbt.heads.saving import known_head
from xbt.hub import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CardData,
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
from xbt.projections.papers import told_method
from xbt.version import __version__

if TYPE_CHECKING:
    from xbt.projections.base import Projection

ProjectionT = TypeVar("ProjectionT", bound="Projection")

_KEYS = ("xbt_version", "kind", "new_dim", "old_dim", "options", "new_space", "old_space")
_LATER = ("method", "sha256")
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


def save(projection: Projection, directory: Path, naming: Naming) -> None:
    """Writes config and weights."""
    save_weights(projection, directory / WEIGHTS_NAME)
    spaces = {"new_space": projection.new_space, "old_space": projection.old_space}
    config = {
        "xbt_version": __version__,
        "kind": projection.kind,
        **({"method": projection.method} if projection.method else {}),
        "new_dim": projection.new_dim,
        "old_dim": projection.old_dim,
        "options": projection.options(),
        **{
            key: each.to_dict() | {"model": naming(each.model)} if each else None
            for key, each in spaces.items()
        },
        "sha256": digests(directory, [WEIGHTS_NAME]),
    }
    write_config(directory / CONFIG_NAME, config)


def load(directory: Path, asked: type[ProjectionT], kinds: Mapping[str, type[Projection]]) -> ProjectionT:
    """Builds the projection that :func:`save` wrote and loads its weights, strictly.

    Args:
        directory: Where it was saved.
        asked: The class it must be of.
        kinds: Every class, by its kind.

    Raises:
        SavedPartError: If a file is missing, damaged, changed, of another kind, or does not fit the other.
    """
    file = directory / CONFIG_NAME
    config = SavedConfig(file)
    kind = config.values.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise SavedPartError(
            f"{file} is of kind {kind!r}, not a projection; the known kinds are {', '.join(sorted(kinds))}"
        )
    chosen = kinds[kind]
    if not issubclass(chosen, asked):
        raise SavedPartError(f"{directory} holds a {chosen.__name__}, not a {asked.__name__}")
    values = config.known(_KEYS, _LATER)
    known = [name for name in inspect.signature(chosen.__init__).parameters if name not in _APART]
    options = config.only(values["options"], known, "options")
    if "head_options" in options:
        _, options["head_options"] = known_head(
            config, options.get("head", ""), options["head_options"], "options.head_options"
        )
    spaces = {key: config.space(key) for key in ("new_space", "old_space")}
    new_dim, old_dim = values["new_dim"], values["old_dim"]
    try:
        projection = build_and_load(
            directory / WEIGHTS_NAME, lambda: chosen(new_dim, old_dim, **options, **spaces), file
        )
    except SavedPartError:
        raise
    except XbtError as error:
        raise SavedPartError(f"{file} cannot be used: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SavedPartError(f"{file} lacks or misnames a key: {error}") from error
    check_digests(directory, values.get("sha256"))
    method = values.get("method")
    projection.method = method if isinstance(method, str) else None
    return projection


def facts(projection: Projection, card: CardData) -> CardFacts:
    """What the card of a projection says."""
    spaces = {"new": projection.new_space, "old": projection.old_space}
    names = {
        side: quoted(public_name(space.model)) if space else f"the {side} model"
        for side, space in spaces.items()
    }
    base = card.base or (projection.new_space.model if projection.new_space else "")
    return CardFacts(
        title="A projection into the space of an older model",
        summary=(
            f"A {type(projection).__name__} made with xbt: it maps vectors of {names['new']} "
            f"({projection.new_dim}-d) into the space of {names['old']} ({projection.old_dim}-d), so that a "
            "gallery which the old model embedded can be searched with the new one. Nothing in that gallery "
            "needs to be embedded again. One map serves texts and images."
        ),
        snippet=_SNIPPET.format(new_dim=projection.new_dim, old_dim=projection.old_dim),
        method=told_method(projection.method, projection.kind),
        limits=_LIMITS,
        spaces=spaces,
        base=hub_repository(base),
        tags=("clip", "projection"),
        pipeline_tag="feature-extraction",
    )
