"""A collection that knows its spaces: how it is made, and how they are read back."""

from __future__ import annotations

from typing import Any, Literal

from xbt.errors import ConfigError, StoreError
from xbt.serve.optional import optional
from xbt.serve.qdrant_connection import asking
from xbt.space import EmbeddingSpace

Part = Literal["old", "new"]
PARTS: tuple[Part, ...] = ("old", "new")

FORMAT = 1
_FORMAT_KEY = "xbt_format"
_SPACE_KEYS: dict[Part, str] = {"old": "xbt_old_space", "new": "xbt_new_space"}
DISTANCES = ("dot", "cosine")


def make_collection(
    client: Any, name: str, spaces: dict[Part, EmbeddingSpace], distance: str, vector_options: dict[str, Any]
) -> None:
    """Creates a collection with one named vector a space, and keeps the spaces in its metadata.

    Args:
        client: The client.
        name: The collection, which must not be there.
        spaces: The spaces of its named vectors.
        distance: ``"dot"`` or ``"cosine"``.
        vector_options: Further arguments of Qdrant's ``VectorParams``, such as ``on_disk``.

    Raises:
        ConfigError: If the distance is not known.
        StoreError: If the collection is there already, or Qdrant refuses.
    """
    models = optional("qdrant_client.models", "serve")
    metric = _metric(distance)
    with asking(f"create the collection {name!r}"):
        if client.collection_exists(name):
            raise StoreError(
                f"there is a collection or an alias {name!r} already; open it, or choose another name"
            )
        client.create_collection(
            name,
            vectors_config={
                part: models.VectorParams(size=space.dim, distance=metric, **vector_options)
                for part, space in spaces.items()
            },
            metadata=_metadata(spaces),
        )
        if client.get_collection(name).config.metadata is None:
            client.delete_collection(name)
            raise StoreError(
                f"this Qdrant keeps no metadata of collections, so that {name!r} could not remember which "
                "model made its vectors; use a server of version 1.16 or later"
            )


def add_space(client: Any, name: str, space: EmbeddingSpace) -> None:
    """Gives a collection the named vector ``new``, with the same distance as ``old``.

    Raises:
        StoreError: If Qdrant refuses: only servers from version 1.18 on can add a vector to a collection.
    """
    models = optional("qdrant_client.models", "serve")
    with asking(f"add the vector 'new' to the collection {name!r}"):
        metric = client.get_collection(name).config.params.vectors["old"].distance
        dense = models.DenseVectorConfig(size=space.dim, distance=metric)
        client.create_vector_name(name, "new", models.DenseVectorNameConfig(dense=dense))
        client.update_collection(name, metadata={_SPACE_KEYS["new"]: space.to_dict()})


def read_spaces(client: Any, name: str) -> dict[Part, EmbeddingSpace]:
    """The spaces of a collection's named vectors.

    Raises:
        StoreError: If there is no such collection, or it does not say its spaces.
    """
    with asking(f"open the collection {name!r}"):
        if not client.collection_exists(name):
            there = ", ".join(repr(each.name) for each in client.get_collections().collections)
            raise StoreError(
                f"Qdrant has no collection or alias {name!r}, it has {there or 'none'}; create it first"
            )
        metadata = client.get_collection(name).config.metadata or {}
    if metadata.get(_FORMAT_KEY) != FORMAT:
        raise StoreError(
            f"the collection {name!r} does not say which models made its vectors (its format is "
            f"{metadata.get(_FORMAT_KEY)!r}, not {FORMAT}); create one with QdrantGallery.create and upload "
            "again"
        )
    try:
        return {
            part: EmbeddingSpace.from_dict(metadata[key])
            for part, key in _SPACE_KEYS.items()
            if part == "old" or key in metadata
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"the spaces in the metadata of the collection {name!r} are damaged ({error!r}); create it anew"
        ) from error


def resolve(client: Any, name: str) -> str:
    """The collection behind an alias; another name is returned as it is."""
    with asking(f"look up the alias {name!r}"):
        aliases = {str(each.alias_name): str(each.collection_name) for each in client.get_aliases().aliases}
    return aliases.get(name, name)


def point_alias(client: Any, alias: str, collection: str) -> str | None:
    """Lets an alias name a collection, in one step with taking it from another.

    Returns:
        The collection that it named before, or ``None``.

    Raises:
        StoreError: If Qdrant refuses, as where a collection itself has that name.
    """
    models = optional("qdrant_client.models", "serve")
    before = resolve(client, alias)
    steps = [
        models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias)),
        models.CreateAliasOperation(
            create_alias=models.CreateAlias(alias_name=alias, collection_name=collection)
        ),
    ]
    known = before != alias
    with asking(f"let the alias {alias!r} name the collection {collection!r}"):
        client.update_collection_aliases(change_aliases_operations=steps if known else steps[1:])
    return before if known else None


def _metric(distance: str) -> Any:
    models = optional("qdrant_client.models", "serve")
    if distance not in DISTANCES:
        raise ConfigError(f"the distance of a collection is 'dot' or 'cosine', got {distance!r}")
    return models.Distance.DOT if distance == "dot" else models.Distance.COSINE


def _metadata(spaces: dict[Part, EmbeddingSpace]) -> dict[str, Any]:
    kept: dict[str, Any] = {_SPACE_KEYS[part]: space.to_dict() for part, space in spaces.items()}
    return {_FORMAT_KEY: FORMAT, **kept}
